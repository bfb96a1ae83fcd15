import itertools

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2t2_dist.comm import LocalComm
from s2t2_dist.errors import ConfigError, DataError
from s2t2_dist.ot import sparse_sinkhorn
from tests import oracles
from tests.distributed import run_ranks
from tests.problems import SPREADS, make_cost, make_marginals, solve_and_refuse, solve_cases

VALUE = 1e-12  # float64 sums of up to 4096 terms of size 1 to 10 round by about 1e-14
GRADIENT = 1e-9  # elementwise in the supports and means over them; about 1e-15 in practice
SHARDED = 1e-10  # the order of the sums over rows changes with the ranks, by about 1e-14

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 3), (64, 32), (64, 48), (300, 32)]


def weighted_grad(plan, cost, seed=0):
    weights = torch.randn(plan.shape, dtype=plan.dtype, generator=torch.manual_seed(seed))
    return torch.autograd.grad((plan * weights).sum(), cost)[0]


def assert_near(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def compare_with_oracle(cost, mu, nu, iterations):
    """Compare values always, gradients where they are defined; say whether they were.

    Where an entry lies on its threshold mathematically, rounding decides its membership in the
    sort form as in ours, and the two may differ: the gradient is undefined there, not wrong.
    """
    expected, margin = oracles.sparse_sinkhorn(cost, mu, nu, iterations)
    result = sparse_sinkhorn(cost, mu, nu, iterations)
    assert_near(result.plan, expected, VALUE)
    if margin <= 1e-12 * mu.mean():
        return False
    assert_near(weighted_grad(result.plan, cost), weighted_grad(expected, cost), GRADIENT)
    return True


@pytest.mark.parametrize("marginals", ["row mass", "literal", "skewed"])
@pytest.mark.parametrize("kind", ["constant", "near one-hot", *SPREADS])
def test_equals_algorithm_1(kind, marginals):
    compared = []
    for (V, U), iterations in itertools.product(SHAPES, [1, 2, 3, 6, 10]):
        mu, nu, unit = make_marginals(marginals, V, U)
        cost = make_cost(kind, V, U, unit, seed=iterations)
        compared.append(compare_with_oracle(cost, mu, nu, iterations))
    # A few wide cases land on a threshold: a row whose one entry takes it all.
    assert sum(compared) >= 0.85 * len(compared)


@pytest.mark.parametrize("marginals", ["row mass", "literal", "skewed"])
@pytest.mark.parametrize("kind", ["tied", "one-hot"])
def test_values_equal_algorithm_1_on_thresholds(kind, marginals):
    for (V, U), iterations in itertools.product(SHAPES, [1, 2, 3, 6, 10]):
        mu, nu, unit = make_marginals(marginals, V, U)
        cost = make_cost(kind, V, U, unit, seed=iterations)
        expected, _ = oracles.sparse_sinkhorn(cost, mu, nu, iterations)
        assert_near(sparse_sinkhorn(cost, mu, nu, iterations).plan, expected, VALUE)


@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize(("V", "U"), [(1, 1), (64, 32), (1024, 256)])
def test_gradient_where_entries_lie_exactly_on_their_threshold(V, U, iterations):
    """Sizes are powers of two, so nothing rounds and both must call the same entries off."""
    mu, nu, _ = make_marginals("row mass", V, U)
    cost = make_cost("one-hot", V, U)
    expected, margin = oracles.sparse_sinkhorn(cost, mu, nu, iterations)
    result = sparse_sinkhorn(cost, mu, nu, iterations)
    assert margin == 0 or V == 1
    assert torch.equal(result.plan, expected)
    assert_near(weighted_grad(result.plan, cost), weighted_grad(expected, cost), GRADIENT)


@pytest.mark.parametrize(
    ("kind", "marginals", "iterations"),
    [("random", "row mass", 3), ("narrow", "skewed", 3), ("constant", "literal", 2)],
)
def test_equals_algorithm_1_at_full_size(kind, marginals, iterations):
    mu, nu, unit = make_marginals(marginals, 4096, 512)
    assert compare_with_oracle(make_cost(kind, 4096, 512, unit), mu, nu, iterations)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*SPREADS, "near one-hot", "constant"])
def test_equals_algorithm_1_at_full_size_for_ten_iterations(kind):
    mu, nu, unit = make_marginals("skewed", 4096, 512)
    assert compare_with_oracle(make_cost(kind, 4096, 512, unit), mu, nu, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_cost_gives_the_uniform_plan_and_a_full_support_gradient(dtype):
    mu, nu, _ = make_marginals("row mass", 48, 20)
    cost = torch.ones(48, 20, dtype=dtype, requires_grad=True)
    result = sparse_sinkhorn(cost, mu, nu)
    tolerance = 4 * torch.finfo(dtype).eps
    assert result.support == 48 * 20
    assert_near(result.plan, torch.full_like(cost, 1 / 20), tolerance)
    weights = torch.randn(48, 20, dtype=dtype, generator=torch.manual_seed(0))
    centred = weights - weights.mean(0) - weights.mean(1, keepdim=True) + weights.mean()
    (grad,) = torch.autograd.grad(result.plan, cost, weights)
    assert_near(grad, centred, 10 * tolerance)


@pytest.mark.parametrize("kind", list(SPREADS))
def test_dense_equals_log_domain_autograd(kind):
    for (V, U), marginals, n in itertools.product(SHAPES, ["row mass", "skewed"], [1, 3, 10]):
        mu, nu, _ = make_marginals(marginals, V, U)
        cost = make_cost(kind, V, U)
        expected = oracles.dense_sinkhorn(cost, mu, nu, n)
        result = sparse_sinkhorn(cost, mu, nu, n, method="dense")
        assert_near(result.plan, expected, VALUE)
        assert_near(weighted_grad(result.plan, cost), weighted_grad(expected, cost), GRADIENT)


@pytest.mark.filterwarnings("ignore:scipy.optimize:DeprecationWarning")  # POT's call
def test_limits_equal_pot():
    """POT minimises the same objectives by other means: L-BFGS on the semi-dual, Sinkhorn-Knopp."""
    V, U = 20, 12
    mu, nu, _ = make_marginals("skewed", V, U)
    cost = make_cost("random", V, U, 1 / V).detach()
    sparse = ot.smooth.smooth_ot_semi_dual(
        (mu * V).numpy(), (nu * V).numpy(), (-cost * V).numpy(), 1.0, "l2",
        stopThr=1e-14, numItermax=20000,
    )  # fmt: skip
    # Both stop near the optimum: L-BFGS at about 1e-8, Dykstra at about 1e-9.
    found = sparse_sinkhorn(cost, mu, nu, 3000)
    assert_near(found.plan, torch.from_numpy(sparse) / V, 1e-6)
    assert max(found.row_error, found.col_error) < 1e-6
    entropic = ot.sinkhorn(mu.numpy(), nu.numpy(), -cost.numpy(), reg=1.0, stopThr=1e-14)
    dense = sparse_sinkhorn(cost, mu, nu, 200, method="dense")
    assert_near(dense.plan, torch.from_numpy(entropic), VALUE)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(0, 10_000))
@settings(deadline=None, max_examples=60)
def test_invariants(V, U, iterations, seed):
    """Columns hold, a row's shift changes nothing, and units scale the plan exactly."""
    mu, nu, unit = make_marginals("skewed", V, U, seed)
    cost = make_cost("random", V, U, unit, seed)
    result = sparse_sinkhorn(cost, mu, nu, iterations)
    assert (result.plan >= 0).all() and result.col_error < 1e-12
    assert result.support == (result.plan > 0).sum()
    assert_near(weighted_grad(result.plan, cost).sum(1), torch.zeros(V).double(), VALUE)
    shifted = sparse_sinkhorn(cost + torch.arange(V)[:, None] * unit, mu, nu, iterations)
    assert_near(shifted.plan, result.plan, VALUE)
    scaled = sparse_sinkhorn(64 * cost, 64 * mu, 64 * nu, iterations)
    assert torch.equal(scaled.plan, 64 * result.plan)  # a power of two: no rounding


@pytest.mark.parametrize(("method", "kind"), list(itertools.product(["dykstra", "dense"], SPREADS)))
def test_float32_is_near_float64(method, kind):
    mu, nu, _ = make_marginals("row mass", 2048, 128)
    cost = make_cost(kind, 2048, 128)
    single = cost.detach().float().requires_grad_()
    exact = sparse_sinkhorn(single.double(), mu, nu, method=method)
    found = sparse_sinkhorn(single, mu, nu, method=method)
    # An entry and its threshold round by 2^-24 of their size, at most 60 row masses here.
    assert_near(found.plan.double(), exact.plan, 60 * 2**-23)
    assert found.col_error < 1e-4
    # An entry that changes sides changes its own gradient and, by one part in the size of the
    # support, its row's and column's.
    expected = weighted_grad(exact.plan, single)
    weights = torch.randn(2048, 128, dtype=torch.float64, generator=torch.manual_seed(0)).float()
    (gradient,) = torch.autograd.grad(found.plan, single, weights)
    assert (gradient - expected).norm() < 0.01 * expected.norm()


class CountingComm(LocalComm):
    def __init__(self):
        self.calls = []

    def sum_(self, tensor):
        self.calls.append(("sum", tuple(tensor.shape)))
        return tensor

    def max_(self, tensor):
        self.calls.append(("max", tuple(tensor.shape)))
        return tensor


def test_backward_sums_once_per_iteration_and_stores_thresholds_only():
    mu, nu, _ = make_marginals("row mass", 40, 10)
    cost, comm = make_cost("random", 40, 10), CountingComm()
    result = sparse_sinkhorn(cost, mu, nu, 4, comm=comm)
    stored = [tuple(saved.shape) for saved in result.plan.grad_fn.saved_tensors]
    assert stored == [(40, 10), (4, 40, 1), (4, 1, 10)]
    assert comm.calls.count(("max", (10,))) == 4
    comm.calls.clear()
    weighted_grad(result.plan, cost)
    assert comm.calls == [("sum", (2, 10))] * 4


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sharded_rows_equal_one_rank(size, tmp_path):
    answers = run_ranks(solve_and_refuse, size, tmp_path)
    ranks = [solved for solved, _ in answers]
    # A bad entry on one rank is refused on all of them: none is left waiting.
    assert all("NaN" in refused for _, refused in answers)
    for i, (plan, grad, numbers) in enumerate(solve_cases(LocalComm())):
        assert_near(torch.cat([rank[i][0] for rank in ranks]), plan, SHARDED)
        assert_near(torch.cat([rank[i][1] for rank in ranks]), grad, SHARDED)
        for rank in ranks:
            assert rank[i][2] == pytest.approx(numbers, abs=1e-10)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "magic"}, ConfigError, "unknown Sinkhorn method 'magic'"),
        ({"iterations": 0}, ConfigError, "at least 1"),
        ({"cost": torch.zeros(3, 2, dtype=torch.bfloat16)}, DataError, "bfloat16"),
        ({"cost": torch.zeros(2, 3)}, DataError, "shapes"),
        ({"cost": torch.full((3, 2), torch.inf)}, DataError, "NaN or infinite"),
        ({"mu": torch.tensor([1.0, 2.0, 0.0])}, DataError, "source marginal must be positive"),
        ({"nu": torch.tensor([3.0, torch.nan])}, DataError, "target marginal must be positive"),
        ({"nu": torch.ones(2)}, DataError, "sums to 3, target to 2"),
    ],
)
def test_refuses(change, error, message):
    problem = {"cost": torch.zeros(3, 2), "mu": torch.ones(3), "nu": torch.full((2,), 1.5)}
    problem |= {"iterations": 3, "method": "dykstra"} | change
    with pytest.raises(error, match=message):
        sparse_sinkhorn(*problem.values())
