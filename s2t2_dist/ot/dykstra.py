"""Sparse Sinkhorn: the paper's Algorithm 1, streamed over tiles of the cost matrix.

With Z_0 = C and W_{-1} = sigma_{-1} = 0, for k = 0..n-1:

    tau_k:    row sums of max(Z_k - tau_k, 0) are mu
    W_k     = max(Z_k - tau_k, 0)   + min(W_{k-1}, sigma_{k-1})
    sigma_k:  column sums of max(W_k - sigma_k, 0) are nu
    Z_{k+1} = max(W_k - sigma_k, 0) + min(Z_k, tau_k)

and the plan is max(W_{n-1} - sigma_{n-1}, 0). The second terms are Dykstra's corrections Q and P;
tau_k and sigma_k are `row_threshold[k]` and `col_threshold[k]`.
Every entry of every iterate is a function of its own C and of the thresholds of its row and column:
n (V + U) numbers hold a solve, and each pass computes the iterates that it needs from C again. So
the work grows with the square of n; past a few iterations `dual` is the better choice.

Shapes: V rows of this rank, U columns.
"""

from dataclasses import dataclass

import torch

from s2t2_dist.ot.dykstra_passes import ColumnSearches, DykstraPasses, State
from s2t2_dist.ot.kernels import library as kernels
from s2t2_dist.ot.native import library
from s2t2_dist.ot.native.passes import MOST_ITERATIONS, NativeDykstra
from s2t2_dist.ot.problem import Problem, Thresholds, check_iterations
from s2t2_dist.ot.tiles import FUSED, check_backend


@dataclass(frozen=True)
class Dykstra:
    """The method `dykstra`: n iterations, for one rank and for many.

    Communication: per iteration one sum of three U-vectors and, per further Newton step, one of
    two vectors over the columns that still move.

    Args:
        iterations: n, at least 1; the paper takes 3.
        backend: "native" (a CPU with a C++ compiler, at most 4 iterations), "triton" (float32 on a
            GPU, at most 15 iterations), "compile" (torch.compile), "eager", or "auto": native or
            eager on a CPU; triton, compile or eager on other devices.
    """

    iterations: int = 3
    backend: str = "auto"

    def __post_init__(self):
        check_iterations(self.iterations)
        check_backend(self.backend)

    def solve(self, problem: Problem, start: Thresholds | None = None) -> "DykstraSolution":
        """See `Solver`.

        Raises:
            ValueError: the backend native or triton cannot do this.
        """
        passes = make_passes(State.empty(problem.cost_VU, self.iterations), self.backend)
        for k in range(self.iterations):
            _iterate(k, problem, passes, start)
        return DykstraSolution(problem, passes)


class DykstraSolution:
    """The thresholds of n iterations, the plan and the gradient that they give."""

    converged = None

    def __init__(self, problem: Problem, passes: ColumnSearches):
        self.problem, self.passes = problem, passes

    @property
    def iterations(self) -> int:
        return len(self.passes.state.row_threshold)

    @property
    def state(self) -> Thresholds:
        """Those of C less each row's maximum: (n, V) and (n, U)."""
        return Thresholds(self.passes.state.row_threshold, self.passes.state.col_threshold)

    def plan(self, rows: slice) -> torch.Tensor:
        """The plan of a block of this rank's rows, (h, U)."""
        return self.passes.plan(rows)

    def backward(self, grad_VU: torch.Tensor, out_VU: torch.Tensor) -> None:
        """Write dloss/dC over out_VU, from dloss/dP: the projections' Jacobians in reverse.

        Both may be one tensor. Communication: one U-vector sum per iteration.

        For k = n-1..0, with gP = gQ = 0 at first and J h = h - mean over the support, 0 off it:
        gW = J_column(gX - gQ) + gQ;  gZ = J_row(gW - gP) + gP;  then gX = gP = gZ and gQ = gW.
        Each sweep over the rows undoes one row projection and sums for the column's after it.
        """
        state, n = self.passes.state, self.iterations
        row_mean, col_mean = map(torch.empty_like, self.state)
        for known in range(n):
            sums = self.passes.backward(grad_VU, out_VU, col_mean, row_mean, known)
            sums = self.problem.comm.sum_(sums)
            col_mean[known] = sums / state.col_count[n - 1 - known]
        self.passes.backward(grad_VU, out_VU, col_mean, row_mean, n)


def make_passes(state: State, backend: str) -> ColumnSearches:
    """How the rows are swept: the one place that looks at the device."""
    n, device, dtype = len(state.row_threshold), state.cost.device, state.cost.dtype
    fits = device.type == "cpu" and n <= MOST_ITERATIONS
    if backend == "native" and not fits:
        raise ValueError(
            f"the backend native takes a CPU and at most {MOST_ITERATIONS} iterations, found "
            f"{device} and {n}; take auto"
        )
    if backend == "native" or (backend == "auto" and fits and library.can_call(state.cost.new())):
        return NativeDykstra(state)
    fits = n <= kernels.MOST_ITERATIONS and kernels.can_call(state.cost)
    if backend == "triton" and not fits:
        raise ValueError(
            f"the backend triton takes float32 on a GPU with Triton and at most "
            f"{kernels.MOST_ITERATIONS} iterations, found {dtype} on {device} and {n}; take auto"
        )
    if backend == "triton" or (backend == "auto" and fits and state.cost.is_cuda):
        from s2t2_dist.ot.kernels.passes import TritonDykstra  # imports Triton

        return TritonDykstra(state)
    return DykstraPasses(state, fused=FUSED.get(backend))


def _iterate(k: int, problem: Problem, passes: ColumnSearches, start: Thresholds | None) -> None:
    """Find the thresholds of iteration k. The columns' first step shares the rows' sweep."""
    state, mu, nu = passes.state, problem.mu_V, problem.nu_U
    state.row_threshold[k], col_guess = _guesses(k, state, start)
    sums = passes.search(k, mu, col_guess)
    rows = sums.new_full((1,), len(mu))  # a kernel: a copy to a device would wait for it
    reduced = problem.comm.sum_(torch.cat((sums.flatten(), rows)))
    sums = reduced[:-1].view_as(sums)
    # Left of every threshold, even where a float32 sum is a little off: with all of its entries
    # in the support, a column's would be (total - nu) / rows.
    floor = (sums[2] - 1e-3 * sums[2].abs() - 2 * nu) / reduced[-1]
    state.col_threshold[k], state.col_count[k] = passes.search_columns(
        k, problem.comm, nu, col_guess, floor.to(col_guess.dtype), sums[:2]
    )


def _guesses(k, state, start):
    """Where the searches of iteration k begin."""
    if start is not None:
        return start.row_threshold[k], start.col_threshold[k]
    if k:
        return state.row_threshold[k - 1], state.col_threshold[k - 1]
    # W_0 is not negative, and its column sums are those of a plan: 0 is near the threshold.
    return -torch.inf, torch.zeros_like(state.col_threshold[0])
