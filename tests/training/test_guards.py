"""What a guard counts goes on over a restart; a stage that learned nothing is named."""

import math

import pytest

from s2t2_dist.comm import Comm
from s2t2_dist.config import Translate
from s2t2_dist.errors import S2T2Error
from s2t2_dist.training.nonfinite import SkippedSteps, never_better

STAGE = Translate(kind="translate", max_steps=9)


def lines(pattern: str, index: int = 0) -> list[dict]:
    """A line per letter: E an evaluation at step 0, g a good step, b a bad one."""
    found, step = [], 0
    for letter in pattern:
        step = 0 if letter == "E" else step + 1
        line = {"stage": "s", "stage_index": index, "step": step}
        found.append({**line, "grad_norm": 1.0, "loss": 1.0} if letter == "g" else line)
    return found


@pytest.mark.parametrize(
    ("pattern", "total", "in_a_row"),
    [
        ("", 0, 0),
        ("E", 0, 0),
        ("Eggg", 0, 0),
        ("Egbb", 2, 2),
        ("Ebbb", 3, 3),
        ("Ebgbb", 3, 2),
        ("EbbgEb", 3, 1),
        ("EgbbEb", 3, 3),  # the last steps of one stage, the first of the next
    ],
)
def test_a_restart_counts_on(pattern, total, in_a_row):
    skipped = SkippedSteps(5, 0)
    skipped.go_on(lines(pattern), Comm())
    assert (skipped.total, skipped.in_a_row) == (total, in_a_row)


@pytest.mark.parametrize("split", range(9))
def test_a_restart_anywhere_counts_as_none(split):
    pattern = "ggbgbbbbg"
    whole, parts = SkippedSteps(4, 1), SkippedSteps(4, 1)
    parts.go_on(lines("E" + pattern[:split]), Comm())
    for step, letter in enumerate(pattern):
        for counter in (whole, parts) if step >= split else (whole,):
            counter.count(STAGE, step + 1, 1.0 if letter == "g" else math.nan)
    assert (whole.total, whole.in_a_row) == (parts.total, parts.in_a_row)


def test_the_limit_may_be_raised(tmp_path):
    skipped = SkippedSteps(3, 0)
    skipped.go_on(lines("Egbbb"), Comm())
    assert skipped.is_over
    with pytest.raises(S2T2Error, match=r"3 steps in a row .* raise max_bad_steps to go on"):
        skipped.require_fewer(tmp_path, STAGE, 4)
    raised = SkippedSteps(4, 0)
    raised.go_on(lines("Egbbb"), Comm())
    raised.require_fewer(tmp_path, STAGE, 4)


def evaluations(*values: float | None, index: int = 0) -> list[dict]:
    found = []
    for step, value in enumerate(values):
        line = {"stage_index": index, "step": step, "eval_loss": value, "eval_bits_per_byte": value}
        found.append({k: v for k, v in line.items() if v is not None})
    return found


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((5.0,), None),  # no step yet
        ((), None),
        ((5.0, 6.0, 4.9), None),
        ((5.0, 4.0, 6.0), None),  # it did once
        ((None, 4.0), None),  # infinite at first
        ((5.0, 5.0), "of its start (best after it: 5.0000 at step 1)"),
        (
            (5.0, 7.0, 6.0),
            "below the 5.0000 bits per byte of its start (best after it: 6.0",
        ),
    ],
)
def test_a_stage_that_never_got_better_is_named(values, named):
    told = never_better(evaluations(*values), STAGE, 0)
    assert told is None if named is None else named in told
    assert never_better(evaluations(*values), STAGE, 1) is None
