"""The compiled passes themselves: where they come from, and what happens without them."""

import logging
import subprocess
import sys

import pytest
import torch

from s2t2_dist.comm import LocalComm
from s2t2_dist.ot import native
from s2t2_dist.ot.dykstra import Dykstra
from s2t2_dist.ot.native import NativePasses
from s2t2_dist.ot.passes import TorchPasses
from tests.problems import make_cost, make_marginals


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No library in memory, and an empty folder to keep one in."""
    native._library.cache_clear()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    yield tmp_path / "s2t2_dist"
    native._library.cache_clear()


def solve(dtype=torch.float64, iterations=3, **options):
    mu, nu, _ = make_marginals("row mass", 40, 16)
    cost = make_cost("random", 40, 16).detach().to(dtype)
    return Dykstra(cost, mu, nu, LocalComm(), iterations=iterations, **options)


def test_compiles_once_and_is_used(fresh):
    assert isinstance(solve().passes, NativePasses)
    (library,) = fresh.iterdir()
    made = library.stat().st_mtime_ns
    native._library.cache_clear()
    assert isinstance(solve().passes, NativePasses)
    assert [path.stat().st_mtime_ns for path in fresh.iterdir()] == [made]


@pytest.mark.parametrize(
    ("compiler", "problem"),
    [("no-such-compiler", "no C++ compiler was found; set CXX"), ("false", "false")],
)
def test_without_a_compiler_torch_does_the_work_and_the_log_says_so(
    fresh, monkeypatch, caplog, compiler, problem
):
    expected = solve().plan(slice(0, 40))
    native._library.cache_clear()
    for library in fresh.iterdir():
        library.unlink()
    monkeypatch.setenv("CXX", compiler)
    with caplog.at_level(logging.WARNING):
        found = solve()
    assert isinstance(found.passes, TorchPasses)
    assert problem in caplog.text and "torch's slower ones" in caplog.text
    torch.testing.assert_close(found.plan(slice(0, 40)), expected, rtol=0, atol=1e-13)
    assert not list(fresh.iterdir())  # nothing half compiled is kept


def test_ranks_may_compile_at_the_same_time(fresh):
    code = "from s2t2_dist.ot.native import has_native; assert has_native()"
    ranks = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [rank.wait() for rank in ranks] == [0, 0, 0]
    assert [path.suffix for path in fresh.iterdir()] == [".so"]


@pytest.mark.parametrize("iterations", [4, 5, 16, 35])
def test_supports_of_any_number_of_iterations(iterations):
    """A byte holds those of 4 iterations and a word those of 15."""
    grads = []
    for backend in ("native", "eager"):
        solution = solve(iterations=iterations, backend=backend)
        grads.append(torch.randn(40, 16, generator=torch.manual_seed(1)).double())
        solution.backward_(grads[-1])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


def test_threads_change_nothing_but_rounding():
    plans, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 64):
            torch.set_num_threads(count)
            solution = solve()
            assert solution.passes.threads == min(count, 40)
            grad = torch.ones(40, 16, dtype=torch.float64).tril()
            solution.backward_(grad)
            plans.append(torch.stack((solution.plan(slice(0, 40)), grad)))
    finally:
        torch.set_num_threads(threads)
    for plan in plans[1:]:
        torch.testing.assert_close(plan, plans[0], rtol=0, atol=1e-13)


def test_a_cost_that_is_not_contiguous():
    mu, nu, _ = make_marginals("row mass", 40, 16)
    cost = make_cost("random", 40, 16).detach()
    scattered = cost.T.contiguous().T
    assert not scattered.is_contiguous()
    plans = [
        Dykstra(c, mu, nu, LocalComm(), iterations=3).plan(slice(3, 20)) for c in (cost, scattered)
    ]
    assert torch.equal(*plans)
