"""Time and memory of the sparse transport beside the paper's algorithm and two libraries.

`python -m tests.bench.transport --help`. Each method runs at each size in a process of its own
(`case.py`). `transport.md` and `transport.json` are written after every case, so that an
interrupted run leaves what it measured.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tests.bench import measure
from tests.bench.case import METHODS, Case

ROOT = Path(__file__).parent.parent.parent
RESULTS = Path("tests/bench/results")
SIZES = "256x512,4096x512,50304x512,50304x4096"
TOO_SLOW = 60.0  # seconds of one call, foreseen from the size before
DEADLINE = 600.0  # seconds of a case
OUT_OF_MEMORY = ("can't allocate memory", "MemoryError", "bad_alloc")  # torch, NumPy, C++
LABELS = {
    "native": "ours, C++",
    "compile": "ours, `torch.compile`",
    "eager": "ours, eager torch",
    "literal": "Algorithms 1 + 2, torch autograd",
    "entmax": "Algorithm 1, `entmax.sparsemax`",
    "pot": "POT to convergence, float64",
}


def passes(iterations: int, column_evaluations: int) -> dict[str, int]:
    """Passes over C that a solve needs: the floor of `forward`, and of `both` with the backward.

    Forward: one pass per row search, which also holds the first evaluation of the column search
    behind it; one per further evaluation; one that writes P. Backward: one per iteration and one
    that writes dL/dC.
    """
    forward = column_evaluations + 1
    return {"forward": forward, "both": forward + iterations + 1}


def main(
    sizes: Annotated[str, typer.Option(help="V x U of the problems.")] = SIZES,
    methods: Annotated[str, typer.Option(help="Some of them.")] = ",".join(METHODS),
    spreads: Annotated[
        str,
        typer.Option(
            help="Standard deviations of C in row masses. At 0.3 the plan has about the support "
            "of the quickstart's trained one (a third of all entries); 1 is sharper."
        ),
    ] = "0.3,1",
    iterations: Annotated[int, typer.Option(min=1, help="n of Algorithm 1.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Of every method.")] = 2,
    memory: Annotated[
        float, typer.Option(help="GiB that one case may take; beyond it, it is given up.")
    ] = 12.0,
    out: Annotated[Path, typer.Option(help="Folder of transport.md and .json.")] = RESULTS,
):
    """Measure time and peak memory of every method at every size; write a table.

    Nothing else should run: about half an hour at the default sizes.

    Example: `python -m tests.bench.transport --sizes 256x512,4096x512 --out /tmp/bench`
    """
    options = {"sizes": sizes, "methods": methods, "spreads": spreads, "iterations": iterations}
    options |= {"threads": threads, "memory": memory}
    torch.set_num_threads(threads)
    report = {
        "machine": measure.machine(threads),
        "command": " ".join(
            ["python -m tests.bench.transport", *(f"--{k} {v}" for k, v in options.items())]
        ),
        "cases": [],
    }
    cases = _cases(sizes, methods, spreads, iterations, threads, memory)
    out.mkdir(parents=True, exist_ok=True)
    columns = [SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn()]
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            name = f"{case.V}x{case.U} spread {case.spread:g} {case.method}"
            progress.update(task, description=name)
            result = _measured(case, report["cases"])
            report["cases"].append({**dataclasses.asdict(case), **result})
            progress.advance(task)
            _write(report, out)
    print(f"wrote {out / 'transport.md'}")


def _cases(sizes, methods, spreads, iterations, threads, memory) -> list[Case]:
    """Small ones first, so that a larger one can be foreseen."""
    try:
        shapes = [tuple(int(n) for n in size.split("x")) for size in sizes.split(",")]
        scales = [float(spread) for spread in spreads.split(",")]
        assert all(len(shape) == 2 and min(shape) > 0 for shape in shapes)
        assert set(methods.split(",")) <= set(METHODS)
    except (AssertionError, ValueError):
        raise typer.BadParameter(
            f"found sizes {sizes}, spreads {spreads}, methods {methods}; expected VxU, numbers and "
            f"some of {','.join(METHODS)}, each separated by commas"
        ) from None
    return [
        Case(method, V, U, spread, iterations, threads, memory)
        for V, U in sorted(shapes, key=lambda shape: shape[0] * shape[1])
        for spread in scales
        for method in methods.split(",")
    ]


def _measured(case: Case, before: list[dict]) -> dict:
    """What `case.run` returns, or {"skipped": why}."""
    smaller = [c for c in before if (c["method"], c["spread"]) == (case.method, case.spread)]
    if smaller:
        last = smaller[-1]
        if "skipped" in last:
            return {"skipped": "not run: the size before was given up"}
        longest = last.get("both_seconds", last["forward_seconds"])  # the first call compiles
        growth = case.V * case.U / (last["V"] * last["U"])
        if longest * growth > TOO_SLOW:
            return {"skipped": f"not run: about {longest * growth / 60:.0f} min for one call"}
    return run_alone(case)


def run_alone(case: Case, deadline: float = DEADLINE) -> dict:
    """Run a case in a process of its own, with nothing compiled; or {"skipped": why}."""
    command = [sys.executable, "-m", "tests.bench.case", json.dumps(dataclasses.asdict(case))]
    with tempfile.TemporaryDirectory() as cache:
        fresh = {"TORCHINDUCTOR_CACHE_DIR": cache, "TORCH_EXTENSIONS_DIR": cache}
        fresh["OMP_NUM_THREADS"] = str(case.threads)
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=os.environ | fresh,
                capture_output=True,
                text=True,
                timeout=deadline,
            )
        except subprocess.TimeoutExpired:
            return {"skipped": f"given up after {deadline / 60:.0f} min"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    if any(text in done.stderr for text in OUT_OF_MEMORY):
        return {"skipped": f"given up: needs more than {case.memory_gib:g} GiB"}
    raise RuntimeError(f"{case} failed:\n{done.stderr}")


def _write(report: dict, out: Path) -> None:
    (out / "transport.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "transport.md").write_text(markdown(report))


def markdown(report: dict) -> str:
    """The report as a page: one table for each size and spread."""
    machine = report["machine"]
    lines = [
        "# Sparse transport: time and memory",
        "",
        f"`{report['command']}`",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['threads']} threads, torch {machine['torch']}.",
        "",
        "C = 1 + spread * randn in row masses, float32, uniform marginals. *Forward* keeps no "
        "graph; *both* is forward and the gradient of sum(P * G). Medians of several calls. "
        "*First* is the first call of a new process, compilation included. *Peak* is the "
        "resident memory above that once C, the marginals and G exist and code is compiled: it "
        "holds P, the returned gradient and everything between; below 1 MiB it is noise. "
        "*Floor*: the bytes of C, read once for each pass that the method needs, at the copy "
        "bandwidth (read and written), and in brackets at the fastest of that and of reading one "
        "vector or two; all are measured in turn with the calls of *both*. Errors are "
        "the largest relative ones of a row and a column sum.",
    ]
    groups: dict[tuple, list[dict]] = {}
    for case in report["cases"]:
        groups.setdefault((case["V"], case["U"], case["spread"]), []).append(case)
    for (V, U, spread), cases in groups.items():
        lines += ["", f"## V = {V:,}, U = {U:,}, spread {spread:g}", ""]
        lines += [f"One matrix: {V * U * 4 / measure.MIB:,.1f} MiB.{_floor_text(cases)}", ""]
        lines += table(cases)
    return "\n".join(lines) + "\n"


HEAD = (
    "method",
    "first s",
    "forward s",
    "both s",
    "speed-up",
    "peak forward MiB",
    "peak both MiB",
    "share",
    "both / floor",
    "row error",
    "column error",
)


def table(cases: list[dict]) -> list[str]:
    """Lines of one size's table; speed-up and share of memory are against the literal method."""
    literal = next((c for c in cases if c["method"] == "literal" and "skipped" not in c), {})
    lines = [f"| {' | '.join(HEAD)} |", "|---" + "|---:" * (len(HEAD) - 1) + "|"]
    for case in cases:
        if "skipped" in case:
            cells = [case["skipped"]] + ["" for _ in HEAD[2:]]
        else:
            cells = [
                _number(case["first_seconds"]),
                _number(case["forward_seconds"]),
                _number(case.get("both_seconds")),
                _ratio(literal.get("both_seconds"), case.get("both_seconds"), "{:.1f}x"),
                _mib(case["forward_peak_bytes"]),
                _mib(case.get("both_peak_bytes")),
                _ratio(case.get("both_peak_bytes"), literal.get("both_peak_bytes"), "{:.2f}"),
                _over_floor(case),
                f"{case['row_error']:.1e}",
                f"{case['column_error']:.1e}",
            ]
        lines.append(f"| {' | '.join([LABELS[case['method']], *cells])} |")
    return lines


def floors(case: dict, kind: str) -> tuple[float, float]:
    """Seconds at the copy bandwidth and at the fastest, of one of OURS."""
    count, speed = passes(case["iterations"], case["column_evaluations"])[kind], case["bandwidths"]
    moved = count * case["V"] * case["U"] * 4
    return moved / speed["copy"], moved / max(speed.values())


def _floor_text(cases: list[dict]) -> str:
    case = next((c for c in cases if "bandwidths" in c), None)
    if case is None:
        return ""
    count, floor = passes(case["iterations"], case["column_evaluations"]), floors(case, "both")
    speed = case["bandwidths"]
    return (
        f" Support: {case['support_share']:.0%}. Passes of ours: {count['forward']} forward, "
        f"{count['both']} both; floor {floor[0]:.2g} s ({floor[1]:.2g} s) at a copy of "
        f"{speed['copy'] / 1e9:.1f} GB/s (fastest {max(speed.values()) / 1e9:.1f} GB/s)."
    )


def _over_floor(case: dict) -> str:
    if "bandwidths" not in case:
        return "-"
    return "{:.1f} ({:.1f})".format(*(case["both_seconds"] / s for s in floors(case, "both")))


def _ratio(top: float | None, bottom: float | None, form: str) -> str:
    return "-" if top is None or not bottom else form.format(top / bottom)


def _mib(size: int | None) -> str:
    return _number(None if size is None else size / measure.MIB)


def _number(value: float | None) -> str:
    """Three significant digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    typer.run(main)
