"""Sinkhorn solvers: from a dense cost matrix to a plan with given row and column sums.

V rows (source tokens, this rank's part of them), U columns (target tokens); the rows may be
spread over ranks. `dykstra` is the paper's sparse Sinkhorn, `dense` is its entropic baseline.
How a solver differentiates is closed-form and kept beside how it iterates: nothing but the
thresholds (or potentials) of each iteration is stored between forward and backward.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from s2t2_dist.comm import LocalComm
from s2t2_dist.errors import ConfigError, DataError
from s2t2_dist.ot.simplex import above, is_finite, newton_threshold, support_sums

MASS_TOLERANCE = 1e-5  # relative; far above float32 rounding of a sum, far below a wrong unit
CPU_TILE = 1 << 17  # entries handled together: half a MiB of float32, to stay in cache
DEVICE_TILE = 1 << 26  # elsewhere: few, large kernels; it bounds the temporary memory


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
    comm: LocalComm | None = None,
) -> SinkhornResult:
    """The plan nearest to a cost matrix among those with the given row and column sums.

    `dykstra` runs the iterations k = 0..n-1 of the paper's Algorithm 1: alternating projections
    on the rows' and the columns' simplices with Dykstra's corrections. The limit minimises
    `|P - C|^2 / 2`; a truncated run keeps the column sums and leaves an error in the row sums.
    `dense` alternates softmax normalisations of rows and columns of exp(C), in the log domain.

    Every rank calls this together, and calls backward together: both hold collectives.

    Args:
        cost_VU: (V_local, U) float32 or float64; this rank's rows, perhaps none.
        source_marginal_V: (V_local,) positive row sums of those rows.
        target_marginal_U: (U,) positive column sums, the same on every rank.
        iterations: n, at least 1 (the paper takes 3).
        method: "dykstra" or "dense".
        comm: the ranks that share the rows; one rank by default.

    Raises:
        ConfigError: an unknown method, or fewer than 1 iteration.
        DataError: shapes that do not fit, entries that are not finite, a marginal that is not
            positive, or row and column sums of different totals. Every rank raises it.
    """
    solvers = {"dykstra": _Dykstra, "dense": _Dense}
    if method not in solvers:
        raise ConfigError(f"unknown Sinkhorn method {method!r}; choose one of {sorted(solvers)}")
    if iterations < 1:
        raise ConfigError(f"iterations is {iterations}; at least 1 is needed")
    comm = comm or LocalComm()
    mu = source_marginal_V.to(cost_VU.device, torch.float64)
    nu = target_marginal_U.to(cost_VU.device, torch.float64)
    rows = _check_problem(cost_VU, mu, nu, comm)
    plan = solvers[method].apply(cost_VU, mu, nu, iterations, rows, comm)
    return measure_plan(plan, mu, nu, comm)


@torch.no_grad()
def measure_plan(
    plan_VU: torch.Tensor, mu: torch.Tensor, nu: torch.Tensor, comm: LocalComm
) -> SinkhornResult:
    """Marginal errors and support of any plan whose rows are spread over ranks (collective)."""
    values = plan_VU.detach()
    col_sums = torch.zeros_like(nu)
    row_error, support = torch.zeros(2, 1, dtype=torch.float64, device=values.device)
    for rows in _tiles(values):
        tile = values[rows]
        col_sums += tile.sum(0, dtype=torch.float64)
        row_sums = tile.sum(1, dtype=torch.float64)
        row_error = torch.maximum(row_error, ((row_sums - mu[rows]).abs() / mu[rows]).max())
        support += torch.ne(tile, 0, out=torch.empty_like(tile)).sum()
    totals = comm.sum_(torch.cat((col_sums, support)))
    return SinkhornResult(
        plan=plan_VU,
        row_error=comm.max_(row_error).item(),
        col_error=((totals[:-1] - nu).abs() / nu).max().item(),
        support=int(totals[-1].item()),
    )


def _check_problem(
    cost_VU: torch.Tensor, mu: torch.Tensor, nu: torch.Tensor, comm: LocalComm
) -> int:
    """Refuse a problem without an answer, on every rank at once; return the rows of all ranks."""
    if cost_VU.dtype not in (torch.float32, torch.float64):
        raise DataError(f"cost is {cost_VU.dtype}; thresholds need float32 or float64")
    if cost_VU.shape != (*mu.shape, *nu.shape) or cost_VU.dim() != 2 or not nu.numel():
        found = f"{tuple(cost_VU.shape)}, {tuple(mu.shape)} and {tuple(nu.shape)}"
        raise DataError(f"cost and marginals have shapes {found}; expected (V, U), (V,) and (U,)")
    bad_cost = not is_finite(cost_VU)
    bad_mu = not _is_positive(mu)
    bad_nu = not _is_positive(nu)
    local = [float(bad_cost), float(bad_mu), float(bad_nu), len(mu), mu.sum().item()]
    reduced = comm.sum_(torch.tensor(local, dtype=torch.float64, device=cost_VU.device)).tolist()
    bad_cost, bad_mu, bad_nu, rows, mass = reduced
    if bad_cost:
        raise DataError("cost holds NaN or infinite entries; is the learning rate too high?")
    if bad_mu or bad_nu or not rows:
        which = "target" if bad_nu else "source"
        raise DataError(
            f"{which} marginal must be positive and finite: leave a token of no mass out"
        )
    if not math.isclose(mass, nu.sum().item(), rel_tol=MASS_TOLERANCE):
        raise DataError(f"source marginal sums to {mass:.7g}, target to {nu.sum().item():.7g}")
    return int(rows)


def _is_positive(marginal: torch.Tensor) -> bool:
    return bool(((marginal > 0) & (marginal < math.inf)).all())


def _tiles(matrix: torch.Tensor) -> Iterator[slice]:
    """Blocks of rows that go through several elementwise passes together."""
    rows, columns = matrix.shape
    height = max(1, (CPU_TILE if matrix.is_cpu else DEVICE_TILE) // columns)
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


class _Dykstra(torch.autograd.Function):
    """Algorithm 1 through its thresholds tau_k (rows) and sigma_k (columns).

    With Z_0 = C and W_{-1} = sigma_{-1} = 0, for k = 0..n-1:

        W_k     = max(Z_k - tau_k, 0)   + min(W_{k-1}, sigma_{k-1})
        Z_{k+1} = max(W_k - sigma_k, 0) + min(Z_k, tau_k)

    The second terms are Dykstra's corrections Q and P, and the plan is max(W_{n-1} - sigma_{n-1},
    0). So C and the thresholds determine every iterate, and backward recomputes them.
    Communication: one U-vector maximum per iteration, then one (2, U) sum per Newton step;
    backward, one (2, U) sum per iteration.
    """

    @staticmethod
    def forward(ctx, cost, mu, nu, iterations, rows, comm):
        plan, taus, sigmas = _dykstra(cost, mu, nu, iterations, rows, comm)
        ctx.save_for_backward(cost, taus, sigmas)
        ctx.comm = comm
        return plan

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_plan):
        return _dykstra_backward(*ctx.saved_tensors, grad_plan, ctx.comm), *[None] * 5


def _dykstra(cost, mu, nu, iterations, rows, comm):
    """The plan, tau as (n, V, 1) and sigma as (n, 1, U)."""
    V, U = cost.shape
    z, w = cost.clone(), torch.zeros_like(cost)
    taus = cost.new_empty(iterations, V, 1)
    sigmas = cost.new_zeros(iterations + 1, 1, U)  # sigmas[k] belongs to iteration k - 1
    for k in range(iterations):
        for tile in _tiles(cost):
            if k:
                z[tile] = _next_z(z[tile], w[tile], taus[k - 1, tile], sigmas[k])
            guess = taus[k - 1, tile, 0] if k else None
            taus[k, tile, 0] = _row_threshold(z[tile], mu[tile], guess)
            w[tile] = _next_w(z[tile], w[tile], taus[k, tile], sigmas[k])
        guess = sigmas[k, 0] if k else None
        sigmas[k + 1, 0] = _column_threshold(w, nu, guess, rows, comm)
    return torch.relu_(w.sub_(sigmas[iterations])), taus, sigmas[1:]


def _next_w(z, w, tau, sigma):
    """W_k from Z_k and W_{k-1}."""
    return torch.relu_(z - tau).add_(torch.minimum(w, sigma))


def _next_z(z, w, tau, sigma):
    """Z_{k+1} from Z_k and W_k."""
    return torch.relu_(w - sigma).add_(torch.minimum(z, tau))


def _row_threshold(z, mu, guess):
    return newton_threshold(lambda t: support_sums(z, t, 1), z.amax(1), mu, z.shape[1], guess)


def _column_threshold(w, nu, guess, rows, comm):
    """Thresholds of columns whose entries are spread over ranks."""

    def sums(threshold):
        total = torch.zeros(2, len(nu), dtype=torch.float64, device=w.device)
        for tile in _tiles(w):
            count, excess = support_sums(w[tile], threshold, 0)
            total[0] += count
            total[1] += excess
        return comm.sum_(total).unbind()

    return newton_threshold(sums, comm.max_(_column_top(w)), nu, rows, guess)


def _column_top(matrix):
    """Largest entry of each column; minus infinity on a rank without rows."""
    return matrix.amax(0) if len(matrix) else matrix.new_full(matrix.shape[1:], -math.inf)


def _dykstra_backward(cost, taus, sigmas, grad_plan, comm):
    """dloss/dC: projections' Jacobians in reverse, with the supports recomputed from C.

    For k = n-1..0, with gP = gQ = 0 at first and J h = h - mean over the support, 0 off it:
    gW = J_column(gX - gQ) + gQ;  gZ = J_row(gW - gP) + gP;  then gX = gP = gZ and gQ = gW.
    """
    last = len(taus) - 1
    row_support, col_support = _supports(cost, taus, sigmas)
    grad_x = grad_plan.clone(memory_format=torch.contiguous_format)
    grad_q = torch.zeros_like(grad_x)
    for k in range(last, -1, -1):
        shift = _column_mean(grad_x, grad_q, col_support[k], comm)
        for tile in _tiles(cost):
            gx, gq = grad_x[tile], grad_q[tile]
            gw = (gx - gq).sub_(shift).mul_(col_support[k, tile].to(gx.dtype)).add_(gq)
            gp = gx if k < last else torch.zeros_like(gx)
            on = row_support[k, tile].to(gx.dtype)
            gz = (gw - gp).mul_(on)
            mean = gz.sum(1, dtype=torch.float64) / on.sum(1)
            gz.sub_(mean.to(gz.dtype)[:, None]).mul_(on).add_(gp)
            grad_x[tile], grad_q[tile] = gz, gw
    return grad_x


def _supports(cost, taus, sigmas):
    """Which entries each row and each column projection kept: two (n, V, U) tensors of 0 and 1."""
    row_support = torch.empty((len(taus), *cost.shape), dtype=torch.uint8, device=cost.device)
    col_support = torch.empty_like(row_support)
    for tile in _tiles(cost):
        z, w, sigma = cost[tile], torch.zeros_like(cost[tile]), torch.zeros_like(sigmas[0])
        for k, tau in enumerate(taus[:, tile]):
            w = _next_w(z, w, tau, sigma)
            sigma = sigmas[k]
            row_support[k, tile], col_support[k, tile] = above(z, tau), above(w, sigma)
            z = _next_z(z, w, tau, sigma)
    return row_support, col_support


def _column_mean(grad_x, grad_q, support, comm):
    """Mean of gX - gQ over each column's support, on all ranks."""
    total = torch.zeros(2, grad_x.shape[1], dtype=torch.float64, device=grad_x.device)
    for tile in _tiles(grad_x):
        on = support[tile].to(grad_x.dtype)
        total[0] += (grad_x[tile] - grad_q[tile]).mul_(on).sum(0, dtype=torch.float64)
        total[1] += on.sum(0)
    comm.sum_(total)
    return (total[0] / total[1]).to(grad_x.dtype)


class _Dense(torch.autograd.Function):
    """Entropic Sinkhorn with unit temperature: P = exp(C + f + g), from g_{-1} = 0.

    f_k = log mu - logsumexp_row(C + g_{k-1}) and g_k = log nu - logsumexp_column(C + f_k), for
    k = 0..n-1. Only the potentials are stored. Communication: a U-vector maximum and a U-vector
    sum per iteration; backward, one U-vector sum per iteration and one more.
    """

    @staticmethod
    def forward(ctx, cost, mu, nu, iterations, rows, comm):
        f = cost.new_empty(iterations, len(mu), 1)
        g = cost.new_zeros(iterations + 1, 1, len(nu))  # g[k] belongs to iteration k - 1
        for k in range(iterations):
            for tile in _tiles(cost):
                row = torch.logsumexp(cost[tile] + g[k], 1)
                f[k, tile, 0] = (mu[tile].log() - row).to(cost.dtype)
            g[k + 1, 0] = (nu.log() - _column_logsumexp(cost, f[k], comm)).to(cost.dtype)
        ctx.save_for_backward(cost, f, g, mu, nu)
        ctx.comm = comm
        return torch.exp_((cost + f[-1]).add_(g[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_plan):
        return _dense_backward(*ctx.saved_tensors, grad_plan, ctx.comm), *[None] * 5


def _column_logsumexp(cost, f, comm):
    """log sum_i exp(C + f) of each column over all ranks, float64."""
    top = comm.max_(_column_top(cost + f))
    total = torch.zeros(cost.shape[1], dtype=torch.float64, device=cost.device)
    for tile in _tiles(cost):
        total += torch.exp_((cost[tile] + f[tile]).sub_(top)).sum(0, dtype=torch.float64)
    return comm.sum_(total).log_() + top


def _dense_backward(cost, f, g, mu, nu, grad_plan, comm):
    """dloss/dC: each normalisation takes away its softmax times the gradient of its potential."""
    grad = torch.exp_((cost + f[-1]).add_(g[-1])).mul_(grad_plan)
    grad_f = grad.sum(1, dtype=torch.float64)
    grad_g = comm.sum_(grad.sum(0, dtype=torch.float64))
    for k in range(len(f) - 1, -1, -1):
        next_grad_g = torch.zeros_like(grad_g)
        by_col, by_row = (grad_g / nu).to(cost.dtype), torch.empty_like(grad_f)
        for tile in _tiles(cost):
            logits = cost[tile] + f[k, tile]
            part = torch.exp_(logits + g[k + 1]).mul_(by_col)
            by_row[tile] = (grad_f[tile] - part.sum(1, dtype=torch.float64)) / mu[tile]
            other = torch.exp_(logits.add_(g[k])).mul_(by_row[tile, None].to(cost.dtype))
            grad[tile] -= part.add_(other)
            next_grad_g -= other.sum(0, dtype=torch.float64)
        grad_f, grad_g = torch.zeros_like(grad_f), comm.sum_(next_grad_g)
    return grad
