"""Mean and spread against NumPy, and a choice of the rate that never sees the reported half."""

import numpy as np
import pytest

from s2t2_dist.study.statistics import Cell, Spread, choose


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_spread_is_numpys(seed, n):
    """1e-12: both sum at most ten numbers near 4 in float64."""
    values = np.random.default_rng(seed).normal(4.2, 0.01, n)
    spread = Spread.of(values.tolist())
    assert spread.n == n
    assert spread.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert (spread.low, spread.high) == (values.min(), values.max())
    if n == 1:
        assert spread.deviation is None
    else:
        assert spread.deviation == pytest.approx(np.std(values, ddof=1), rel=1e-9)


def cell(rate: float, select: list[float], report: list[float], **more) -> Cell:
    seeds = (1, 2, 3)
    kept = [dict(zip(seeds, values, strict=False)) for values in (select, report)]
    return Cell({"rate": rate}, seeds, kept[0], kept[1], kept[1], **more)


def test_the_lowest_mean_of_the_select_half_is_chosen():
    cells = [
        cell(1.0, [4.3, 4.3, 4.3], [4.1, 4.1, 4.1]),  # the best of what is reported
        cell(2.0, [4.0, 4.4, 4.2], [4.9, 4.9, 4.9]),  # the lowest mean: 4.2
        cell(3.0, [3.9, 4.5, 4.5], [4.2, 4.2, 4.2]),  # the lowest single value
    ]
    assert choose(cells) is cells[1]


def test_no_number_of_the_reported_half_changes_the_choice():
    rng = np.random.default_rng(7)
    select = rng.normal(4.2, 0.01, (4, 3)).tolist()
    chosen = set()
    for _ in range(50):
        report = rng.normal(4.2, 1.0, (4, 3)).tolist()
        cells = [cell(float(i), *halves) for i, halves in enumerate(zip(select, report))]  # noqa: B905
        chosen.add(choose(cells).rate["rate"])
    assert chosen == {float(np.argmin(np.mean(select, 1)))}


def test_equal_means_keep_the_order_of_the_file():
    cells = [cell(2.0, [4.0] * 3, [4.0] * 3), cell(1.0, [4.0] * 3, [3.0] * 3)]
    assert choose(cells) is cells[0]


def test_a_rate_with_a_failed_seed_does_not_count():
    survivors = cell(1.0, [3.0, 3.0], [3.0, 3.0], failed=(3,))
    whole = cell(2.0, [4.0] * 3, [4.0] * 3)
    assert choose([survivors, whole]) is whole
    assert choose([survivors]) is None and choose([]) is None
