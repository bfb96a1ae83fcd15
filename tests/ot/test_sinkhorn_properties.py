"""What holds for every problem: properties, and what float32 makes of them."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2t2_dist.ot import project_simplex, sparse_sinkhorn
from tests.ot import oracles
from tests.ot.problems import SPREADS, make_cost, make_marginals

VALUE = 1e-12  # float64 sums of a dozen terms of size 1 to 10 round by about 1e-15
SINGLE = 1e-5  # of the row mass: what float32 promises where C is up to 10 row masses
RANGE = 1e-6  # and beyond it, of a row's range: 16 roundings of 2^-24, as the docstring says

sizes = st.integers(1, 12)
seeds = st.integers(0, 10_000)
quick = settings(deadline=None, max_examples=60)
fewer = settings(deadline=None, max_examples=25)  # each solves to a limit


def assert_near(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def skewed_problem(V, U, seed, kind="random"):
    mu, nu, unit = make_marginals("skewed", V, U, seed)
    return make_cost(kind, V, U, seed=seed), mu / unit, nu / unit


def gradient(result, cost):
    weights = torch.randn(cost.shape, generator=torch.manual_seed(0), dtype=torch.float64)
    return torch.autograd.grad(result.plan, cost, weights.to(cost.dtype))[0]


@given(sizes, sizes, st.integers(1, 5), seeds)
@quick
def test_marginals_and_units(V, U, iterations, seed):
    """Columns hold, and units scale the plan exactly."""
    cost, mu, nu = skewed_problem(V, U, seed)
    result = sparse_sinkhorn(cost, mu, nu, iterations)
    assert (result.plan >= 0).all() and result.col_error < 1e-12
    assert result.support == (result.plan > 0).sum()
    scaled = sparse_sinkhorn(64 * cost, 64 * mu, 64 * nu, iterations)
    assert torch.equal(scaled.plan, 64 * result.plan)  # a power of two: no rounding


@given(sizes, sizes, st.integers(1, 5), seeds)
@quick
def test_row_constants_change_nothing(V, U, iterations, seed):
    cost, mu, nu = skewed_problem(V, U, seed)
    result = sparse_sinkhorn(cost, mu, nu, iterations)
    shifted = sparse_sinkhorn(cost + torch.arange(V)[:, None], mu, nu, iterations)
    assert_near(shifted.plan, result.plan, VALUE)
    # So the gradient has none: its rows add up to zero.
    assert_near(gradient(result, cost).sum(1), torch.zeros(V).double(), VALUE)


@given(sizes, sizes, seeds)
@fewer
def test_column_constants_change_nothing_at_the_limit(V, U, seed):
    cost, mu, nu = skewed_problem(V, U, seed)
    options = {"method": "dual", "tolerance": 1e-12, "iterations": 10_000}
    plans = [
        sparse_sinkhorn(shifted, mu, nu, **options).plan
        for shifted in (cost, cost + torch.arange(U))
    ]
    assert_near(plans[1], plans[0], 1e-8)  # a row error of 1e-12 leaves some 1e-10 in the plan


@given(sizes, sizes, st.integers(1, 5), seeds)
@quick
def test_permutations_go_through(V, U, iterations, seed):
    cost, mu, nu = skewed_problem(V, U, seed)
    rows, columns = torch.randperm(V), torch.randperm(U)
    result = sparse_sinkhorn(cost, mu, nu, iterations)
    moved = sparse_sinkhorn(cost[rows][:, columns], mu[rows], nu[columns], iterations)
    assert_near(moved.plan, result.plan[rows][:, columns], VALUE)


@given(sizes, sizes, seeds, st.floats(0.1, 10))
@quick
def test_a_projection_projected_again_stays(V, U, seed, scale):
    cost = make_cost("random", V, U, seed=seed).detach()
    _, once = project_simplex(cost, scale)
    _, twice = project_simplex(once, scale)
    assert_near(twice, once, VALUE * max(1, scale))


@given(sizes, sizes, seeds)
@fewer
def test_a_plan_is_its_own_plan_at_the_limit(V, U, seed):
    """The set of plans is convex: projecting a point of it changes nothing."""
    cost, mu, nu = skewed_problem(V, U, seed)
    options = {"method": "dual", "tolerance": 1e-12, "iterations": 10_000}
    once = sparse_sinkhorn(cost, mu, nu, **options).plan.detach()
    assert_near(sparse_sinkhorn(once, mu, nu, **options).plan, once, 1e-8)


@pytest.mark.parametrize("marginals", ["row mass", "skewed"])
@pytest.mark.parametrize("spread", [1e-8, 1e-4, 0.01, 0.1, 1.0, 10.0])
def test_float32_equals_the_literal_algorithm_in_float64(spread, marginals):
    """Values always; gradients where no entry is within float32's reach of its threshold."""
    compared = 0
    for seed, (V, U) in itertools.product(range(2), [(64, 48), (40, 100), (300, 32), (12, 9)]):
        mu, nu, unit = make_marginals(marginals, V, U, seed)
        mu, nu = mu / unit, nu / unit
        cost = (spread * make_cost("random", V, U, seed=seed)).detach().float().requires_grad_()
        exact = cost.detach().double().requires_grad_()
        expected, margin = oracles.sparse_sinkhorn(exact, mu, nu, 3)
        result = sparse_sinkhorn(cost, mu, nu, 3)
        assert_near(result.plan.double(), expected, SINGLE)
        if margin > 4 * SINGLE * max(1, spread / 10):
            assert_near(gradient(result, cost), gradient_of(expected, exact).float(), SINGLE)
            compared += 1
    assert compared or (marginals, spread) in NEVER_CLEAR


# With skewed marginals and a nearly constant C whole columns lie at their thresholds.
NEVER_CLEAR = [("skewed", 1e-8), ("skewed", 1e-4)]


def gradient_of(plan, cost):
    weights = torch.randn(cost.shape, generator=torch.manual_seed(0), dtype=torch.float64)
    return torch.autograd.grad(plan, cost, weights)[0]


@pytest.mark.parametrize("spread", [1e2, 1e3, 1e4])
@pytest.mark.parametrize("crowded", [False, True])
def test_float32_beyond_ten_row_masses_keeps_its_bound(spread, crowded):
    """`crowded`: every row wants one column, so that most of the plan lies far below the top."""
    for seed, (V, U) in itertools.product(range(2), [(64, 48), (40, 100), (300, 32)]):
        cost, mu, nu = skewed_problem(V, U, seed)
        cost = cost.detach()
        cost[:, 0] += 1 if crowded else 0
        cost = (cost if crowded else cost * spread).float()
        cost[:, 0] *= spread if crowded else 1
        expected, _ = oracles.sparse_sinkhorn(cost.double(), mu, nu, 3)
        bound = max(SINGLE, RANGE * (cost.amax(1) - cost.amin(1)).max().item())
        result = sparse_sinkhorn(cost, mu, nu, 3)
        assert_near(result.plan.double(), expected, bound)
        assert result.plan.isfinite().all()


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("constant", [1e4, -1e4])
def test_a_constant_as_large_as_1e4_row_masses_is_taken_away(constant, backend):
    """2^-24 of 1e4 row masses is 6e-4 of one: only the entries themselves keep that rounding."""
    mu, nu, _ = make_marginals("row mass", 64, 48)
    cost = (make_cost("random", 64, 48) + constant).detach().float()
    expected, _ = oracles.sparse_sinkhorn(cost.double(), mu, nu, 3)
    assert_near(sparse_sinkhorn(cost, mu, nu, backend=backend).plan.double(), expected, SINGLE)


@pytest.mark.parametrize(("method", "kind"), list(itertools.product(["dykstra", "dense"], SPREADS)))
def test_float32_is_near_float64_at_size(method, kind):
    mu, nu, _ = make_marginals("row mass", 2048, 128)
    single = make_cost(kind, 2048, 128).detach().float().requires_grad_()
    exact = sparse_sinkhorn(single.double(), mu, nu, method=method)
    found = sparse_sinkhorn(single, mu, nu, method=method)
    assert_near(found.plan.double(), exact.plan, SINGLE)
    assert found.col_error < 1e-4
    # An entry that changes sides changes its own gradient and, by one part in the size of the
    # support, its row's and column's.
    expected = gradient(exact, single)
    assert (gradient(found, single) - expected).norm() < 0.01 * expected.norm()
