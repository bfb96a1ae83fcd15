"""Triton's kernels: on a GPU as they are, on a CPU in Triton's interpreter (tests/conftest.py)."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from s2t2_dist.comm import Comm
from s2t2_dist.ot import Translator, sparse_sinkhorn
from s2t2_dist.ot.dual import Dual
from s2t2_dist.ot.dykstra import Dykstra
from s2t2_dist.ot.kernels import library, passes
from s2t2_dist.ot.problem import Problem
from s2t2_dist.ot.simplex import NewtonSearch
from s2t2_dist.ot.sums import tile_sums
from tests.jobs.distributed import run_ranks
from tests.ot import oracles
from tests.ot.problems import make_cost, make_marginals, solve_by_triton, translator_inputs

VALUE = 1e-5  # of the row mass: what float32 promises (tests/ot/test_sinkhorn_properties.py)
GRADIENT = 1e-4  # of the largest: means over supports of float32 numbers, which cancel
CLEAR = 2e-6  # of the row mass: from here on no rounding decides whether an entry is in a support
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def solve(cost, mu, nu, iterations=3, comm=None, start=None):
    problem = Problem(cost, mu.to(DEVICE), nu.to(DEVICE), comm or Comm())
    return Dykstra(iterations, "triton").solve(problem, start)


def compare_with_oracle(kind, V, U, iterations, marginals="skewed", spread=1.0, seed=0):
    """Values always, gradients where no entry lies on its threshold; says whether they were."""
    mu, nu, unit = make_marginals(marginals, V, U, seed)
    mu, nu = mu / unit, nu / unit
    cost = (spread * make_cost(kind, V, U, seed=seed)).detach().float()
    exact = cost.double().requires_grad_()
    expected, margin = oracles.sparse_sinkhorn(exact, mu, nu, iterations)
    solution = solve(cost.to(DEVICE), mu, nu, iterations)
    plan = solution.plan(slice(0, V)).cpu().double()
    torch.testing.assert_close(plan, expected.detach(), rtol=0, atol=VALUE)
    if margin < CLEAR:
        return False
    weights = torch.randn(V, U, generator=torch.manual_seed(1))
    (wanted,) = torch.autograd.grad(expected, exact, weights.double())
    found = weights.to(DEVICE)
    solution.backward(found, found)
    bound = GRADIENT * max(wanted.abs().max().item(), 1e-3)  # all of it may be 0
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=0, atol=bound)
    return True


@pytest.fixture
def short_blocks(monkeypatch):
    """Rows of more than 16 columns are cut into chunks, and 8 rows are a part."""
    monkeypatch.setattr(passes, "MOST_COLUMNS", 16)
    monkeypatch.setattr(passes, "TILE", 32)
    monkeypatch.setattr(passes, "ROWS_PER_PART", 8)
    monkeypatch.setattr(passes, "TALL_PART", 16)


QUICK = [
    ("random", 1, 1, 3, "row mass", 1.0),
    ("random", 9, 1, 3, "skewed", 1.0),
    ("random", 1, 21, 2, "skewed", 1.0),
    ("random", 37, 33, 3, "skewed", 0.3),
    ("random", 19, 12, 3, "skewed", 1e6),
]
SLOW = [
    ("random", 270, 60, 3, "skewed", 1.0),  # more than one part of a pass by columns
    ("narrow", 97, 31, 3, "row mass", 1.0),
    ("wide", 70, 20, 4, "skewed", 1.0),
    ("random", 40, 24, 6, "skewed", 1.0),
    ("near one-hot", 64, 32, 3, "skewed", 1.0),
    ("random", 130, 32, 3, "row mass", 1e6),
    ("random", 5, 600, 3, "row mass", 0.3),
]


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_equals_algorithm_1(case):
    kind, V, U, iterations, marginals, spread = case
    assert compare_with_oracle(kind, V, U, iterations, marginals, spread)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_equals_algorithm_1_at_more_sizes(case):
    kind, V, U, iterations, marginals, spread = case
    seeds = range(4)  # until gradients could be compared
    assert any(compare_with_oracle(kind, V, U, iterations, marginals, spread, s) for s in seeds)


@pytest.mark.slow
@pytest.mark.parametrize(("V", "U"), [(19, 33), (5, 16)])
def test_rows_of_more_than_one_chunk(short_blocks, V, U):
    assert passes.RowGrid(V, U).chunks == -(-U // 16)
    assert compare_with_oracle("random", V, U, 3)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.3, 1e6])
def test_rows_of_many_chunks(short_blocks, spread):
    assert any(compare_with_oracle("random", 40, 70, 3, spread=spread, seed=s) for s in range(3))


@pytest.mark.parametrize("kind", ["tied", "one-hot", "duplicated rows", "constant"])
def test_ties(kind):
    """Values as the oracle's; what lies exactly on a threshold is off it, as for the other passes.

    Sizes and entries are powers of two: for one-hot and constant costs nothing rounds.
    """
    V, U = 32, 16
    compare_with_oracle(kind, V, U, 3, "row mass")
    if kind not in ("one-hot", "constant"):
        return
    mu, nu, _ = make_marginals("row mass", V, U)
    cost, grads = make_cost(kind, V, U).detach().float(), []
    for backend in ("triton", "eager"):
        grad = torch.randn(V, U, generator=torch.manual_seed(0)).to(DEVICE)
        problem = Problem(cost.to(DEVICE), mu.to(DEVICE), nu.to(DEVICE), Comm())
        Dykstra(3, backend).solve(problem).backward(grad, grad)
        grads.append(grad)
    torch.testing.assert_close(*grads, rtol=0, atol=1e-6)  # sums of up to 32 numbers of size 1


class Waits(TorchDispatchMode):
    """Counts the operations after which a device's queue must be empty for the host to go on."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = function.overloadpacket == torch.ops.aten.index and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")
        self.count += masks or function.overloadpacket.__name__ in waits
        return function(*args, **(kwargs or {}))


def test_the_device_never_waits_for_the_host(monkeypatch):
    """A solve and its gradient; on a GPU torch itself says so, in tests/gpu."""
    mu, nu, _ = make_marginals("row mass", 60, 16)
    cost = make_cost("random", 60, 16).detach().float().to(DEVICE)
    reads, read = [], library.Flags._read
    monkeypatch.setattr(
        library.Flags, "_read", lambda *args: reads.append(read(*args)) or reads[-1]
    )
    with Waits() as waits:
        solution = solve(cost, mu, nu)
        grad = torch.ones_like(cost).tril()
        solution.backward(grad, grad)
        solution.plan(slice(0, 60))
    assert waits.count == 0
    # Each search reads flags of a step before the last: the device has more to do when it does.
    assert reads.count(True) == 3 and library.LAG > 0
    with Waits() as waits:  # what it counts in a search that the host leads
        Dykstra(3, "eager").solve(Problem(cost, mu.to(DEVICE), nu.to(DEVICE), Comm()))
    assert waits.count > 3


def test_a_translator_s_step_waits_three_times(monkeypatch):
    """Whether C is finite, the statistics, the gradient's norm: one read each."""
    embed, head, mu, nu, step = translator_inputs(V=20, U=8, D=4)
    solver = Dykstra(3, "triton")
    translator = Translator(embed.to(DEVICE), head.to(DEVICE), mu, nu, solver=solver)
    translator.costs[0].data += step.to(DEVICE)
    lists, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: lists.append(t.shape) or tolist(t))
    with Waits() as waits:
        translated = translator.translate()
        translated.embed_UD.grad = torch.ones_like(translated.embed_UD)
        translator.backward(translated)
        translator.clip_grad_norm(1.0)
    # A list of CPU numbers is read without an operation; one from a GPU is copied first.
    assert waits.count == 1 and len(lists) == 2


@pytest.mark.parametrize("shape", [(1, 1), (20, 150), (300, 7)])
def test_sums_over_a_plan_equal_torchs(shape):
    plan = torch.randn(shape, generator=torch.manual_seed(0)).relu().to(DEVICE)
    expected = tile_sums(plan.double().cpu())
    for found, exact in zip(passes.tile_sums(plan), expected, strict=True):
        # float32 sums of at most 300 numbers of about 1
        torch.testing.assert_close(found.cpu(), exact, rtol=1e-6, atol=1e-5)
    p = plan.double().cpu() / 3
    found = passes.log_sum(plan, 3).item()
    assert found == pytest.approx(torch.special.entr(p).sum().neg().item(), rel=1e-5, abs=1e-5)


def test_a_column_search_takes_the_steps_of_newton_search():
    """From the same sums, the ones of W's columns, which some guesses are above."""
    random = torch.manual_seed(2)
    w = torch.rand(50, 40, generator=random)
    nu = 50 / 40 * (0.2 + torch.rand(40, generator=random).double())
    guess = 1.5 * torch.rand(40, generator=random)
    floor = ((w.sum(0).double() - 2 * nu) / 50).float()
    host = NewtonSearch(None, nu, guess, floor)
    device = passes.ColumnSearch(nu.to(DEVICE), guess.to(DEVICE), floor.to(DEVICE))
    steps, ended = 0, False
    while not ended:
        over = torch.relu(w - host.threshold)
        sums = torch.stack(((over > 0).sum(0).double(), over.sum(0, dtype=torch.float64)))
        i = host.moving
        if len(i):
            host.update(*sums[:, i])
        ended = device.update(sums.to(DEVICE))
        moving = device.moving.nonzero()[:, 0].cpu()
        assert torch.equal(moving, host.moving)
        assert torch.equal(device.threshold.cpu(), host.threshold)
        assert torch.equal(device.count.cpu(), host.count)
        steps += 1
        assert steps < 40
    assert steps > 3


@pytest.mark.slow
def test_repeats_bit_for_bit_and_starts_from_thresholds():
    mu, nu, _ = make_marginals("skewed", 45, 14)
    mu, nu = 45 * mu, 45 * nu
    cost = make_cost("random", 45, 14).detach().float().to(DEVICE)
    first, again = solve(cost, mu, nu), solve(cost, mu, nu)
    for one, other in zip(first.state, again.state, strict=True):
        assert torch.equal(one, other)
    warm = solve(cost, mu, nu, start=first.state)
    rows = slice(7, 30)
    torch.testing.assert_close(warm.plan(rows), first.plan(slice(0, 45))[rows], rtol=0, atol=VALUE)
    assert warm.plan(slice(3, 3)).shape == (0, 14)


def test_a_cost_and_marginals_that_are_not_contiguous():
    mu, nu, _ = make_marginals("row mass", 20, 8)
    cost = make_cost("random", 20, 8).detach().float().to(DEVICE)
    views = mu[:1].expand(20), nu.repeat_interleave(2)[::2]
    expected = solve(cost, mu, nu).plan(slice(0, 20))
    assert torch.equal(solve(cost.T.contiguous().T, *views).plan(slice(0, 20)), expected)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="gloo ranks on a CPU")
def test_sharded_rows_equal_one_rank(tmp_path):
    answers = run_ranks(solve_by_triton, 2, tmp_path)
    for found, expected in zip(zip(*answers, strict=True), solve_by_triton(Comm()), strict=True):
        # of the row mass: a threshold of size 1 to 10 may round the other way
        torch.testing.assert_close(torch.cat(found), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize(("V", "U", "spread"), [(1, 1, 1.0), (9, 1, 1.0), (21, 33, 0.3)])
def test_dual_equals_the_passes_in_torch(short, V, U, spread, request):
    """In float64: potentials, plan and gradient; and the same iterations up to a tolerance."""
    if short:
        request.getfixturevalue("short_blocks")
    mu, nu, unit = make_marginals("skewed", V, U)
    cost = (spread * make_cost("random", V, U)).detach().float()
    for solver in (Dual(2), Dual(60, 1e-3)):
        found = []
        for backend, dtype in (("triton", torch.float32), ("eager", torch.float64)):
            masses = (mu / unit).to(DEVICE), (nu / unit).to(DEVICE)
            problem = Problem(cost.to(DEVICE, dtype), *masses, Comm())
            solution = replace(solver, backend=backend).solve(problem)
            grad = torch.randn(V, U, generator=torch.manual_seed(1)).to(problem.cost_VU)
            solution.backward(grad, grad)
            found.append((solution.plan(slice(0, V)).double(), grad.double()))
            found[-1] += (solution.iterations, solution.converged)
        (plan, grad, *ends), (exact, wanted, *expected) = found
        torch.testing.assert_close(plan, exact, rtol=0, atol=VALUE)
        bound = GRADIENT * max(wanted.abs().max().item(), 1e-3)
        torch.testing.assert_close(grad, wanted, rtol=0, atol=bound)
        assert ends == expected


@pytest.mark.slow
def test_dual_starts_from_its_potentials_and_repeats():
    mu, nu, _ = make_marginals("row mass", 20, 8)
    problem = Problem(make_cost("random", 20, 8).detach().float().to(DEVICE), mu.to(DEVICE),
                      nu.to(DEVICE), Comm())  # fmt: skip
    solver = Dual(100, 1e-3, "triton")
    first, again = solver.solve(problem), solver.solve(problem)
    assert torch.equal(first.plan(slice(0, 20)), again.plan(slice(0, 20)))
    assert first.converged and 1 < first.iterations < 100
    assert solver.solve(problem, first.state).iterations == 1


def test_what_the_backend_refuses(monkeypatch):
    cost, marginal = torch.zeros(4, 4, device=DEVICE), torch.ones(4)
    message = "float32 on a GPU with Triton and at most 15 iterations, found torch.float64 on"
    with pytest.raises(ValueError, match=re.escape(message)):
        sparse_sinkhorn(cost.double(), marginal, marginal, backend="triton")
    with pytest.raises(ValueError, match="and 16; take auto"):
        sparse_sinkhorn(cost, marginal, marginal, 16, backend="triton")
    with pytest.raises(ValueError, match="float32 on a GPU with Triton, found"):
        sparse_sinkhorn(cost.double(), marginal, marginal, method="dual", backend="triton")
    monkeypatch.setattr(library, "interpreting", lambda: False)
    with pytest.raises(ValueError, match=r"found torch[.]float32 on cpu"):
        sparse_sinkhorn(cost.cpu(), marginal, marginal, backend="triton")


def run_python(*arguments, **changes):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | changes
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_room_imports_no_triton():
    code = "import s2t2_dist.ot, sys; assert 'triton' not in sys.modules, 'triton was imported'"
    run_python("-c", code)


@pytest.mark.slow
def test_every_kernel_compiles_for_hopper(tmp_path):
    """By Triton and ptxas, which need no GPU: within its registers, and nothing contracted.

    A multiply-add in place of two roundings could put an entry into one kernel's support only.
    Rows of 8,192 columns fill the register file: some versions of Triton spill a little there. A
    register or two that wait outside the loops cost nothing.
    """
    script = Path(__file__).with_name("compile_kernels.py")
    lines = run_python(script, TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert len(lines) >= 25
    for line in lines:
        spilled = int(re.search(r"spill (\d+) bytes", line).group(1))
        assert spilled <= (1000 if "'BLOCK': 8192" in line else 16), line
        assert line.endswith("contracted 0"), line
