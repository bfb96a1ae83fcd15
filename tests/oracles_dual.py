"""References for the dual method in plain float64 autograd and dense algebra, and its ranks' work.

Spawned ranks import this module: it must stay cheap, without the reference libraries.
"""

import torch

from s2t2_dist.comm import LocalComm
from s2t2_dist.ot.dual import Dual
from tests.problems import make_cost, make_marginals, uneven_rows


class CountingComm(LocalComm):
    """One rank that writes down its collectives, or several, over another `Comm`."""

    def __init__(self, comm=None):
        self.inner, self.calls = comm or LocalComm(), []
        self.rank, self.size = self.inner.rank, self.inner.size

    def sum_(self, tensor):
        self.calls.append(("sum", tuple(tensor.shape)))
        return self.inner.sum_(tensor)

    def max_(self, tensor):
        self.calls.append(("max", tuple(tensor.shape)))
        return self.inner.max_(tensor)


def row_thresholds(z, scale):
    """SPARSEMAX's thresholds (paper, Algorithm 2) of the rows of z, by sorting."""
    ordered = torch.sort(z, dim=1, descending=True).values
    sums = torch.cumsum(ordered, dim=1)
    k = torch.arange(1, z.shape[1] + 1, dtype=z.dtype)
    count = (scale[:, None] + k * ordered > sums).sum(dim=1, keepdim=True)
    return (sums.gather(1, count - 1) - scale[:, None]) / count


def unrolled_dual(cost, mu, nu, iterations):
    """(plan, smallest distance of an entry from its threshold) after so many alternations."""
    b = cost.new_zeros(1, cost.shape[1])
    for _ in range(iterations):
        a = row_thresholds(cost - b, mu)
        b = row_thresholds((cost - a).T, nu).T
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
        dual = Dual(cost, mu[rows], nu, counting, iterations=most, tolerance=tolerance)
        grad = torch.randn(V, U, dtype=torch.float64, generator=torch.manual_seed(0))[rows].clone()
        dual.backward_(grad)
        answers.append((dual.plan(slice(None)), grad, dual.iterations, counting.calls))
    return answers
