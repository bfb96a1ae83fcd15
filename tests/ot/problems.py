"""Transport problems for the tests, and the functions that ranks run on them.

Spawned ranks import this module: it must stay cheap, without the reference libraries.
"""

import torch

from s2t2_dist.comm import Comm
from s2t2_dist.errors import S2T2Error
from s2t2_dist.lm.translation import save_translation
from s2t2_dist.ot import Translator, make_solver, row_range, sparse_sinkhorn
from s2t2_dist.ot.translator import to_csr


class CountingComm(Comm):
    """One rank that writes down its collectives, or several, over another `Comm`."""

    def __init__(self, comm=None):
        self.inner, self.calls = comm or Comm(), []
        self.rank, self.size = self.inner.rank, self.inner.size

    def sum_(self, tensor):
        self.calls.append(("sum", tuple(tensor.shape)))
        return self.inner.sum_(tensor)

    def max_(self, tensor):
        self.calls.append(("max", tuple(tensor.shape)))
        return self.inner.max_(tensor)


SPREADS = {"narrow": 0.1, "random": 1.0, "wide": 10.0}  # in row masses


def make_cost(kind, V, U, unit=1.0, seed=0):
    """A float64 cost in units of a row's mass, times `unit`."""
    random = torch.manual_seed(seed)
    if kind == "constant":
        cost = torch.full((V, U), 0.3, dtype=torch.float64)
    elif kind == "tied":
        cost = torch.randint(0, 3, (V, U), generator=random).double() / 2
    elif kind == "duplicated rows":
        cost = torch.randint(0, 9, (V, U), generator=random).double() / 4
        cost = cost[torch.arange(V) // 3]
    elif kind in ("one-hot", "near one-hot"):
        cost = torch.zeros(V, U, dtype=torch.float64)
        cost[torch.arange(V), torch.arange(V) % U] = 1
        if kind == "near one-hot":
            cost += 1e-3 * torch.randn(V, U, dtype=torch.float64, generator=random)
    else:
        cost = SPREADS[kind] * torch.randn(V, U, dtype=torch.float64, generator=random)
    return (cost * unit).requires_grad_()


def make_marginals(kind, V, U, seed=0):
    """(mu, nu, mean row mass)."""
    if kind == "skewed":
        random = torch.manual_seed(seed)
        mu = 0.05 + torch.rand(V, dtype=torch.float64, generator=random)
        nu = 0.05 + torch.rand(U, dtype=torch.float64, generator=random) ** 2
        return mu / mu.sum(), nu / nu.sum(), 1 / V
    unit = 1.0 if kind == "row mass" else 1 / V
    ones = torch.ones(V + U, dtype=torch.float64) * unit
    return ones[:V], ones[V:] * V / U, unit


CASES = [
    (method, kind, marginals, V, U, iterations)
    for method in ("dykstra", "dense")
    for kind, marginals, V, U, iterations in [
        ("random", "row mass", 64, 48, 3),
        ("narrow", "skewed", 300, 32, 10),
        ("wide", "skewed", 65, 7, 5),
        ("constant", "literal", 30, 12, 3),
        ("one-hot", "row mass", 64, 32, 3),
        ("random", "literal", 1, 1, 3),
    ]
]


def uneven_rows(V, rank, size):
    """Rank 0 takes a fifth, the last rank the rest, a rank between them nothing."""
    if rank == 0:
        return slice(0, V if size == 1 else V // 5)
    return slice(V // 5, V) if rank == size - 1 else slice(0, 0)


def solve_cases(comm):
    """(plan, gradient, statistics) of this rank's rows for every case."""
    answers = []
    for method, kind, marginals, V, U, iterations in CASES:
        mu, nu, unit = make_marginals(marginals, V, U)
        rows = uneven_rows(V, comm.rank, comm.size)
        cost = make_cost(kind, V, U, unit).detach()[rows].clone().requires_grad_()
        result = sparse_sinkhorn(cost, mu[rows], nu, iterations, method, comm)
        weights = torch.randn(V, U, dtype=torch.float64, generator=torch.manual_seed(0))
        (grad,) = torch.autograd.grad(result.plan, cost, weights[rows])
        numbers = (result.row_error, result.col_error, result.support)
        answers.append((result.plan.detach(), grad, numbers))
    return answers


def solve_by_triton(comm):
    """The same of a smaller one, because Triton's interpreter is slow."""
    return solve_single(comm, 24, 8, "triton")


def solve_single(comm, V=257, U=64, backend="auto"):
    """Plan and gradient of this rank's rows of a float32 problem."""
    mu, nu, _ = make_marginals("skewed", V, U)
    rows = uneven_rows(V, comm.rank, comm.size)
    cost = make_cost("random", V, U, seed=3).detach().float()[rows].requires_grad_()
    result = sparse_sinkhorn(cost, V * mu[rows], V * nu, comm=comm, backend=backend)
    weights = torch.randn(V, U, generator=torch.manual_seed(0))
    (grad,) = torch.autograd.grad(result.plan, cost, weights[rows])
    return result.plan.detach(), grad


def refusal(comm):
    """The error of a solve in which the last rank alone holds a bad entry."""
    cost = torch.zeros(2, 2)
    if comm.rank == comm.size - 1:
        cost[0, 0] = torch.nan
    try:
        sparse_sinkhorn(cost, torch.ones(2), torch.full((2,), float(comm.size)), comm=comm)
    except ValueError as error:
        return str(error)
    return None


def solve_and_refuse(comm):
    return solve_cases(comm), solve_single(comm), refusal(comm)


def translator_inputs(V=30, U=12, D=8, tied=False):
    """(E, L, mu, nu, a step for C in row masses): float32 matrices, float64 marginals."""
    random = torch.manual_seed(5)
    embed = torch.randn(V, D, generator=random)
    head = embed if tied else torch.randn(V, D, generator=random)
    mu, nu, _ = make_marginals("skewed", V, U)
    return embed, head, mu, nu, torch.randn(V, U, generator=random) * 0.3


def leaf_loss(embed_UD, head_UD, rank):
    """A loss that is not linear in E' and L' and differs from rank to rank."""
    return (rank + 1) * ((embed_UD * head_UD.roll(1, 0)).sin().sum() + head_UD.square().sum() / 9)


def dense_rows(translator):
    """This rank's rows of the plan, total mass 1 over all ranks."""
    tiles = [tile.to_dense() for tile in translator.plan_tiles()["plan"]]
    return torch.cat([torch.zeros(0, translator.costs[0].shape[1]), *tiles])


def translate_rows(comm, ranks, settings, alpha=0.1):
    """One translate and backward of this rank's rows; `ranks` losses are spread over the ranks."""
    embed, head, mu, nu, step = translator_inputs()
    rows = slice(*row_range(len(mu), comm.rank, comm.size))
    settings = {**settings, "solver": make_solver(settings["method"])}
    del settings["method"]
    translator = Translator(embed[rows], head[rows], mu[rows], nu, comm=comm, **settings)
    translator.costs[0].data += step[rows] * translator.mass / translator.rows
    translated = translator.translate()
    for rank in range(comm.rank, ranks, comm.size):
        leaf_loss(translated.embed_UD, translated.head_UD, rank).backward()
    translator.backward(translated, alpha)
    return {
        "embed": translated.embed_UD.detach(),
        "head": translated.head_UD.detach(),
        "grad": translator.costs[0].grad.clone(),
        "plan": dense_rows(translator),
        "norm": translator.clip_grad_norm(1e-3),
        "statistics": translator.statistics(),
        "clipped": translator.costs[0].grad,
    }


def write_translation(comm, directory, options):
    """Save this rank's rows of a plan; the error's text where that fails."""
    plans, ids, mu, nu = translation_parts(options.get("plans", "shared"))
    rows = slice(*row_range(len(mu), comm.rank, comm.size))
    try:
        save_translation(
            directory,
            comm,
            plans={name: csr_tiles(plan[rows]) for name, plan in plans.items()},
            source_token_ids=ids[rows],
            source_marginal=mu[rows],
            target_marginal=nu,
            source_tokenizer_sha256="a" * 64,
            target_tokenizer_sha256="b" * 64,
            embed_scale=options["embed_scale"],
            vocab_size=options.get("vocab_size", 60),
            info={"method": "dykstra", "statistics": {"entropy": 1.5}},
        )
    except S2T2Error as error:
        return str(error)
    return None


def csr_tiles(plan, height=7):
    """What `Translator.plan_tiles` gives for a plan, with several tiles."""
    return [to_csr(tile) for tile in plan.split(height)] if len(plan) else []


def translation_parts(plans="shared"):
    """Sparse plans of 30 of 60 source tokens: (dense plans by name, token ids, mu, nu)."""
    embed, head, mu, nu, step = translator_inputs()
    translator = Translator(embed, head, mu, nu, plans=plans)
    for number, cost in enumerate(translator.costs, start=1):
        cost.data += number * step
    tiles = translator.plan_tiles()
    found = {name: torch.cat([tile.to_dense() for tile in tiles[name]]) for name in tiles}
    return found, torch.arange(30) * 2, mu, nu
