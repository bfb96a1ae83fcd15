"""One case of `transport`, alone in a process so that its peak memory is its own.

`python -m tests.bench.case '{"method": "literal", "V": 256, "U": 512, ...}'` (the fields of `Case`)
prints one line of JSON: what `run` returns.
"""

import json
import resource
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot import sparse_sinkhorn
from s2t2_dist.ot.tiles import new_matrix
from tests.bench import baselines, measure

OURS = ("native", "compile", "eager")  # backends
METHODS = (*OURS, "literal", "entmax", "pot")
WITHOUT_GRADIENT = ("pot",)
ROUNDS = 5  # of calls, and of the bandwidths beside them
LONG = 20.0  # seconds of calls after which there is no further round
SLOW = 10.0  # seconds of a first call that needs no second one to warm up


@dataclass(frozen=True)
class Case:
    """A method on C = 1 + spread * randn in row masses (float32), with uniform marginals."""

    method: str
    V: int
    U: int
    spread: float
    iterations: int = 3
    threads: int = 2
    memory_gib: float = 12.0


def problem(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(cost, mu, nu, dL/dP); row masses of 1. C lies in memory as the trainer's does."""
    random = torch.manual_seed(0)
    cost = new_matrix(torch.empty(0, case.U), case.V)
    torch.randn(case.V, case.U, generator=random, out=cost).mul_(case.spread).add_(1)
    mu = torch.ones(case.V, dtype=torch.float64)
    nu = torch.full((case.U,), case.V / case.U, dtype=torch.float64)
    return cost.requires_grad_(), mu, nu, torch.randn(case.V, case.U, generator=random)


def solver(method: str) -> Callable[..., torch.Tensor]:
    """(cost, mu, nu, iterations) -> plan."""
    if method in OURS:
        return lambda *args: sparse_sinkhorn(*args, backend=method).plan
    return {"literal": baselines.literal, "entmax": baselines.literal_entmax, "pot": baselines.pot}[
        method
    ]


def run(case: Case) -> dict[str, object]:
    """Seconds of the first call, medians of the following ones, peak bytes, marginal errors.

    `forward` runs without a graph. `both` is forward and the gradient of sum(P * G). Peaks are
    above the resident memory once C, the marginals and G exist and code is compiled, so they hold
    P, the returned gradient, and everything between.
    """
    cost, mu, nu, grad = problem(case)
    solve = solver(case.method)

    @torch.no_grad()
    def forward():
        return solve(cost, mu, nu, case.iterations)

    def both():
        return torch.autograd.grad(solve(cost, mu, nu, case.iterations), cost, grad)

    calls = {"forward": forward}
    if case.method not in WITHOUT_GRADIENT:
        calls["both"] = both
    first = measure.seconds(list(calls.values())[-1])
    found: dict[str, object] = {"first_seconds": first}
    for name, call in calls.items():
        if case.method in OURS and name == "both":
            times, found["bandwidths"] = in_turn(call)
        else:
            if first < SLOW:
                call()  # warm up, where that is cheap
            times = measure.repeated(call)
        found |= {f"{name}_seconds": statistics.median(times), f"{name}_runs": len(times)}
        found[f"{name}_peak_bytes"] = measure.peak_above(call)
    plan = forward().double()
    found["row_error"] = ((plan.sum(1) - mu) / mu).abs().max().item()
    found["column_error"] = ((plan.sum(0) - nu) / nu).abs().max().item()
    found["support_share"] = (plan > 0).double().mean().item()
    if case.method in OURS:
        found["column_evaluations"] = column_evaluations(case)
    return found


def in_turn(call: Callable[[], object]) -> tuple[list[float], dict[str, float]]:
    """Seconds of the calls, and medians of the bandwidths, measured in turn.

    A shared machine has fast and slow seconds: a ratio of the two needs both from the same ones.
    """
    times, speeds = [], []
    for _ in range(ROUNDS):
        call()  # the bandwidths have emptied the caches
        times += measure.repeated(call, budget=1.0)
        speeds.append(measure.bandwidths())
        if sum(times) > LONG:
            break
    return times, {name: statistics.median(s[name] for s in speeds) for name in speeds[0]}


def column_evaluations(case: Case) -> int:
    """Newton evaluations of all the column searches of one solve: a sum each.

    The first of an iteration sums three U-vectors and a number, the others two of some columns.
    """
    comm = _Counting(case.U)
    cost, mu, nu, _ = problem(case)
    with torch.no_grad():
        sparse_sinkhorn(cost, mu, nu, case.iterations, comm=comm)
    return comm.evaluations


class _Counting(Comm):
    def __init__(self, columns: int):
        self.columns, self.evaluations = columns, 0

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        first = tensor.numel() == 3 * self.columns + 1
        self.evaluations += first or (tensor.dim() == 2 and len(tensor) == 2)
        return tensor


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    # Beyond it an allocation fails, rather than the machine.
    limit = measure.status_bytes("VmSize") + int(case.memory_gib * measure.GIB)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(case.threads)
    print(json.dumps(run(case)))


if __name__ == "__main__":
    main()
