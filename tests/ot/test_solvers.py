"""What every solver keeps: options alone, one status, one gradient, one list of names."""

import dataclasses
import re

import pytest
import torch

from s2t2_dist import config
from s2t2_dist.comm import Comm
from s2t2_dist.ot import METHODS, make_solver, sparse_sinkhorn
from s2t2_dist.ot.dual import Dual
from s2t2_dist.ot.dykstra import Dykstra
from s2t2_dist.ot.entropic import Entropic
from s2t2_dist.ot.plain import Plain
from s2t2_dist.ot.problem import Problem
from tests.ot.problems import CountingComm, make_cost, make_marginals

ALL = slice(None)
SOLVERS = [Dykstra(2), Dykstra(5), Dual(4), Dual(5000, 1e-13), Entropic(4), Plain()]


def small(dtype=torch.float64, comm=None):
    mu, nu, _ = make_marginals("skewed", 7, 5)
    return Problem(make_cost("random", 7, 5).detach().to(dtype), 7 * mu, 7 * nu, comm or Comm())


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_solver_is_a_value(solver):
    """Equal options, equal solver; it keeps nothing of a solve: the next one is the same."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.iterations = 9
    same = dataclasses.replace(solver)
    assert same == solver and hash(same) == hash(solver)
    comm = CountingComm()
    first = solver.solve(small(comm=comm))
    taken, comm.calls = comm.calls, []
    again = same.solve(small(comm=comm))
    assert comm.calls == taken and vars(solver) == vars(same)
    assert torch.equal(first.plan(ALL), again.plan(ALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_solution_says_how_it_ended(solver, dtype):
    if solver == Dual(5000, 1e-13) and dtype == torch.float32:
        solver = Dual(5000, 1e-5)
    solution = solver.solve(small(dtype))
    plan = solution.plan(ALL)
    assert plan.dtype == dtype and plan.shape == (7, 5)
    if isinstance(solver, Dual) and solver.tolerance:
        assert solution.converged and 1 < solution.iterations < 5000
    else:
        assert solution.converged is None
        assert solution.iterations == getattr(solver, "iterations", 0)
    if isinstance(solver, Dykstra | Dual):
        n = solution.iterations if isinstance(solver, Dykstra) else 1
        assert solution.state.row_threshold.shape == (n, 7)
        assert solution.state.col_threshold.shape == (n, 5)
    else:
        assert solution.state is None
    grad, apart = torch.ones(7, 5, dtype=dtype).tril(), torch.full((7, 5), torch.nan, dtype=dtype)
    solution.backward(grad, apart)
    solution.backward(grad, grad)
    assert torch.equal(apart, grad)


@pytest.mark.parametrize("solver", [s for s in SOLVERS if s != Dual(4)], ids=repr)
def test_gradient_equals_finite_differences(solver):
    """Dual(4) is left out: its gradient is that of the limit with the same support."""
    problem, step = small(), 1e-6
    weights = torch.randn(7, 5, dtype=torch.float64, generator=torch.manual_seed(0))
    found = torch.empty(7, 5, dtype=torch.float64)
    solution = solver.solve(problem)
    solution.backward(weights, found)
    for i in range(7):
        for j in range(5):
            values = []
            for sign in (1, -1):
                cost = problem.cost_VU.clone()
                cost[i, j] += sign * step
                moved = dataclasses.replace(problem, cost_VU=cost)
                near = solver.solve(moved, solution.state)
                values.append((near.plan(ALL) * weights).sum().item())
            # Exact while no entry changes sides: then P is linear. Rounding leaves 1e-12 / step.
            slope = (values[0] - values[1]) / (2 * step)
            assert slope == pytest.approx(found[i, j].item(), abs=1e-6)


def test_the_result_explains_its_status():
    cost = make_cost("random", 40, 12)
    marginals = torch.ones(40), torch.full((12,), 40 / 12, dtype=torch.float64)
    fixed = sparse_sinkhorn(cost, *marginals, 3)
    assert (fixed.iterations, fixed.converged) == (3, None)
    assert re.fullmatch(
        r"all 3 iterations taken, no tolerance asked for: row error \d\.\de-\d\d, column error .*",
        fixed.status,
    )
    met = sparse_sinkhorn(cost, *marginals, 1000, "dual", tolerance=1e-3)
    assert met.converged and met.row_error <= 1e-3
    assert met.status.startswith(f"converged in {met.iterations} iterations: row error ")
    missed = sparse_sinkhorn(cost, *marginals, met.iterations - 1, "dual", tolerance=1e-3)
    assert missed.converged is False and missed.row_error > 1e-3
    assert missed.status.startswith(f"not converged in {met.iterations - 1} iterations: row error")
    assert missed.status.endswith("allow more iterations or a larger tolerance")


def test_a_recipe_s_methods_and_defaults_are_solvers():
    assert tuple(config.METHODS) == METHODS
    kinds = (Dykstra, Dual, Entropic, Plain)
    for method, kind in zip(METHODS, kinds, strict=True):
        values = {"kind": "translate", "max_steps": 1, "method": method}
        stage = config.Translate.model_validate(values)
        assert type(make_solver(stage.method, stage.iterations, stage.tolerance)) is kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "other"}, "unknown Sinkhorn method 'other'; choose one of dykstra, dual"),
        ({"method": "dykstra", "tolerance": 0.1}, "a tolerance is for the method dual; dykstra"),
        ({"method": "dykstra", "iterations": 0}, "iterations is 0; at least 1 is needed"),
        ({"method": "dual", "iterations": 0}, "iterations is 0; at least 1 is needed"),
        ({"method": "dense", "iterations": -1}, "iterations is -1; at least 1 is needed"),
        ({"method": "dual", "backend": "cuda"}, "backend is 'cuda'; choose one of auto, native"),
        ({"method": "dykstra", "backend": ""}, "backend is ''; choose one of auto, native"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_solver(**options)
