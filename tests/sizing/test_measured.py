"""The planner against measured peaks, and the pages that its benchmarks write."""

import dataclasses

import pytest

from tests.bench import loading, measure, memory

PLAN = {"loading": 10 << 20, "training": 80 << 20, "evaluation": 40 << 20}


@pytest.mark.slow
def test_a_translate_stage_of_the_demo_model_peaks_where_the_plan_says(tmp_path, monkeypatch):
    for key, value in memory.MALLOC.items():
        monkeypatch.setenv(key, value)
    case = memory.Case("tiny", "translate", 2, "float32")
    found = memory.run_case(case, tmp_path)
    assert memory.peak_ratio(found) == pytest.approx(1, abs=memory.TOLERANCE), found["ratios"]
    assert found["checkpoint_ratio"] == pytest.approx(1, abs=0.01)
    assert len(found["measured"]) == 2


def test_the_page_shows_ratios_of_the_largest_rank():
    measured = [{**PLAN, "training": size << 20, "checkpoint": 5} for size in (60, 88)]
    case = {
        **dataclasses.asdict(memory.Case("tiny", "finetune", 2)),
        "plan": PLAN,
        "measured": measured,
        "ratios": memory.ratios(measured, PLAN),
        "checkpoint_ratio": 1.0,
    }
    assert memory.peak_ratio(case) == pytest.approx(1.1)
    text = memory.markdown({"machine": measure.machine(1), "cases": [case]})
    assert "| 10 (1.00) | 88 (1.10) | 40 (1.00) | 1.10 | 1.00 |" in text


@pytest.mark.parametrize(("size", "code"), [(91, None), (93, 1), (67, 1)])
def test_the_command_fails_where_the_plan_is_far_away(tmp_path, monkeypatch, size, code):
    measured = [{**PLAN, "training": size << 20, "checkpoint": 5}]

    def fake(case, room):
        found = {"ratios": memory.ratios(measured, PLAN), "checkpoint_ratio": 1.0}
        return {**dataclasses.asdict(case), "plan": PLAN, "measured": measured, **found}

    monkeypatch.setattr(memory, "run_case", fake)
    for key in memory.MALLOC:
        monkeypatch.setenv(key, "0")
    try:
        memory.main("tiny", tmp_path)
        found = None
    except memory.typer.Exit as stop:
        found = stop.exit_code
    assert found == code
    assert (tmp_path / "memory.md").exists()


def test_the_page_of_loading_has_before_and_after():
    runs = [
        {
            "model": "large",
            "ranks": ranks,
            "own": own,
            "bytes": 310 << 20,
            "measured": [{"peak": (400 - rank) << 20, "after": 300 << 20} for rank in range(ranks)],
        }
        for own in (False, True)
        for ranks in (1, 2)
    ]
    text = loading.markdown({"machine": measure.machine(1), "runs": runs})
    assert "| large | 310 | 1 | 400 | - | 400 | 300 |" in text
    assert "| large | 310 | 2 | 400 | 399 | 400 | 300 |" in text
