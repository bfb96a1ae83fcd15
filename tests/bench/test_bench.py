"""The benchmarks measure the right thing: baselines, peaks, formulas, complete tables."""

import dataclasses
import json
from collections.abc import Sequence

import pytest
import torch

from s2t2_dist.ot import sparse_sinkhorn
from s2t2_dist.ot.sizes import rank_memory, rank_traffic, sent
from tests.bench import baselines, measure, scaling, transport
from tests.bench.case import METHODS, Case, problem, run
from tests.jobs.distributed import run_ranks
from tests.ot import oracles
from tests.ot.problems import make_cost, make_marginals

SPEED = {"copy": 2e10, "read": 1e10, "read two": 3e10}
NOT_COMPILED = [method for method in METHODS if method != "compile"]
TINY = Case("literal", V=40, U=24, spread=0.3)
pot_warns = pytest.mark.filterwarnings("ignore:scipy.optimize:DeprecationWarning")


@pytest.fixture(autouse=True)
def restored_threads():
    """The benchmarks set the number of threads, with which rounding changes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("baseline", [baselines.literal, baselines.literal_entmax])
@pytest.mark.parametrize("marginals", ["row mass", "skewed"])
def test_literal_baselines_equal_the_float64_transcription(baseline, marginals):
    mu, nu, unit = make_marginals(marginals, 60, 17)
    cost = make_cost("random", 60, 17, unit)
    weights = torch.randn(60, 17, dtype=torch.float64, generator=torch.manual_seed(1))
    expected, margin = oracles.sparse_sinkhorn(cost, mu, nu, 3)
    assert margin > 1e-9 * unit  # no entry so near its threshold that rounding decides
    plan = baseline(cost, mu, nu, 3)
    # Sums of 60 float64 numbers of size 1, divided by a scale of at least 1e-3.
    torch.testing.assert_close(plan, expected, rtol=0, atol=1e-12)
    found, wanted = (torch.autograd.grad(p, cost, weights)[0] for p in (plan, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_ours_and_the_literal_one_agree_on_the_benchmark_s_own_problem():
    cost, mu, nu, grad = problem(dataclasses.replace(TINY, V=300, U=64))
    # 19,200 draws: their mean and spread are within 1% (four standard errors).
    assert (cost.mean().item(), cost.std().item()) == pytest.approx((1, 0.3), abs=0.01)
    plans = [baselines.literal(cost, mu, nu, 3), sparse_sinkhorn(cost, mu, nu, 3).plan]
    # float32 numbers of size 1 to 10, a few hundred to a sum.
    torch.testing.assert_close(*plans, rtol=0, atol=1e-5)
    grads = [torch.autograd.grad(plan, cost, grad)[0] for plan in plans]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-4)


@pot_warns
def test_pot_is_the_limit_of_the_literal_one():
    cost, mu, nu, _ = problem(TINY)
    limit = baselines.literal(cost.double(), mu, nu, 2000).detach()
    # POT's last plan, whose row sums are only as good as L-BFGS made them, in float32.
    torch.testing.assert_close(baselines.pot(cost, mu, nu).double(), limit, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_peak_sees_memory_that_was_freed_and_memory_that_stays():
    size = 64 * measure.MIB

    def freed():
        torch.ones(size // 4)

    for call, expected in [(freed, size), (lambda: torch.ones(size // 4), size), (int, 0)]:
        # Pages are counted in batches, and the interpreter allocates a little.
        assert measure.peak_above(call) == pytest.approx(expected, abs=2 * measure.MIB)


@pytest.mark.slow
@pot_warns
def test_the_table_has_every_cell():
    cases = [dataclasses.replace(TINY, method=method) for method in NOT_COMPILED]
    results = [{**dataclasses.asdict(case), **run(case)} for case in cases]
    for result in results:
        assert result["forward_seconds"] > 0
        assert ("both_seconds" in result) == (result["method"] != "pot")
    # As the eager one, without the seconds that the compiler takes.
    assert results[1]["method"] == "eager"
    assert_complete([results[0], {**results[1], "method": "compile"}, *results[1:]])


@pytest.mark.soak
def test_the_command_writes_every_cell(tmp_path):
    """Every method in a process of its own, but for the one whose compiler takes a minute."""
    transport.main("40x24", ",".join(NOT_COMPILED), "0.3", 3, 1, 8.0, tmp_path)
    report = json.loads((tmp_path / "transport.json").read_text())
    assert_complete(report["cases"], NOT_COMPILED)
    assert (tmp_path / "transport.md").read_text() == transport.markdown(report)


def assert_complete(cases: list[dict], methods: Sequence[str] = METHODS) -> None:
    """The page has a line for every method and no empty cell."""
    # The peak of so small a case may be measured as 0, which has no ratio.
    more = {"both_peak_bytes": measure.MIB}
    cases = [case | (more if "both_peak_bytes" in case else {}) for case in cases]
    report = {"machine": measure.machine(1), "command": "x", "cases": cases}
    rows = [line for line in transport.markdown(report).splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == [
        f"| {transport.LABELS[method]}" for method in methods
    ]
    for row, case in zip(rows[1:], cases, strict=True):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == len(transport.HEAD) and all(cells)
        # POT has no gradient; only our passes have a floor.
        missing = {"pot": 5, "literal": 1, "entmax": 1}.get(case["method"], 0)
        assert cells.count("-") == missing


def test_ratios_and_floor_are_those_of_the_figures():
    timed = {"forward_seconds": 1.0, "both_seconds": 4.0, "forward_peak_bytes": 2**20}
    timed |= {"first_seconds": 5.0, "row_error": 0.0, "column_error": 0.0, "support_share": 1.0}
    literal = {**dataclasses.asdict(TINY), **timed, "both_peak_bytes": 8 * 2**20}
    ours = {**literal, "method": "native", "both_seconds": 0.2, "both_peak_bytes": 2**20}
    ours |= {"column_evaluations": 11, "bandwidths": SPEED}
    # (11 + 1) passes forward and 3 + 1 backward over 40 x 24 float32.
    assert transport.floors(ours, "both") == (16 * 3840 / 2e10, 16 * 3840 / 3e10)
    row = transport.table([ours, literal])[2]
    assert "| 20.0x |" in row and "| 0.12 |" in row


@pytest.mark.slow
def test_gives_up_what_does_not_fit_or_takes_too_long():
    small = dataclasses.replace(TINY, V=4096, U=4096, memory_gib=0.2)
    assert transport.run_alone(small) == {"skipped": "given up: needs more than 0.2 GiB"}
    assert transport.run_alone(TINY, deadline=0.1)["skipped"].startswith("given up after")
    known = {**dataclasses.asdict(TINY), "both_seconds": 100.0, "forward_seconds": 90.0}
    twice = dataclasses.replace(TINY, V=80)
    assert transport._measured(twice, [known]) == {"skipped": "not run: about 3 min for one call"}
    given_up = {**dataclasses.asdict(TINY), "skipped": "given up after 10 min"}
    assert "the size before" in transport._measured(twice, [given_up])["skipped"]
    row = transport.table([{**dataclasses.asdict(twice), "skipped": "why"}])[2]
    assert "| why |" in row and row.count("|") == len(transport.HEAD) + 1


def test_memory_formula():
    V, U, D = 100_352, 32_768, 4096
    one, eight, many = (rank_memory(V, U, D, ranks) for ranks in (1, 8, 3 * V))
    assert one["C"] == 4 * V * U and eight["C"] == 4 * 12_544 * U and many["C"] == 4 * U
    assert eight["AdamW moments"] == 2 * eight["C"] == 2 * eight["gradient of C"]
    assert eight["E', L'"] == one["E', L'"] == 8 * U * D
    assert 2 * rank_memory(V, U, D, 8, tied=True)["rows of E and L"] == eight["rows of E and L"]


@pytest.mark.slow
def test_a_sharded_step_sends_what_the_formula_says(tmp_path):
    shape = scaling.Shape(V=70, U=48, D=12, steps=1)
    results = run_ranks(scaling.measure_rank, 2, tmp_path, shape)
    for rank in results:
        assert rank["calls"]["U x K sums"] == 2
        assert rank["payload_bytes"]["U x K sums"] == 4 * 4 * 48 * 12
        assert rank["payload_bytes"] == results[0]["payload_bytes"]
    evaluations = results[0]["calls"]["column searches"]
    computed = rank_traffic(48, 12, column_evaluations=evaluations)
    counted = sum(results[0]["payload_bytes"].values())
    # At most: finished columns send nothing; a few scalars are left out.
    assert 0.6 * sum(computed.values()) < counted < 1.05 * sum(computed.values())
    assert [sent(1000, ranks) for ranks in (1, 2, 4)] == [0, 1000, 1500]
    assert results[0]["sent_bytes"] == pytest.approx(counted, abs=100)  # two ranks: gathered or not
    run = {"ranks": 2, **dataclasses.asdict(shape), "results": results}
    check = scaling._check(run)
    assert check["traffic"] == pytest.approx(counted / sum(computed.values()))
    report = {"machine": measure.machine(1), "runs": [run, run], "checks": [check]}
    tables = [line for line in scaling.markdown(report).splitlines() if line.startswith("| ")]
    # Heads and lines of: one scaling run, one check, 9 + 1 parts of memory, 5 + 1 of traffic.
    assert len(tables) == 2 + 2 + 11 + 7
    assert all(cell.strip() for line in tables[:4] for cell in line.strip("|").split("|"))


@pytest.mark.parametrize(("memory", "code"), [(1.09, None), (1.11, 1), (0.89, 1)])
def test_scaling_fails_where_a_formula_is_a_tenth_off(tmp_path, monkeypatch, memory, code):
    computed = sum(rank_memory(70, 48, 12, 2).values())
    traffic = sum(rank_traffic(48, 12, column_evaluations=9).values())
    rank = {"seconds": 1.0, "calls": {"column searches": 9}, "payload_bytes": {"all": traffic}}
    rank |= {"peak_bytes": memory * computed, "sent_bytes": traffic}
    monkeypatch.setattr(scaling, "run_ranks", lambda *args, **kwargs: [rank, rank])
    settings = {"scaling": "70x48x12", "ranks": "2", "slices": "70x48x12", "steps": 1}
    try:
        scaling.main(**settings, out=tmp_path)
        found = None
    except scaling.typer.Exit as stop:
        found = stop.exit_code
    assert found == code
    assert (tmp_path / "scaling.json").exists() and (tmp_path / "scaling.md").exists()
