"""Row errors of Dykstra and of the dual method against the number of iterations.

Prints two markdown tables: the largest relative error of a row sum, mean over seeds; and the
iterations after which it is under 1%, for each seed. Columns hold after every iteration of both.
C is normal with a standard deviation given in row masses, marginals are uniform; float32.

    python -m tests.bench.row_errors [V U]
"""

import itertools
import sys
from collections.abc import Iterator

import torch

from s2t2_dist.comm import LocalComm
from s2t2_dist.ot import project_simplex
from s2t2_dist.ot.dual import Dual

SPREADS = (0.1, 1.0, 10.0)
COUNTS = (1, 2, 3, 5, 7, 10, 20, 50)
SEEDS = range(3)
TARGET = 0.01
MOST = 1000


def dykstra_errors(cost_VU, mu, nu) -> Iterator[float]:
    """After each iteration of the paper's Algorithm 1, which keeps its iterates here."""
    z, w = cost_VU, torch.zeros_like(cost_VU)
    sigma = torch.zeros_like(cost_VU[0])
    while True:
        tau, y = project_simplex(z, mu, 1)
        w = y + torch.minimum(w, sigma)
        sigma, x = project_simplex(w, nu, 0)
        z = x + torch.minimum(z, tau[:, None])
        yield row_error(x, mu)


def dual_errors(cost_VU, mu, nu) -> Iterator[float]:
    """After each iteration of the dual method."""
    state = None
    while True:
        dual = Dual(cost_VU, mu, nu, LocalComm(), iterations=1, start=state)
        state = dual.state
        yield row_error(dual.plan(slice(None)), mu)


def row_error(plan_VU, mu):
    return ((plan_VU.sum(1, dtype=torch.float64) - mu).abs() / mu).max().item()


def measure(errors: Iterator[float]) -> tuple[list[float], int | None]:
    """The errors at COUNTS, and the first iteration under TARGET; None beyond MOST."""
    found = list(itertools.islice(errors, max(COUNTS)))
    for error in itertools.islice(errors, MOST - len(found)):
        if min(found) <= TARGET:
            break
        found.append(error)
    needed = next((n for n, error in enumerate(found, 1) if error <= TARGET), None)
    return [found[n - 1] for n in COUNTS], needed


def main(V: int = 4096, U: int = 512) -> None:
    """Print both tables."""
    methods = {"Dykstra": dykstra_errors, "dual": dual_errors}
    mu, nu = torch.ones(V).double(), torch.full((U,), V / U).double()
    print(f"Largest relative error of a row sum at V x U = {V} x {U}, {len(SEEDS)} seeds\n")
    print("| std(C) | method |", " | ".join(map(str, COUNTS)), "|")
    print("|" + "---|" * (len(COUNTS) + 2))
    needed = {}
    for spread, name in itertools.product(SPREADS, methods):
        costs = [spread * torch.randn(V, U, generator=torch.manual_seed(seed)) for seed in SEEDS]
        errors, counts = zip(*(measure(methods[name](c, mu, nu)) for c in costs), strict=True)
        means = torch.tensor(errors).mean(0).tolist()
        print(f"| {spread} | {name} |", " | ".join(f"{x:.2%}" for x in means), "|", flush=True)
        needed[spread, name] = ", ".join(str(n or f"over {MOST}") for n in counts)
    print(f"\nIterations until it is under {TARGET:.0%}, for each seed\n")
    print("| std(C) |", " | ".join(methods), "|")
    print("|" + "---|" * (len(methods) + 1))
    for spread in SPREADS:
        print(f"| {spread} |", " | ".join(needed[spread, name] for name in methods), "|")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
