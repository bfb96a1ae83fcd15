import gc

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2t2_dist.comm import Comm
from s2t2_dist.ot import sparse_sinkhorn
from s2t2_dist.ot.dykstra import Dykstra
from s2t2_dist.ot.problem import Problem, Thresholds
from s2t2_dist.ot.sinkhorn import make_solver
from tests.jobs.distributed import run_ranks
from tests.ot import oracles
from tests.ot.covering import noted, pairwise
from tests.ot.problems import (
    SPREADS,
    CountingComm,
    make_cost,
    make_marginals,
    solve_and_refuse,
    solve_cases,
    solve_single,
)

VALUE = 1e-12  # float64 sums of up to 4096 terms of size 1 to 10 round by about 1e-14
GRADIENT = 1e-9  # elementwise in the supports and means over them; about 1e-15 in practice
SHARDED = 1e-10  # the order of the sums over rows changes with the ranks, by about 1e-14
SHARDED_SINGLE = 1e-6  # of the row mass: a threshold of size 1 to 10 may round the other way

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 3), (64, 32), (64, 48), (300, 32)]


def weighted_grad(plan, cost, seed=0):
    weights = torch.randn(plan.shape, dtype=plan.dtype, generator=torch.manual_seed(seed))
    return torch.autograd.grad((plan * weights).sum(), cost)[0]


def assert_near(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


# auto is native code up to 4 iterations; "compile" is compared with them below
BACKENDS = ["auto", "eager"]
MARGINALS = ["row mass", "literal", "skewed"]
COUNTS = [1, 2, 3, 6, 10]
ON_THRESHOLDS = ["tied", "one-hot", "duplicated rows"]
OTHERS = ["constant", "near one-hot", *SPREADS]


def compare_with_oracle(kind, marginals, V, U, iterations, backend="auto", seed=None):
    """Compare values always, gradients where they are defined; say whether they were.

    Where an entry lies on its threshold mathematically, rounding decides its membership in the
    sort form as in ours, and the two may differ: the gradient is undefined there, not wrong.
    """
    mu, nu, unit = make_marginals(marginals, V, U)
    cost = make_cost(kind, V, U, unit, iterations if seed is None else seed)
    expected, margin = oracles.sparse_sinkhorn(cost, mu, nu, iterations)
    result = sparse_sinkhorn(cost, mu, nu, iterations, backend=backend)
    assert_near(result.plan, expected, VALUE)
    if kind in ON_THRESHOLDS or margin <= 1e-12 * mu.mean():
        return False
    assert_near(weighted_grad(result.plan, cost), weighted_grad(expected, cost), GRADIENT)
    return True


def test_equals_algorithm_1():
    compared = []
    for case in pairwise(OTHERS, MARGINALS, SHAPES, COUNTS, BACKENDS):
        kind, marginals, (V, U), iterations, backend = case
        with noted(*case):
            compared.append(compare_with_oracle(kind, marginals, V, U, iterations, backend))
    # A few wide cases land on a threshold: a row whose one entry takes it all.
    assert sum(compared) >= 0.85 * len(compared)


def test_values_equal_algorithm_1_on_thresholds():
    for case in pairwise(ON_THRESHOLDS, MARGINALS, SHAPES, COUNTS, BACKENDS):
        kind, marginals, (V, U), iterations, backend = case
        with noted(*case):
            compare_with_oracle(kind, marginals, V, U, iterations, backend)


sizes = st.integers(1, 12)


@given(
    st.sampled_from([*OTHERS, *ON_THRESHOLDS]), st.sampled_from(MARGINALS), sizes, sizes,
    st.integers(1, 10), st.sampled_from(BACKENDS), st.integers(0, 10_000),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_equals_algorithm_1_in_any_case(kind, marginals, V, U, iterations, backend, seed):
    compare_with_oracle(kind, marginals, V, U, iterations, backend, seed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("V", "U", "iterations"), [(1, 1, 3), (64, 32, 10), (512, 128, 3)])
def test_gradient_where_entries_lie_exactly_on_their_threshold(V, U, iterations, backend):
    """Sizes are powers of two, so nothing rounds and both must call the same entries off."""
    mu, nu, _ = make_marginals("row mass", V, U)
    cost = make_cost("one-hot", V, U)
    expected, margin = oracles.sparse_sinkhorn(cost, mu, nu, iterations)
    result = sparse_sinkhorn(cost, mu, nu, iterations, backend=backend)
    assert margin == 0 or V == 1
    assert torch.equal(result.plan, expected)
    assert_near(weighted_grad(result.plan, cost), weighted_grad(expected, cost), GRADIENT)


@pytest.mark.parametrize(
    ("kind", "marginals", "iterations"),
    [
        ("narrow", "skewed", 3),
        pytest.param("random", "row mass", 3, marks=pytest.mark.slow),
        pytest.param("constant", "literal", 2, marks=pytest.mark.slow),
        pytest.param("near one-hot", "skewed", 4, marks=pytest.mark.slow),
        pytest.param("wide", "skewed", 6, marks=pytest.mark.slow),
    ],
)
def test_equals_algorithm_1_at_full_size(kind, marginals, iterations):
    assert compare_with_oracle(kind, marginals, 4096, 512, iterations, seed=0)


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


def test_dense_equals_log_domain_autograd():
    for case in pairwise(list(SPREADS), SHAPES, MARGINALS, [1, 3, 10]):
        kind, (V, U), marginals, n = case
        mu, nu, _ = make_marginals(marginals, V, U)
        cost = make_cost(kind, V, U)
        expected = oracles.dense_sinkhorn(cost, mu, nu, n)
        result = sparse_sinkhorn(cost, mu, nu, n, method="dense")
        with noted(*case):
            assert_near(result.plan, expected, VALUE)
            found = weighted_grad(result.plan, cost)
            assert_near(found, weighted_grad(expected, cost), GRADIENT)


@pytest.mark.filterwarnings("ignore:scipy.optimize:DeprecationWarning")  # POT's call
def test_limits_equal_pot():
    """POT minimises the same objectives by other means: L-BFGS on the semi-dual, Sinkhorn-Knopp."""
    V, U = 20, 12
    mu, nu, _ = make_marginals("skewed", V, U)
    cost = make_cost("narrow", V, U, 1 / V).detach()
    sparse = ot.smooth.smooth_ot_semi_dual(
        (mu * V).numpy(), (nu * V).numpy(), (-cost * V).numpy(), 1.0, "l2",
        stopThr=1e-14, numItermax=20000,
    )  # fmt: skip
    # L-BFGS stops near the optimum, at about 1e-8; Dykstra is there after 60 iterations.
    found = sparse_sinkhorn(cost, mu, nu, 80)
    assert_near(found.plan, torch.from_numpy(sparse) / V, 1e-6)
    assert max(found.row_error, found.col_error) < 1e-6
    entropic = ot.sinkhorn(mu.numpy(), nu.numpy(), -cost.numpy(), reg=1.0, stopThr=1e-14)
    dense = sparse_sinkhorn(cost, mu, nu, 200, method="dense")
    assert_near(dense.plan, torch.from_numpy(entropic), VALUE)


def test_collectives_of_a_solve():
    """One sum per Newton step of the columns; backward, one per iteration."""
    mu, nu, _ = make_marginals("row mass", 400, 10)
    cost, comm = make_cost("random", 400, 10), CountingComm()
    result = sparse_sinkhorn(cost, mu, nu, 4, comm=comm)
    check, marginals, *solve = comm.calls
    assert check == ("max", (1,)) and marginals == ("sum", (3,))
    assert solve[-1] == ("sum", (10 + 2 + 1,))  # column sums, support and entropy, row errors
    steps = solve[:-1]
    assert all(kind == "sum" for kind, _ in steps)
    # The first Newton step of an iteration: count, excess and sum of every column, and the rows.
    # Those after it are of fewer and fewer columns.
    assert [shape for _, shape in steps].count((31,)) == 4
    later = [shape for _, shape in steps if shape != (31,)]
    assert all(len(shape) == 2 and shape[0] == 2 for shape in later)
    assert any(shape[1] < 10 for shape in later) and len(later) <= 4 * 7
    comm.calls.clear()
    weighted_grad(result.plan, cost)
    assert comm.calls == [("sum", (10,))] * 4


def tensors_alive():
    gc.collect()
    return [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]


def test_nothing_of_the_size_of_the_cost_is_kept_for_backward():
    mu, nu, _ = make_marginals("row mass", 400, 300)
    cost = make_cost("random", 400, 300).detach()
    problem = Problem(cost, mu, nu, Comm())
    before = {id(found) for found in tensors_alive()}
    solutions = [make_solver(method).solve(problem) for method in ("dykstra", "dual", "dense")]
    kept = [found for found in tensors_alive() if id(found) not in before]
    others = [t for t in kept if t.untyped_storage().data_ptr() != cost.data_ptr()]
    assert solutions and 0 < sum(t.numel() for t in others) < cost.numel() / 10


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_warm_start_finds_the_same_plan_in_fewer_steps(backend, dtype):
    mu, nu, _ = make_marginals("skewed", 300, 40)
    mu, nu = 300 * mu, 300 * nu
    cost = make_cost("random", 300, 40).detach().to(dtype)
    step = 0.01 * make_cost("random", 300, 40, seed=1).detach().to(dtype)
    counts, plans = [], []
    solver = Dykstra(backend=backend)
    former = solver.solve(Problem(cost, mu, nu, Comm()))
    for start in (None, former.state):
        comm = CountingComm()
        solution = solver.solve(Problem(cost + step, mu, nu, comm), start)
        counts.append(len(comm.calls))
        plans.append(solution.plan(slice(0, 300)))
    # A threshold (up to 8 here) rounds by an ulp or two with the way that leads to it. Projections
    # do not stretch distances, but those of a column of 300 entries can meet in one.
    rounding = 256 * torch.finfo(dtype).eps
    assert_near(plans[1], plans[0], rounding)
    assert counts[1] < counts[0]
    # A start that is nowhere near is no worse than none.
    far = Thresholds(*(torch.full_like(part, 1e3) for part in former.state))
    again = solver.solve(Problem(cost + step, mu, nu, Comm()), far)
    assert_near(again.plan(slice(0, 300)), plans[0], rounding)


@pytest.mark.parametrize("method", ["dykstra", "dual", "dense"])
def test_rows_and_columns_of_no_mass_are_as_if_absent(method):
    mu, nu, _ = make_marginals("skewed", 12, 9)
    rows, columns = torch.arange(12) % 4 != 1, torch.arange(9) % 3 != 2
    mu, nu = mu * rows, nu * columns
    mu, nu = mu / mu.sum(), nu / nu.sum()
    cost = make_cost("random", 12, 9, 1 / 12)
    found = sparse_sinkhorn(cost, mu, nu, 5, method)
    kept = sparse_sinkhorn(cost[rows][:, columns], mu[rows], nu[columns], 5, method)
    assert torch.equal(found.plan[rows][:, columns], kept.plan)
    assert not found.plan[~rows].any() and not found.plan[:, ~columns].any()
    assert (found.row_error, found.col_error) == (kept.row_error, kept.col_error)
    assert found.support == kept.support
    grad = weighted_grad(found.plan, cost)
    assert not grad[~rows].any() and not grad[:, ~columns].any() and grad.isfinite().all()
    assert grad.any()


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "iterations"), [("aot_eager", 2), ("inductor", 1)])
def test_compiled_passes_agree_with_eager_ones(compiler, iterations, compile_by):
    """aot_eager makes the same graphs, of whole functions and any size, in half the time."""
    compile_by(compiler)
    mu, nu, _ = make_marginals("skewed", 600, 48)
    cost = make_cost("random", 600, 48, 1 / 600)
    eager, compiled = (
        sparse_sinkhorn(cost, mu, nu, iterations, backend=b) for b in ("eager", "compile")
    )
    assert_near(compiled.plan, eager.plan, VALUE)
    grads = [weighted_grad(result.plan, cost) for result in (eager, compiled)]
    assert_near(grads[1], grads[0], GRADIENT)


@pytest.mark.parametrize("method", ["dykstra", "dual", "dense"])
def test_marginals_may_be_views_and_may_change_before_backward(method):
    cost = make_cost("random", 12, 8)
    mu, nu = torch.ones(12, dtype=torch.float64), torch.full((8,), 1.5, dtype=torch.float64)
    views = mu[:1].expand(12), nu.repeat_interleave(2)[::2]
    grads = []
    for source, target in (views, (mu, nu)):
        plan = sparse_sinkhorn(cost, source, target, 3, method).plan
        target.mul_(2)
        grads.append(torch.autograd.grad(plan, cost, cost.detach().cos())[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sharded_rows_equal_one_rank(size, tmp_path):
    answers = run_ranks(solve_and_refuse, size, tmp_path)
    ranks, singles, refusals = zip(*answers, strict=True)
    # A bad entry on one rank is refused on all of them: none is left waiting.
    assert all("NaN" in refused for refused in refusals)
    assert size < 3 or not len(singles[1][0])  # a rank without a row
    for found, expected in zip(zip(*singles, strict=True), solve_single(Comm()), strict=True):
        assert_near(torch.cat(found), expected, SHARDED_SINGLE)
    for i, (plan, grad, numbers) in enumerate(solve_cases(Comm())):
        assert_near(torch.cat([rank[i][0] for rank in ranks]), plan, SHARDED)
        assert_near(torch.cat([rank[i][1] for rank in ranks]), grad, SHARDED)
        for rank in ranks:
            assert rank[i][2] == pytest.approx(numbers, abs=1e-10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "magic"}, "unknown Sinkhorn method 'magic'"),
        ({"iterations": 0}, "at least 1"),
        ({"method": "plain"}, "plain keeps no marginals: choose dykstra, dual or"),
        ({"cost": torch.zeros(3, 2, dtype=torch.bfloat16)}, "bfloat16"),
        ({"cost": torch.zeros(2, 3)}, "shapes"),
        ({"cost": torch.full((3, 2), torch.inf)}, "NaN or infinite"),
        ({"cost": torch.tensor([[3e38, -3e38]] * 3)}, "that overflow"),
        (
            {"mu": torch.tensor([1.0, 2.5, -0.5])},
            "source marginal must be finite and not",
        ),
        ({"mu": torch.zeros(3), "nu": torch.zeros(2)}, "both must be the same and pos"),
        ({"nu": torch.tensor([3.0, torch.nan])}, "target marginal must be finite"),
        ({"nu": torch.ones(2)}, "sums to 3, target to 2"),
    ],
)
def test_refuses(change, message):
    problem = {"cost": torch.zeros(3, 2), "mu": torch.ones(3), "nu": torch.full((2,), 1.5)}
    problem |= {"iterations": 3, "method": "dykstra"} | change
    with pytest.raises(ValueError, match=message):
        sparse_sinkhorn(*problem.values())
