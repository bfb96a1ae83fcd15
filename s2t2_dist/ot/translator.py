"""The translation stage's layer: from the learned matrix C to the target vocabulary's E' and L'.

Shapes: V source rows of this rank (`row_range` cuts them), U target tokens, D model width.
E' = (P^T * 1/mu) E and L' = (P * 1/nu)^T L (paper, section 2), with P = Sinkhorn(C).
"""

import math
from dataclasses import dataclass

import torch

from s2t2_dist.comm import LocalComm
from s2t2_dist.errors import ConfigError
from s2t2_dist.ot.sinkhorn import measure_plan, sparse_sinkhorn

METHODS = ("dykstra", "dense", "plain")


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
        entropy: H(P) = -sum P log P in nats, with P of total mass 1.
        plan_VU: this rank's rows of P in the units of C, attached to C's graph.
    """

    embed_UD: torch.Tensor
    head_UD: torch.Tensor
    entropy: float
    plan_VU: torch.Tensor


class Translator:
    """This rank's rows of C, E and L, and the way from C to E', L' and back.

    In units `row_mass`, C and P are multiplied by the number of source rows, so that a row's mean
    mass is 1 and a learning rate is a share of it at any vocabulary size; `literal` keeps the
    paper's probabilities. The sparse projections are homogeneous: proportional C give the same
    E' and L' in both.

    Communication, each on every rank: the solver's, one U x D sum for each of E' and L' in
    `translate` and in `backward`, and scalars.

    Args:
        embed_VD: this rank's rows of the embedding.
        head_VD: those of the LM head; the same tensor when tied.
        source_marginal_V: mu of this rank's rows, positive; 1 in total over all ranks.
        target_marginal_U: nu, positive, total 1.
        method: "dykstra" (S2T2), "dense" (softmax) or "plain" (P is the parameter itself).
        iterations: Sinkhorn iterations; unused by "plain".
        embed_scale: "paper" divides by mu, "convex" by nu (rows of E' are then averages of rows
            of E).
        units: "row_mass" or "literal".
        comm: the ranks that share the rows.

    Attributes:
        cost: C as a float32 parameter (V, U). It starts as the constant 1/V of the paper (1 in
            row_mass units), which makes P uniform where the marginals are; "plain" starts at
            P = mu nu^T.
    """

    def __init__(
        self,
        embed_VD: torch.Tensor,
        head_VD: torch.Tensor,
        source_marginal_V: torch.Tensor,
        target_marginal_U: torch.Tensor,
        *,
        method: str = "dykstra",
        iterations: int = 3,
        embed_scale: str = "paper",
        units: str = "row_mass",
        comm: LocalComm | None = None,
    ):
        _check_choice("method", method, METHODS)
        _check_choice("embed_scale", embed_scale, ("paper", "convex"))
        _check_choice("units", units, ("row_mass", "literal"))
        self.comm = comm or LocalComm()
        self.method, self.iterations = method, iterations
        self.embed_VD = embed_VD.detach().float()
        self.head_VD = self.embed_VD if head_VD is embed_VD else head_VD.detach().float()
        device = self.embed_VD.device
        mu = source_marginal_V.to(device, torch.float64)
        rows, total = self.comm.sum_(torch.stack((mu.new_tensor(len(mu)), mu.sum()))).tolist()
        assert math.isclose(total, 1, rel_tol=1e-4), f"source marginal sums to {total}, not 1"
        self.rows = int(rows)
        self.mass = rows if units == "row_mass" else 1.0
        self.mu = mu * self.mass
        self.nu = target_marginal_U.to(device, torch.float64) * self.mass
        by_source, by_target = 1 / self.mu.float()[:, None], 1 / self.nu.float()[:, None]
        paper = embed_scale == "paper"
        # E' = embed_out * P^T (embed_in * E) and L' = head_out * P^T L
        self._embed_in = by_source if paper else torch.ones_like(by_source)
        self._embed_out = torch.ones_like(by_target) if paper else by_target
        self._head_out = by_target
        self.cost = torch.nn.Parameter(self._initial_cost())
        self._statistics: dict[str, float] = {}

    def _initial_cost(self) -> torch.Tensor:
        if self.method == "plain":
            return (self.mu[:, None] * (self.nu / self.mass)).float()
        value = self.mass / self.rows
        return torch.full((len(self.mu), len(self.nu)), value, device=self.mu.device)

    def translate(self) -> Translated:
        """Solve for P and make E' and L'. Once per optimizer step, however many micro-batches."""
        plan_VU = self._solve()
        plan = plan_VU.detach()
        embed_UD = self.comm.sum_(plan.T @ (self.embed_VD * self._embed_in)) * self._embed_out
        head_UD = self.comm.sum_(plan.T @ self.head_VD) * self._head_out
        return Translated(
            embed_UD=embed_UD.requires_grad_(),
            head_UD=head_UD.requires_grad_(),
            entropy=self._statistics["entropy"],
            plan_VU=plan_VU,
        )

    def backward(self, translated: Translated, entropy_weight: float = 0.0) -> None:
        """Set `cost.grad` to the gradient of (sum over ranks of their losses) + alpha * H(P).

        So each rank divides its loss by the global number of tokens before its own backward. The
        leaves' gradients are reduced in place; a rank that had no batch counts as zero.
        """
        embed_grad_UD = self._reduced_grad(translated.embed_UD)
        head_grad_UD = self._reduced_grad(translated.head_UD)
        grad_VU = (self.embed_VD * self._embed_in) @ (embed_grad_UD * self._embed_out).T
        grad_VU += self.head_VD @ (head_grad_UD * self._head_out).T
        if entropy_weight:
            grad_VU += _entropy_grad(translated.plan_VU.detach(), self.mass).mul_(entropy_weight)
        (self.cost.grad,) = torch.autograd.grad(translated.plan_VU, self.cost, grad_VU)
        nonzero = self.comm.sum_(torch.count_nonzero(self.cost.grad).double()).item()
        self._statistics["gradient_share"] = nonzero / (self.rows * len(self.nu))

    def clip_grad_norm(self, max_norm: float) -> float:
        """The norm of `cost.grad` over all ranks, which is scaled down to max_norm if above it.

        A max_norm of 0 only measures.
        """
        row_norms = torch.linalg.vector_norm(self.cost.grad, dim=1).double()
        norm = math.sqrt(self.comm.sum_(row_norms.square().sum()).item())
        if 0 < max_norm < norm:
            self.cost.grad.mul_(max_norm / norm)
        return norm

    def statistics(self) -> dict[str, float]:
        """Numbers of the last solve, the same on every rank. Not a collective.

        entropy of P in nats; nonzeros_per_row and nonzeros_per_column (means); support_share of
        all V x U entries; row_error and col_error, the largest relative errors of the marginals;
        and after a `backward`, gradient_share: the share of C whose gradient is not zero.
        """
        return dict(self._statistics)

    @torch.no_grad()
    def plan_rows(self) -> torch.Tensor:
        """This rank's rows of P for the present C, total mass 1 over all ranks, float32."""
        return self._solve() / self.mass

    def _solve(self) -> torch.Tensor:
        """This rank's rows of P in the units of C; renews the statistics."""
        if self.method == "plain":
            result = measure_plan(self.cost, self.mu, self.nu, self.comm)
        else:
            result = sparse_sinkhorn(
                self.cost, self.mu, self.nu, self.iterations, self.method, self.comm
            )
        self._statistics = {
            "entropy": self.comm.sum_(_entropy(result.plan.detach(), self.mass)).item(),
            "nonzeros_per_row": result.support / self.rows,
            "nonzeros_per_column": result.support / len(self.nu),
            "support_share": result.support / (self.rows * len(self.nu)),
            "row_error": result.row_error,
            "col_error": result.col_error,
        }
        return result.plan

    def _reduced_grad(self, leaf: torch.Tensor) -> torch.Tensor:
        if leaf.grad is None:
            leaf.grad = torch.zeros_like(leaf)
        return self.comm.sum_(leaf.grad)


def _entropy(plan_VU: torch.Tensor, mass: float) -> torch.Tensor:
    """-sum p log p with p = P / mass, 0 log 0 = 0; entries of a plain P below 0 count as 0."""
    total = torch.zeros((), dtype=torch.float64, device=plan_VU.device)
    for rows in plan_VU.split(256):
        total += torch.special.entr((rows / mass).clamp_min_(0)).sum(dtype=torch.float64)
    return total


def _entropy_grad(plan_VU: torch.Tensor, mass: float) -> torch.Tensor:
    """dH/dP; 0 where P is not positive, since such entries stay out of the support."""
    log = (plan_VU / mass).log_().add_(1)
    return torch.where(plan_VU > 0, log / -mass, 0.0)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
