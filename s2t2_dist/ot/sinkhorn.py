"""Sinkhorn solvers: from a cost matrix to a plan with given row and column sums.

V rows (source tokens, this rank's part of them), U columns (target tokens); the rows may be
spread over ranks. A solver is a class: making it solves, `plan(rows)` gives rows of the plan, and
`backward(grad, out)` turns dloss/dP into dloss/dC.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.autograd.function import once_differentiable

from s2t2_dist.comm import Comm
from s2t2_dist.errors import ConfigError, DataError
from s2t2_dist.ot.dual import Dual
from s2t2_dist.ot.dykstra import Dykstra
from s2t2_dist.ot.entropic import Entropic
from s2t2_dist.ot.simplex import NOT_FINITE, is_finite
from s2t2_dist.ot.sums import PlanSums
from s2t2_dist.ot.tiles import new_matrix

METHODS = ("dykstra", "dual", "dense")
MASS_TOLERANCE = 1e-5  # relative; far above float32 rounding of a sum, far below a wrong unit

Thresholds = tuple[torch.Tensor, torch.Tensor]


class Solution(Protocol):
    """What every solver offers once it is made; `state` is where a next solve may start."""

    state: Thresholds | None

    def plan(self, rows: slice) -> torch.Tensor:
        """(h, U): a block of this rank's rows of P, without autograd."""

    def backward(self, grad_VU: torch.Tensor, out_VU: torch.Tensor) -> None:
        """Write dloss/dC over out_VU, from dloss/dP; both may be one tensor. A collective."""


@dataclass(frozen=True, eq=False)
class SinkhornResult:
    """A plan and how well it keeps its marginals. The numbers are over the rows of all ranks.

    Attributes:
        plan: (V_local, U), the units of the marginals; differentiable in the cost.
        row_error: largest relative error of a row sum.
        col_error: largest relative error of a column sum.
        support: number of entries that are not zero.
    """

    plan: torch.Tensor
    row_error: float
    col_error: float
    support: int


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
        tolerance: of `dual`: the largest relative error of a row sum at which to stop.
        backend: of `dykstra` and `dual`: how passes are computed, see `Dykstra`.

    Raises:
        ConfigError: an unknown method, fewer than 1 iteration, or a tolerance without `dual`.
        DataError: shapes that do not fit, entries that are not finite, a marginal that is negative
            or holds no mass, or row and column sums of different totals. Every rank raises it.
    """
    comm = comm or Comm()
    check_method(method, iterations, tolerance)
    mu = source_marginal_V.to(cost_VU.device, torch.float64)
    nu = target_marginal_U.to(cost_VU.device, torch.float64)
    check_cost(cost_VU, comm)
    check_marginals(cost_VU.shape, mu, nu, comm)
    options = {"method": method, "iterations": iterations, "tolerance": tolerance}
    options |= {"backend": backend}
    rows, columns = mu > 0, nu > 0
    whole = bool(rows.all() and columns.all())
    cost = cost_VU if whole else cost_VU[rows][:, columns]
    mu, nu = mu[rows], nu[columns]  # contiguous copies: backward needs them as they are now
    plan = _Solve.apply(cost, mu, nu, comm, options)
    sums = PlanSums(mu, nu)
    if len(plan):
        sums.add(slice(None), plan.detach())
    row_error, col_error, support, _ = sums.reduce(comm)
    if not whole:
        wide = plan.new_zeros(len(plan), len(columns)).index_copy(1, columns.nonzero()[:, 0], plan)
        plan = torch.zeros_like(cost_VU).index_copy(0, rows.nonzero()[:, 0], wide)
    return SinkhornResult(plan, row_error, col_error, int(support))


def solve(
    cost_VU: torch.Tensor,
    mu_V: torch.Tensor,
    nu_U: torch.Tensor,
    comm: Comm,
    *,
    method: str,
    iterations: int,
    tolerance: float | None = None,
    start: Thresholds | None = None,
    backend: str = "auto",
) -> Solution:
    """A solver's solution: what `sparse_sinkhorn` uses, without its checks and without autograd.

    Args:
        cost_VU, mu_V, nu_U: finite; float64 marginals, positive, on the same device.
        start: the state of a solution of the same method and iterations, to start from.
    """
    problem = (cost_VU.detach(), mu_V, nu_U, comm)
    if method == "dense":
        return Entropic(*problem, iterations=iterations)
    if method == "dual":
        options = {"tolerance": tolerance, "start": start, "backend": backend}
        return Dual(*problem, iterations=iterations, **options)
    return Dykstra(*problem, iterations=iterations, start=start, backend=backend)


def check_method(method: str, iterations: int, tolerance: float | None) -> None:
    """Raise a ConfigError unless the options name a solver and fit it."""
    if method not in METHODS:
        raise ConfigError(f"unknown Sinkhorn method {method!r}; choose one of {sorted(METHODS)}")
    if iterations < 1:
        raise ConfigError(f"iterations is {iterations}; at least 1 is needed")
    if tolerance is not None and method != "dual":
        raise ConfigError(f"a tolerance is for the method dual; {method} takes its iterations")


def check_cost(cost_VU: torch.Tensor, comm: Comm) -> None:
    """Raise a DataError, on every rank, unless the rows of all ranks can be solved for."""
    if cost_VU.dtype not in (torch.float32, torch.float64):
        raise DataError(f"cost is {cost_VU.dtype}; thresholds need float32 or float64")
    bad = torch.tensor([float(not is_finite(cost_VU))], device=cost_VU.device)
    if comm.max_(bad).item():
        raise DataError(f"cost {NOT_FINITE}; is the learning rate too high?")


def check_marginals(shape: torch.Size, mu: torch.Tensor, nu: torch.Tensor, comm: Comm) -> None:
    """Raise a DataError, on every rank, unless the marginals fit a cost of this rank's shape."""
    if len(shape) != 2 or tuple(shape) != (*mu.shape, *nu.shape):
        found = f"{tuple(shape)}, {tuple(mu.shape)} and {tuple(nu.shape)}"
        raise DataError(f"cost and marginals have shapes {found}; expected (V, U), (V,) and (U,)")
    local = [float(_is_bad(mu)), float(_is_bad(nu)), mu.sum().item()]
    reduced = comm.sum_(torch.tensor(local, dtype=torch.float64, device=mu.device)).tolist()
    bad_mu, bad_nu, mass = reduced
    if bad_mu or bad_nu:
        which = "target" if bad_nu else "source"
        raise DataError(f"{which} marginal must be finite and not negative")
    total = nu.sum().item()
    if not mass > 0 or not math.isclose(mass, total, rel_tol=MASS_TOLERANCE):
        raise DataError(
            f"source marginal sums to {mass:.7g}, target to {total:.7g}; both must be the same "
            "and positive"
        )


def _is_bad(marginal: torch.Tensor) -> bool:
    return not bool(((marginal >= 0) & (marginal < math.inf)).all())


class _Solve(torch.autograd.Function):
    """The dense plan of a solution, for autograd."""

    @staticmethod
    def forward(ctx, cost, mu, nu, comm, options):
        ctx.save_for_backward(cost)  # backward looks at it again: autograd checks that it is kept
        ctx.solution = solve(cost, mu, nu, comm, **options)
        return ctx.solution.plan(slice(0, len(cost)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_plan):
        _ = ctx.saved_tensors
        grad_cost = new_matrix(grad_plan)
        ctx.solution.backward(grad_plan.contiguous(), grad_cost)
        return grad_cost, *[None] * 4
