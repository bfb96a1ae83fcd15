import json
import subprocess
import sys

import pytest
import torch

from s2t2_dist import artifacts, load_translation
from s2t2_dist.comm import Comm
from s2t2_dist.errors import ArtifactError
from s2t2_dist.ot import Translator, make_solver
from tests.jobs.distributed import run_ranks
from tests.ot.problems import translation_parts, write_translation

PAPER = {"embed_scale": "paper"}


def reseal(directory):
    """Make a changed directory complete again, so that only its content is wrong."""
    (directory / artifacts.MANIFEST).unlink()
    (directory / artifacts.COMPLETE).unlink()
    artifacts.seal(directory, {"kind": "translation"})


@pytest.mark.parametrize(("size", "plans"), [(1, "shared"), (3, "shared"), (2, "separate")])
def test_round_trip(size, plans, tmp_path):
    target, options = tmp_path / "runs" / "translation", {**PAPER, "plans": plans}
    if size == 1:
        errors = [write_translation(Comm(), target, options)]
    else:
        errors = run_ranks(write_translation, size, tmp_path, target, options)
    assert errors == [None] * size
    plans, ids, mu, nu = translation_parts(options["plans"])
    loaded = load_translation(target)
    assert loaded.plans.keys() == plans.keys()
    for name, plan in plans.items():
        found = loaded.plans[name]
        assert torch.equal(found.to_dense(), plan)
        assert found.is_sparse and found.values().count_nonzero() == plan.count_nonzero()
    assert torch.equal(loaded.source_token_ids, ids)
    assert torch.equal(loaded.source_marginal, mu) and torch.equal(loaded.target_marginal, nu)
    assert loaded.source_tokenizer_sha256 == "a" * 64
    assert loaded.target_tokenizer_sha256 == "b" * 64
    assert (loaded.vocab_size, loaded.embed_scale) == (60, "paper")
    assert loaded.info == {"method": "dykstra", "statistics": {"entropy": 1.5}}
    assert len(list(target.glob("plan-*.safetensors"))) == size
    assert [path.name for path in target.parent.iterdir()] == ["translation"]


@pytest.mark.parametrize("plans", ["shared", "separate"])
@pytest.mark.parametrize("embed_scale", ["paper", "convex"])
def test_embed_and_head_equal_the_translators(embed_scale, plans, tmp_path):
    """The folded model must be the trained one, also in bfloat16 and with padded rows.

    Its width, 16, is not that of the model whose plan it was (8): a plan has none.
    """
    found, ids, mu, nu = translation_parts(plans)
    options = {"embed_scale": embed_scale, "plans": plans}
    write_translation(Comm(), tmp_path / "t", options)
    loaded = load_translation(tmp_path / "t")
    random = torch.manual_seed(0)
    embed, head = (torch.randn(64, 16, generator=random).bfloat16() for _ in range(2))
    options |= {"solver": make_solver("plain"), "units": "literal"}
    trained = Translator(embed[ids], head[ids], mu, nu, **options)
    for name, plan in trained.plans.items():
        plan.cost.data = found[name]
    expected = trained.translate()
    # The same float32 products summed in another order.
    for found, wanted in (
        (loaded.embed(embed), expected.embed_UD),
        (loaded.head(head), expected.head_UD),
    ):
        assert found.dtype == torch.float32 and found.shape == (12, 16)
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-5)


def test_identity_plan_reproduces_the_source(tmp_path):
    weights = torch.randn(60, 4, generator=torch.manual_seed(1))
    write_translation(Comm(), tmp_path / "t", PAPER)
    loaded = load_translation(tmp_path / "t")
    identity = torch.eye(30).div(30).to_sparse()
    uniform = torch.full((30,), 1 / 30, dtype=torch.float64)
    fields = vars(loaded) | {
        "plans": {"plan": identity}, "source_marginal": uniform, "target_marginal": uniform
    }  # fmt: skip
    same = type(loaded)(**fields)
    for made in (same.embed(weights), same.head(weights)):
        torch.testing.assert_close(made, weights[::2], rtol=1e-6, atol=0)


def test_refuses_a_matrix_of_another_vocabulary(tmp_path):
    write_translation(Comm(), tmp_path / "t", PAPER)
    with pytest.raises(ArtifactError, match="needs 59 rows or more"):
        load_translation(tmp_path / "t").head(torch.zeros(40, 4))


def test_never_overwrites(tmp_path):
    target = tmp_path / "translation"
    target.mkdir()
    (target / "mine.txt").write_text("kept")
    errors = run_ranks(write_translation, 2, tmp_path / "ranks", target, PAPER)
    assert all("exists" in error for error in errors)
    assert [path.name for path in target.iterdir()] == ["mine.txt"]
    assert not list(tmp_path.glob(".translation*"))


def test_a_failed_write_leaves_nothing(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("not a directory")
    error = write_translation(Comm(), blocker / "translation", PAPER)
    assert "file" in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_refuses_an_unfinished_or_altered_translation(tmp_path):
    target = tmp_path / "t"
    with pytest.raises(ArtifactError, match="missing"):
        load_translation(target)
    write_translation(Comm(), target, PAPER)
    part = target / "plan-00000-of-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)
    with pytest.raises(ArtifactError, match="altered"):
        load_translation(target)
    (target / artifacts.COMPLETE).unlink()
    with pytest.raises(ArtifactError, match="not finished"):
        load_translation(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format 99, expected a translation of format 2"),
        ({"format_version": 1}, "format 1, expected"),
        ({"kind": "model"}, "is a model"),
        ({"vocab_size": 10}, "expected one distinct id below 10"),
        ({"parts": 2}, "not readable"),
        ({"plans": ["embed", "head"]}, "lacks the tensor 'embed.indptr'"),
        ({"plans": ["head", "embed"]}, "holds the plans"),
    ],
)
def test_refuses_a_wrong_record(change, message, tmp_path):
    write_translation(Comm(), tmp_path / "t", PAPER)
    record = tmp_path / "t" / "translation.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    reseal(tmp_path / "t")
    with pytest.raises(ArtifactError, match=message):
        load_translation(tmp_path / "t")


def test_importing_the_package_does_not_import_torch():
    code = "import sys, s2t2_dist.errors; assert 'torch' not in sys.modules; print('cheap')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "cheap\n"
