"""The tables and `study.json` on planted records: hand computation and NumPy."""

import csv
import json

import numpy as np
import pytest

from s2t2_dist import artifacts
from s2t2_dist.errors import DataError
from s2t2_dist.study.config import load_study
from s2t2_dist.study.results import (
    best,
    cells_of,
    make_lines,
    markdown,
    study_values,
    write_results,
)
from s2t2_dist.study.work import DONE
from tests.study.conftest import RATE

SEEDS = [17, 18, 19]
# variant -> rate -> bits of (select, report) by seed
PLANTED = {
    "s2t2": {
        0.001: ([4.30, 4.31, 4.32], [4.00, 4.00, 4.00]),
        0.003: ([4.20, 4.22, 4.21], [4.25, 4.27, 4.23]),
    },
    "truncated": {
        0.001: ([4.40, 4.40, 4.40], [4.50, 4.52, 4.51]),
        0.003: ([4.45, 4.45, 4.45], [4.10, 4.10, 4.10]),
    },
}


def record_of(run, text: str = "same") -> dict:
    select, report = (half[SEEDS.index(run.seed)] for half in PLANTED[run.variant][run.rate[RATE]])
    cost = {"steps": run.steps, "tokens": 640, "text_bytes": 1000 + run.seed, "flops": 2e9}
    return {
        "bits_per_byte": (select + report) / 2,
        "recipe_sha256": run.recipe_sha256,
        "halves": {"select": {"bits_per_byte": select}, "report": {"bits_per_byte": report}},
        "documents_sha256": text,
        "cost": {**cost, "seconds": 60.0},
    }


@pytest.fixture
def study(write):
    return load_study(write(seeds=SEEDS))


@pytest.fixture
def records(study):
    return {run.name: record_of(run) for run in study.runs}


def test_the_chosen_rate_is_reported_on_the_other_half(study, records):
    s2t2, truncated = make_lines(study, records, {})
    # The best of what is reported is at the other rate, in both.
    assert (s2t2.chosen.rate, truncated.chosen.rate) == ({RATE: 0.003}, {RATE: 0.001})
    found, planted = cells_of(s2t2), PLANTED["s2t2"][0.003]
    deviation = np.std(planted[1], ddof=1)
    assert found[:4] == ["0.003", f"4.2500 ± {deviation:.4f}", "4.2300 to 4.2700", "3"]
    whole = np.mean(planted, 0)
    assert found[4] == f"{whole.mean():.4f} ± {np.std(whole, ddof=1):.4f}"
    assert found[5:] == ["10", "640", "0.001", "2.000e+09", "1.0", "6.0", ""]
    assert best([s2t2, truncated]) is s2t2


def test_a_failed_run_is_in_the_table(study, records):
    failed = {run.name: "no" for run in study.runs if run.variant == "truncated" and run.seed == 18}
    for name in failed:
        del records[name]
    s2t2, truncated = make_lines(study, records, failed)
    assert truncated.chosen is None and truncated.failed == 2
    assert cells_of(truncated)[:3] == ["", "failed", ""] and cells_of(truncated)[-1] == "2"
    text = markdown([s2t2, truncated])
    assert "| truncated |  | failed |" in text
    assert text.count("**S2T2**") == 1
    del records["s2t2_rate-0.003_seed-19"]
    lines = make_lines(study, records, failed)
    assert lines[0].chosen.rate == {RATE: 0.001}, "a rate that lacks a seed was chosen"


def test_nothing_finished_is_said(study):
    lines = make_lines(study, {}, {})
    assert best(lines) is None
    assert [cells_of(line)[1] for line in lines] == ["not finished", "not finished"]


def test_runs_over_different_documents_are_refused(study, records):
    last = study.runs[-1]
    records[last.name] = record_of(last, "other")
    with pytest.raises(DataError, match=f"{study.runs[0].name} and {last.name} were validated on"):
        make_lines(study, records, {})


def test_files(study, records, tmp_path):
    failed = {"truncated_rate-0.003_seed-17": "diverged"}
    del records["truncated_rate-0.003_seed-17"]
    lines = make_lines(study, records, failed)
    study.output_dir.mkdir()
    values = study_values(study, lines, records, failed, "s2t2 study study.yaml")
    write_results(study, lines, values)
    with (study.output_dir / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["variant"], r["rate"], r["chosen"], r["n"], r["failed"]) for r in rows] == [
        ("s2t2", "0.001", "0", "3", "0"),
        ("s2t2", "0.003", "1", "3", "0"),
        ("truncated", "0.001", "1", "3", "0"),
        ("truncated", "0.003", "0", "2", "1"),
    ]
    for row in rows[:3]:
        select, report = PLANTED[row["variant"]][float(row["rate"])]
        for kind, half in (("select", select), ("report", report)):
            assert float(row[f"{kind}_mean"]) == pytest.approx(np.mean(half), rel=1e-12)
            deviation = np.std(half, ddof=1)
            assert float(row[f"{kind}_deviation"]) == pytest.approx(deviation, rel=1e-9, abs=1e-12)
            assert (float(row[f"{kind}_low"]), float(row[f"{kind}_high"])) == (min(half), max(half))
        assert float(row["text_bytes"]) == 1018
    stored = json.loads((study.output_dir / "study.json").read_text())
    assert stored["file"] == {
        "path": str(study.path),
        "sha256": artifacts.sha256_file(study.path),
    }
    assert stored["study"]["seeds"] == SEEDS and stored["command"] == "s2t2 study study.yaml"
    first = stored["runs"][0]
    assert first["command"] == f"s2t2 train {study.runs[0].recipe.output_dir / 'config.yaml'}"
    states = {run["run"]: (run["state"], run["reason"]) for run in stored["runs"]}
    assert states.pop("truncated_rate-0.003_seed-17") == ("failed", "diverged")
    assert set(states.values()) == {(DONE, None)} and len(states) == 11
    for name, sha256 in stored["files"].items():
        assert artifacts.sha256_file(study.output_dir / name) == sha256
    assert stored["lines"][0]["report"]["mean"] == pytest.approx(4.25)


def test_a_label_cannot_break_the_table(write):
    study = load_study(write(variants={"a": {"label": "x | *y*"}}, seeds=[17]))
    assert "| x \\| \\*y\\* |" in markdown(make_lines(study, {}, {}))
