"""One learned plan: its matrix C, and the product of P with the rows that it translates.

P is never made as a whole: its tiles go straight into the product, and dloss/dP is made in the
place of dloss/dC. Beside C that gradient is all that a step keeps of size V x U.

Shapes: V source rows of this rank, h of a tile, U target tokens, K columns of what is translated.
"""

import warnings

import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot.sinkhorn import Solution, Thresholds, check_cost, solve
from s2t2_dist.ot.sums import PlanSums
from s2t2_dist.ot.tiles import new_matrix, tiles

LEAST_ROWS = 256  # of a tile in a product: shorter ones would go over the total too often


class Transport:
    """C of this rank's rows, as a float32 parameter, and Y = P^T X.

    Communication: the solver's; one U x K sum in `translate`; scalars. Every rank calls each
    method together.

    Args:
        values_VK: X, float32: this rank's rows of what P translates.
        mu_V, nu_U: positive marginals in the units of C, float64.
        rows: source rows of all ranks.
        mass: the marginals' total.
        method, iterations, tolerance: see `Translator`.

    Attributes:
        cost: C (V, U). It starts as the constant mass / rows; "plain" starts at P = mu nu^T.
        start: thresholds of the last step, from which the next one searches.
        statistics: numbers of the last solve, see `Translator.statistics`.
    """

    def __init__(
        self,
        values_VK: torch.Tensor,
        mu_V: torch.Tensor,
        nu_U: torch.Tensor,
        rows: int,
        mass: float,
        comm: Comm,
        *,
        method: str,
        iterations: int,
        tolerance: float | None,
    ):
        self.values, self.mu, self.nu, self.comm = values_VK, mu_V, nu_U, comm
        self.rows, self.mass = rows, mass
        self.method = method
        self._options = {"method": method, "iterations": iterations, "tolerance": tolerance}
        cost = new_matrix(values_VK.new_empty(0, len(nu_U)), len(mu_V)).fill_(mass / rows)
        if method == "plain":
            torch.mul(mu_V[:, None], nu_U / mass, out=cost)
        self.cost = torch.nn.Parameter(cost)
        self.start: Thresholds | None = None
        self.statistics: dict[str, float] = {}

    @torch.no_grad()
    def translate(self) -> tuple[torch.Tensor, Solution]:
        """Solve, and return Y = P^T X (U, K), the same on every rank; renews the statistics.

        Raises:
            DataError: on every rank, when C is not finite.
        """
        solution = self._solve()
        sums = PlanSums(self.mu, self.nu)
        translated_UK = self.values.new_zeros(len(self.nu), self.values.shape[1])
        for rows in tiles(self.cost, LEAST_ROWS):
            plan = solution.plan(rows)
            sums.add(rows, plan)
            translated_UK.addmm_(plan.T, self.values[rows])
            sums.add_entropy(plan, self.mass)
        self._measure(sums)
        return self.comm.sum_(translated_UK), solution

    @torch.no_grad()
    def backward(self, solution: Solution, grad_UK: torch.Tensor, entropy_weight: float) -> None:
        """Set `cost.grad` from dloss/dY, the same on every rank; adds alpha * H(P) to the loss."""
        grad_VU = new_matrix(self.cost)
        for rows in tiles(self.cost, LEAST_ROWS):
            torch.mm(self.values[rows], grad_UK.T, out=grad_VU[rows])
            if entropy_weight:
                plan = solution.plan(rows)
                grad_VU[rows] += _entropy_grad(plan, self.mass).mul_(entropy_weight)
        solution.backward(grad_VU, grad_VU)
        self.cost.grad = grad_VU
        self.start = solution.state

    @torch.no_grad()
    def squared_grad_norm(self) -> float:
        """Of `cost.grad` over all ranks; also makes the statistic gradient_share."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.cost.device)
        for rows in tiles(self.cost):
            grad = self.cost.grad[rows]
            totals[0] += torch.linalg.vector_norm(grad).double().square()
            totals[1] += grad.sign().abs_().sum()
        square, nonzero = self.comm.sum_(totals).tolist()
        self.statistics["gradient_share"] = nonzero / (self.rows * len(self.nu))
        return square

    @torch.no_grad()
    def plan_tiles(self) -> list[torch.Tensor]:
        """This rank's rows of P for the present C, total mass 1 over all ranks: CSR tiles."""
        solution = self._solve()
        return [to_csr(solution.plan(rows) / self.mass) for rows in tiles(self.cost)]

    def _solve(self):
        if self.method == "plain":
            return _Plain(self.cost.detach())
        check_cost(self.cost, self.comm)
        start = {"start": self.start}
        return solve(self.cost, self.mu, self.nu, self.comm, **start, **self._options)

    def _measure(self, sums):
        row_error, col_error, support, log_sum = sums.reduce(self.comm)
        self.statistics = {
            "entropy": -log_sum,
            "nonzeros_per_row": support / self.rows,
            "nonzeros_per_column": support / len(self.nu),
            "support_share": support / (self.rows * len(self.nu)),
            "row_error": row_error,
            "col_error": col_error,
        }


class _Plain:
    """P is the parameter itself, without constraints."""

    state = None

    def __init__(self, cost: torch.Tensor):
        self.cost = cost

    def plan(self, rows: slice) -> torch.Tensor:
        return self.cost[rows]

    def backward(self, grad: torch.Tensor, out: torch.Tensor) -> None:
        """dloss/dP is dloss/dC: in place, as it is called here, there is nothing to do."""


def _entropy_grad(plan_hU: torch.Tensor, mass: float) -> torch.Tensor:
    """dH/dP; 0 where P is not positive, since such entries stay out of the support."""
    log = (plan_hU / mass).log_().add_(1)
    return torch.where(plan_hU > 0, log / -mass, 0.0)


def to_csr(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix in CSR, without torch's notice that its CSR tensors are new."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return matrix.to_sparse_csr()
