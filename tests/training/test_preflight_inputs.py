"""What does not fit together is refused by name before anything is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from s2t2_dist import artifacts
from s2t2_dist.comm import Comm
from s2t2_dist.config import ModelConfig, Recipe
from s2t2_dist.data.shards import ShardReader, tokenizer_sha256
from s2t2_dist.errors import ArtifactError, ConfigError, DataError
from s2t2_dist.lm.architecture import random_lm_config
from s2t2_dist.lm.vocabulary import source_token_ids
from s2t2_dist.report.export import copy_weights
from s2t2_dist.training.context import Context
from s2t2_dist.training.preflight import check_inputs
from tests.conftest import CONTEXT, SOURCE_VOCAB

TRANSLATE = {"kind": "translate", "max_steps": 1}
TRUNCATE = {"kind": "finetune", "max_steps": 1, "init": "truncate"}
SOURCE = {"kind": "finetune", "max_steps": 1, "init": "source"}
PRETRAIN = {"kind": "pretrain", "max_steps": 1}
STARTS = [TRANSLATE, TRUNCATE, SOURCE, TRUNCATE | {"init": "mean"}]
STARTS += [TRUNCATE | {"init": "subtoken_mean"}]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}


def context_of(model, data, stage, zero=3):
    recipe = Recipe.model_validate(
        {
            "output_dir": "never-written",
            "model": model,
            "data": {"path": data},
            "deepspeed": "ds.json",
            "stages": [stage],
        }
    )
    return Context(
        recipe=recipe,
        run_dir=recipe.output_dir,
        comm=Comm(),
        device=torch.device("cpu"),
        deepspeed={"zero_optimization": {"stage": zero}},
        train=ShardReader(data, "train"),
        validation=ShardReader(data, "validation"),
    )


def check(folder, data, stage=TRANSLATE, zero=3):
    check_inputs(context_of({"model_name_or_path": str(folder)}, data, stage, zero))


def check_pretrain(data, **values):
    model_type = values.pop("model_type", "olmo")
    model = {"model_type": model_type, "config": {**SMALL, **values}}
    check_inputs(context_of(model, data, PRETRAIN))


@pytest.fixture
def folder(source_model, tmp_path):
    return shutil.copytree(source_model, tmp_path / "base")


@pytest.fixture
def sharded(source_model, tmp_path):
    """The base model in several files with an index."""
    target = tmp_path / "sharded"
    target.mkdir()
    copy_weights(source_model, target, "30KB")
    for path in source_model.glob("*.json"):
        shutil.copyfile(path, target / path.name)
    return target


def save_model(config, tokenizer, folder):
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def test_good_inputs_pass(source_model, sharded, protein_data, source_data):
    for folder in (source_model, sharded):
        assert check(folder, protein_data) is None
        assert check(folder, protein_data, TRUNCATE) is None
        assert check(folder, source_data, SOURCE) is None
    assert check_pretrain(protein_data, rope_theta=5000.0, tie_word_embeddings=True) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hiden_size": 192}, r"model\.config\.hiden_size: .*did you mean hidden_size\?"),
        ({"qqqq": 1}, r"model\.config\.qqqq: .*see the documentation"),
        ({"hidden_size": "abc"}, "model.config is not a valid olmo config: .*hidden_size"),
        ({"hidden_size": -8}, "model.config is not a valid olmo config"),
        ({"hidden_act": "sillu"}, "model.config is not a valid olmo config: .*sillu"),
        ({"model_type": "olmoo"}, r"model\.model_type: .*olmoo; did you mean olmo\?"),
        ({"model_type": "vit"}, r"model\.model_type: .*vit"),
        ({"max_position_embeddings": CONTEXT - 1}, "32 tokens.*max_position_embeddings is 31"),
    ],
)
def test_a_model_to_pretrain_is_checked(protein_data, values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_pretrain(protein_data, **values)
    assert "\n" not in str(caught.value)


def start_from(init, **keys):
    return {"kind": "finetune", "max_steps": 1, "init": init, **keys}


@pytest.mark.parametrize("init", ["mean", "gaussian", "subtoken_mean", "character_mean", "focus"])
def test_starts_without_training_pass(source_model, protein_data, init):
    assert check(source_model, protein_data, start_from(init)) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "alignment: .* cannot be read"),
        ("{}", "must be JSON of the form"),
        ('{"64": 1}', "names the target id 64, but ids are below 64"),
        ('{"5": 400}', "names the source id 400, but ids are below 400"),
        ('{"5": 1}', "lacks 6. of 64 target tokens"),
    ],
)
def test_an_alignment_is_checked_before_the_first_step(
    source_model, protein_data, tmp_path, content, message
):
    path = tmp_path / "alignment.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        check(source_model, protein_data, start_from("alignment", alignment=path))


@pytest.mark.parametrize("init", ["subtoken_mean", "focus"])
def test_tokenizers_without_a_common_text_are_refused_before_the_first_step(
    folder, protein_data, init
):
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "x": 1}, [], unk_token="<unk>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(ConfigError, match=f"the start {init} does not fit"):
        check(folder, protein_data, start_from(init))


def test_names_that_a_config_class_maps_are_known():
    """GPT-2 calls the width n_embd and takes hidden_size for it."""
    given = {"hidden_size": 16, "n_layer": 1, "n_head": 2}
    config = random_lm_config(ModelConfig(model_type="gpt2", config=given), {"vocab_size": 64})
    assert (config.n_embd, config.vocab_size) == (16, 64)


@pytest.mark.parametrize("stage", STARTS, ids=["P", "truncate", "source", "mean", "sub"])
def test_a_model_without_tokenizer_is_refused(folder, source_data, stage):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"base/tokenizer\.json does not exist"):
        check(folder, source_data, stage)


@pytest.mark.parametrize("stage", [TRANSLATE, SOURCE], ids=["translate", "source"])
def test_damaged_weight_files_are_named(sharded, source_data, stage):
    path = sorted(sharded.glob("*.safetensors"))[1]
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=f"{path.name} is truncated or damaged"):
        check(sharded, source_data, stage)
    path.write_bytes(b"version https://git-lfs")
    with pytest.raises(ArtifactError, match=f"{path.name} is truncated or damaged"):
        check(sharded, source_data, stage)
    path.unlink()
    with pytest.raises(ArtifactError, match=f"{path.name} is missing"):
        check(sharded, source_data, stage)
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(ArtifactError, match=rf"{path.name} lacks model\."):
        check(sharded, source_data, stage)


def test_a_single_cut_file_is_named(folder, protein_data):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"model\.safetensors is truncated or damaged"):
        check(folder, protein_data)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("model.safetensors.index.json", "{", r"index\.json is not valid JSON"),
        ("model.safetensors.index.json", "{}", "has no weight_map"),
        ("config.json", "{", r"config\.json does not describe a causal LM"),
        pytest.param(
            *(
                "config.json",
                '{"model_type": "vit"}',
                r"config\.json does not describe a causal LM",
            ),
            marks=pytest.mark.slow,  # transformers imports every model to name those that would do
        ),
    ],
)
def test_a_broken_json_of_the_model_is_named(folder, protein_data, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(ArtifactError, match=message) as caught:
        check(folder, protein_data)
    assert "\n" not in str(caught.value)


def test_a_model_without_its_embedding_is_refused(folder, protein_data):
    path = folder / "model.safetensors"
    weights = load_file(path)
    del weights["model.embed_tokens.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"holds no model\.embed_tokens\.weight"):
        check(folder, protein_data)


def test_rows_longer_than_the_model_reads_are_refused(folder, protein_data):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    for stage in (TRANSLATE, TRUNCATE):
        with pytest.raises(ConfigError, match=r"32 tokens.*max_position_embeddings is 16"):
            check(folder, protein_data, stage)


@pytest.mark.parametrize("zero", [1, 2])
def test_a_frozen_model_needs_zero_0_or_3(source_model, protein_data, zero):
    """DeepSpeed has no engine without an optimizer for the stages between."""
    with pytest.raises(ConfigError, match=rf"zero_optimization\.stage is {zero}"):
        check(source_model, protein_data, TRANSLATE, zero)
    assert check(source_model, protein_data, TRUNCATE, zero) is None
    assert check(source_model, protein_data, TRANSLATE, 0) is None


SCALED = {
    "logit_scale": Cohere2Config(**SMALL, vocab_size=SOURCE_VOCAB, logit_scale=0.5),
    "logits_scaling": GraniteConfig(**SMALL, vocab_size=SOURCE_VOCAB, logits_scaling=8.0),
    "final_logit_softcapping": Gemma2Config(
        **SMALL, vocab_size=SOURCE_VOCAB, num_key_value_heads=4, head_dim=8
    ),
}


@pytest.mark.parametrize("key", SCALED)
def test_logits_that_the_architecture_changes_are_translated(
    source_tokenizer, protein_data, tmp_path, key
):
    folder = save_model(SCALED[key], source_tokenizer, tmp_path / "base")
    assert check(folder, protein_data) is None
    assert check(folder, protein_data, TRUNCATE) is None


@pytest.mark.parametrize(
    "config",
    [
        GraniteConfig(**SMALL, vocab_size=SOURCE_VOCAB, logits_scaling=1.0),
        Cohere2Config(**SMALL, vocab_size=SOURCE_VOCAB, logit_scale=1.0),
        LlamaConfig(**SMALL, vocab_size=SOURCE_VOCAB),
        GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=CONTEXT, vocab_size=SOURCE_VOCAB),
    ],
    ids=lambda config: config.model_type,
)
def test_architectures_with_plain_logits_pass(source_tokenizer, protein_data, tmp_path, config):
    folder = save_model(config, source_tokenizer, tmp_path / "base")
    assert check(folder, protein_data) is None


def test_a_head_with_bias_passes(source_tokenizer, protein_data, source_data, tmp_path):
    config = PhiConfig(**SMALL, vocab_size=SOURCE_VOCAB)
    folder = save_model(config, source_tokenizer, tmp_path / "base")
    for stage in (TRANSLATE, TRUNCATE):
        assert check(folder, protein_data, stage) is None
    assert check(folder, source_data, SOURCE) is None


def test_all_leaves_out_rows_that_pad_the_embedding(source_model):
    """OLMo has 50304 rows for 50280 tokens."""
    every = torch.arange(SOURCE_VOCAB)
    assert torch.equal(source_token_ids("all", source_model, SOURCE_VOCAB), every)
    assert torch.equal(source_token_ids("all", source_model, SOURCE_VOCAB + 24), every)
    assert torch.equal(source_token_ids("all", source_model, 300), every[:300])


def test_bytes_are_the_tokens_of_one_character(source_model):
    """A byte-level tokenizer has one for each of the 256 bytes."""
    model = Tokenizer.from_file(str(source_model / "tokenizer.json"))
    ids = source_token_ids("bytes", source_model, SOURCE_VOCAB)
    assert len(ids) == 256
    assert {len(model.id_to_token(int(i))) for i in ids} == {1}
    cut = source_token_ids("bytes", source_model, 100)
    assert torch.equal(cut, ids[ids < 100]) and 0 < len(cut) < 256


def save_tokenizer(folder, tokens):
    folder.mkdir()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    Tokenizer(models.BPE(vocabulary, [])).save(str(folder / "tokenizer.json"))
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / "tokenizer_config.json").write_text(text)
    return folder


def test_sentencepiece_bytes_count(tmp_path):
    folder = save_tokenizer(tmp_path / "t", ["<0x41>", "<0xfg>", "ab", "b", "<0x4>", "<0xC3>"])
    assert source_token_ids("bytes", folder, 6).tolist() == [0, 3, 5]


def test_a_tokenizer_without_bytes_is_refused(tmp_path):
    folder = save_tokenizer(tmp_path / "t", ["ab", "cd"])
    with pytest.raises(ConfigError, match="no single characters or bytes"):
        source_token_ids("bytes", folder, 2)


def test_the_tokenizer_is_what_it_does_not_how_it_is_written(source_tokenizer, tmp_path):
    original = tokenizer_sha256(source_tokenizer)
    path = tmp_path / "tokenizer.json"
    content = json.loads((source_tokenizer / "tokenizer.json").read_text())
    path.write_text(json.dumps(dict(reversed(content.items())), indent=7))
    assert tokenizer_sha256(tmp_path) == original
    changed = Tokenizer.from_file(str(path))
    changed.enable_truncation(16)
    changed.enable_padding(pad_id=1, pad_token="<pad>")
    changed.save(str(path))
    assert tokenizer_sha256(tmp_path) == original
    changed.add_tokens(["another"])
    changed.save(str(path))
    assert tokenizer_sha256(tmp_path) != original


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_malformed_tokenizer_is_named(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(DataError, match=r"tokenizer\.json is not"):
        tokenizer_sha256(tmp_path)


@pytest.mark.parametrize("rows", [399, 401, 7])
def test_a_vocabulary_that_does_not_fit_the_weights_is_named(folder, protein_data, rows):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    message = rf"embed_tokens.weight has shape \(400, 32\), but the config makes it \({rows}, 32\)"
    with pytest.raises(ArtifactError, match=message):
        check(folder, protein_data)


def same_padding_and_end(folder):
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "pad_token": config["eos_token"]}))


def lossy_decoder(folder):
    path = folder / "tokenizer.json"
    lossy = {"type": "Replace", "pattern": {"String": "AC"}, "content": "A"}
    decoder = {"type": "Sequence", "decoders": [{"type": "Fuse"}, lossy]}
    path.write_text(json.dumps({**json.loads(path.read_text()), "decoder": decoder}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (same_padding_and_end, "padding and end of sequence are both token"),
        (lossy_decoder, "does not decode what it encodes"),
    ],
)
@pytest.mark.parametrize("stage", [TRANSLATE, PRETRAIN])
def test_a_tokenizer_that_no_export_would_take_is_refused_before_the_first_step(
    source_model, protein_data, tmp_path, stage, damage, message
):
    data = shutil.copytree(protein_data, tmp_path / "data")
    record = artifacts.read_manifest(data)
    damage(data / "tokenizer")
    artifacts.seal(data, record)
    with pytest.raises(DataError, match=message):
        if stage is PRETRAIN:
            check_pretrain(data)
        else:
            check(source_model, data, stage)
