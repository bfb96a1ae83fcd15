"""What a plan's entries add up to: how it keeps its marginals, how sparse it is, its entropy.

Shapes: V rows of this rank, h rows of a tile, U columns. Sums are float64.
"""

import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot.kernels import library as kernels
from s2t2_dist.ot.native import library


class PlanSums:
    """Collects a plan tile by tile; `reduce` gives the numbers over all ranks."""

    def __init__(self, mu_V: torch.Tensor, nu_U: torch.Tensor):
        self.mu, self.nu = mu_V, nu_U
        self.col_sums = torch.zeros_like(nu_U)
        self.row_error, self.support, self.log_sum = nu_U.new_zeros(3, 1)

    def add(self, rows: slice, plan_hU: torch.Tensor) -> None:
        """Count a tile in (a row at least)."""
        mu = self.mu[rows]
        row_sums, col_sums, support = tile_sums(plan_hU)
        self.col_sums += col_sums
        self.row_error = torch.maximum(self.row_error, ((row_sums - mu).abs() / mu).max())
        self.support += support

    def add_entropy(self, plan_hU: torch.Tensor, mass: float) -> None:
        """Add a tile's sum of p log p, p = P / mass; entries of a plain P below 0 count as 0."""
        if _on_a_gpu(plan_hU):
            from s2t2_dist.ot.kernels import passes  # imports Triton

            self.log_sum += passes.log_sum(plan_hU, mass)
            return
        p = plan_hU.clamp_min(0).div_(mass)
        # Where p is 0 any number does for its logarithm; that of 0 itself is slow.
        self.log_sum += p.clamp_min(torch.finfo(p.dtype).tiny).log_().mul_(p).sum()

    def reduce(self, comm: Comm) -> tuple[float, float, float, float]:
        """row_error, col_error, support and the sum of p log p, over all ranks (one collective)."""
        row_errors = torch.zeros(comm.size, dtype=torch.float64, device=self.nu.device)
        row_errors[comm.rank] = self.row_error
        sums = comm.sum_(torch.cat((self.col_sums, self.support, self.log_sum, row_errors)))
        U = len(self.nu)
        col_error = ((sums[:U] - self.nu).abs() / self.nu).max()
        ends = sums[U + 2 :].max(), col_error, *sums[U : U + 2]
        return tuple(torch.stack(ends).tolist())  # at once: each read waits for the device


def _on_a_gpu(plan_hU: torch.Tensor) -> bool:
    """Whether Triton's kernels take it; on a CPU, where they are for tests, native code does."""
    return plan_hU.is_cuda and plan_hU.is_contiguous() and kernels.can_call(plan_hU)


def tile_sums(plan_hU: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Row sums (h,), column sums (U,) and the number (1,) of entries that are not 0, float64.

    Native code makes the sums in the plan's dtype over blocks, and in float64 over those.
    """
    if _on_a_gpu(plan_hU):
        from s2t2_dist.ot.kernels import passes  # imports Triton

        return passes.tile_sums(plan_hU)
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
