"""The translation stage's layer: from the learned matrix C to the target vocabulary's E' and L'.

Shapes: V source rows of this rank (`row_range` cuts them), U target tokens, D model width, K
columns of what a plan translates: D or 2 D.
E' = (P^T * 1/mu) E and L' = (P * 1/nu)^T L (paper, section 2), with P = Sinkhorn(C).
"""

import math
from dataclasses import dataclass

import torch

from s2t2_dist.comm import Comm
from s2t2_dist.errors import ConfigError
from s2t2_dist.ot.sinkhorn import Solution, check_marginals
from s2t2_dist.ot.transport import Transport

METHODS = ("dykstra", "dual", "dense", "plain")


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
        solutions: of each transport, for its backward.
    """

    embed_UD: torch.Tensor
    head_UD: torch.Tensor
    entropy: float
    solutions: list[Solution]


class Translator:
    """This rank's rows of C, E and L, and the way from C to E', L' and back.

    In units `row_mass`, C and P are multiplied by the number of source rows, so that a row's mean
    mass is 1 and a learning rate is a share of it at any vocabulary size; `literal` keeps the
    paper's probabilities. The sparse projections are homogeneous: proportional C give the same
    E' and L' in both. A constant added to a row of C leaves P as it is, so, but for `plain`, each
    row of `cost.grad` sums to 0 up to rounding: no step is spent on row constants.

    Communication, each on every rank: the solver's, one U x K sum in `translate` and one in
    `backward`, and scalars; per plan.

    Args:
        embed_VD: this rank's rows of the embedding.
        head_VD: those of the LM head; the same tensor when tied.
        source_marginal_V: mu of this rank's rows, positive; 1 in total over all ranks.
        target_marginal_U: nu, positive, total 1.
        method: "dykstra" (S2T2), "dual" (its limit), "dense" (softmax) or "plain" (P is the
            parameter itself).
        iterations: Sinkhorn iterations, or the most that `dual` takes; unused by "plain".
        tolerance: of "dual", see `sparse_sinkhorn`.
        embed_scale: "paper" divides by mu, "convex" by nu (rows of E' are then averages of rows
            of E).
        units: "row_mass" or "literal".
        plans: "shared", or "separate" for one C and P for E and another for L (paper, section 2).
        comm: the ranks that share the rows.

    Attributes:
        transports: one per plan, by name: "plan", or "embed" and "head". The `cost` of each is
            C, which starts as the constant 1/V of the paper (1 in row_mass units): that makes P
            uniform where the marginals are. "plain" starts at P = mu nu^T.
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
        tolerance: float | None = None,
        embed_scale: str = "paper",
        units: str = "row_mass",
        plans: str = "shared",
        comm: Comm | None = None,
    ):
        _check_choice("method", method, METHODS)
        _check_choice("embed_scale", embed_scale, ("paper", "convex"))
        _check_choice("units", units, ("row_mass", "literal"))
        _check_choice("plans", plans, ("shared", "separate"))
        self.comm = comm or Comm()
        device = embed_VD.device
        mu = source_marginal_V.to(device, torch.float64)
        nu = target_marginal_U.to(device, torch.float64)
        check_marginals((len(embed_VD), len(nu)), mu, nu, self.comm)
        tied = head_VD is embed_VD
        self.rows = int(self.comm.sum_(mu.new_tensor([len(mu)])).item())
        self.mass = self.rows if units == "row_mass" else 1.0
        mu, nu = mu * self.mass, nu * self.mass
        self.width = embed_VD.shape[1]
        # E' = embed_out * P^T (embed_in * E) and L' = head_out * P^T L
        self._head_out = 1 / nu.float()[:, None]
        self._embed_out, embed_in = self._head_out, None
        if embed_scale == "paper":
            common = self._common_value(mu)
            self._embed_out = 1 / (common or 1.0)
            embed_in = None if common else 1 / mu.float()[:, None]
        options = {"method": method, "iterations": iterations, "tolerance": tolerance}
        values = _values(embed_VD.detach(), head_VD.detach(), embed_in, plans, tied)
        self.transports = {
            name: Transport(values_VK, mu, nu, self.rows, self.mass, self.comm, **options)
            for name, values_VK in values.items()
        }

    @property
    def costs(self) -> list[torch.nn.Parameter]:
        """Every C of this rank: what an optimizer steps."""
        return [transport.cost for transport in self.transports.values()]

    def translate(self) -> Translated:
        """Solve for P and make E' and L'. Once per optimizer step, however many micro-batches.

        Raises:
            DataError: on every rank, when C is not finite.
        """
        transports = list(self.transports.values())
        found, solutions = zip(*(transport.translate() for transport in transports), strict=True)
        D = self.width
        return Translated(
            embed_UD=(found[0][:, :D] * self._embed_out).requires_grad_(),
            head_UD=(found[-1][:, -D:] * self._head_out).requires_grad_(),
            entropy=sum(transport.statistics["entropy"] for transport in transports),
            solutions=list(solutions),
        )

    def backward(self, translated: Translated, entropy_weight: float = 0.0) -> None:
        """Make every `cost.grad`: that of (sum over ranks of their losses) + alpha * H(P).

        So each rank divides its loss by the global number of tokens before its own backward; a
        rank that had no batch counts as zero. The thresholds found are the next step's guesses.
        The leaves' gradients are used up.
        """
        embed_grad_UD = _grad(translated.embed_UD).mul_(self._embed_out)
        head_grad_UD = _grad(translated.head_UD).mul_(self._head_out)
        transports = list(self.transports.values())
        if len(transports) == 2:
            grads = [embed_grad_UD, head_grad_UD]
        elif transports[0].values.shape[1] == self.width:
            grads = [embed_grad_UD.add_(head_grad_UD)]
        else:
            grads = [torch.cat((embed_grad_UD, head_grad_UD), 1)]
        for transport, solution, grad_UK in zip(
            transports, translated.solutions, grads, strict=True
        ):
            transport.backward(solution, self.comm.sum_(grad_UK), entropy_weight)

    def clip_grad_norm(self, max_norm: float) -> float:
        """The norm of all `cost.grad` over all ranks; they are scaled down to max_norm above it.

        A max_norm of 0 only measures.
        """
        norm = math.sqrt(sum(t.squared_grad_norm() for t in self.transports.values()))
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
        if len(self.transports) == 1:
            return dict(self.transports["plan"].statistics)
        return {
            f"{name}_{key}": value
            for name, transport in self.transports.items()
            for key, value in transport.statistics.items()
        }

    def _common_value(self, marginal: torch.Tensor) -> float | None:
        """The value of every entry on every rank, or None where they differ."""
        ends = torch.full((2,), -math.inf, dtype=torch.float64, device=marginal.device)
        if len(marginal):
            ends = torch.stack((marginal.max(), -marginal.min()))
        high, negated_low = self.comm.max_(ends).tolist()
        return high if high == -negated_low else None


def _values(
    embed_VD: torch.Tensor,
    head_VD: torch.Tensor,
    embed_in: torch.Tensor | None,
    plans: str,
    tied: bool,
) -> dict[str, torch.Tensor]:
    """What each plan translates, float32: E and L side by side, or one matrix where it does."""
    if tied and embed_in is None and plans == "shared":
        return {"plan": embed_VD.float()}
    embed_VD, head_VD = embed_VD.float(), head_VD.float()
    if embed_in is not None:
        embed_VD = embed_VD * embed_in
    if plans == "separate":
        return {"embed": embed_VD, "head": head_VD}
    return {"plan": torch.cat((embed_VD, head_VD), 1)}


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
