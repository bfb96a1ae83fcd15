"""What the product is measured against: the paper's algorithms as printed, and two libraries.

V rows (source tokens), U columns (target tokens). Each baseline has the signature
`(cost_VU, source_marginal_V, target_marginal_U, iterations) -> plan_VU`, in the cost's dtype.
"""

from collections.abc import Callable

import torch

Projection = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def sparsemax_by_sorting(z: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Algorithm 2 on every row of z (rows, K) with a scale (rows,); ordinary autograd."""
    scale = scale[:, None]
    ordered = z.sort(dim=1, descending=True).values
    sums = ordered.cumsum(1)
    ranks = torch.arange(1, z.shape[1] + 1, dtype=z.dtype)
    count = (scale + ranks * ordered > sums).sum(1, keepdim=True)
    threshold = (sums.gather(1, count - 1) - scale) / count
    return torch.relu(z - threshold)


def sparsemax_of_entmax(z: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The same projection by the `entmax` library: its total is 1, so z is divided by the scale."""
    from entmax import sparsemax

    return sparsemax(z / scale[:, None], dim=1) * scale[:, None]


def literal(
    cost_VU: torch.Tensor,
    source_marginal_V: torch.Tensor,
    target_marginal_U: torch.Tensor,
    iterations: int,
    sparsemax: Projection = sparsemax_by_sorting,
) -> torch.Tensor:
    """Algorithm 1, iterations k = 0..n-1, line by line; autograd goes through every iteration.

    Columns are projected as the rows of a transposed copy: torch sorts those twice as fast as
    strided columns.
    """
    mu, nu = source_marginal_V.to(cost_VU.dtype), target_marginal_U.to(cost_VU.dtype)
    P, Q, X = torch.zeros_like(cost_VU), torch.zeros_like(cost_VU), cost_VU
    for _ in range(iterations):
        Y = sparsemax(X + P, mu)
        P = X + P - Y
        X = sparsemax((Y + Q).T.contiguous(), nu).T
        Q = Y + Q - X
    return X


def literal_entmax(
    cost_VU: torch.Tensor,
    source_marginal_V: torch.Tensor,
    target_marginal_U: torch.Tensor,
    iterations: int,
) -> torch.Tensor:
    """Algorithm 1 with the sparsemax of `entmax`, which has a backward of its own."""
    return literal(cost_VU, source_marginal_V, target_marginal_U, iterations, sparsemax_of_entmax)


def pot(
    cost_VU: torch.Tensor,
    source_marginal_V: torch.Tensor,
    target_marginal_U: torch.Tensor,
    iterations: int = 0,
) -> torch.Tensor:
    """The limit of Algorithm 1 by POT: L-BFGS on the semi-dual until it improves no more, float64.

    Blondel et al. 2018, eq. 10. No gradient. `iterations` is unused: POT runs to convergence.
    """
    import ot

    problem = (source_marginal_V, target_marginal_U, -cost_VU.detach())
    a, b, cost = (tensor.double().numpy() for tensor in problem)
    plan = ot.smooth.smooth_ot_semi_dual(
        a, b, cost, reg=1.0, reg_type="l2", stopThr=1e-14, numItermax=20_000
    )
    return torch.from_numpy(plan).to(cost_VU.dtype)
