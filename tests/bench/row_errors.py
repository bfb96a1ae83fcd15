"""Row errors of Dykstra and of the dual method against the number of iterations.

`python -m tests.bench.row_errors --help`. Two tables: the largest relative error of a row sum, mean
over seeds; and the iterations after which it is under 1%, for each seed. Columns hold after every
iteration of both. C is normal with a standard deviation given in row masses, marginals are uniform;
float32.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from s2t2_dist.comm import Comm
from s2t2_dist.ot import project_simplex
from s2t2_dist.ot.dual import Dual
from s2t2_dist.ot.problem import Problem

RESULTS = Path("tests/bench/results/row_errors.md")
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
    problem, state = Problem(cost_VU, mu, nu, Comm()), None
    while True:
        dual = Dual(iterations=1).solve(problem, state)
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


def main(
    rows: Annotated[int, typer.Option(help="V")] = 4096,
    columns: Annotated[int, typer.Option(help="U")] = 512,
    out: Annotated[Path, typer.Option(help="The tables.")] = RESULTS,
):
    """Measure both methods; write both tables. A minute or two at the default size."""
    methods = {"Dykstra": dykstra_errors, "dual": dual_errors}
    mu = torch.ones(rows, dtype=torch.float64)
    nu = torch.full((columns,), rows / columns, dtype=torch.float64)
    lines = [
        f"# Row errors at V x U = {rows:,} x {columns:,}",
        "",
        f"`python -m tests.bench.row_errors --rows {rows} --columns {columns}`",
        "",
        "C is normal with a standard deviation in row masses; uniform marginals, float32.",
        "",
        f"Largest relative error of a row sum after some iterations, mean of {len(SEEDS)} seeds:",
        "",
        f"| std(C) | method | {' | '.join(map(str, COUNTS))} |",
        "|---:|---" + "|---:" * len(COUNTS) + "|",
    ]
    needed = {}
    for spread, name in itertools.product(SPREADS, methods):
        costs = [
            spread * torch.randn(rows, columns, generator=torch.manual_seed(seed)) for seed in SEEDS
        ]
        errors, counts = zip(*(measure(methods[name](c, mu, nu)) for c in costs), strict=True)
        means = torch.tensor(errors).mean(0).tolist()
        lines.append(f"| {spread} | {name} | {' | '.join(f'{x:.2%}' for x in means)} |")
        needed[spread, name] = ", ".join(str(n or f"over {MOST}") for n in counts)
    lines += ["", f"Iterations until it is under {TARGET:.0%}, for each seed:", ""]
    lines += [f"| std(C) | {' | '.join(methods)} |", "|---:|---:|---:|"]
    for spread in SPREADS:
        lines.append(f"| {spread} | {' | '.join(needed[spread, name] for name in methods)} |")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
