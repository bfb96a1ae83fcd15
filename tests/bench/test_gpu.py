"""The benchmark of a GPU: parts that fail leave their line, and the page shows what is there."""

import json

import pytest
import torch
import typer

from tests.bench import gpu, gpu_page, gpu_parts


def line(**more):
    figures = {"V": 50_304, "U": 512, "bytes": 4 * 50_304 * 512, "first_seconds": 1.0}
    figures |= {"forward_seconds": 0.5e-3, "both_seconds": 1e-3, "peak_bytes": 5 * 50_304 * 512 * 4}
    return figures | {"row_error": 0.1, "column_error": 1e-6} | more


def report(**parts):
    found = {name: {"problem": None, "lines": lines} for name, lines in parts.items()}
    return {"command": "x", "commit": "abc", "parts": found}


def test_ratios_are_those_of_the_figures():
    ours = line(evaluations=14, warm_seconds=0.2e-3)
    page = gpu_page.markdown(
        report(
            machine=[{"device": "H", "copy": 3e12, "read": 2e12}], triton=[ours], literal=[line()]
        )
    )
    # 14 evaluations, of which one in each of 3 searches found nothing to do; C, P, 4 x 2 + 1.
    moved = (11 + 2 + 9) * ours["bytes"]
    assert f"| 11 | {1e-3 * 3e12 / moved:.3g} |" in page
    assert "| ours, Triton | 1 | 0.5 | 0.2 | 1 | 5 | 11 |" in page
    assert "| Algorithms 1 + 2, torch autograd | 1 | 0.5 | - | 1 | 5 | - | - | 1.0e-01 |" in page
    assert "device H." in page and "| 3,000 | 2,000 |" in page


def test_every_table_has_its_lines():
    translator = {"V": 9, "U": 8, "D": 7, "translate": 0.1, "backward": 0.2, "optimizer": 1}
    step = {"step_seconds": 0.5, "tokens_per_second": 1e4, "peak_gib": 20.0, "mfu": 0.4}
    page = gpu_page.markdown(
        report(
            translate=[step | {"translator_seconds": 0.01, "planned_gib": 19.0}],
            finetune=[step],
            plain=[step],
            checkpoint=[{"bytes": 14e9, "save": 9.0, "verify": 5.0, "load": 7.0}],
            loader=[{"tokens_per_second": 1e6}],
            translator=[translator],
            tiles=[{"V": 9, "U": 8, "tile": 512, "per_thread": 8, "both": 1e-3}],
        )
    )
    assert "|  | translate | finetune | plain |" in page
    assert "| ms of the translator | 10 | - | - |" in page and "| MFU | 0.4 | 0.4 | 0.4 |" in page
    assert "| 14 | 9 | 5 | 7 |" in page and "| 1,000,000 |" in page
    assert "| 9 | 8 | 7 | 100 | 200 | 1,000 | - |" in page and "| 9 | 8 | 512 | 8 | 1 |" in page


def test_a_size_that_was_not_run_says_so():
    problem = {"V": 9, "U": 8, "problem": "out of memory"}
    assert "| ours, eager torch | out of memory |" in gpu_page.markdown(report(eager=[problem]))


def test_every_part_is_there():
    assert gpu.LIMITS.keys() == gpu_parts.PARTS.keys()
    assert set(gpu_page.LABELS) <= gpu.LIMITS.keys()
    # What ran longest goes last; what is left out for lack of time matters least.
    assert list(gpu.LIMITS)[:2] == ["machine", "triton"] and list(gpu.LIMITS)[-1] == "tiles"


@pytest.mark.slow
def test_a_part_that_fails_leaves_its_line(tmp_path):
    """`loader` has no data to read."""
    with pytest.raises(typer.Exit):
        gpu.main(tmp_path, "cpu", True, "machine,loader", None, None, "abc")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["commit"] == "abc" and found["command"].endswith("--parts machine,loader")
    machine, loader = found["parts"].values()
    assert machine["problem"] is None and machine["lines"][0]["torch"] == torch.__version__
    assert "manifest" in loader["problem"] or "data" in loader["problem"]
    assert "- loader: " in (tmp_path / "gpu.md").read_text()


def test_refuses_parts_and_devices(tmp_path):
    for changes in ({"parts": "machine,other"}, {"device": "tpu"}):
        with pytest.raises(typer.BadParameter, match="expected some of machine,triton"):
            gpu.main(tmp_path, **{"device": "cpu", "small": True, "parts": "machine"} | changes)
