"""References for the dual method in plain float64 autograd and dense algebra, and its ranks' work.

Spawned ranks import this module: it must stay cheap, without the reference libraries.
"""

import itertools

import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot.dual import Dual
from s2t2_dist.ot.problem import Problem
from tests.ot.oracles import sort_threshold
from tests.ot.problems import CountingComm, make_cost, make_marginals, uneven_rows

ALL = slice(None)
TIGHT = 1e-10  # float64 row errors: sums of up to 4096 terms of size 1 to 10 round by about 1e-14


def problem(kind, marginals, V, U, seed=0):
    """(cost, mu, nu, a row's mean mass), without autograd."""
    mu, nu, unit = make_marginals(marginals, V, U, seed)
    if kind == "duplicated":
        cost = make_cost("random", V, U, unit, seed)[torch.arange(V) // 3]
    else:
        cost = make_cost(kind, V, U, unit, seed)
    return cost.detach(), mu, nu, unit


def solve(cost, mu, nu, iterations=5000, tolerance=TIGHT, *, backend="auto", comm=None, start=None):
    """On one rank by default."""
    problem = Problem(cost, mu, nu, comm or Comm())
    return Dual(iterations, tolerance, backend).solve(problem, start)


def weights_like(cost):
    """Some dL/dP."""
    return torch.randn(cost.shape, dtype=torch.float64, generator=torch.manual_seed(0))


def gradient(dual, cost):
    """dL/dC for that dL/dP."""
    grad = weights_like(cost).to(cost)
    dual.backward(grad, grad)
    return grad


def unrolled_dual(cost, mu, nu, iterations):
    """(plan, smallest distance of an entry from its threshold) after so many alternations."""
    b = cost.new_zeros(1, cost.shape[1])
    for _ in range(iterations):
        a = sort_threshold(cost - b, mu)[:, None]
        b = sort_threshold((cost - a).T, nu)[None]
    slack = cost - a - b
    return torch.relu(slack), slack.detach().abs().min().item()


def implicit_gradient(support, grad):
    """dL/dC from dL/dP by the optimality conditions, solved densely.

    M * (G - x_i - y_j) is the orthogonal projection of M * G on matrices on the support whose
    rows and columns sum to 0: what least squares leaves of G's entries there.
    """
    rows, cols = support.nonzero(as_tuple=True)
    incidence = grad.new_zeros(len(rows), sum(support.shape))
    entries = torch.arange(len(rows))
    incidence[entries, rows] = 1
    incidence[entries, support.shape[0] + cols] = 1
    known = grad[rows, cols]
    potentials = torch.linalg.lstsq(incidence, known[:, None], driver="gelsd").solution
    answer = torch.zeros_like(grad)
    answer[rows, cols] = known - (incidence @ potentials)[:, 0]
    return answer


CASES = [
    ("random", "row mass", 64, 48, 1e-9),
    ("narrow", "skewed", 300, 32, 1e-9),
    ("wide", "skewed", 65, 7, None),
    ("constant", "literal", 30, 12, None),
    ("one-hot", "skewed", 64, 32, None),
    ("random", "literal", 1, 1, 1e-9),
]


def solve_cases(comm):
    """(plan, gradient, iterations, collectives) of this rank's rows for every case."""
    answers = []
    for kind, marginals, V, U, tolerance in CASES:
        mu, nu, unit = make_marginals(marginals, V, U)
        rows = uneven_rows(V, comm.rank, comm.size)
        cost = make_cost(kind, V, U, unit).detach()[rows].clone()
        counting = CountingComm(comm)
        most = 3 if tolerance is None else 2000
        dual = solve(cost, mu[rows], nu, most, tolerance, comm=counting)
        grad = torch.randn(V, U, dtype=torch.float64, generator=torch.manual_seed(0))[rows].clone()
        dual.backward(grad, grad)
        answers.append((dual.plan(slice(None)), grad, dual.iterations, counting.calls))
    return answers


def check_collectives(calls, U, iterations, tolerance):
    """One maximum an iteration, sums of the columns still searched, then the linear system's."""
    maxima = [i for i, call in enumerate(calls) if call[0] == "max"]
    assert len(maxima) == iterations + (tolerance is not None)
    assert all(calls[i] == ("max", (U + 1,)) for i in maxima)
    backward = calls.index(("sum", (4, U)))
    assert set(calls[backward + 1 :]) <= {("sum", (U,))}
    ends = [*maxima, backward] if tolerance is None else maxima
    for start, stop in itertools.pairwise(ends):
        widths = [shape for _, shape in calls[start + 1 : stop]]
        assert widths[0] == (2, U) and widths == sorted(widths, reverse=True)
        assert 2 <= len(widths) <= 9
    return len(calls) - backward - 1
