"""Products with a tile of a plan, and sums over it: dense, or sparse where that is faster.

`tests/bench/products.py` measures where that is.

Shapes: h rows of a tile, U target tokens, K columns of the matrix that is translated.
"""

import warnings

import torch

from s2t2_dist.ot.native import library

SPARSE_BELOW = 0.15  # share of the entries of a tile; above it the dense product is faster


def is_sparse(plan_hU: torch.Tensor, support: float, *others: torch.Tensor) -> bool:
    """Whether products with a tile of so many entries that are not zero are to be sparse."""
    return support < SPARSE_BELOW * plan_hU.numel() and library.can_call(plan_hU, *others)


def add_product(
    total_UK: torch.Tensor, plan_hU: torch.Tensor, values_hK: torch.Tensor, sparse: bool
) -> None:
    """Add a tile's P^T X to the total."""
    if not sparse:
        total_UK.addmm_(plan_hU.T, values_hK)
        return
    sizes = (*plan_hU.shape, values_hK.shape[1])
    tensors = (plan_hU, values_hK, total_UK)
    library.call("add_product", plan_hU.dtype, *tensors, *sizes)


def product_grad(
    out_hU: torch.Tensor,
    values_hK: torch.Tensor,
    grad_UK: torch.Tensor,
    plan_hU: torch.Tensor | None,
) -> None:
    """Write dloss/dP of a tile from dloss/d(P^T X).

    With a plan, entries off its support are left 0: a sparse projection has no derivative there.
    """
    if plan_hU is None:
        torch.mm(values_hK, grad_UK.T, out=out_hU)
        return
    sizes = (*plan_hU.shape, values_hK.shape[1])
    tensors = (plan_hU, values_hK, grad_UK, out_hU)
    parts = library.parts(len(plan_hU), library.FEW_ROWS)
    library.call("product_grad", plan_hU.dtype, *tensors, *sizes, parts)


def plan_sums(plan_hU: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row sums (h,), column sums (U,) and the number (1,) of entries that are not 0, float64.

    Native code makes the sums in the plan's dtype over blocks, and in float64 over those.
    """
    if not library.can_call(plan_hU):
        support = torch.count_nonzero(plan_hU).double()[None]
        return plan_hU.sum(1, dtype=torch.float64), plan_hU.sum(0, dtype=torch.float64), support
    (h, U), parts = plan_hU.shape, library.parts(len(plan_hU))
    row_sums = torch.empty(h, dtype=torch.float64)
    col_sums = torch.zeros(parts, U, dtype=torch.float64)
    support = torch.zeros(parts, dtype=torch.float64)
    tensors = (row_sums, col_sums, support)
    library.call("plan_sums", plan_hU.dtype, plan_hU, h, U, *tensors, parts)
    return row_sums, col_sums.sum(0), support.sum(0, keepdim=True)


def to_csr(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix in CSR, without torch's notice that its CSR tensors are new."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return matrix.to_sparse_csr()
