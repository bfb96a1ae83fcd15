"""The dual method: quadratic transport to its limit, through V + U potentials alone.

The plan nearest to C with row sums mu and column sums nu is P = max(C - a_i - b_j, 0), where the
potentials a and b maximise a concave function of V + U numbers. Maximising it exactly in a and in
b in turn is the nonlinear Gauss-Seidel method of Lorenz, Manns and Meyer 2021 ("Quadratically
regularized optimal transport"); each half is one threshold search per row or column, as in the
paper's SPARSEMAX (Algorithm 2): a_i is the threshold of row i of C - b, b_j that of column j of
C - a. How the plan is differentiated is in `dual_gradient`.

Shapes: V rows of this rank, U columns.
"""

from dataclasses import dataclass

import torch

from s2t2_dist.ot.dual_gradient import write_gradient
from s2t2_dist.ot.dual_passes import DualPasses, plan_pass
from s2t2_dist.ot.kernels import library as kernels
from s2t2_dist.ot.native import library
from s2t2_dist.ot.native.passes import NativeDual
from s2t2_dist.ot.problem import Problem, Thresholds, check_iterations
from s2t2_dist.ot.tiles import FUSED, check_backend


@dataclass(frozen=True)
class Dual:
    """The method `dual`: the plan that minimises |P - C|^2 / 2 with given row and column sums.

    One iteration solves for every row's potential, then for every column's, exactly: afterwards
    the columns hold up to rounding and the rows' error shrinks by a factor that depends on how
    the support connects rows and columns. Nothing of size V x U is kept but the cost itself.

    Communication: one maximum of U + 1 numbers per iteration (and one more with a tolerance); one
    sum of two numbers per column that is still searched for each Newton step of the columns.

    Args:
        iterations: how many to take, at least 1; with a tolerance, the most to take.
        tolerance: largest relative error of a row sum at which to stop. Potentials resolve 1e-7
            (float32) or 2e-16 (float64) of the spread of C, and so the row sums cannot be closer.
        backend: how rows are swept, as for `Dykstra`; native takes any number of iterations.
    """

    iterations: int
    tolerance: float | None = None
    backend: str = "auto"

    def __post_init__(self):
        check_iterations(self.iterations)
        check_backend(self.backend)

    def solve(self, problem: Problem, start: Thresholds | None = None) -> "DualSolution":
        """See `Solver`."""
        cost, passes = problem.cost_VU, make_passes(problem, self.backend)
        if start is None:  # left of every root, with columns at 0
            row_V1, col_U = -passes.mu_V1.to(cost.dtype), cost.new_zeros(cost.shape[1])
        else:
            row_V1, col_U = (part.to(cost).flatten() for part in start)
            row_V1 = row_V1[:, None]
        taken, converged = 0, None
        while self.tolerance is not None or taken < self.iterations:
            found = passes.search_rows(row_V1, col_U)
            reduced = problem.comm.max_(torch.cat((found.top_U, found.error)))
            if self.tolerance is not None and taken:
                # The search began with the row sums of the present plan, which is then kept.
                converged = reduced[-1].item() <= self.tolerance
                if converged or taken == self.iterations:
                    break
            row_V1 = found.row_V1
            sums, top_U = problem.comm.sum_(found.sums), reduced[:-1]
            col_U = passes.search_columns(problem.comm, problem.nu_U, row_V1, col_U, top_U, sums)
            taken += 1
        return DualSolution(problem, passes, row_V1, col_U, taken, converged)


@dataclass(eq=False)
class DualSolution:
    """Potentials, and the plan and gradient that they give.

    Attributes:
        row_V1, col_U: with a_i = row_i + max_j C_ij and b = col, P = max(C - a_i - b_j, 0).
        iterations: how many were taken.
        converged: whether the tolerance was met; None without one.
        cg_iterations, cg_residual: of the last `backward`: steps of conjugate gradients and the
            size of what they left, relative to the sums of |dL/dP - row mean| over each column.
    """

    problem: Problem
    passes: DualPasses
    row_V1: torch.Tensor
    col_U: torch.Tensor
    iterations: int
    converged: bool | None
    cg_iterations: int = 0
    cg_residual: float = 0.0

    @property
    def state(self) -> Thresholds:
        """The potentials, (1, V) and (1, U)."""
        return Thresholds(self.row_V1.T, self.col_U[None])

    def plan(self, rows: slice) -> torch.Tensor:
        """The (h, U) rows of P; entries at or below the potentials are exactly zero."""
        return self.passes.run(plan_pass, *self.passes.tile(rows, self.row_V1, self.col_U))

    def backward(self, grad_VU: torch.Tensor, out_VU: torch.Tensor) -> None:
        """Write dL/dC over out_VU, from dL/dP; see `write_gradient`."""
        potentials = self.row_V1, self.col_U
        self.cg_iterations, self.cg_residual = write_gradient(
            self.passes, potentials, self.problem.comm, grad_VU, out_VU
        )


def make_passes(problem: Problem, backend: str) -> DualPasses:
    """How the rows are swept: the one place that looks at the device."""
    cost = problem.cost_VU
    if backend in ("auto", "native") and library.can_call(cost):
        return NativeDual(problem)
    fits = kernels.can_call(cost)
    if backend == "triton" and not fits:
        raise ValueError(
            f"the backend triton takes float32 on a GPU with Triton, found {cost.dtype} on "
            f"{cost.device}; take auto"
        )
    if backend == "triton" or (backend == "auto" and fits and cost.is_cuda):
        from s2t2_dist.ot.kernels.passes import TritonDual  # imports Triton

        return TritonDual(problem)
    return DualPasses(problem, FUSED.get(backend))
