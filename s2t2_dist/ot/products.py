"""Products with rows of a plan: dense, or sparse where the plan is sparse enough for it to pay.

`tests/bench/products.py` measures where that is.

Shapes: h rows of a tile, U target tokens, K columns of the matrix that is translated.
"""

import warnings

import torch

SPARSE_BELOW = 0.04  # share of the entries of a tile; above it the dense product is faster
LEAST_ROWS = 256  # of a tile: shorter ones would go over the total too often
SPARSE_WIDTH = 512  # K from which the product outweighs the conversion to a sparse tile


def add_product(
    total_UK: torch.Tensor, plan_hU: torch.Tensor, values_hK: torch.Tensor, support: float
) -> torch.Tensor | None:
    """Add a tile's P^T X to the total; returns its P^T in CSR where that was used, else None.

    Args:
        support: number of entries of the tile that are not zero.
    """
    sparse = plan_hU.is_cpu and values_hK.shape[1] >= SPARSE_WIDTH
    if not sparse or support > SPARSE_BELOW * plan_hU.numel():
        total_UK.addmm_(plan_hU.T, values_hK)
        return None
    plan_Uh = to_csr(plan_hU.T)
    total_UK.add_(plan_Uh @ values_hK)
    return plan_Uh


def product_grad(
    values_hK: torch.Tensor, grad_UK: torch.Tensor, plan_Uh: torch.Tensor | None
) -> torch.Tensor:
    """dloss/dP (h, U) of a tile from dloss/d(P^T X).

    With the CSR tile that `add_product` returned, entries off its support are left 0: a sparse
    projection has no derivative there.
    """
    if plan_Uh is None:
        return values_hK @ grad_UK.T
    sampled = torch.sparse.sampled_addmm(plan_Uh, grad_UK, values_hK.T, beta=0.0)
    return sampled.to_dense().T


def to_csr(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix in CSR, without torch's notice that its CSR tensors are new."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return matrix.to_sparse_csr()
