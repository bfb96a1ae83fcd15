import itertools

import ot
import pytest
import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot import sparse_sinkhorn
from s2t2_dist.ot.problem import Thresholds
from s2t2_dist.ot.simplex import NewtonSearch
from tests.bench import row_errors
from tests.jobs.distributed import run_ranks
from tests.ot.covering import noted, pairwise
from tests.ot.oracles_dual import (
    ALL,
    CASES,
    TIGHT,
    check_collectives,
    gradient,
    implicit_gradient,
    problem,
    solve,
    solve_cases,
    unrolled_dual,
    weights_like,
)
from tests.ot.problems import SPREADS, CountingComm

VALUE = 1e-12  # sums of size 1 to 10 round by about 1e-14, and searches do not add that up
GRADIENT = 1e-6  # the criterion; about 1e-11 in practice
SHARDED = 1e-9  # the order of sums changes with the ranks; both are converged to 1e-9

SHAPES = [(1, 1), (1, 7), (7, 1), (5, 3), (20, 12), (12, 20), (64, 48)]
DEGENERATE = ["constant", "tied", "one-hot", "near one-hot", "duplicated"]


def assert_near(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def assert_optimal(dual, cost, mu, nu, tolerance=TIGHT):
    """The marginals hold, C - P = a + b on the support and C <= a + b off it."""
    row, col = dual.state
    plan = dual.plan(ALL)
    sums = cost.amax(1, keepdim=True) + row.T + col
    size = cost.abs().max().item()
    rounding = 8 * torch.finfo(cost.dtype).eps * size
    assert dual.converged
    assert ((plan.sum(1) - mu).abs() / mu).max() <= 2 * tolerance
    # A threshold rounds by eps times the spread of C, and each entry of the column with it.
    assert ((plan.sum(0) - nu).abs() <= VALUE * nu + len(mu) * rounding).all()
    on = plan > 0
    assert_near((cost - plan)[on], sums[on], rounding)
    assert (cost <= sums + rounding)[~on].all() and (plan >= 0).all()


@pytest.mark.filterwarnings("ignore:scipy.optimize:DeprecationWarning")  # POT's call
def test_equals_pot():
    """L-BFGS on the semi-dual, run until its line search finds nothing: about 5e-7 of the row mass
    at worst here. (At 300 x 32 and std 10 it stops 2e-6 away; `test_optimality` goes on.)"""
    kinds = [*SPREADS, "constant", "tied", "one-hot"]
    for case in pairwise(kinds, ["row mass", "skewed"], SHAPES, range(2)):
        kind, marginals, (V, U), seed = case
        cost, mu, nu, unit = problem(kind, marginals, V, U, seed)
        expected = ot.smooth.smooth_ot_semi_dual(
            (mu / unit).numpy(), (nu / unit).numpy(), (-cost / unit).numpy(), 1.0, "l2",
            stopThr=0, numItermax=20000,
        )  # fmt: skip
        dual = solve(cost, mu, nu)
        with noted(*case):
            assert dual.converged
            assert_near(dual.plan(ALL) / unit, torch.from_numpy(expected), 1e-6)


def test_optimality_of_degenerate_costs():
    shapes = [(1, 1), (1, 40), (40, 1), (30, 90), (64, 32)]
    for kind, marginals, (V, U) in pairwise(DEGENERATE, ["row mass", "skewed"], shapes):
        cost, mu, nu, _ = problem(kind, marginals, V, U)
        with noted(kind, marginals, V, U):
            assert_optimal(solve(cost, mu, nu), cost, mu, nu)


@pytest.mark.parametrize(("kind", "V", "U"), [("narrow", 2000, 300), ("wide", 600, 100)])
def test_optimality_where_pot_does_not_reach(kind, V, U):
    cost, mu, nu, _ = problem(kind, "skewed", V, U)
    assert_optimal(solve(cost, mu, nu), cost, mu, nu)


def test_a_fixed_count_equals_the_plain_alternation():
    kinds, shapes = [*SPREADS, "near one-hot"], [*SHAPES, (300, 32)]
    for case in pairwise(kinds, ["row mass", "skewed"], shapes, [1, 2, 3, 10]):
        kind, marginals, (V, U), iterations = case
        cost, mu, nu, _ = problem(kind, marginals, V, U, iterations)
        expected, _ = unrolled_dual(cost, mu, nu, iterations)
        dual = solve(cost, mu, nu, iterations, None)
        with noted(*case):
            assert (dual.iterations, dual.converged) == (iterations, None)
            assert_near(dual.plan(ALL), expected, VALUE)


@pytest.mark.slow
def test_gradient_equals_that_of_the_unrolled_iteration():
    limits = [("narrow", 60), ("random", 500), ("wide", 2000)]
    for case in pairwise(limits, ["row mass", "skewed"], [(5, 3), (9, 14)]):
        (kind, iterations), marginals, (V, U) = case
        cost, mu, nu, _ = problem(kind, marginals, V, U)
        dual = solve(cost, mu, nu, tolerance=1e-12, iterations=20000)
        leaf = cost.clone().requires_grad_()
        plan, margin = unrolled_dual(leaf, mu, nu, iterations)
        with noted(*case):
            assert_near(dual.plan(ALL), plan.detach(), 1e-9)
            assert margin > 1e-7  # else the gradient would not be defined
            (expected,) = torch.autograd.grad((plan * weights_like(cost)).sum(), leaf)
            assert_near(gradient(dual, cost), expected, GRADIENT)


@pytest.mark.slow
def test_gradient_equals_dense_least_squares(monkeypatch):
    """On the support that was found, whatever it is: many components, or one entry per row."""
    monkeypatch.setattr("s2t2_dist.ot.tiles.CPU_TILE", 1000)
    shapes = [(1, 1), (1, 7), (7, 1), (30, 40), (64, 48)]
    for case in pairwise([*SPREADS, *DEGENERATE], shapes, [(3, None), (5000, TIGHT)]):
        kind, (V, U), (iterations, tolerance) = case
        cost, mu, nu, _ = problem(kind, "row mass", V, U, 1)
        dual = solve(cost, mu, nu, iterations, tolerance)
        off = dual.plan(ALL) == 0
        expected = implicit_gradient(~off, weights_like(cost))
        found = gradient(dual, cost)
        with noted(*case):
            # residual 1e-13, times the condition: under 1e3 here
            assert_near(found, expected, 1e-10)
            assert not found[off].any()


@pytest.mark.parametrize("blocks", [2, 16])
def test_entries_exactly_on_their_threshold_are_off_the_support(blocks):
    """Outside the blocks, C - a - b is 0 without rounding."""
    cost = torch.kron(torch.eye(blocks), torch.ones(4, 2)).double() / 2
    mu, nu = torch.ones(4 * blocks).double(), torch.full((2 * blocks,), 2.0).double()
    dual = solve(cost, mu, nu, 3, None)
    assert torch.equal(dual.plan(ALL), cost)
    assert_near(gradient(dual, cost), implicit_gradient(cost > 0, weights_like(cost)), VALUE)


def test_a_row_without_support_has_no_gradient():
    """Before convergence: the last row halves its mass between columns that drop such entries."""
    cost = torch.tensor([[9.0, 0, 0]] * 10 + [[0, 9.0, 0]] * 10 + [[9.0, 9.0, -5.0]]).double()
    mu, nu = torch.ones(21).double(), torch.tensor([4.0, 4.0, 13.0]).double()
    dual = solve(cost, mu, nu, 1, None)
    assert (dual.plan(ALL) > 0).sum(1)[-3:].tolist() == [2, 2, 0]
    found = gradient(dual, cost)
    assert_near(found, implicit_gradient(dual.plan(ALL) > 0, weights_like(cost)), VALUE)
    assert (found[-1] == 0).all()


def test_gradient_of_a_gradient_in_the_space_of_gradients_is_itself():
    """Then nothing is left to solve for, and rounding alone must not start a search."""
    cost, mu, nu, _ = problem("random", "skewed", 64, 48)
    dual = solve(cost, mu, nu)
    once = gradient(dual, cost)
    twice = once.clone()
    dual.backward(twice, twice)
    assert_near(twice, once, 1e-11)
    assert dual.cg_iterations <= 1
    constant = torch.ones_like(once)
    dual.backward(constant, constant)
    assert_near(constant, torch.zeros_like(once), VALUE)


def test_constants_in_rows_and_columns_change_nothing():
    cost, mu, nu, _ = problem("random", "skewed", 40, 25)
    unit = mu.mean()
    plain = solve(cost, mu, nu, tolerance=1e-13)
    rows, columns = torch.linspace(-50, 50, 40).double(), torch.linspace(3, -9, 25).double()
    shift = unit * (rows[:, None] + columns)
    shifted = solve(cost + shift, mu, nu, tolerance=1e-13)
    assert_near(shifted.plan(ALL), plan := plain.plan(ALL), TIGHT)
    again = solve(plan, mu, nu)  # the plan is its own nearest plan
    assert_near(again.plan(ALL), plan, TIGHT)


def test_duplicated_rows_have_one_plan_and_share_their_gradient():
    cost, mu, nu, _ = problem("duplicated", "row mass", 30, 20)
    dual = solve(cost, mu, nu)
    plan = dual.plan(ALL).view(10, 3, 20)
    assert torch.equal(plan[:, 0], plan[:, 1]) and torch.equal(plan[:, 0], plan[:, 2])
    grad = weights_like(cost).view(10, 3, 20)
    grad[:, 1:] = grad[:, :1]
    grad = grad.view(30, 20).clone()
    dual.backward(grad, grad)
    assert torch.equal(grad[0::3], grad[1::3])


@pytest.mark.parametrize("spread", [1e2, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("iterations", [1, 20])
def test_costs_far_above_the_row_mass(spread, dtype, iterations):
    """Columns hold to what the type resolves at the largest entry, and every row's gradient too."""
    cost, mu, nu, _ = problem("random", "row mass", 300, 32)
    cost = (spread * cost).to(dtype)
    dual = solve(cost, mu, nu, iterations, None)
    plan = dual.plan(ALL)
    rounding = torch.finfo(dtype).eps * cost.abs().max().item()
    support = (plan > 0).sum(0)
    assert (support > 0).all()
    # Each entry of a column is off by its threshold's rounding and its own.
    assert ((plan.sum(0, dtype=torch.float64) - nu).abs() <= 4 * support * rounding).all()
    grad = gradient(dual, cost)
    # A thousand roundings: supports hold up to 60 entries of size 1.
    small = 1000 * torch.finfo(dtype).eps
    assert_near(grad.sum(0), torch.zeros_like(grad[0]), small)
    assert_near(grad.sum(1), torch.zeros_like(grad[:, 0]), small)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_rows_constant_costs_float32_no_digits(offset):
    """Rows are shifted by their maximum: an offset that float32 holds exactly changes no bit."""
    cost, mu, nu, _ = problem("random", "row mass", 64, 16)
    cost = (cost * 1024).round().div(1024).float()
    exact = solve(cost.double(), mu, nu, 10, None).plan(ALL)
    found = solve(cost + offset, mu, nu, 10, None).plan(ALL)
    assert_near(found.double(), exact, 1e-5)


@pytest.mark.parametrize("kind", [*SPREADS, "constant"])
def test_float32_is_near_float64(kind):
    cost, mu, nu, _ = problem(kind, "row mass", 1024, 64)
    single = cost.float()
    exact, found = solve(single.double(), mu, nu), solve(single, mu, nu, tolerance=1e-4)
    assert found.converged
    assert found.plan(ALL).dtype == torch.float32
    assert [part.dtype for part in found.state] == [torch.float32] * 2
    # The row error, times the same factor of conditioning as the gradient's; 1e-4 in practice.
    assert_near(found.plan(ALL).double(), exact.plan(ALL), 1e-3)
    expected = gradient(exact, single.double())
    # An entry that changes sides changes its own gradient and, by one part in the size of the
    # support, its row's and column's.
    assert (gradient(found, single) - expected).norm() < 0.02 * expected.norm()


def test_a_tolerance_is_met_or_reported(monkeypatch):
    monkeypatch.setattr(
        "s2t2_dist.ot.tiles.CPU_TILE", 1000
    )  # the largest error is not in the last tile
    cost, mu, nu, _ = problem("random", "row mass", 64, 48)
    dual = solve(cost, mu, nu, 1000, 1e-6)
    taken = dual.iterations
    errors = []
    for iterations in (taken - 1, taken):
        plan = solve(cost, mu, nu, iterations, None).plan(ALL)
        errors.append(((plan.sum(1) - mu).abs() / mu).max().item())
    assert errors[0] > 1e-6 >= errors[1] and dual.converged
    assert torch.equal(dual.plan(ALL), plan)
    assert not solve(cost, mu, nu, taken - 1, 1e-6).converged
    assert solve(cost, mu, nu, taken, 1e-6).converged


def test_starts_from_a_former_state():
    cost, mu, nu, _ = problem("random", "skewed", 64, 48)
    cold = solve(cost, mu, nu)
    assert solve(cost, mu, nu, start=cold.state).iterations == 1
    moved = cost + 0.01 * mu.mean() * weights_like(cost)
    near, far = solve(moved, mu, nu, start=cold.state), solve(moved, mu, nu)
    assert near.iterations < far.iterations
    assert_near(near.plan(ALL), far.plan(ALL), 1e-8 * mu.mean().item())
    wrong = Thresholds(*(part.roll(7) * 30 for part in cold.state))  # right of most roots
    assert_near(solve(cost, mu, nu, start=wrong).plan(ALL), cold.plan(ALL), 1e-9)


def test_plan_by_blocks_and_no_state_of_the_matrix_size():
    cost, mu, nu, _ = problem("random", "row mass", 50, 10)
    dual = solve(cost, mu, nu, 3, None)
    assert torch.equal(dual.plan(slice(7, 21)), dual.plan(ALL)[7:21])
    assert [tuple(part.shape) for part in dual.state] == [(1, 50), (1, 10)]
    held = [*vars(dual).values(), *vars(dual.passes).values()]
    kept = [value for value in held if isinstance(value, torch.Tensor)]
    assert [value.numel() for value in kept if value.numel() > 50] == [500]
    assert any(value.data_ptr() == cost.data_ptr() for value in kept)


def test_counts_collectives_and_sends_only_columns_that_change(monkeypatch):
    cost, mu, nu, _ = problem("random", "skewed", 400, 64)
    comm, update, moved = CountingComm(), NewtonSearch.update, []

    def noted(search, count, excess):
        moved.append(("sum", (2, len(search.moving))))
        return update(search, count, excess)

    monkeypatch.setattr(NewtonSearch, "update", noted)
    dual = solve(cost, mu, nu, 12, None, comm=comm)
    gradient(dual, cost)
    assert check_collectives(comm.calls, 64, 12, None) == dual.cg_iterations > 3
    sums = [call for call in comm.calls if call[0] == "sum"]
    assert sums[: len(moved)] == moved and sums[len(moved)] == ("sum", (4, 64))
    assert sum(width <= 8 for _, (_, width) in moved) > 3  # picked out of a tile
    assert dual.cg_residual < 1e-13


@pytest.mark.parametrize("size", [2, 3])
def test_sharded_rows_equal_one_rank(size, tmp_path):
    """Uneven rows, and with three ranks one that has none."""
    ranks = run_ranks(solve_cases, size, tmp_path)
    for i, (plan, grad, iterations, calls) in enumerate(solve_cases(Comm())):
        *_, U, tolerance = CASES[i]
        assert_near(torch.cat([rank[i][0] for rank in ranks]), plan, SHARDED)
        assert_near(torch.cat([rank[i][1] for rank in ranks]), grad, SHARDED)
        for rank in ranks:
            assert rank[i][2] == iterations
            assert rank[i][3] == ranks[0][i][3]
            check_collectives(rank[i][3], U, iterations, tolerance)
        assert abs(len(ranks[0][i][3]) - len(calls)) <= 2  # rounding may add a step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_native_passes_equal_eager_ones(dtype):
    compare_backends("native", dtype)


@pytest.mark.slow
def test_compiled_passes_equal_eager_ones(compile_by):
    compile_by("inductor")
    for dtype in (torch.float32, torch.float64):
        compare_backends("compile", dtype)


def compare_backends(backend, dtype):
    """The order of sums differs, and nothing else."""
    rounding = 64 * torch.finfo(dtype).eps
    for kind, V, U in [("random", 1000, 300), ("wide", 400, 64), ("constant", 700, 400)]:
        cost, mu, nu, _ = problem(kind, "row mass", V, U)
        cost = cost.to(dtype)
        fused, eager = (solve(cost, mu, nu, 5, None, backend=b) for b in (backend, "eager"))
        # An entry and its threshold round by the size of the entry, at most 60 row masses here.
        assert_near(fused.plan(ALL), eager.plan(ALL), 60 * rounding)
        difference = (gradient(fused, cost) - gradient(eager, cost)).norm()
        # In float32 an entry may change sides: as above.
        assert difference < (0.02 if dtype == torch.float32 else 1e-9) * eager.plan(ALL).norm()


def test_the_row_error_benchmark_measures_the_methods(tmp_path, monkeypatch):
    cost, mu, nu, _ = problem("random", "row mass", 60, 20)
    for n in (1, 4):
        *_, error = itertools.islice(row_errors.dykstra_errors(cost, mu, nu), n)
        assert error == pytest.approx(sparse_sinkhorn(cost, mu, nu, n).row_error, abs=VALUE)
        *_, error = itertools.islice(row_errors.dual_errors(cost, mu, nu), n)
        plan = solve(cost, mu, nu, n, None).plan(ALL)
        assert error == pytest.approx(((plan.sum(1) - mu).abs() / mu).max().item(), abs=VALUE)
    assert row_errors.measure(iter([0.5] * 60 + [0.009] * 9)) == ([0.5] * 8, 61)
    monkeypatch.setattr(row_errors, "MOST", 60)
    row_errors.main(40, 12, tmp_path / "page.md")
    printed = (tmp_path / "page.md").read_text().splitlines()
    rows = [line for line in printed if line.startswith("|") and "---" not in line]
    assert [line.count("|") for line in rows] == [11] * 7 + [4] * 4
    assert "over 60" in rows[-1]
