"""Projection onto the scaled simplex: the step that every sparse solver repeats.

The projection of z on {p >= 0, sum p = scale} is `max(z - t, 0)`, where the threshold t solves
`sum max(z - t, 0) = scale`. That sum is convex, decreasing and piecewise linear in t, so Newton
from the left of the root climbs to it in finitely many steps (Michelot 1986), without a sort.
One strict test, `z > t`, decides the support for the value, the gradient and the count.
"""

import math

import torch
from torch.autograd.function import once_differentiable

# Of what `is_finite` denies.
NOT_FINITE = "holds NaN or infinite entries, or differences of them that overflow"


def project_simplex(
    z: torch.Tensor, scale: torch.Tensor | float, dim: int = -1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Euclidean projection of every slice of z along `dim` onto a simplex of total `scale`.

    This is SPARSEMAX with a scale (paper, Algorithm 2). The Jacobian on the support S is
    `g - mean_S(g)`, and 0 off it; entries exactly at the threshold are off the support. Both
    outputs are differentiable, once, in z and in scale.

    Args:
        z: float32 or float64, any shape.
        scale: positive; a number, or a tensor that broadcasts to z's shape without `dim`.
        dim: the dimension that is projected.

    Returns:
        threshold (z's shape without `dim`) and projection (z's shape).

    Raises:
        ValueError: z is not finite or not float32/float64, or a scale is not positive.
    """
    check_dtype(z, "z")
    if not is_finite(z):
        raise ValueError(f"z {NOT_FINITE}")
    lanes = z.movedim(dim, -1)
    if lanes.shape[-1] == 0:
        raise ValueError(f"z has no entry along dimension {dim}: nothing can sum to the scale")
    scale = torch.as_tensor(scale, dtype=torch.float64, device=z.device)
    if not bool(((scale > 0) & (scale < math.inf)).all()):
        raise ValueError("scale must be positive and finite everywhere")
    threshold, projection = _Projection.apply(lanes, scale.expand(lanes.shape[:-1]))
    return threshold, projection.movedim(-1, dim)


class NewtonSearch:
    """The thresholds of many slices at once, from sums that others make.

    The first step may start anywhere, because Newton on a convex function lands left of the root;
    from there a threshold only rises, so supports are nested, and one that keeps its count is
    final. A slice that has stopped is frozen: its result does not depend on the slices beside it.

    Args:
        top: the largest entry of each slice: no threshold reaches it. None where that is not
            known; a step that rounding takes beyond it is then taken back.
        scale: total of each projection, float64.
        guess: where to start; by default at `floor`.
        floor: thresholds left of every root; by default `top - scale`.

    Attributes:
        threshold: (K,), final where a slice no longer moves.
        count: (K,) float64, entries above it.
    """

    def __init__(
        self,
        top: torch.Tensor | None,
        scale: torch.Tensor,
        guess: torch.Tensor | None = None,
        floor: torch.Tensor | None = None,
    ):
        self.scale = scale
        self.ceiling = torch.full_like(floor, math.inf) if top is None else below(top)
        if floor is None:
            floor = torch.minimum((top - scale).to(top.dtype), self.ceiling)
        self.floor, self.good = floor.clone(), floor.clone()
        self.threshold = (floor if guess is None else guess).clone()
        self.count = torch.full_like(scale, math.inf)
        self.moving = torch.arange(len(scale), device=scale.device)

    def update(self, count: torch.Tensor, excess: torch.Tensor) -> torch.Tensor:
        """One step of the slices that move, from their sums; returns those that still move."""
        i = self.moving
        before = self.count[i]
        threshold, moves = newton_step(
            self.threshold[i], self.floor[i], self.ceiling[i], before, count, excess, self.scale[i]
        )
        # Where rounding emptied a support, the step is taken back, and was the last one. (A first
        # guess may be above every entry: its step goes to the floor, and on from there.)
        over = (count == 0) & before.isfinite()
        good = torch.where(over, self.good[i], torch.minimum(threshold, self.threshold[i]))
        self.threshold[i] = self.floor[i] = torch.where(over, good, threshold)
        self.good[i] = good
        self.count[i] = torch.where(over, before, count)
        self.moving = i[moves & ~over]
        return self.moving


def newton_step(
    threshold: torch.Tensor,
    floor: torch.Tensor,
    ceiling: torch.Tensor,
    before: torch.Tensor,
    count: torch.Tensor,
    excess: torch.Tensor,
    scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next thresholds, and which of them move: those whose count is not the one before."""
    moves = count != before
    newton = (threshold + (excess - scale) / count).to(threshold.dtype)
    return torch.where(moves, torch.clamp(newton, floor, ceiling), threshold), moves


def below(top: torch.Tensor) -> torch.Tensor:
    """The largest threshold that no rounding can make an empty support of."""
    return torch.nextafter(top, torch.full_like(top, -math.inf))


def check_dtype(z: torch.Tensor, name: str) -> None:
    """Raise a ValueError unless z is float32 or float64."""
    if z.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is {z.dtype}; thresholds need float32 or float64")


def is_finite(z: torch.Tensor) -> torch.Tensor:
    """Whether every entry is, and every difference of two; one pass, no temporary of z's size."""
    if z.numel() == 0:
        return torch.ones((), dtype=torch.bool, device=z.device)
    low, high = z.detach().aminmax()
    return (high - low).isfinite()


class _Projection(torch.autograd.Function):
    """Thresholds and projections of the last dimension."""

    @staticmethod
    def forward(ctx, z, scale):
        flat = z.reshape(-1, z.shape[-1])
        search = NewtonSearch(flat.amax(1), scale.reshape(-1))
        moving = search.moving
        while len(moving):
            excess = torch.relu_(flat[moving] - search.threshold[moving, None])
            count, total = torch.count_nonzero(excess, 1), excess.sum(1, dtype=torch.float64)
            moving = search.update(count.double(), total)
        threshold = search.threshold.view(z.shape[:-1])
        ctx.save_for_backward(z, threshold)
        return threshold, torch.relu_(z - threshold[..., None])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_threshold, grad_projection):
        z, threshold = ctx.saved_tensors
        above = z > threshold[..., None]
        count = above.sum(-1)
        total = (grad_projection * above).sum(-1, dtype=torch.float64)
        shift = ((grad_threshold - total) / count).to(z.dtype)
        grad_z = (grad_projection + shift[..., None]) * above
        return grad_z, (total - grad_threshold) / count
