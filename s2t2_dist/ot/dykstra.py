"""Sparse Sinkhorn: the paper's Algorithm 1, streamed over tiles of the cost matrix.

With Z_0 = C and W_{-1} = sigma_{-1} = 0, for k = 0..n-1:

    tau_k:    row sums of max(Z_k - tau_k, 0) are mu
    W_k     = max(Z_k - tau_k, 0)   + min(W_{k-1}, sigma_{k-1})
    sigma_k:  column sums of max(W_k - sigma_k, 0) are nu
    Z_{k+1} = max(W_k - sigma_k, 0) + min(Z_k, tau_k)

and the plan is max(W_{n-1} - sigma_{n-1}, 0). The second terms are Dykstra's corrections Q and P.
Every entry of every iterate is a function of its own C and of the thresholds of its row and column:
n (V + U) numbers hold a solve, and each pass computes the iterates that it needs from C again. So
the work grows with the square of n; past a few iterations `dual` is the better choice.

Shapes: V rows of this rank, U columns; in a pass, V is the height of a tile.
"""

import torch

from s2t2_dist.comm import Comm
from s2t2_dist.errors import ConfigError
from s2t2_dist.ot.native import library
from s2t2_dist.ot.native.passes import MOST_ITERATIONS, NativePasses
from s2t2_dist.ot.passes import State, TorchPasses
from s2t2_dist.ot.simplex import NewtonSearch
from s2t2_dist.ot.tiles import FUSED

BACKENDS = ("auto", "native", "compile", "eager")


class Dykstra:
    """A solve of n iterations. One class for one rank and for many.

    Communication: per iteration one sum of three U-vectors and, per further Newton step, one of
    two vectors over the columns that still move; in `backward`, one U-vector sum per iteration.

    Args:
        cost_VU: this rank's rows of C, finite, float32 or float64.
        mu_V, nu_U: positive marginals, float64, on C's device.
        comm: the ranks that share the rows.
        iterations: n, at least 1.
        start: the `state` of a former solve of as many iterations; its thresholds are the first
            guesses.
        backend: "native" (a CPU with a C++ compiler, at most 4 iterations), "compile"
            (torch.compile), "eager", or "auto": native or eager on a CPU, compile or eager on
            other devices.
    """

    def __init__(
        self,
        cost_VU: torch.Tensor,
        mu_V: torch.Tensor,
        nu_U: torch.Tensor,
        comm: Comm,
        *,
        iterations: int,
        start: tuple[torch.Tensor, torch.Tensor] | None = None,
        backend: str = "auto",
    ):
        V, U = cost_VU.shape
        self.comm, self.nu = comm, nu_U
        self._found = State(
            cost=cost_VU,
            shift=cost_VU.new_empty(V),
            tau=cost_VU.new_empty(iterations, V),
            sigma=cost_VU.new_empty(iterations, U),
            row_count=mu_V.new_empty(iterations, V),
            col_count=nu_U.new_empty(iterations, U),
        )
        self.passes = make_passes(self._found, backend)
        for k in range(iterations):
            self._iterate(k, mu_V, *self._guesses(k, start))

    @property
    def state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """tau (n, V) and sigma (n, U) of C less each row's maximum: where another may `start`."""
        return self._found.tau, self._found.sigma

    def plan(self, rows: slice) -> torch.Tensor:
        """The plan of a block of this rank's rows, (h, U)."""
        return self.passes.plan(rows)

    def backward(self, grad_VU: torch.Tensor, out_VU: torch.Tensor) -> None:
        """Write dloss/dC over out_VU, from dloss/dP: the projections' Jacobians in reverse.

        Both may be one tensor.

        For k = n-1..0, with gP = gQ = 0 at first and J h = h - mean over the support, 0 off it:
        gW = J_column(gX - gQ) + gQ;  gZ = J_row(gW - gP) + gP;  then gX = gP = gZ and gQ = gW.
        Each sweep over the rows undoes one row projection and sums for the column's after it.
        """
        found = self._found
        iterations = len(found.tau)
        col_mean, row_mean = torch.empty_like(found.sigma), torch.empty_like(found.tau)
        for known in range(iterations):
            sums = self.comm.sum_(self.passes.backward(grad_VU, out_VU, col_mean, row_mean, known))
            col_mean[known] = sums / found.col_count[iterations - 1 - known]
        self.passes.backward(grad_VU, out_VU, col_mean, row_mean, iterations)

    def _guesses(self, k, start):
        """Where the searches of iteration k begin."""
        if start is not None:
            return start[0][k], start[1][k]
        if k:
            return self._found.tau[k - 1], self._found.sigma[k - 1]
        # W_0 is not negative, and its column sums are those of a plan: 0 is near the threshold.
        return -torch.inf, torch.zeros_like(self._found.sigma[0])

    def _iterate(self, k, mu, row_guess, col_guess):
        """tau_k and sigma_k. The first step of the columns shares the rows' sweep."""
        self._found.tau[k] = row_guess
        sums = self.passes.search(k, mu, col_guess)
        reduced = self.comm.sum_(torch.cat((sums.flatten(), sums.new_tensor([len(mu)]))))
        count, excess, total = reduced[:-1].view_as(sums)
        # Left of every threshold, even where a float32 sum is a little off: with all of its entries
        # in the support, a column's would be (total - nu) / rows.
        floor = (total - 1e-3 * total.abs() - 2 * self.nu) / reduced[-1]
        search = NewtonSearch(None, self.nu, col_guess, floor.to(col_guess.dtype))
        moving = search.update(count, excess)
        while len(moving):
            sums = self.passes.column_sums(k, search.threshold, moving)
            moving = search.update(*self.comm.sum_(sums))
        self._found.sigma[k], self._found.col_count[k] = search.threshold, search.count


def make_passes(state: State, backend: str) -> TorchPasses | NativePasses:
    """How the rows are swept: the one place that looks at the device."""
    fits = state.cost.is_cpu and len(state.tau) <= MOST_ITERATIONS
    if backend == "native" and not fits:
        raise ConfigError(
            f"the backend native takes a CPU and at most {MOST_ITERATIONS} iterations, found "
            f"{state.cost.device} and {len(state.tau)}; take auto"
        )
    if backend == "native" or (backend == "auto" and fits and library.can_call(state.cost.new())):
        return NativePasses(state)
    return TorchPasses(state, fused=FUSED.get(backend))
