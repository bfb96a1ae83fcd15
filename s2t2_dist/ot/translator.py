"""The translation stage's layer: from the learned matrix C to the target vocabulary's E' and L'.

P as a whole is never made: its tiles go straight into the product with E and L, and dloss/dP is
made in the place of dloss/dC. Beside C that gradient is all that a step keeps of size V x U.

Shapes: V source rows of this rank (`row_range` cuts them), h of a tile, U target tokens, D model
width, K columns of what a plan translates: D or 2 D.
"""

import math
import warnings
from dataclasses import dataclass, field

import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot.dykstra import Dykstra
from s2t2_dist.ot.entropic import Entropic
from s2t2_dist.ot.plain import Plain
from s2t2_dist.ot.problem import (
    Problem,
    Solution,
    Solver,
    Thresholds,
    check_cost,
    check_marginals,
)
from s2t2_dist.ot.sums import PlanSums
from s2t2_dist.ot.tiles import new_matrix, tiles
from s2t2_dist.ot.weights import translated_rows, weight_factors

LEAST_ROWS = 256  # of a tile in a product: shorter ones would go over the total too often


def row_range(rows: int, rank: int, size: int) -> tuple[int, int]:
    """The contiguous block [start, stop) of a rank; block lengths differ by at most one."""
    length, longer = divmod(rows, size)
    start = rank * length + min(rank, longer)
    return start, start + length + (rank < longer)


@dataclass(frozen=True, eq=False)
class Translated:
    """One solve. The model reads the leaves, and their `.grad` is what `backward` starts from.

    Attributes:
        embed_UD, head_UD: float32 leaf tensors, the same on every rank.
        entropy: H(P) = -sum P log P in nats, with P of total mass 1; of separate plans, the sum.
        solutions: of each plan, for its backward.
    """

    embed_UD: torch.Tensor
    head_UD: torch.Tensor
    entropy: float
    solutions: list[Solution]


@dataclass(eq=False)
class LearnedPlan:
    """One plan that learns.

    Attributes:
        values_VK: X, float32: this rank's rows of what P translates; Y = P^T X.
        cost: C (V, U), float32.
        start: thresholds of the last step, from which the next one searches.
        statistics: numbers of the last solve, see `Translator.statistics`.
    """

    values_VK: torch.Tensor
    cost: torch.nn.Parameter
    start: Thresholds | None = None
    statistics: dict[str, float] = field(default_factory=dict)


class Translator:
    """This rank's rows of C, E and L, and the way from C to E', L' and back.

    In units `row_mass`, C and P are multiplied by the number of source rows, so that a row's mean
    mass is 1 and a learning rate is a share of it at any vocabulary size; `literal` keeps the
    paper's probabilities. The sparse projections are homogeneous: proportional C give the same
    E' and L' in both. A constant added to a row of C leaves P as it is, so, but for `Plain`, each
    row of `cost.grad` sums to 0 up to rounding: no step is spent on row constants.

    Communication, each on every rank: the solver's, one U x K sum in `translate` and one in
    `backward`, and scalars; per plan.

    Args:
        embed_VD: this rank's rows of the embedding.
        head_VD: those of the LM head; the same tensor when tied.
        source_marginal_V: mu of this rank's rows, positive; 1 in total over all ranks.
        target_marginal_U: nu, positive, total 1.
        solver: how P is made of C, see `make_solver`.
        embed_scale: "paper" or "convex", see `weight_factors`.
        units: "row_mass" or "literal".
        plans: "shared", or "separate" for one C and P for E and another for L (paper, section 2).
        first_plan_VU: this rank's rows of the P to start from, float32: positive, of these
            marginals. Default: see `plans` below.
        comm: the ranks that share the rows.

    Attributes:
        plans: by name: "plan", or "embed" and "head". Each C starts as the constant 1/V of the
            paper (1 in row_mass units): that makes P uniform where the marginals are. With `Plain`
            it starts at P = mu nu^T.

    Raises:
        ValueError: an unknown choice, or marginals that do not fit. Every rank raises it.
    """

    def __init__(
        self,
        embed_VD: torch.Tensor,
        head_VD: torch.Tensor,
        source_marginal_V: torch.Tensor,
        target_marginal_U: torch.Tensor,
        *,
        solver: Solver | None = None,
        embed_scale: str = "paper",
        units: str = "row_mass",
        plans: str = "shared",
        first_plan_VU: torch.Tensor | None = None,
        comm: Comm | None = None,
    ):
        _check_choice("embed_scale", embed_scale, ("paper", "convex"))
        _check_choice("units", units, ("row_mass", "literal"))
        _check_choice("plans", plans, ("shared", "separate"))
        self.solver, self.comm = solver or Dykstra(), comm or Comm()
        mu = source_marginal_V.to(embed_VD.device, torch.float64)
        nu = target_marginal_U.to(embed_VD.device, torch.float64)
        check_marginals((len(embed_VD), len(nu)), mu, nu, self.comm)
        self.rows = int(self.comm.sum_(mu.new_tensor([len(mu)])).item())
        self.mass = self.rows if units == "row_mass" else 1.0
        self.mu, self.nu, self.width = mu * self.mass, nu * self.mass, embed_VD.shape[1]
        scaled = embed_scale, self.mu, self.nu
        before, after = weight_factors("embed", *scaled)
        common = self._common_value(before)
        if common is not None:  # it may come after the product: a tied E and L stay one matrix
            before, after = 1.0, after * common
        self._embed_factor = after
        _, self._head_factor = weight_factors("head", *scaled)
        values = translated_rows(embed_VD, head_VD, before, plans)
        first = first_plan_VU
        self.plans = {n: LearnedPlan(x, self._first_cost(x, first)) for n, x in values.items()}

    @property
    def costs(self) -> list[torch.nn.Parameter]:
        """Every C of this rank: what an optimizer steps."""
        return [plan.cost for plan in self.plans.values()]

    @torch.no_grad()
    def translate(self) -> Translated:
        """Solve for P and make E' and L'. Once per optimizer step, however many micro-batches.

        Raises:
            ValueError: on every rank, when C is not finite.
        """
        products, solutions = zip(*map(self._product, self.plans.values()), strict=True)
        D = self.width
        return Translated(
            embed_UD=(products[0][:, :D] * self._embed_factor).requires_grad_(),
            head_UD=(products[-1][:, -D:] * self._head_factor).requires_grad_(),
            entropy=sum(plan.statistics["entropy"] for plan in self.plans.values()),
            solutions=list(solutions),
        )

    @torch.no_grad()
    def backward(self, translated: Translated, entropy_weight: float = 0.0) -> None:
        """Make every `cost.grad`: that of (sum over ranks of their losses) + alpha * H(P).

        So each rank divides its loss by the global number of tokens before its own backward; a
        rank that had no batch counts as zero. The thresholds found are the next step's guesses.
        The leaves' gradients are used up.
        """
        embed_grad_UD = _grad(translated.embed_UD).mul_(self._embed_factor)
        head_grad_UD = _grad(translated.head_UD).mul_(self._head_factor)
        plans = list(self.plans.values())
        if len(plans) == 2:
            grads = [embed_grad_UD, head_grad_UD]
        elif plans[0].values_VK.shape[1] == self.width:
            grads = [embed_grad_UD.add_(head_grad_UD)]
        else:
            grads = [torch.cat((embed_grad_UD, head_grad_UD), 1)]
        for plan, solution, grad_UK in zip(plans, translated.solutions, grads, strict=True):
            self._product_backward(plan, solution, self.comm.sum_(grad_UK), entropy_weight)
            plan.start = solution.state

    @torch.no_grad()
    def clip_grad_norm(self, max_norm: float) -> float:
        """The norm of all `cost.grad` over all ranks; they are scaled down to max_norm above it.

        A max_norm of 0 only measures. Makes the statistic gradient_share.
        """
        norm = math.sqrt(sum(map(self._squared_grad_norm, self.plans.values())))
        if 0 < max_norm < norm:
            for cost in self.costs:
                cost.grad.mul_(max_norm / norm)
        return norm

    def statistics(self) -> dict[str, float]:
        """Numbers of the last solve, the same on every rank. Not a collective.

        entropy of P in nats; nonzeros_per_row and nonzeros_per_column (means); support_share of
        all V x U entries; row_error and col_error, the largest relative errors of the marginals;
        and after a `clip_grad_norm`, gradient_share: the share of C whose gradient is not zero.
        Of separate plans, each name begins with `embed_` or `head_`.
        """
        if len(self.plans) == 1:
            return dict(self.plans["plan"].statistics)
        return {
            f"{name}_{key}": value
            for name, plan in self.plans.items()
            for key, value in plan.statistics.items()
        }

    @torch.no_grad()
    def plan_tiles(self) -> dict[str, list[torch.Tensor]]:
        """This rank's rows of every P for the present C, total mass 1 over all ranks: CSR tiles.

        Raises:
            ValueError: on every rank, when C is not finite.
        """
        found = {}
        for name, plan in self.plans.items():
            solution = self._solve(plan)
            found[name] = [to_csr(solution.plan(rows) / self.mass) for rows in tiles(plan.cost)]
        return found

    def _solve(self, plan: LearnedPlan) -> Solution:
        check_cost(plan.cost, self.comm)
        problem = Problem(plan.cost.detach(), self.mu, self.nu, self.comm)
        return self.solver.solve(problem, plan.start)

    def _product(self, plan: LearnedPlan) -> tuple[torch.Tensor, Solution]:
        """Y = P^T X (U, K), the same on every rank, and the solution; renews the statistics."""
        solution, sums = self._solve(plan), PlanSums(self.mu, self.nu)
        product_UK = plan.values_VK.new_zeros(len(self.nu), plan.values_VK.shape[1])
        for rows in tiles(plan.cost, LEAST_ROWS):
            plan_hU = solution.plan(rows)
            sums.add(rows, plan_hU)
            product_UK.addmm_(plan_hU.T, plan.values_VK[rows])
            sums.add_entropy(plan_hU, self.mass)
        row_error, col_error, support, log_sum = sums.reduce(self.comm)
        plan.statistics = {
            "entropy": -log_sum,
            "nonzeros_per_row": support / self.rows,
            "nonzeros_per_column": support / len(self.nu),
            "support_share": support / (self.rows * len(self.nu)),
            "row_error": row_error,
            "col_error": col_error,
        }
        return self.comm.sum_(product_UK), solution

    def _product_backward(
        self, plan: LearnedPlan, solution: Solution, grad_UK: torch.Tensor, entropy_weight: float
    ) -> None:
        """Set `cost.grad` from dloss/dY, the same on every rank, and alpha * H(P)."""
        grad_VU = new_matrix(plan.cost)
        for rows in tiles(plan.cost, LEAST_ROWS):
            torch.mm(plan.values_VK[rows], grad_UK.T, out=grad_VU[rows])
            if entropy_weight:
                entropy_grad_hU = _entropy_grad(solution.plan(rows), self.mass)
                grad_VU[rows] += entropy_grad_hU.mul_(entropy_weight)
        solution.backward(grad_VU, grad_VU)
        plan.cost.grad = grad_VU

    def _squared_grad_norm(self, plan: LearnedPlan) -> float:
        """Over all ranks."""
        totals = torch.zeros(2, dtype=torch.float64, device=plan.cost.device)
        for rows in tiles(plan.cost):
            grad_hU = plan.cost.grad[rows]
            totals[0] += torch.linalg.vector_norm(grad_hU).double().square()
            totals[1] += grad_hU.sign().abs_().sum()
        square, nonzero = self.comm.sum_(totals).tolist()
        plan.statistics["gradient_share"] = nonzero / (self.rows * len(self.nu))
        return square

    def _first_cost(
        self, values_VK: torch.Tensor, plan_VU: torch.Tensor | None
    ) -> torch.nn.Parameter:
        V, U = len(self.mu), len(self.nu)
        cost_VU = new_matrix(values_VK.new_empty(0, U), V).fill_(self.mass / self.rows)
        if plan_VU is not None:
            # A plan that keeps its marginals is its own projection, and P = exp(C) of potentials 0.
            cost_VU.copy_(plan_VU).mul_(self.mass)
            if isinstance(self.solver, Entropic):
                cost_VU.log_()
        elif isinstance(self.solver, Plain):
            torch.mul(self.mu[:, None], self.nu / self.mass, out=cost_VU)
        return torch.nn.Parameter(cost_VU)

    def _common_value(self, factor: torch.Tensor | float) -> float | None:
        """The value of every entry on every rank, or None where they differ."""
        if isinstance(factor, float):
            return factor
        ends = torch.full((2,), -math.inf, dtype=torch.float64, device=factor.device)
        if len(factor):
            ends = torch.stack((factor.max(), -factor.min())).double()
        high, negated_low = self.comm.max_(ends).tolist()
        return high if high == -negated_low else None


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _entropy_grad(plan_hU: torch.Tensor, mass: float) -> torch.Tensor:
    """dH/dP; 0 where P is not positive, since such entries stay out of the support."""
    log = (plan_hU / mass).log_().add_(1)
    return torch.where(plan_hU > 0, log / -mass, 0.0)


def to_csr(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix in CSR, without torch's notice that its CSR tensors are new."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return matrix.to_sparse_csr()


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
