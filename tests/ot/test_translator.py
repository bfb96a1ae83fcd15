import itertools

import pytest
import torch

from s2t2_dist.comm import Comm
from s2t2_dist.ot import Translator, make_solver, row_range
from tests.jobs.distributed import run_ranks
from tests.ot import oracles
from tests.ot.problems import leaf_loss, translate_rows, translator_inputs

# The product computes in float32, the reference in float64: a few float32 roundings (6e-8)
# of numbers up to about 10, summed over 30 rows.
SINGLE = {"rtol": 1e-4, "atol": 1e-5}
# Between rank counts only the order of float32 sums differs.
SHARDED = {"rtol": 1e-5, "atol": 1e-6}
SETTINGS = [
    {"method": method, "embed_scale": scale, "units": units}
    for method, scale, units in itertools.product(
        ("dykstra", "dense", "plain"), ("paper", "convex"), ("row_mass", "literal")
    )
]


def dense_formula(settings, alpha, ranks):
    """E', L', dloss/dC, P (total mass 1) by plain float64 autograd, all rows at once."""
    embed, head, mu, nu, step = (tensor.double() for tensor in translator_inputs())
    unit = 1.0 if settings["units"] == "row_mass" else 1 / len(mu)
    mass = unit * len(mu)
    method = settings["method"]
    start = torch.outer(mu, nu) * mass if method == "plain" else torch.full_like(step, unit)
    # The product's parameter is float32: start from the same numbers.
    cost = (start.float() + step.float() * unit).double().requires_grad_()
    if method == "dykstra":
        plan, _ = oracles.sparse_sinkhorn(cost, mu * mass, nu * mass, 3)
    elif method == "dense":
        plan = oracles.dense_sinkhorn(cost, mu * mass, nu * mass, 3)
    else:
        plan = cost
    plan = plan / mass
    by_mu, by_nu = plan / mu[:, None], plan / nu
    embed_UD = (by_mu if settings["embed_scale"] == "paper" else by_nu).T @ embed
    head_UD = by_nu.T @ head
    positive = plan[plan > 0]
    entropy = -(positive * positive.log()).sum()
    loss = sum(leaf_loss(embed_UD, head_UD, rank) for rank in range(ranks)) + alpha * entropy
    (grad,) = torch.autograd.grad(loss, cost)
    return {"embed": embed_UD, "head": head_UD, "grad": grad, "plan": plan, "entropy": entropy}


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings.values()))
def test_equals_dense_autograd(settings):
    found = translate_rows(Comm(), 2, settings, alpha=0.1)
    expected = dense_formula(settings, 0.1, 2)
    scale = expected["grad"].abs().max()
    for name in ("embed", "head", "plan"):
        torch.testing.assert_close(found[name].double(), expected[name].detach(), **SINGLE)
    torch.testing.assert_close(found["grad"].double() / scale, expected["grad"] / scale, **SINGLE)
    share = (expected["grad"].abs() > 1e-6 * scale).double().mean().item()
    assert found["statistics"]["gradient_share"] == pytest.approx(share)
    assert found["statistics"]["entropy"] == pytest.approx(expected["entropy"].item(), rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_sharded_equals_local(size, tmp_path):
    # Two losses: on one rank they add up, on three ranks one rank has none.
    for settings in [SETTINGS[0], SETTINGS[5], SETTINGS[-1]] if size == 2 else SETTINGS[:1]:
        local = translate_rows(Comm(), 2, settings)
        ranks = run_ranks(translate_rows, size, tmp_path, 2, settings)
        scale = local["grad"].abs().max()
        for name in ("embed", "head"):
            for rank in ranks:
                assert torch.equal(rank[name], ranks[0][name])
                torch.testing.assert_close(rank[name], local[name], **SHARDED)
        for name, unit in [("grad", scale), ("plan", 1.0), ("clipped", 1e-3)]:
            together = torch.cat([rank[name] for rank in ranks])
            torch.testing.assert_close(together / unit, local[name] / unit, **SHARDED)
        for rank in ranks:
            assert rank["statistics"] == pytest.approx(local["statistics"], rel=1e-4, abs=1e-6)
            assert rank["norm"] == pytest.approx(local["norm"], rel=1e-5)


@pytest.mark.parametrize("method", ["dykstra", "plain"])
def test_units_give_the_same_translation(method):
    by_units = [
        translate_rows(Comm(), 1, {"method": method, "units": units}, alpha=0.0)
        for units in ("row_mass", "literal")
    ]
    for name in ("embed", "head", "plan"):
        torch.testing.assert_close(by_units[0][name], by_units[1][name], **SHARDED)
    # dloss/d(V C) = dloss/dC / V: what a learning rate in row masses is measured against.
    row_mass, literal = (units["grad"] / by_units[1]["grad"].abs().max() for units in by_units)
    torch.testing.assert_close(row_mass * 30, literal, **SINGLE)


@pytest.mark.parametrize("units", ["row_mass", "literal"])
@pytest.mark.parametrize("method", ["dykstra", "dense", "plain"])
def test_starts_at_the_uniform_plan(method, units):
    """Every row of L' is the mean of L; of E', V/U times that of E (paper) or that (convex)."""
    embed, head, *_ = translator_inputs(V=24)
    mu, nu = torch.full((24,), 1 / 24), torch.full((12,), 1 / 12)
    for embed_scale, length in (("paper", 2.0), ("convex", 1.0)):
        options = {"solver": make_solver(method), "embed_scale": embed_scale, "units": units}
        translator = Translator(embed, head, mu, nu, **options)
        translated = translator.translate()
        mean = embed.mean(0).expand(12, -1) * length
        torch.testing.assert_close(translated.embed_UD, mean, check_stride=False, **SINGLE)
        torch.testing.assert_close(translated.head_UD, head.mean(0).expand(12, -1), **SINGLE)
        statistics = translator.statistics()
        assert statistics["support_share"] == 1.0
        assert statistics["nonzeros_per_row"] == 12 and statistics["nonzeros_per_column"] == 24
        assert statistics["entropy"] == pytest.approx(torch.tensor(24 * 12.0).log().item())


@pytest.mark.parametrize("marginals", ["uniform", "skewed"])
def test_a_tied_head_is_that_of_a_copy(marginals):
    """With uniform masses one product serves both; leaves, and the gradient of C, are the same."""
    embed, _, mu, nu, step = translator_inputs()
    if marginals == "uniform":
        mu, nu = torch.full((30,), 1 / 30), torch.full((12,), 1 / 12)
    found = []
    for head in (embed, embed.clone()):
        translator = Translator(embed, head, mu, nu)
        translator.costs[0].data += step
        translated = translator.translate()
        assert translated.embed_UD.is_leaf and translated.embed_UD.requires_grad
        assert translated.embed_UD.dtype == torch.float32
        leaf_loss(translated.embed_UD, translated.head_UD, 0).backward()
        translator.backward(translated)
        leaves = translated.embed_UD.detach(), translated.head_UD.detach()
        found.append((*leaves, translator.costs[0].grad))
        one_product = head is embed and marginals == "uniform"
        assert translator.plans["plan"].values_VK.shape[1] == (8 if one_product else 16)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, check_stride=False, **SHARDED)


def test_gradients_accumulate_over_micro_batches_with_one_solve():
    embed, head, mu, nu, step = translator_inputs()
    grads = []
    for calls in (1, 4):
        translator = Translator(embed, head, mu, nu)
        translator.costs[0].data += step
        translated = translator.translate()
        for _ in range(calls):
            (leaf_loss(translated.embed_UD, translated.head_UD, 0) / calls).backward()
        translator.backward(translated)
        grads.append(translator.costs[0].grad)
    torch.testing.assert_close(grads[0], grads[1], **SHARDED)


def test_entropy_weight_lowers_the_entropy():
    """Descending alpha * H(P) alone, with alpha > 0, makes P sparser (paper, section 3)."""
    embed, head, mu, nu, step = translator_inputs()
    translator = Translator(embed, head, mu, nu)
    translator.costs[0].data += step
    before = translator.translate()
    translator.backward(before, entropy_weight=1.0)
    support = translator.statistics()["support_share"]
    for _ in range(20):
        translator.costs[0].data -= 0.3 * translator.costs[0].grad / translator.clip_grad_norm(0)
        after = translator.translate()
        translator.backward(after, entropy_weight=1.0)
    assert after.entropy < before.entropy - 0.01
    assert translator.statistics()["support_share"] < support


def test_clip_grad_norm_equals_torch():
    embed, head, mu, nu, _ = translator_inputs()
    translator = Translator(embed, head, mu, nu)
    grad = torch.randn(30, 12, generator=torch.manual_seed(0))
    for max_norm in (0.5, 1e6, 0.0):
        translator.costs[0].grad = grad.clone()
        reference = torch.nn.Parameter(torch.zeros(30, 12))
        reference.grad = grad.clone()
        if max_norm:
            torch.nn.utils.clip_grad_norm_(reference, max_norm)
        assert translator.clip_grad_norm(max_norm) == pytest.approx(grad.norm().item(), rel=1e-6)
        # torch divides by norm + 1e-6.
        torch.testing.assert_close(translator.costs[0].grad, reference.grad, rtol=1e-5, atol=0)


def test_translate_without_gradients_for_evaluation():
    embed, head, mu, nu, _ = translator_inputs()
    translator = Translator(embed, head, mu, nu)
    with torch.no_grad():
        translated = translator.translate()
    assert torch.equal(translated.embed_UD, translator.translate().embed_UD)


@pytest.mark.parametrize("rows", [0, 1, 2, 7, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_row_range_is_a_balanced_partition(rows, size):
    ranges = [row_range(rows, rank, size) for rank in range(size)]
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(rows))
    lengths = [stop - start for start, stop in ranges]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("choice", ["embed_scale", "units", "plans"])
def test_refuses_unknown_settings(choice):
    embed, head, mu, nu, _ = translator_inputs()
    with pytest.raises(ValueError, match=f"{choice} is 'other'; choose one of"):
        Translator(embed, head, mu, nu, **{choice: "other"})


def test_separate_plans_learn_apart_and_start_together():
    embed, head, mu, nu, step = translator_inputs()
    shared = Translator(embed, head, mu, nu)
    separate = Translator(embed, head, mu, nu, plans="separate")
    assert list(separate.plans) == ["embed", "head"] and len(separate.costs) == 2
    for cost in (*shared.costs, *separate.costs):
        cost.data += step
    found = [translator.translate() for translator in (shared, separate)]
    for translator, translated in zip((shared, separate), found, strict=True):
        leaf_loss(translated.embed_UD, translated.head_UD, 0).backward()
        translator.backward(translated, 0.1)
    # With equal C, the two gradients add up to the shared one (alpha H(P) counts twice).
    torch.testing.assert_close(found[1].embed_UD, found[0].embed_UD, **SHARDED)
    torch.testing.assert_close(found[1].head_UD, found[0].head_UD, **SHARDED)
    extra = Translator(embed, head, mu, nu)
    extra.costs[0].data += step
    extra.backward(extra.translate(), 0.1)
    total = shared.costs[0].grad + extra.costs[0].grad
    scale = total.abs().max()
    torch.testing.assert_close(sum(c.grad for c in separate.costs) / scale, total / scale, **SINGLE)
    norms = [cost.grad.norm() for cost in separate.costs]
    assert separate.clip_grad_norm(0) == pytest.approx(torch.stack(norms).norm().item(), rel=1e-5)
    names = set(separate.statistics())
    assert {"embed_entropy", "head_gradient_share"} <= names
    # Only the embedding's loss: only its plan has a gradient.
    translated = separate.translate()
    translated.embed_UD.sum().square().backward()
    separate.backward(translated)
    assert separate.costs[0].grad.any() and not separate.costs[1].grad.any()


def test_dual_translates_by_the_limit_of_dykstra():
    embed, head, mu, nu, step = translator_inputs()
    limits = [("dykstra", {"iterations": 120}), ("dual", {"iterations": 999, "tolerance": 1e-5})]
    found = []
    for method, options in limits:
        solver = make_solver(method, **options)
        translator = Translator(embed, head, mu, nu, solver=solver)
        translator.costs[0].data += step
        translated = translator.translate()
        leaf_loss(translated.embed_UD, translated.head_UD, 0).backward()
        translator.backward(translated)
        assert translator.statistics()["row_error"] < 1e-4
        found.append((translated.embed_UD.detach(), translator.costs[0].grad))
    for one, other in zip(*found, strict=True):
        # A row error of 1e-5 of plans in which E' is up to 30 long.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * one.abs().max().item())


def test_a_row_of_the_gradient_adds_up_to_zero():
    """P does not depend on row constants of C, so none is ever learned."""
    embed, head, mu, nu, step = translator_inputs()
    for method in ("dykstra", "dual", "dense"):
        translator = Translator(embed, head, mu, nu, solver=make_solver(method, 50))
        translator.costs[0].data += step
        translated = translator.translate()
        leaf_loss(translated.embed_UD, translated.head_UD, 0).backward()
        translator.backward(translated)
        grad = translator.costs[0].grad
        torch.testing.assert_close(
            grad.sum(1) / grad.abs().max(), torch.zeros(30), rtol=0, atol=1e-5
        )


def test_the_next_step_starts_from_the_last_ones_thresholds_and_evaluation_does_not_count():
    embed, head, mu, nu, step = translator_inputs()
    translator = Translator(embed, head, mu, nu)
    plan = translator.plans["plan"]
    translator.costs[0].data += step
    translator.translate()
    assert plan.start is None
    translated = translator.translate()
    translator.backward(translated)
    start = plan.start
    assert torch.equal(start[1], translated.solutions[0].state[1])
    translator.costs[0].data += 0.01 * step
    warm = translator.translate().embed_UD
    assert plan.start is start
    cold = Translator(embed, head, mu, nu)
    cold.costs[0].data.copy_(translator.costs[0].data)
    torch.testing.assert_close(warm, cold.translate().embed_UD, **SHARDED)
