"""Every method and backend on the device against the float64 oracles on the CPU."""

import contextlib
import functools

import pytest
import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot import Translator, make_solver, sparse_sinkhorn
from s2t2_dist.ot.dykstra import Dykstra
from s2t2_dist.ot.kernels import library
from s2t2_dist.ot.problem import Problem
from tests.ot import oracles
from tests.ot.problems import leaf_loss, make_cost, make_marginals, translator_inputs

pytestmark = pytest.mark.slow

VALUE = {torch.float32: 1e-5, torch.float64: 1e-12}  # of the row mass
GRADIENT = {torch.float32: 1e-4, torch.float64: 1e-9}  # of the largest
CLEAR = 2e-6  # of the row mass; nearer to a threshold float32 decides the support by rounding
# At 1,000,000 entries some lie that near: their own gradients differ, and those of their rows
# and columns by a part in the size of the support.
FEW = 1e-3
SHAPES = {
    "cpu": [(1, 1), (37, 21)],
    "cuda": [(1, 1), (257, 31), (2048, 512), (1501, 4099), (70, 9000)],
}
BACKENDS = {"cpu": ["native", "triton", "eager"], "cuda": ["triton", "compile", "eager"]}
LARGER = (2048, 512) if torch.cuda.is_available() else (37, 21)
HERE = "cuda" if torch.cuda.is_available() else "cpu"
GRID = [(backend, torch.float32) for backend in BACKENDS[HERE]]
GRID += [(backend, torch.float64) for backend in BACKENDS[HERE] if backend != "triton"]


@functools.cache
def problem_of(shape, spread, dtype):
    """(mu, nu, C, dL/dP, the oracle's plan and gradient, its margin), for every backend."""
    mu, nu, _ = make_marginals("row mass", *shape)
    cost = (1 + spread * make_cost("random", *shape, seed=shape[0]).detach()).to(dtype)
    exact = cost.double().requires_grad_()
    plan, margin = oracles.sparse_sinkhorn(exact, mu, nu, 3)
    weights = torch.randn(shape, generator=torch.manual_seed(1), dtype=torch.float64)
    (grad,) = torch.autograd.grad(plan, exact, weights)
    return mu, nu, cost, weights, plan.detach(), grad, margin


@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0, 1e6])
@pytest.mark.parametrize("shape", SHAPES[HERE], ids=str)
@pytest.mark.parametrize(("backend", "dtype"), GRID, ids=str)
def test_dykstra_equals_algorithm_1(backend, dtype, shape, spread, device):
    mu, nu, cost, weights, expected, wanted, margin = problem_of(shape, spread, dtype)
    cost = cost.to(device).requires_grad_()
    plan = sparse_sinkhorn(cost, mu, nu, backend=backend).plan
    (grad,) = torch.autograd.grad(plan, cost, weights.to(plan))
    off = (plan.detach().cpu().double() - expected).abs().max().item()
    assert off <= VALUE[dtype]
    if spread:  # a constant cost ties everywhere: rounding decides
        wrong = (grad.cpu().double() - wanted).abs() > GRADIENT[dtype] * wanted.abs().max()
        clear = margin > (CLEAR if dtype == torch.float32 else 1e-12)
        assert wrong.double().mean().item() <= (0 if clear else FEW)


@pytest.mark.parametrize(("backend", "dtype"), GRID, ids=str)
def test_dual_equals_its_limit_on_the_cpu(backend, dtype, device):
    V, U = LARGER
    mu, nu, _ = make_marginals("row mass", V, U)
    cost = make_cost("narrow", V, U).detach()
    expected = sparse_sinkhorn(cost, mu, nu, 5000, "dual", tolerance=1e-10, backend="eager").plan
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    found = sparse_sinkhorn(
        cost.to(device, dtype), mu, nu, 5000, "dual", tolerance=tolerance, backend=backend
    )
    assert found.converged
    # A row error of 1e-4 leaves a few times that in the plan.
    bound = 1e-3 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(found.plan.cpu().double(), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dense_equals_log_domain_autograd(dtype, device):
    V, U = LARGER
    mu, nu, _ = make_marginals("row mass", V, U)
    cost = make_cost("random", V, U)
    expected = oracles.dense_sinkhorn(cost, mu, nu, 3)
    weights = torch.randn(V, U, generator=torch.manual_seed(1), dtype=torch.float64)
    (wanted,) = torch.autograd.grad(expected, cost, weights)
    there = cost.detach().to(device, dtype).requires_grad_()
    plan = sparse_sinkhorn(there, mu, nu, 3, "dense").plan
    (grad,) = torch.autograd.grad(plan, there, weights.to(plan))
    for found, exact in ((plan, expected), (grad, wanted)):
        bound = VALUE[dtype] * max(1, exact.abs().max().item())
        torch.testing.assert_close(
            found.detach().cpu().double(), exact.detach(), rtol=0, atol=bound
        )


def solved(device):
    V, U = LARGER
    mu, nu, _ = make_marginals("row mass", V, U)
    cost = make_cost("random", V, U).detach().float().to(device)
    return Problem(cost, mu.to(device), nu.to(device), Comm())


def test_a_solve_repeats_bit_for_bit(device):
    problem, results = solved(device), []
    for _ in range(3):
        solution = Dykstra(3, "triton").solve(problem)
        grad = torch.ones_like(problem.cost_VU).tril()
        solution.backward(grad, grad)
        results.append((solution.plan(slice(None)), grad))
    for plan, grad in results[1:]:
        assert torch.equal(plan, results[0][0]) and torch.equal(grad, results[0][1])


@contextlib.contextmanager
def refusing_waits(device):
    """On a GPU torch raises where the host would wait for the device."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_host_round_trip(device, monkeypatch):
    """torch raises at any wait of its own; the reads of flags are behind work that goes on."""
    problem = solved(device)
    warm = Dykstra(3, "triton").solve(problem)  # compiles
    grad = torch.ones_like(problem.cost_VU)
    warm.backward(grad, grad)
    warm.plan(slice(0, 1))
    reads, read = [], library.Flags._read

    def noted_read(*args):
        reads.append(read(*args))
        return reads[-1]

    monkeypatch.setattr(library.Flags, "_read", noted_read)
    with refusing_waits(device):
        solution = Dykstra(3, "triton").solve(problem)
        solution.backward(grad, grad)
        solution.plan(slice(0, 1))
    assert reads.count(True) == 3 and len(reads) <= 3 * 12


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["dykstra", "dual", "dense", "plain"])
def test_a_translator_s_step_equals_that_of_a_cpu(method, tied, device):
    embed, head, mu, nu, step = translator_inputs(V=60, U=24, D=16, tied=tied)
    results = []
    for where in (torch.device("cpu"), device):
        there = embed.to(where)
        translator = Translator(
            there, there if tied else head.to(where), mu, nu, solver=make_solver(method)
        )
        translator.costs[0].data += step.to(where)
        translated = translator.translate()
        leaf_loss(translated.embed_UD, translated.head_UD, 0).backward()
        translator.backward(translated, 0.1)
        made = translated.embed_UD, translated.head_UD, translator.costs[0].grad
        results.append([tensor.detach().cpu() for tensor in made])
    for one, other in zip(*results, strict=True):
        # float32 products over 60 rows, in another order; an entry may change sides
        bound = 1e-4 * other.abs().max().item()
        assert ((one - other).abs() > bound).double().mean() <= FEW
