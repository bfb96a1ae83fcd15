"""The paper's algorithms, transcribed line by line in float64, as independent references.

They sort, store every iterate and differentiate with plain autograd, where the product uses
Newton thresholds and a closed-form backward.
"""

import torch


def sort_threshold(z: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """The thresholds of the rows of z (paper, Algorithm 2, as printed), (V,)."""
    ordered = torch.sort(z, dim=1, descending=True).values
    sums = torch.cumsum(ordered, dim=1)
    k = torch.arange(1, z.shape[1] + 1, dtype=z.dtype)
    scale = torch.as_tensor(scale, dtype=z.dtype).expand(len(z))[:, None]
    k_z = (scale + k * ordered > sums).sum(dim=1, keepdim=True)
    return ((sums.gather(1, k_z - 1) - scale) / k_z)[:, 0]


def sparsemax_rows(z: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 2 on every row of z: (projection, margin).

    `margin` is the smallest distance of an entry from its row's threshold. At an entry exactly
    there the projection has no derivative; the convention is the strict support, which is what
    relu's derivative (0 at 0) gives here. Where rounding separates a mathematically tied entry
    from its threshold by less than about 1e-13, two correct programs may disagree on membership:
    callers look at the margin before they compare gradients.
    """
    tau = sort_threshold(z, scale)[:, None]
    return torch.relu(z - tau), (z - tau).detach().abs().min()


def sparse_sinkhorn(
    C: torch.Tensor, mu: torch.Tensor, nu: torch.Tensor, iterations: int
) -> tuple[torch.Tensor, float]:
    """Algorithm 1 with k = 0..iterations-1: (plan, smallest margin of any projection)."""
    P, Q, X = torch.zeros_like(C), torch.zeros_like(C), C
    margins = []
    for _ in range(iterations):
        Y, row_margin = sparsemax_rows(X + P, mu)
        P = X + P - Y
        X_T, col_margin = sparsemax_rows((Y + Q).T, nu)
        X = X_T.T
        Q = Y + Q - X
        margins += [row_margin.item(), col_margin.item()]
    return X, min(margins)


def dense_sinkhorn(
    C: torch.Tensor, mu: torch.Tensor, nu: torch.Tensor, iterations: int
) -> torch.Tensor:
    """Softmax in place of sparsemax: normalise rows, then columns, of log P."""
    log_plan = C
    for _ in range(iterations):
        log_plan = torch.log_softmax(log_plan, dim=1) + mu.log()[:, None]
        log_plan = torch.log_softmax(log_plan, dim=0) + nu.log()
    return log_plan.exp()
