"""The parts of `tests.bench.gpu` that run in this process: ceilings, the transport, the loader.

`python -m tests.bench.gpu_parts NAME DEVICE full|small LINES WORK` runs one and adds its figures to
LINES, a line of JSON each. Times are medians of calls that end with the device's queue drained.
"""

import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot import Translator
from s2t2_dist.ot.dykstra import Dykstra
from s2t2_dist.ot.problem import Problem
from tests.bench import baselines, gpu_runs

FULL = ((4096, 512), (50_304, 512), (50_304, 4096), (100_352, 32_768))
SMALL = ((16, 8), (24, 20))
MOST = {"eager": 3e8, "compile": 3e8, "literal": 3e8, "entmax": 3e8}  # entries; beyond: not run
N, SPREAD = 3, 0.3  # iterations; standard deviation of C in row masses, see `tests.bench.transport`
GB, GIB = 1e9, 1 << 30


@dataclass(frozen=True)
class Bench:
    """What a part may know.

    Attributes:
        note: adds a line of figures.
    """

    name: str
    device: torch.device
    small: bool
    work: Path
    lines: Path

    def note(self, **values: object) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps({"part": self.name, "values": values}) + "\n")

    def drain(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], rounds: int = 7) -> float:
        """Median of a call, after two that warm up."""
        times = []
        for _ in range(2 + (2 if self.small else rounds)):
            self.drain()
            start = time.perf_counter()
            call()
            self.drain()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def peak(self, call: Callable[[], object]) -> int | None:
        """Bytes allocated at once during a call, those before it included; None on a CPU."""
        if self.device.type != "cuda":
            call()
            return None
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated()


def machine(bench: Bench) -> None:
    """Versions, and the ceilings: a copy (read and written), a read, a bf16 product."""
    import transformers

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "cuda": torch.version.cuda}
    name = "CPU"
    if bench.device.type == "cuda":
        name = torch.cuda.get_device_name()
    bench.note(device=name, cores=os.cpu_count(), **versions)
    size, side = (2**20, 256) if bench.small else (2**30, 8192)
    source, target = (torch.ones(size, device=bench.device) for _ in range(2))
    bench.note(copy=8 * size / bench.seconds(lambda: target.copy_(source)))
    bench.note(read=4 * size / bench.seconds(source.sum))
    factor = torch.randn(side, side, device=bench.device, dtype=torch.bfloat16)
    bench.note(bf16=2 * side**3 / bench.seconds(lambda: factor @ factor))


def transport(bench: Bench) -> None:
    """One method at each size: first call, forward, forward and backward, peak."""
    for V, U in SMALL if bench.small else FULL:
        if MOST.get(bench.name, float("inf")) < V * U:
            bench.note(V=V, U=U, problem="not run: too much memory or time")
            continue
        try:
            measure_size(bench, V, U)
        except torch.OutOfMemoryError:
            bench.note(V=V, U=U, problem="out of memory")
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


class Counting(Comm):
    """Counts the sums over all columns: an evaluation of a column search each."""

    def __init__(self, columns: int):
        super().__init__()
        self.columns, self.evaluations = columns, 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        first = tensor.numel() == 3 * self.columns + 1
        self.evaluations += first or (tensor.dim() == 2 and len(tensor) == 2)
        return tensor


def measure_size(bench: Bench, V: int, U: int) -> None:
    torch.manual_seed(0)
    cost = torch.randn(V, U, device=bench.device).mul_(SPREAD).add_(1)
    grad = torch.randn(V, U, device=bench.device)
    mu = torch.ones(V, device=bench.device, dtype=torch.float64)
    nu = torch.full((U,), V / U, device=bench.device, dtype=torch.float64)
    found: dict[str, object] = {"V": V, "U": U, "bytes": 4 * V * U}
    if bench.name in ("literal", "entmax"):
        solve = baselines.literal if bench.name == "literal" else baselines.literal_entmax
        cost.requires_grad_()
        run = functools.partial(solve, cost, mu, nu, N)
        forward = torch.no_grad()(run)

        def both():
            torch.autograd.grad(run(), cost, grad)

    else:
        solver, comm = Dykstra(N, bench.name), Counting(U)
        problem = Problem(cost, mu, nu, comm)
        solver.solve(problem)
        found["evaluations"] = comm.evaluations
        out = torch.empty_like(grad)

        def forward():
            return solver.solve(problem).plan(slice(0, V))

        def both():
            solution = solver.solve(problem)
            solution.plan(slice(0, V))
            solution.backward(grad, out)

        found["warm_seconds"] = warm(bench, solver, problem)
    start = time.perf_counter()
    both()
    bench.drain()
    found["first_seconds"] = time.perf_counter() - start
    rounds = 3 if V * U > 1e9 else 7
    found |= {"forward_seconds": bench.seconds(forward, rounds)}
    found |= {"both_seconds": bench.seconds(both, rounds), "peak_bytes": bench.peak(both)}
    plan = forward()
    rows, columns = plan.sum(1, dtype=torch.float64), plan.sum(0, dtype=torch.float64)
    found["row_error"] = ((rows - mu) / mu).abs().max().item()
    found["column_error"] = ((columns - nu) / nu).abs().max().item()
    bench.note(**found)


def warm(bench: Bench, solver: Dykstra, problem: Problem) -> float:
    """Seconds of a solve from the thresholds of a cost that is a thousandth of a row mass off."""
    state = solver.solve(problem).state
    near = problem.cost_VU + 1e-3 * torch.randn_like(problem.cost_VU)
    moved = Problem(near, problem.mu_V, problem.nu_U, problem.comm)
    return bench.seconds(lambda: solver.solve(moved, state), 3)


def translator(bench: Bench) -> None:
    """The translator's step at OLMo-1B's sizes: its three parts, and a profile beside the page."""
    V, U, D = (96, 24, 16) if bench.small else (50_304, 512, 2048)
    torch.manual_seed(0)
    embed = torch.randn(V, D, device=bench.device)
    made = Translator(embed, embed, torch.full((V,), 1 / V), torch.full((U,), 1 / U))
    optimizer = torch.optim.AdamW(made.costs, lr=1e-2, fused=True)
    parts: dict[str, list[float]] = {"translate": [], "backward": [], "optimizer": []}

    def lap(name: str, start: float) -> float:
        bench.drain()
        now = time.perf_counter()
        parts[name].append(now - start)
        return now

    def step() -> None:
        bench.drain()
        start = time.perf_counter()
        translated = made.translate()
        start = lap("translate", start)
        translated.embed_UD.grad = torch.ones_like(translated.embed_UD)
        translated.head_UD.grad = translated.head_UD.detach() / U
        made.backward(translated)
        start = lap("backward", start)
        made.clip_grad_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()
        lap("optimizer", start)

    for _ in range(3 if bench.small else 12):
        step()
    medians = {name: statistics.median(times[2:]) for name, times in parts.items()}
    bench.note(V=V, U=U, D=D, peak_bytes=bench.peak(step), **medians)
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if bench.device.type == "cuda" else []
    with profile(activities=activities) as seen:
        step()
    by = "cuda_time_total" if bench.device.type == "cuda" else "cpu_time_total"
    table = seen.key_averages().table(sort_by=by, row_limit=40)
    (bench.lines.parent / "translator_profile.txt").write_text(table)


def tiles(bench: Bench) -> None:
    """Other tile sizes of the kernels that own rows, to choose those of `kernels/passes.py`."""
    from s2t2_dist.ot.kernels import passes

    for V, U in SMALL[:1] if bench.small else FULL[1:3]:
        cost = torch.randn(V, U, device=bench.device).mul_(SPREAD)
        grad, out = torch.randn_like(cost), torch.empty_like(cost)
        mu = torch.ones(V, device=bench.device, dtype=torch.float64)
        nu = torch.full((U,), V / U, device=bench.device, dtype=torch.float64)
        problem, solver = Problem(cost, mu, nu, Comm()), Dykstra(N, "triton")

        def both(solver=solver, problem=problem, grad=grad, out=out):
            solver.solve(problem).backward(grad, out)

        for entries in (512, 1024, 2048, 4096):
            for per_thread in (4, 8, 16):
                passes.TILE, passes.PER_THREAD = entries, per_thread
                bench.note(V=V, U=U, tile=entries, per_thread=per_thread, both=bench.seconds(both))
                if bench.small:
                    return


PARTS = {
    "machine": machine,
    **dict.fromkeys(("triton", "compile", "eager", "literal", "entmax"), transport),
    "translator": translator,
    "tiles": tiles,
    **gpu_runs.PARTS,
}


def main(name: str, device: str, size: str, lines: str, work: str) -> None:
    if device == "cpu":
        torch.set_num_threads(1)
    PARTS[name](Bench(name, torch.device(device), size == "small", Path(work), Path(lines)))


if __name__ == "__main__":
    main(*sys.argv[1:])
