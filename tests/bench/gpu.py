"""Everything that is measured on one GPU: `python -m tests.bench.gpu --out DIR`, under 8 minutes.

Each part (`gpu_parts.py`) runs in a process of its own, with a time limit: a part that fails or
runs out of time or memory leaves a line that says so, and the next one starts. `gpu.json` and
`gpu.md` in DIR are written again after each.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from tests.bench.gpu_page import markdown

ROOT = Path(__file__).parents[2]
# Seconds at most of each, in the order of what matters most.
LIMITS = {
    "machine": 60,
    "triton": 110,
    "literal": 60,
    "inputs": 120,
    "translate": 120,
    "finetune": 120,
    "plain": 90,
    "translator": 60,
    "checkpoint": 120,
    "loader": 40,
    "eager": 60,
    "entmax": 60,
    "compile": 150,
    "tiles": 90,
}
BUDGET, LEAST = 470.0, 10.0  # seconds in all; that a part needs
REHEARSAL = 10  # times the limits, on a machine that others use too


def main(
    out: Annotated[Path, typer.Option(help="Folder of gpu.json and gpu.md.")],
    device: Annotated[str, typer.Option(help="cuda, or cpu for a rehearsal.")] = "cuda",
    small: Annotated[
        bool, typer.Option("--small", help="Small sizes: to see that all parts work.")
    ] = False,
    parts: Annotated[str, typer.Option(help="Some of them.")] = ",".join(LIMITS),
    budget: Annotated[
        float | None, typer.Option(help="Seconds in all; default: 470, and none with --small.")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder of models and runs; default: in --out.")
    ] = None,
    commit: Annotated[str, typer.Option(help="Of the checkout, where git cannot tell.")] = "",
):
    """Measure the transport, the stages and their ceilings on a GPU; write a page.

    Nothing else should run on it.

    Example: `python -m tests.bench.gpu --out /tmp/gpu --device cpu --small`
    """
    chosen = parts.split(",")
    if not set(chosen) <= LIMITS.keys() or device not in ("cuda", "cpu"):
        raise typer.BadParameter(
            f"found parts {parts}, device {device}; expected some of {','.join(LIMITS)}, and cuda "
            "or cpu"
        )
    out = out.resolve()
    work = (work or out / "work").resolve()
    work.mkdir(parents=True, exist_ok=True)
    lines = out / "lines.jsonl"
    lines.unlink(missing_ok=True)
    report = {
        "commit": commit or checkout(),
        "command": command(device, small, chosen),
        "parts": {},
    }
    begun = time.monotonic()
    for name in chosen:
        left = (budget or (math.inf if small else BUDGET)) - (time.monotonic() - begun)
        limit = min(LIMITS[name] * (REHEARSAL if device == "cpu" else 1), left)
        end = (
            "no time was left" if limit < LEAST else run_part(name, device, small, limit, out, work)
        )
        report["parts"][name] = {"problem": end, "lines": read(lines, name)}
        report["seconds"] = round(time.monotonic() - begun, 1)
        (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "gpu.md").write_text(markdown(report))
        print(f"{name}: {end or 'done'}, {report['seconds']:.0f} s", flush=True)
    print(f"wrote {out / 'gpu.md'}")
    if any(part["problem"] for part in report["parts"].values()):
        raise typer.Exit(1)


def run_part(
    name: str, device: str, small: bool, limit: float, out: Path, work: Path
) -> str | None:
    """Run a part; what went wrong, or None. Its lines so far are kept in any case."""
    arguments = [name, device, "small" if small else "full", out / "lines.jsonl", work]
    changes = {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    if device == "cpu":
        changes |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.gpu_parts", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | changes,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, problem = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return f"stopped after {limit:.0f} s"
    if process.returncode == 0:
        return None
    (out / f"{name}.err").write_text(problem)
    return (problem.strip().splitlines() or [f"exit code {process.returncode}"])[-1][:300]


def read(lines: Path, name: str) -> list[dict]:
    """What a part has written so far."""
    if not lines.exists():
        return []
    found = [json.loads(line) for line in lines.read_text().splitlines()]
    return [line["values"] for line in found if line["part"] == name]


def checkout() -> str:
    """Of the checkout, with a mark where it was changed; unknown without git."""
    try:
        told = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(told, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command(device: str, small: bool, parts: list[str]) -> str:
    words = ["python -m tests.bench.gpu", f"--device {device}"]
    words += ["--small"] if small else []
    return " ".join(words + ([f"--parts {','.join(parts)}"] if parts != list(LIMITS) else []))


if __name__ == "__main__":
    typer.run(main)
