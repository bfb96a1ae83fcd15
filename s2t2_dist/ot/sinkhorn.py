"""Sinkhorn: from a cost matrix to a plan with given row and column sums.

V rows (source tokens, this rank's part of them), U columns (target tokens); the rows may be
spread over ranks.
"""

from dataclasses import dataclass, replace

import torch
from torch.autograd.function import once_differentiable

from s2t2_dist.comm import Comm
from s2t2_dist.ot.dual import Dual
from s2t2_dist.ot.dykstra import Dykstra
from s2t2_dist.ot.entropic import Entropic
from s2t2_dist.ot.plain import Plain
from s2t2_dist.ot.problem import Problem, Solution, Solver, check_cost, check_marginals
from s2t2_dist.ot.sums import PlanSums
from s2t2_dist.ot.tiles import new_matrix

METHODS = ("dykstra", "dual", "dense", "plain")  # the ways to learn P


@dataclass(frozen=True, eq=False)
class SinkhornResult:
    """A plan and how well it keeps its marginals. The numbers are over the rows of all ranks.

    Attributes:
        plan: (V_local, U), the units of the marginals; differentiable in the cost.
        row_error: largest relative error of a row sum.
        col_error: largest relative error of a column sum.
        support: number of entries that are not zero.
        iterations: how many were taken.
        converged: whether the tolerance was met; None where none was asked for.
    """

    plan: torch.Tensor
    row_error: float
    col_error: float
    support: int
    iterations: int
    converged: bool | None

    @property
    def status(self) -> str:
        """One line: how the solve ended, and what may be done about it."""
        errors = f"row error {self.row_error:.1e}, column error {self.col_error:.1e}"
        if self.converged is None:
            return f"all {self.iterations} iterations taken, no tolerance asked for: {errors}"
        if self.converged:
            return f"converged in {self.iterations} iterations: {errors}"
        return (
            f"not converged in {self.iterations} iterations: {errors}; allow more iterations or a "
            "larger tolerance"
        )


def make_solver(
    method: str, iterations: int = 3, tolerance: float | None = None, backend: str = "auto"
) -> Solver:
    """The solver of a name of METHODS.

    Args:
        method: "dykstra" (S2T2), "dual" (its limit), "dense" (softmax in place of sparsemax) or
            "plain" (no constraint: P is the cost itself, and takes no iterations).
        iterations: at least 1; with a tolerance, the most to take.
        tolerance: of `dual`: the largest relative error of a row sum at which to stop.
        backend: of `dykstra` and `dual`: how passes are computed, see `Dykstra`.

    Raises:
        ValueError: an unknown method, or options that do not fit it.
    """
    if method not in METHODS:
        raise ValueError(f"unknown Sinkhorn method {method!r}; choose one of {', '.join(METHODS)}")
    if tolerance is not None and method != "dual":
        raise ValueError(f"a tolerance is for the method dual; {method} takes its iterations")
    if method == "dykstra":
        return Dykstra(iterations, backend)
    if method == "dual":
        return Dual(iterations, tolerance, backend)
    return Entropic(iterations) if method == "dense" else Plain()


def sparse_sinkhorn(
    cost_VU: torch.Tensor,
    source_marginal_V: torch.Tensor,
    target_marginal_U: torch.Tensor,
    iterations: int = 3,
    method: str = "dykstra",
    comm: Comm | None = None,
    *,
    tolerance: float | None = None,
    backend: str = "auto",
) -> SinkhornResult:
    """The plan nearest to a cost matrix among those with the given row and column sums.

    `dykstra` is the paper's Algorithm 1; its limit minimises `|P - C|^2 / 2`, and a truncated run
    keeps the column sums and leaves an error in the row sums. `dual` goes to the same limit by
    steps in the potentials, and its gradient is the limit's. `dense` normalises exp(C) in turn.

    Rows and columns of no mass get zeros and no gradient, as if they were not there.

    float32 resolves an entry of the plan to 1e-5 of the mean row mass, or to 1e-6 of the largest
    range of a row (its maximum less its minimum) where that is more.

    Every rank calls this together, and calls backward together: both hold collectives.

    Args:
        cost_VU: (V_local, U) float32 or float64; this rank's rows, perhaps none.
        source_marginal_V: (V_local,) row sums of those rows, not negative.
        target_marginal_U: (U,) column sums, not negative, the same on every rank.
        iterations: n, at least 1 (the paper takes 3); with a tolerance, the most to take.
        method: "dykstra", "dual" or "dense".
        comm: the ranks that share the rows; one rank by default.
        tolerance, backend: see `make_solver`.

    Raises:
        ValueError: options that `make_solver` refuses, or the method plain, which has no marginals;
            shapes that do not fit, entries that are not finite, a marginal that is negative or
            holds no mass, or row and column sums of different totals. Every rank raises it.
    """
    comm = comm or Comm()
    solver = make_solver(method, iterations, tolerance, backend)
    if isinstance(solver, Plain):
        raise ValueError("the method plain keeps no marginals: choose dykstra, dual or dense")
    mu = source_marginal_V.to(cost_VU.device, torch.float64)
    nu = target_marginal_U.to(cost_VU.device, torch.float64)
    check_cost(cost_VU, comm)
    check_marginals(cost_VU.shape, mu, nu, comm)
    rows, columns = mu > 0, nu > 0
    whole = bool(rows.all() and columns.all())
    cost = cost_VU if whole else cost_VU[rows][:, columns]
    found = _result(solver, cost, mu[rows], nu[columns], comm)
    return found if whole else replace(found, plan=_with_zeros(found.plan, rows, columns))


def _result(
    solver: Solver, cost_VU: torch.Tensor, mu_V: torch.Tensor, nu_U: torch.Tensor, comm: Comm
) -> SinkhornResult:
    """For positive marginals, which nobody changes before the backward."""
    with torch.no_grad():
        solution = solver.solve(Problem(cost_VU.detach(), mu_V, nu_U, comm))
    plan = _DensePlan.apply(cost_VU, solution)
    sums = PlanSums(mu_V, nu_U)
    if len(plan):
        sums.add(slice(None), plan.detach())
    row_error, col_error, support, _ = sums.reduce(comm)
    status = solution.iterations, solution.converged
    return SinkhornResult(plan, row_error, col_error, int(support), *status)


def _with_zeros(plan: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """A plan of some rows and columns, with zeros in the others."""
    wide = plan.new_zeros(len(plan), len(columns)).index_copy(1, columns.nonzero()[:, 0], plan)
    return wide.new_zeros(len(rows), len(columns)).index_copy(0, rows.nonzero()[:, 0], wide)


class _DensePlan(torch.autograd.Function):
    """All of this rank's rows of a solution's plan, as a function of the cost."""

    @staticmethod
    def forward(ctx, cost: torch.Tensor, solution: Solution):
        ctx.save_for_backward(cost)  # backward looks at it again: autograd checks that it is kept
        ctx.solution = solution
        return solution.plan(slice(0, len(cost)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_plan):
        _ = ctx.saved_tensors
        grad_cost = new_matrix(grad_plan)
        ctx.solution.backward(grad_plan.contiguous(), grad_cost)
        return grad_cost, None
