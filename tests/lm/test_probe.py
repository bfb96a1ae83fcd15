"""The probes see what would train wrongly without an error, and nothing else."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig

from s2t2_dist.comm import Comm
from s2t2_dist.errors import ArtifactError, ConfigError
from s2t2_dist.lm.probe import (
    difference,
    plain_logits,
    probe_engine,
    probe_rows,
    require_written,
)
from tests.conftest import SOURCE_VOCAB
from tests.lm.families import make_model, tiny_config

IDS = probe_rows(SOURCE_VOCAB, torch.device("cpu"))


def make(tmp_path, source_tokenizer, name):
    return make_model(tiny_config(name, SOURCE_VOCAB), source_tokenizer, tmp_path / name)


def probe(lm, folder, document_mask=False, change=lambda logits: logits):
    def logits(ids, *positions):
        given = {"position_ids": positions[0]} if positions else {}
        return change(lm(input_ids=ids, use_cache=False, **given).logits)

    probe_engine(logits, IDS, lambda: plain_logits(folder, IDS), document_mask, Comm())


@pytest.fixture(scope="module")
def olmo(tmp_path_factory, source_tokenizer):
    return make(tmp_path_factory.mktemp("probe"), source_tokenizer, "olmo")


def load(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, **more).eval()


@pytest.mark.parametrize("document_mask", [False, True])
def test_the_same_model_passes(olmo, document_mask):
    probe(load(olmo), olmo, document_mask)


def test_an_embedding_that_is_scaled_in_the_engine_is_refused(olmo):
    lm = load(olmo)
    lm.get_input_embeddings().weight.data.mul_(1.01)
    with pytest.raises(ConfigError, match=r"differs from the model by transformers alone: .* off"):
        probe(lm, olmo)


def test_logits_that_are_not_finite_are_refused(olmo):
    with pytest.raises(ConfigError, match="differs from the model by transformers alone"):
        probe(load(olmo), olmo, change=lambda logits: logits * torch.nan)


def test_a_model_that_sees_later_tokens_is_refused(tmp_path, source_tokenizer):
    config = BertConfig(**{**tiny_config("bert", SOURCE_VOCAB).to_dict(), "is_decoder": False})
    folder = make_model(config, source_tokenizer, tmp_path / "bert")
    with pytest.raises(ConfigError, match="this is no causal language model"):
        probe(load(folder), folder)


@pytest.mark.parametrize("name", ["falcon_h1", "bloom"])
def test_documents_that_are_not_kept_apart_are_refused(tmp_path, source_tokenizer, name):
    """A state that goes on from token to token, and biases instead of positions."""
    folder = make(tmp_path, source_tokenizer, name)
    probe(load(folder), folder)
    with pytest.raises(ConfigError, match=r"data\.document_mask: .* reads across documents"):
        probe(load(folder), folder, document_mask=True)


@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.layers.1.mlp.gate.e_score_correction_bias"]
)
def test_a_tensor_that_was_changed_in_the_written_folder_is_named(tmp_path, source_tokenizer, name):
    folder = make(tmp_path, source_tokenizer, "deepseek_v3")
    logits = plain_logits(folder, IDS)
    require_written(folder, IDS, logits)
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[name] = weights[name].flip(0).contiguous() + 0.5
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="is not the one that was trained"):
        require_written(folder, IDS, logits)


def test_a_model_without_position_ids_is_refused_with_document_mask(olmo):
    lm = load(olmo)
    with pytest.raises(ConfigError, match="takes no position ids"):
        probe_engine(lambda ids: lm(ids).logits, IDS, lambda: lm(IDS).logits, True, Comm())


def test_logits_that_are_not_finite_must_be_so_in_the_same_places(caplog):
    one = torch.tensor([[1.0, 2.0, torch.inf], [torch.nan, 3.0, 4.0]])
    assert difference(one, one) == 0
    assert difference(one.clone().fill_(1.0), one) == torch.inf
    assert difference(one, torch.ones_like(one)) == torch.inf
    assert difference(one * torch.nan, one * torch.nan) == 0
    assert "not finite" in caplog.text
    assert difference(one * 1.5, one) == pytest.approx(0.5)
