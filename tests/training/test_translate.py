"""The translate stage's parts without an LM: marginals, the state in a checkpoint, the warning."""

import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from s2t2_dist import load_translation
from s2t2_dist.comm import Comm
from s2t2_dist.config import Translate
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.errors import ArtifactError, ConfigError, DataError
from s2t2_dist.lm import vocabulary
from s2t2_dist.lm.folder import WeightFiles
from s2t2_dist.lm.translation import save_translation
from s2t2_dist.lm.vocabulary import source_marginal, source_rows, target_marginal, token_counts
from s2t2_dist.ot import Thresholds, Translator, make_solver, row_range
from s2t2_dist.training.translate import TranslateStage, least_gradient_share
from s2t2_dist.training.translate_checkpoint import load_plans, save_plans
from tests.conftest import SOURCE_VOCAB
from tests.ot.problems import leaf_loss, translator_inputs

SETTINGS = [
    {"solver": make_solver("dykstra")},
    {"solver": make_solver("dykstra"), "plans": "separate"},
    {"solver": make_solver("dual", iterations=50, tolerance=1e-4)},
    {"solver": make_solver("dense"), "plans": "separate"},
    {"solver": make_solver("plain")},
]


def make_stage(**values):
    return Translate.model_validate({"kind": "translate", "max_steps": 1, **values})


def make_learner(settings):
    """A translator of 30 x 12 and its optimizer, as the stage makes them."""
    embed, head, mu, nu, _ = translator_inputs()
    translator = Translator(embed, head, mu, nu, **settings)
    return translator, torch.optim.AdamW(translator.costs, lr=0.05, eps=1e-5, fused=True)


def learn(translator, optimizer, steps):
    """Steps of a loss that is not linear; the losses."""
    losses = []
    for step in range(steps):
        translated = translator.translate()
        loss = leaf_loss(translated.embed_UD, translated.head_UD, step % 2)
        loss.backward()
        translator.backward(translated)
        translator.clip_grad_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    "settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values()))
)
@pytest.mark.parametrize("before", [0, 4])
def test_a_resumed_plan_learns_bit_identically(settings, before, tmp_path):
    """Exactly equal, since the same additions happen; also from a checkpoint of step 0."""
    learner = make_learner(settings)
    learn(*learner, before)
    learner[0].translate()  # an evaluation between two steps leaves no trace
    save_plans(tmp_path, (0, 30), *learner)
    expected = learn(*learner, 6)
    resumed = make_learner(settings)
    load_plans(tmp_path, (0, 30), *resumed)
    assert learn(*resumed, 6) == expected
    for found, wanted in zip(resumed[0].costs, learner[0].costs, strict=True):
        assert torch.equal(found, wanted)
        for key, moment in learner[1].state[wanted].items():
            assert torch.equal(resumed[1].state[found][key], moment), key


def test_a_checkpoint_holds_where_the_searches_go_on(tmp_path):
    """The thresholds of the last step, not those of an evaluation after it."""
    for settings in SETTINGS[:3]:
        folder = tmp_path / "-".join(map(str, settings.values()))
        folder.mkdir()
        learner = make_learner(settings)
        learn(*learner, 3)
        starts = [[part.clone() for part in plan.start] for plan in learner[0].plans.values()]
        learner[0].translate()
        save_plans(folder, (0, 30), *learner)
        resumed = make_learner(settings)
        load_plans(folder, (0, 30), *resumed)
        for plan, start in zip(resumed[0].plans.values(), starts, strict=True):
            assert all(map(torch.equal, plan.start, start))


def stored(rows, start, optimizer_step=7):
    """A stand-in for one rank's translator and optimizer, filled with numbers of its own rows."""
    column = torch.arange(*rows, dtype=torch.float32)[:, None]
    plans, state = {}, {}
    for number, name in enumerate(("embed", "head")):
        cost = torch.nn.Parameter(column * 10 + torch.arange(4.0) + number / 2)
        thresholds = None
        if start:
            row_threshold = torch.stack((column[:, 0], -column[:, 0]))
            thresholds = Thresholds(row_threshold, torch.ones(2, 4) + number)
        plans[name] = SimpleNamespace(cost=cost, start=thresholds)
        moments = {"exp_avg": cost.detach() + 100, "exp_avg_sq": cost.detach() + 200}
        state[cost] = {"step": torch.tensor(float(optimizer_step)), **moments}
    return SimpleNamespace(plans=plans), SimpleNamespace(state=state)


@pytest.mark.parametrize("start", [True, False], ids=["warm", "before the first step"])
@pytest.mark.parametrize(("written", "read"), [(3, 2), (2, 3), (1, 9), (9, 1)])
def test_rows_are_cut_anew_for_any_number_of_ranks(written, read, start, tmp_path):
    """Seven rows; on nine ranks two have none, write no file and still know the columns'."""
    for rank in range(written):
        rows = row_range(7, rank, written)
        save_plans(tmp_path, rows, *stored(rows, start))
    assert len(list(tmp_path.iterdir())) == min(written, 7)
    for rank in range(read):
        rows = row_range(7, rank, read)
        expected, expected_optimizer = stored(rows, start)
        found, optimizer = stored(rows, False, 0)
        for plan in found.plans.values():
            plan.cost.data.zero_()
            optimizer.state[plan.cost] = {}
        load_plans(tmp_path, rows, found, optimizer)
        for name, wanted in expected.plans.items():
            plan = found.plans[name]
            assert torch.equal(plan.cost, wanted.cost)
            state = optimizer.state[plan.cost]
            for key, value in expected_optimizer.state[wanted.cost].items():
                assert torch.equal(state[key], value), key
            assert (plan.start is None) == (not start)
            if start:
                assert all(map(torch.equal, plan.start, wanted.start))


def test_a_checkpoint_that_lacks_rows_is_refused(tmp_path):
    save_plans(tmp_path, (0, 3), *stored((0, 3), True))
    save_plans(tmp_path, (5, 7), *stored((5, 7), True))
    with pytest.raises(ArtifactError, match="holds 5 of rows 0 to 7 of C"):
        load_plans(tmp_path, (0, 7), *stored((0, 7), False))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="holds 0 of rows 7 to 7 of C"):
        load_plans(tmp_path / "empty", (7, 7), *stored((7, 7), False))


def test_counts_leave_out_padding_and_are_spread_evenly(protein_data, monkeypatch):
    reader = ShardReader(protein_data, "train")
    last = len(reader) - 1
    assert reader.length(last) < reader.context, "the last row must have padding"

    def by_hand(rows):
        tokens = np.concatenate([reader[row][: reader.length(row)] for row in rows])
        return torch.bincount(torch.from_numpy(tokens.astype(np.int64)), minlength=64)

    assert torch.equal(token_counts(reader), by_hand(range(len(reader))))
    assert token_counts(reader).sum() == reader.metadata["splits"]["train"]["tokens"]
    monkeypatch.setattr(vocabulary, "COUNTED_ROWS", 3)
    monkeypatch.setattr(vocabulary, "BLOCK", 2)
    assert torch.equal(token_counts(reader), by_hand([0, last // 2, last]))


def test_every_target_token_has_mass(protein_data):
    reader = ShardReader(protein_data, "train")
    counts = token_counts(reader)
    assert (counts == 0).any(), "the unknown token at least is in no row"
    nu = target_marginal("frequency", reader)
    assert (nu > 0).all() and nu.dtype == torch.float64
    torch.testing.assert_close(nu, (counts + 1) / (counts + 1).sum().double(), rtol=1e-15, atol=0)
    uniform = target_marginal("uniform", reader)
    assert torch.equal(uniform, torch.full((64,), 1 / 64, dtype=torch.float64))


def test_source_tokens_that_the_data_lack_have_no_row(source_model, source_data):
    counts = token_counts(ShardReader(source_data, "train"))
    everything = torch.arange(SOURCE_VOCAB + 24)  # ids beyond the tokenizer pad the embedding
    ids, mu = source_marginal(str(source_data), source_model, everything)
    assert torch.equal(ids, counts.nonzero()[:, 0]) and 0 < len(ids) < SOURCE_VOCAB
    torch.testing.assert_close(mu, counts[ids] / counts.sum().double(), rtol=1e-15, atol=0)
    some, mu = source_marginal(str(source_data), source_model, ids[::2])
    assert torch.equal(some, ids[::2]) and mu.sum().item() == pytest.approx(1, rel=1e-15)
    ids, mu = source_marginal("uniform", source_model, everything)
    assert torch.equal(ids, everything)
    assert torch.equal(mu, torch.full((424,), 1 / 424, dtype=torch.float64))


def test_a_source_marginal_that_does_not_fit_is_refused(source_model, source_data, protein_data):
    tokens = torch.arange(SOURCE_VOCAB)
    with pytest.raises(ConfigError, match="nowhere is neither uniform nor a directory"):
        source_marginal("nowhere", source_model, tokens)
    with pytest.raises(DataError, match="the shards were made with the tokenizer"):
        source_marginal(str(protein_data), source_model, tokens)
    counts = token_counts(ShardReader(source_data, "train"))
    with pytest.raises(ConfigError, match="holds none of the"):
        source_marginal(str(source_data), source_model, tokens[counts == 0])


@pytest.mark.parametrize("plans", ["shared", "separate"])
def test_tokens_without_a_row_have_no_mass(
    plans, source_model, source_data, protein_data, tmp_path
):
    """Frequencies on both sides: finite everywhere, and rows left out or padding count nothing."""
    stage = make_stage(source_marginal=str(source_data), target_marginal="frequency")
    ids, mu = source_rows(stage, WeightFiles(source_model))
    nu = target_marginal(stage.target_marginal, ShardReader(protein_data, "train"))
    random = torch.manual_seed(3)
    embed, head = (torch.randn(SOURCE_VOCAB + 24, 8, generator=random) for _ in range(2))
    translator = Translator(embed[ids], head[ids], mu, nu, plans=plans)
    optimizer = torch.optim.AdamW(translator.costs, lr=0.05, eps=1e-5, fused=True)
    assert np.isfinite(learn(translator, optimizer, 5)).all()
    save_translation(
        tmp_path / "t",
        Comm(),
        plans=translator.plan_tiles(),
        source_token_ids=ids,
        source_marginal=mu,
        target_marginal=nu,
        source_tokenizer_sha256="a" * 64,
        target_tokenizer_sha256="b" * 64,
        embed_scale="paper",
        vocab_size=SOURCE_VOCAB + 24,
        info={},
    )
    translation = load_translation(tmp_path / "t")
    expected = translator.translate()
    without = torch.ones(SOURCE_VOCAB + 24, dtype=torch.bool)
    without[ids] = False
    for apply, weight, wanted in (
        (translation.embed, embed, expected.embed_UD.detach()),
        (translation.head, head, expected.head_UD.detach()),
    ):
        found = apply(weight)
        assert found.isfinite().all()
        # The same float32 products in another order; E / mu is up to 1e3 where a token is rare.
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(apply(weight.masked_fill(without[:, None], torch.nan)), found)


@pytest.mark.parametrize(
    "settings", SETTINGS[:4], ids=lambda settings: "-".join(map(str, settings.values()))
)
def test_the_gradient_holds_no_row_constant(settings):
    """P does not change when a row of C gets a constant, so rows of dloss/dC sum to 0.

    In float32: each of the 12 entries of a row is rounded at most some 16 times (two for each
    half step of the three iterations) at the size of the largest gradient, by 2^-24 of it.
    """
    translator, optimizer = make_learner(settings)
    learn(translator, optimizer, 3)
    translated = translator.translate()
    leaf_loss(translated.embed_UD, translated.head_UD, 0).backward()
    translator.backward(translated, entropy_weight=0.1)
    for cost in translator.costs:
        largest = cost.grad.abs().max()
        assert largest > 0
        assert cost.grad.sum(1).abs().max() <= 12 * 16 * 2**-24 * largest


def show(stage, rank, *statistics):
    """Show these statistics, of 512 target tokens, to a stage of this rank."""
    context = SimpleNamespace(comm=Comm())
    context.comm.rank = rank
    shell = SimpleNamespace(stage=stage, warned=False, context=context, target_marginal=[1] * 512)
    for numbers in statistics:
        TranslateStage._warn_once(shell, numbers)


def test_dying_gradients_are_told_once_by_one_rank(caplog):
    low, high = 3.9 / 512, 4.1 / 512
    stage = make_stage(units="literal", learning_rate=0.5)
    with caplog.at_level(logging.WARNING):
        show(stage, 0, {"gradient_share": high})
        show(stage, 1, {"gradient_share": low})
        assert not caplog.records
        show(stage, 0, {"gradient_share": high}, *[{"gradient_share": low}] * 2)
    (record,) = caplog.records
    assert "take units row_mass, or lower learning_rate (0.5)" in record.message
    caplog.clear()
    separate = {"embed_gradient_share": high, "head_gradient_share": low}
    show(make_stage(), 0, separate)
    (record,) = caplog.records
    assert f"only {low:.2%} of C" in record.message and "row_mass" not in record.message


@pytest.mark.parametrize(
    ("units", "learning_rate", "warns"),
    [("row_mass", 1e-2, False), ("row_mass", 1.0, True), ("literal", 1e-2, True)],
)
@pytest.mark.parametrize("U", [64, 512])
def test_the_warning_comes_before_the_gradients_are_gone(units, learning_rate, warns, U):
    """V = 1,000, batches of a bigram language: what works is left alone, what kills is told.

    The gradients are gone after some 30 steps of what kills: less than a fourth is then left of
    those at the warning, and at the warning there are some.
    """
    random = torch.manual_seed(0)
    embed, head = (torch.randn(1000, 16, generator=random) for _ in range(2))
    mu, nu = torch.full((1000,), 1e-3), torch.full((U,), 1 / U)
    translator = Translator(embed, head, mu, nu, embed_scale="convex", units=units)
    optimizer = torch.optim.AdamW(translator.costs, lr=learning_rate, eps=1e-5, fused=True)
    shares = []
    for _ in range(40):
        tokens = torch.randint(0, U, (512,), generator=random)
        following = (7 * tokens + torch.randint(0, 3, (512,), generator=random)) % U
        translated = translator.translate()
        logits = translated.embed_UD[tokens].tanh() @ translated.head_UD.T
        torch.nn.functional.cross_entropy(logits, following).backward()
        translator.backward(translated)
        translator.clip_grad_norm(1.0)
        optimizer.step()
        shares.append(translator.statistics()["gradient_share"])
    told = [share for share in shares if share < least_gradient_share(U)]
    assert bool(told) == warns, shares
    assert not told or (told[0] > 0 and told[0] > 4 * min(shares)), shares
