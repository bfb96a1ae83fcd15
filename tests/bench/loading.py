"""Peak memory of each rank while a model is loaded, before and after `s2t2_dist.lm.load`.

`python -m tests.bench.loading --help`. Before: `from_pretrained` under ZeRO-3, where rank 0 reads
everything.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from s2t2_dist.config import ModelConfig, Translate
from s2t2_dist.lm import engine
from s2t2_dist.lm.load import load_lm
from tests.bench import measure
from tests.bench.memory import MALLOC, RESULTS, as_launched, make_model
from tests.jobs.distributed import run_ranks

MODELS = ("large", "large-tied")
RANKS = (1, 2, 4)


def load_rank(comm, folder: Path, miniature: Path, own: bool) -> dict[str, int]:
    """Peak bytes above the baseline while a model is loaded, and those that stay.

    Args:
        own: by `load_lm`; else by transformers' `from_pretrained` under ZeRO-3.
    """
    as_launched(comm)
    lm = ModelConfig(model_name_or_path=str(folder))
    stage = Translate(kind="translate", max_steps=1)
    settings = engine.load_settings(Path("ds_configs/cpu.json"))
    full = engine.engine_settings(settings, lm, stage, comm.size)
    load = load_lm if own else _from_pretrained
    load(miniature, lm, full)
    base = measure.reset_peak()
    held = load(folder, lm, full)
    peak = measure.status_bytes("VmHWM") - base
    after = measure.reset_peak() - base
    del held
    return {"peak": peak, "after": after}


def _from_pretrained(folder: Path, lm: ModelConfig, settings: dict) -> torch.nn.Module:
    keep = HfDeepSpeedConfig(settings)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, lm.dtype))
    del keep
    return loaded


def run_loading(name: str, ranks: int, own: bool, room: Path) -> dict:
    folder, miniature = make_model(name, room / name), make_model("miniature", room / "miniature")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    measured = run_ranks(load_rank, ranks, room / "ranks", folder, miniature, own, fresh=True)
    return {"model": name, "ranks": ranks, "own": own, "bytes": size, "measured": measured}


def main(out: Annotated[Path, typer.Option(help="Folder of loading.md and .json.")] = RESULTS):
    """Measure peak memory per rank while loading 162 million weights on 1, 2 and 4 CPU ranks.

    Exits with 1 where the largest rank's peak does not fall with the number of ranks.

    Example: `python -m tests.bench.loading --out /tmp/bench`
    """
    os.environ.update(MALLOC)
    report = {"machine": measure.machine(1), "runs": []}
    runs = [(name, own, ranks) for name in MODELS for own in (False, True) for ranks in RANKS]
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    with Progress(*columns) as progress, tempfile.TemporaryDirectory() as room:
        for name, own, ranks in runs:
            task = progress.add_task(f"{name} on {ranks} ranks", total=1)
            report["runs"].append(run_loading(name, ranks, own, Path(room)))
            progress.advance(task)
    out.mkdir(parents=True, exist_ok=True)
    (out / "loading.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "loading.md").write_text(markdown(report))
    print(f"wrote {out / 'loading.md'}")
    for name in MODELS:
        peaks = [largest(run) for run in report["runs"] if run["own"] and run["model"] == name]
        if peaks != sorted(peaks, reverse=True):
            print(f"{name}: the peak does not fall with the ranks: {peaks}")
            raise typer.Exit(1)


def largest(run: dict, key: str = "peak") -> int:
    """Bytes of the rank that holds most."""
    return max(rank[key] for rank in run["measured"])


def markdown(report: dict) -> str:
    """The report as a page."""
    machine = report["machine"]
    lines = [
        "# Peak memory per rank while a model is loaded",
        "",
        "`python -m tests.bench.loading`",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, CPU ranks over gloo, torch "
        f"{machine['torch']}. A model of random bfloat16 weights in files of 60 MB, untied and "
        "tied, under ZeRO-3. MiB, counted as in [memory.md](memory.md): VmHWM, mapped files "
        "included, above the same work on a miniature model.",
        "",
        "Before: `from_pretrained` under ZeRO-3; rank 0 maps every file and keeps it until all is "
        "sent. After: `s2t2_dist.lm.load`; each rank reads its own part of each weight. What is "
        "above the partition is one whole weight, the embedding in float32, which DeepSpeed makes "
        "before it cuts it; a tied model is made with a head of its own, let go when it is tied.",
        "",
        "| model | files MiB | ranks | before: rank 0 | before: others | after: largest rank "
        "| stays per rank |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *_lines(report["runs"]),
    ]
    return "\n".join(lines) + "\n"


def _lines(runs: list[dict]) -> list[str]:
    before = {(run["model"], run["ranks"]): run for run in runs if not run["own"]}
    lines = []
    for run in (run for run in runs if run["own"]):
        first, *others = (r["peak"] for r in before[run["model"], run["ranks"]]["measured"])
        cells = [_mib(first), _mib(max(others)) if others else "-"]
        cells += [_mib(largest(run)), _mib(largest(run, "after"))]
        name = f"{run['model']} | {_mib(run['bytes'])} | {run['ranks']}"
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _mib(size: int) -> str:
    return f"{size / measure.MIB:,.0f}"


if __name__ == "__main__":
    typer.run(main)
