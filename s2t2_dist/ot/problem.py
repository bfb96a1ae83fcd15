"""What a solver solves and what it gives back: the interface that every solver keeps.

A solver is a value: its options and nothing else, such as `Dykstra(iterations=3)`. `solve` takes
a `Problem` to a `Solution`, which makes rows of the plan P and turns dloss/dP into dloss/dC.

Shapes: V rows (source tokens; of this rank, since rows may be spread over ranks), U columns
(target tokens), h rows of a block.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot.simplex import NOT_FINITE, check_dtype, is_finite

MASS_TOLERANCE = 1e-5  # relative; far above float32 rounding of a sum, far below a wrong unit


@dataclass(frozen=True, eq=False)
class Problem:
    """A cost and the marginals of its plan. Not checked: see `check_cost` and `check_marginals`.

    Attributes:
        cost_VU: C, this rank's rows, perhaps none: finite, float32 or float64, without autograd.
            It must not change before the solution's `backward`.
        mu_V: positive row sums in the units of the cost, float64, on the cost's device.
        nu_U: positive column sums, the same on every rank and of mu's total.
        comm: the ranks that share the rows.
    """

    cost_VU: torch.Tensor
    mu_V: torch.Tensor
    nu_U: torch.Tensor
    comm: Comm


class Thresholds(NamedTuple):
    """Where the searches of a solve ended, and where those of a next one may start.

    Attributes:
        row_threshold: (n, V) of the rows of C less each row's maximum; n is the solver's.
        col_threshold: (n, U), the same on every rank.
    """

    row_threshold: torch.Tensor
    col_threshold: torch.Tensor


class Solution(Protocol):
    """A plan that was found, and its gradient.

    Attributes:
        state: for a next solve with a cost nearby; None where there is nothing to start from.
        iterations: how many were taken.
        converged: whether the tolerance was met; None where none was asked for.
    """

    state: Thresholds | None
    iterations: int
    converged: bool | None

    def plan(self, rows: slice) -> torch.Tensor:
        """(h, U): a block of this rank's rows of P, without autograd."""

    def backward(self, grad_VU: torch.Tensor, out_VU: torch.Tensor) -> None:
        """Write dloss/dC over out_VU, from dloss/dP; both may be one tensor. A collective."""


class Solver(Protocol):
    """Options of one method. Raises ValueError when made with options that cannot be."""

    def solve(self, problem: Problem, start: Thresholds | None = None) -> Solution:
        """Find the plan. A collective.

        Args:
            start: the `state` of a solution by an equal solver: it changes how long the searches
                take, and what they find only by rounding.
        """


def check_iterations(iterations: int) -> None:
    """Raise a ValueError unless a solver can take so many."""
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}; at least 1 is needed")


def check_cost(cost_VU: torch.Tensor, comm: Comm) -> None:
    """Raise a ValueError, on every rank, unless the rows of all ranks can be solved for."""
    check_dtype(cost_VU, "cost")
    bad = (~is_finite(cost_VU)).float()[None]
    if comm.max_(bad).item():
        raise ValueError(f"cost {NOT_FINITE}")


def check_marginals(shape: torch.Size, mu: torch.Tensor, nu: torch.Tensor, comm: Comm) -> None:
    """Raise a ValueError, on every rank, unless the marginals fit a cost of this rank's shape."""
    if len(shape) != 2 or tuple(shape) != (*mu.shape, *nu.shape):
        found = f"{tuple(shape)}, {tuple(mu.shape)} and {tuple(nu.shape)}"
        raise ValueError(f"cost and marginals have shapes {found}; expected (V, U), (V,) and (U,)")
    local = [float(_is_bad(mu)), float(_is_bad(nu)), mu.sum().item()]
    reduced = comm.sum_(torch.tensor(local, dtype=torch.float64, device=mu.device)).tolist()
    bad_mu, bad_nu, mass = reduced
    if bad_mu or bad_nu:
        which = "target" if bad_nu else "source"
        raise ValueError(f"{which} marginal must be finite and not negative")
    total = nu.sum().item()
    if not mass > 0 or not math.isclose(mass, total, rel_tol=MASS_TOLERANCE):
        raise ValueError(
            f"source marginal sums to {mass:.7g}, target to {total:.7g}; both must be the same "
            "and positive"
        )


def _is_bad(marginal: torch.Tensor) -> bool:
    return not bool(((marginal >= 0) & (marginal < math.inf)).all())
