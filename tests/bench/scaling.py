"""Strong scaling of one translate step, and a check of the formulas in `s2t2_dist.ot.sizes`.

`python -m tests.bench.scaling --help`. A step is `Translator.translate`, `backward` with given
gradients of E' and L', clipping and AdamW. Ranks are gloo processes of this machine, one thread
each.
"""

import json
import statistics
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from s2t2_dist.comm import GroupComm
from s2t2_dist.ot import Translator, row_range
from s2t2_dist.ot.sizes import rank_memory, rank_traffic, sent
from tests.bench import measure
from tests.jobs.distributed import run_ranks

RESULTS = Path("tests/bench/results")
TARGET = {"V": 100_352, "U": 32_768, "D": 4096}  # OLMo-2's vocabulary and width, a large new one
TOLERANCE = 0.1
KINDS = ("U x K sums", "column searches", "U-vectors", "scalars")


@dataclass(frozen=True)
class Shape:
    """V rows over all ranks, U columns, width D; `steps` are timed after one that is not."""

    V: int
    U: int
    D: int
    steps: int


class CountingComm(GroupComm):
    """Counts collectives and the bytes that this rank hands to them, by kind."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.sent = 0

    def clear(self) -> None:
        """Count from nothing again."""
        self.calls.clear()
        self.bytes.clear()
        self.sent = 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        ring = sent(tensor.nbytes, self.size)
        self._count(tensor, (self.size - 1) * tensor.nbytes if self.gathers(tensor) else ring)
        return super().sum_(tensor)

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        self._count(tensor, sent(tensor.nbytes, self.size))
        return super().max_(tensor)

    def _count(self, tensor: torch.Tensor, leaving: int) -> None:
        if tensor.numel() >= self.shape.U * self.shape.D:
            kind = "U x K sums"
        elif len(tensor) in (2, 3 * self.shape.U + 1):  # the first of an iteration has totals too
            kind = "column searches"
        else:
            kind = "U-vectors" if tensor.numel() >= self.shape.U else "scalars"
        self.calls[kind] += 1
        self.bytes[kind] += tensor.nbytes
        self.sent += leaving


def measure_rank(_, shape: Shape) -> dict[str, object]:
    """Seconds, collectives and bytes of one step on this rank; peak bytes over all of them.

    The peak is above the memory before C, E and L exist, with the code compiled.
    """
    comm = CountingComm(shape)
    _run(comm, Shape(40 * comm.size, shape.U, 8, 1))  # compile and import
    before = measure.reset_peak()
    times = _run(comm, shape)
    return {
        "seconds": statistics.median(times),
        "calls": dict(comm.calls),
        "payload_bytes": dict(comm.bytes),
        "sent_bytes": comm.sent,
        "peak_bytes": measure.status_bytes("VmHWM") - before,
    }


def _run(comm: CountingComm, shape: Shape) -> list[float]:
    """Seconds of the steps after the first; `comm` holds the counts of the last."""
    start, stop = row_range(shape.V, comm.rank, comm.size)
    random = torch.manual_seed(comm.rank)
    embed_VD, head_VD = (torch.randn(stop - start, shape.D, generator=random) for _ in range(2))
    mu = torch.full((stop - start,), 1 / shape.V, dtype=torch.float64)
    nu = torch.full((shape.U,), 1 / shape.U, dtype=torch.float64)
    translator = Translator(embed_VD, head_VD, mu, nu, comm=comm)
    del embed_VD, head_VD  # the translator holds what it needs
    (cost,) = translator.costs
    for row in cost.data:
        row.add_(torch.randn(shape.U, generator=random), alpha=0.3)
    # Fused: the other implementations make temporaries of C's size.
    optimizer = torch.optim.AdamW([cost], lr=1e-3, fused=True)

    def step():
        comm.clear()
        translated = translator.translate()
        for leaf in (translated.embed_UD, translated.head_UD):
            leaf.grad = torch.randn(leaf.shape, generator=random)
        translator.backward(translated)
        assert translator.clip_grad_norm(1.0) > 0, "a step without work"
        optimizer.step()
        optimizer.zero_grad()

    return [measure.seconds(step) for _ in range(shape.steps + 1)][1:]


def main(
    scaling: Annotated[str, typer.Option(help="VxUxD of the strong scaling.")] = "8192x1024x64",
    ranks: Annotated[str, typer.Option(help="Numbers of ranks that share it.")] = "1,2,4",
    slices: Annotated[
        str,
        typer.Option(
            help="VxUxD of the slices that check the formulas on 2 ranks: each rank owns the rows "
            f"that one of 64 would own at V = {TARGET['V']:,}, at the full width (11 GiB in all) "
            "and at one where C dominates."
        ),
    ] = "3136x32768x4096,3136x32768x256",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of the strong scaling.")] = 5,
    out: Annotated[Path, typer.Option(help="Folder of scaling.md and .json.")] = RESULTS,
):
    """Measure a sharded translate step; check memory and traffic against the formulas.

    Exits with 1 where a slice is more than 10% away from its formula.

    Example: `python -m tests.bench.scaling --slices 512x4096x64 --out /tmp/bench`
    """
    strong = Shape(*_numbers(scaling, "x", 3), steps)
    checks = [Shape(*_numbers(text, "x", 3), 1) for text in slices.split(",")]
    jobs = [(size, strong) for size in _numbers(ranks, ",")] + [(2, shape) for shape in checks]
    report = {"machine": measure.machine(1), "runs": []}
    columns = [SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    with Progress(*columns) as progress, tempfile.TemporaryDirectory() as room:
        for size, shape in jobs:
            name = f"{shape.V}x{shape.U}x{shape.D} on {size} ranks"
            task = progress.add_task(name, total=1)
            results = run_ranks(measure_rank, size, Path(room), shape, timeout=1200)
            report["runs"].append({"ranks": size, **asdict(shape), "results": results})
            progress.advance(task)
    report["checks"] = [_check(run) for run in report["runs"][len(jobs) - len(checks) :]]
    out.mkdir(parents=True, exist_ok=True)
    (out / "scaling.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "scaling.md").write_text(markdown(report))
    print(f"wrote {out / 'scaling.md'}")
    worst = max(abs(check[kind] - 1) for check in report["checks"] for kind in RATIOS)
    if worst > TOLERANCE:
        print(f"measured and computed differ by {worst:.0%}; at most {TOLERANCE:.0%} is expected")
        raise typer.Exit(1)


RATIOS = ("memory", "traffic")


def _numbers(text: str, separator: str, count: int | None = None) -> list[int]:
    try:
        numbers = [int(number) for number in text.split(separator)]
        assert min(numbers) > 0 and count in (None, len(numbers))
    except (AssertionError, ValueError):
        raise typer.BadParameter(
            f"found {text!r}; expected {count or 'some'} positive numbers between {separator!r}"
        ) from None
    return numbers


def _check(run: dict) -> dict[str, float]:
    """Measured over computed, of the largest rank."""
    V, U, D = run["V"], run["U"], run["D"]
    evaluations = run["results"][0]["calls"]["column searches"]
    memory = sum(rank_memory(V, U, D, run["ranks"]).values())
    traffic = sum(rank_traffic(U, D, column_evaluations=evaluations).values())
    return {
        "V": V,
        "U": U,
        "D": D,
        "computed_memory": memory,
        "computed_traffic": traffic,
        "memory": max(rank["peak_bytes"] for rank in run["results"]) / memory,
        "traffic": max(sum(rank["payload_bytes"].values()) for rank in run["results"]) / traffic,
    }


def markdown(report: dict) -> str:
    """The report as a page: strong scaling, the check, the arithmetic of the target."""
    machine = report["machine"]
    strong = report["runs"][: len(report["runs"]) - len(report["checks"])]
    lines = [
        "# Sharded transport: time, collectives, memory",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, one thread per "
        f"rank, gloo, torch {machine['torch']}. A step: translate, backward, clipping, AdamW.",
        "",
        "## Strong scaling",
        "",
        "V = {V:,}, U = {U:,}, D = {D:,}. Collectives and bytes are per rank and step; K is D, or "
        "2 D for E and L side by side. *Sent* is by formula: of a ring's all-reduce and, for short "
        "sums on gloo, of an all-gather. ".format(**strong[0])
        + f"Where there are more ranks than the {machine['cores']} cores, they wait for each "
        "other: time cannot fall, memory does.",
        "",
        f"| ranks | s | {' | '.join(KINDS)} | all-reduced MB | sent MB | peak MiB |",
        "|---:" * (len(KINDS) + 5) + "|",
        *(_scaling_line(run) for run in strong),
        "",
        "## The formulas against a measured slice, 2 ranks",
        "",
        "Peak memory per rank above that before C, E and L exist; bytes all-reduced.",
        "",
        "| V | U | D | computed MiB | measured / computed | computed MB | measured / computed |",
        "|---:" * 7 + "|",
        *(_check_line(check) for check in report["checks"]),
        "",
        *arithmetic_lines(),
    ]
    return "\n".join(lines) + "\n"


def _scaling_line(run: dict) -> str:
    slowest = max(rank["seconds"] for rank in run["results"])
    calls, payload = (run["results"][0][key] for key in ("calls", "payload_bytes"))
    total = sum(payload.values())
    peak = max(rank["peak_bytes"] for rank in run["results"])
    cells = [run["ranks"], f"{slowest:.3f}", *(calls.get(kind, 0) for kind in KINDS)]
    cells += [f"{total / 1e6:.2f}", f"{run['results'][0]['sent_bytes'] / 1e6:.2f}"]
    return f"| {' | '.join(str(cell) for cell in [*cells, f'{peak / measure.MIB:.0f}'])} |"


def _check_line(check: dict) -> str:
    return (
        "| {V:,} | {U:,} | {D:,} | ".format(**check)
        + f"{check['computed_memory'] / measure.MIB:,.0f} | {check['memory']:.3f} | "
        + f"{check['computed_traffic'] / 1e6:,.1f} | {check['traffic']:.3f} |"
    )


def arithmetic_lines(ranks: tuple[int, ...] = (8, 32, 128)) -> list[str]:
    """The target's memory and traffic per rank, as lines of markdown."""
    V, U, D = TARGET.values()
    memory = [rank_memory(V, U, D, size) for size in ranks]
    traffic = rank_traffic(U, D)
    head = f"| | {' | '.join(f'{size} ranks' for size in ranks)} |"
    rule = "|---" + "|---:" * len(ranks) + "|"
    lines = [f"## By arithmetic: V = {V:,}, U = {U:,}, D = {D:,}, n = 3, float32", ""]
    lines += ["GiB held per rank; the language model comes on top.", "", head, rule]
    for part in memory[0]:
        lines.append(_line(part, [held[part] / measure.GIB for held in memory]))
    lines.append(_line("**sum**", [sum(held.values()) / measure.GIB for held in memory]))
    lines += ["", "GB sent per rank and step by ring all-reduces.", "", head, rule]
    for part, payload in traffic.items():
        lines.append(_line(part, [sent(payload, size) / 1e9 for size in ranks]))
    total = sum(traffic.values())
    return [*lines, _line("**sum**", [sent(total, size) / 1e9 for size in ranks])]


def _line(name: str, values: list[float]) -> str:
    return f"| {name} | {' | '.join(f'{value:.4g}' for value in values)} |"


if __name__ == "__main__":
    typer.run(main)
