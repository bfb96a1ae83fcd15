"""The compiled passes themselves: where they come from, and what happens without them."""

import logging
import subprocess
import sys

import pytest
import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot.dual import Dual
from s2t2_dist.ot.dykstra import Dykstra
from s2t2_dist.ot.dykstra_passes import DykstraPasses
from s2t2_dist.ot.native import library
from s2t2_dist.ot.native.passes import NativeDykstra
from s2t2_dist.ot.problem import Problem
from s2t2_dist.ot.sums import tile_sums
from tests.ot.problems import make_cost, make_marginals


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library in memory, and an empty folder to keep one in."""
    library._library.cache_clear()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    yield tmp_path / "s2t2_dist"
    library._library.cache_clear()


def solve(dtype=torch.float64, iterations=3, backend="auto"):
    mu, nu, _ = make_marginals("row mass", 40, 16)
    cost = make_cost("random", 40, 16).detach().to(dtype)
    return Dykstra(iterations, backend).solve(Problem(cost, mu, nu, Comm()))


@pytest.mark.parametrize(
    ("compiler", "problem"),
    [("no-such-compiler", "no C++ compiler was found; set CXX"), ("false", "false")],
)
def test_without_a_compiler_torch_does_the_work_and_the_log_says_so(
    fresh, monkeypatch, caplog, compiler, problem
):
    expected = solve(backend="eager").plan(slice(0, 40))
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        found = solve()
    assert isinstance(found.passes, DykstraPasses)
    assert problem in caplog.text and "torch's slower ones" in caplog.text
    torch.testing.assert_close(found.plan(slice(0, 40)), expected, rtol=0, atol=1e-13)
    assert not list(fresh.glob("*"))  # nothing half compiled is kept


@pytest.mark.slow
def test_ranks_may_compile_at_the_same_time_and_the_code_is_kept(fresh):
    code = "import torch; from s2t2_dist.ot.native import library; "
    code += "assert library.can_call(torch.ones(1))"
    ranks = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0]
    (compiled,) = fresh.iterdir()
    assert compiled.suffix == ".so"
    made = compiled.stat().st_mtime_ns
    assert isinstance(solve(torch.float32).passes, NativeDykstra)
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [made]


def test_four_iterations_at_most():
    """A byte holds the supports of as many; auto takes torch's passes for more."""
    with pytest.raises(ValueError, match="at most 4 iterations, found cpu and 5; take auto"):
        solve(iterations=5, backend="native")
    assert isinstance(solve(iterations=5).passes, DykstraPasses)
    assert isinstance(solve(iterations=4).passes, NativeDykstra)


@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(1, 1), (40, 16), (37, 33), (130, 5), (3, 700)])
def test_equals_the_passes_in_torch(iterations, shape):
    """Rows and columns that do not fill the blocks of the loops; float64, so rounding is small."""
    mu, nu, _ = make_marginals("skewed", *shape)
    cost = make_cost("random", *shape).detach()
    upstream = torch.randn(shape, generator=torch.manual_seed(1), dtype=torch.float64)
    found = []
    for backend in ("native", "eager"):
        solution = Dykstra(iterations, backend).solve(Problem(cost, mu, nu, Comm()))
        grad, apart = upstream.clone(), torch.full_like(upstream, torch.nan)
        solution.backward(upstream, apart)
        solution.backward(grad, grad)
        assert torch.equal(apart, grad), backend
        found.append((solution.plan(slice(0, shape[0])), grad, *solution.state))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [Dykstra, Dual])
def test_the_number_of_threads_changes_no_bit(solver):
    plans, threads, (V, U) = [], torch.get_num_threads(), (2051, 150)
    mu, nu, _ = make_marginals("row mass", V, U)
    cost = make_cost("random", V, U).detach().float()
    try:
        for count in (1, 2, 3, 64):
            torch.set_num_threads(count)
            solution = solver(3, backend="native").solve(Problem(cost, mu, nu, Comm()))
            grad = torch.ones_like(cost).tril()
            if solver is Dykstra:  # the gradient of the dual is a linear system, solved in torch
                solution.backward(grad, grad)
            plan = solution.plan(slice(0, V))
            sums = tile_sums(plan)
            plans.append(torch.cat([t.double().flatten() for t in (plan, grad, *sums)]))
    finally:
        torch.set_num_threads(threads)
    assert library.parts(V) == library.MOST_PARTS
    for plan in plans[1:]:
        assert torch.equal(plan, plans[0])


def test_a_cost_that_is_not_contiguous():
    mu, nu, _ = make_marginals("row mass", 40, 16)
    cost = make_cost("random", 40, 16).detach()
    scattered = cost.T.contiguous().T
    assert not scattered.is_contiguous()
    problems = [Problem(c, mu, nu, Comm()) for c in (cost, scattered)]
    plans = [Dykstra().solve(problem).plan(slice(3, 20)) for problem in problems]
    assert torch.equal(*plans)


@pytest.mark.parametrize("shape", [(1, 1), (7, 40), (100, 700)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_over_a_plan_equal_torchs(monkeypatch, shape, dtype):
    plan = torch.randn(shape, generator=torch.manual_seed(0)).relu().to(dtype)
    found = tile_sums(plan)
    monkeypatch.setattr(library, "can_call", lambda *_: False)
    for one, other in zip(found, tile_sums(plan), strict=True):
        # float32 sums of at most 700 numbers of about 1
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)
