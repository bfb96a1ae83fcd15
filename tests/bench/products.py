"""Where the sparse product of a tile beats the dense one: `python -m tests.bench.products`.

Sets `SPARSE_BELOW` of `s2t2_dist/ot/products.py`. A tile of P (h x U) is made at several shares of
support; timed are P^T X and dloss/dP together, as a training step makes them, on one thread.
"""

import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from s2t2_dist.ot import products
from s2t2_dist.ot.tiles import CPU_TILE
from s2t2_dist.ot.transport import LEAST_ROWS

RESULTS = Path("tests/bench/results/products.md")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
WIDTHS = (128, 192, 512, 1024, 4096)


def both_ways(plan_hU: torch.Tensor, values_hK: torch.Tensor, sparse: bool) -> None:
    """One product and its gradient."""
    total_UK = torch.zeros(plan_hU.shape[1], values_hK.shape[1])
    products.add_product(total_UK, plan_hU, values_hK, sparse)
    out_hU = torch.empty_like(plan_hU)
    products.product_grad(out_hU, values_hK, total_UK, plan_hU if sparse else None)


def seconds(plan_hU: torch.Tensor, values_hK: torch.Tensor, sparse: bool) -> float:
    """Median of seven."""
    both_ways(plan_hU, values_hK, sparse)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        both_ways(plan_hU, values_hK, sparse)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main(
    columns: Annotated[int, typer.Option(help="U")] = 512,
    out: Annotated[Path, typer.Option(help="The table.")] = RESULTS,
):
    """Measure dense and sparse products of one tile; write a table of their ratio."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    height = max(LEAST_ROWS, CPU_TILE // columns)
    lines = [
        f"# Dense over sparse time of a tile of {height} x {columns}",
        "",
        f"`python -m tests.bench.products --columns {columns}`: P^T X and its gradient, "
        "X of K columns, one thread. Above 1 the sparse form wins.",
        "",
        "| share of support | " + " | ".join(f"K = {width}" for width in WIDTHS) + " |",
        "|---:" * (len(WIDTHS) + 1) + "|",
    ]
    for share in SHARES:
        plan = torch.rand(height, columns) * (torch.rand(height, columns) < share)
        cells = []
        for width in WIDTHS:
            values = torch.randn(height, width)
            ratio = seconds(plan, values, False) / seconds(plan, values, True)
            cells.append(f"{ratio:.2f}")
        lines.append(f"| {share:.0%} | {' | '.join(cells)} |")
    lines += ["", f"Taken: sparse below {products.SPARSE_BELOW:.0%}."]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    typer.run(main)
