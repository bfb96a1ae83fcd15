"""Every defect that a vocabulary swap is known to leave is found, by the name of its check."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from s2t2_dist import artifacts, cli
from s2t2_dist.errors import ArtifactError
from s2t2_dist.report.contents import UNTRAINED
from s2t2_dist.report.verify import CHECKS, require_verified, verify_model
from tests.conftest import make_source_model

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def untied_model(source_tokenizer, tmp_path_factory):
    return make_source_model(tmp_path_factory.mktemp("m") / "model", source_tokenizer, tied=False)


@pytest.fixture
def model(untied_model, tmp_path):
    return shutil.copytree(untied_model, tmp_path / "model")


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(folder, name, **values):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def failures(folder, untrained=None):
    return {c.name: c.found for c in verify_model(folder, untrained) if not c.passed}


def test_good_models_pass_every_check(untied_model, source_model, source_tokenizer, tmp_path):
    half = make_source_model(tmp_path / "half", source_tokenizer, dtype=torch.bfloat16)
    for folder in (untied_model, source_model, half):
        checks = verify_model(folder)
        assert [check.name for check in checks] == list(CHECKS)
        assert not failures(folder)


@pytest.mark.parametrize("matrix", [EMBED, HEAD])
def test_zero_row(model, matrix):
    change_weights(model, lambda w: w[matrix][300].zero_())
    found = failures(model)
    assert next(iter(found)) == "zero rows"
    assert "300 " in found["zero rows"]


def test_zero_row_of_the_padding_token(model):
    """transformers makes the embedding so; the LM head has no such excuse."""
    change_weights(model, lambda w: w[EMBED][1].zero_())
    assert not failures(model)
    change_weights(model, lambda w: w[HEAD][1].zero_())
    assert "LM head rows that are zero: 1 " in failures(model)["zero rows"]


@pytest.mark.parametrize("matrix", [EMBED, HEAD])
def test_duplicate_row(model, matrix):
    change_weights(model, lambda w: w[matrix][300].copy_(w[matrix][7]))
    found = failures(model)
    assert found.keys() == {"duplicate rows"}
    assert ": 7 " in found["duplicate rows"]
    assert ", 300 " in found["duplicate rows"]


def test_duplicate_rows_of_untrained_tokens_are_told_but_pass(model):
    change_weights(model, lambda w: w[EMBED][300].copy_(w[EMBED][7]))
    checks = {check.name: check for check in verify_model(model, untrained=[7, 300])}
    assert checks["duplicate rows"].passed
    assert "2 tokens that did not occur in training" in checks["duplicate rows"].found
    assert failures(model, untrained=[300]).keys() == {"duplicate rows"}
    artifacts.seal(model, {"kind": "model", UNTRAINED: [7, 300]})
    assert not failures(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_not_finite(model, value):
    change_weights(model, lambda w: w[HEAD][5, 3].fill_(value))
    assert failures(model).keys() == {"finite rows"}


def test_wrong_vocab_size(model):
    change_json(model, "config.json", vocab_size=399)
    found = failures(model)
    assert {"parameters", "row counts"} <= found.keys()
    assert "400 rows, config.vocab_size is 399" in found["row counts"]


def test_token_id_beyond_the_rows(model):
    for matrix in (EMBED, HEAD):
        change_weights(model, lambda w, matrix=matrix: w.update({matrix: w[matrix][:390].clone()}))
    change_json(model, "config.json", vocab_size=390)
    assert "largest token id is 399, but there are 390 rows" in failures(model)["row counts"]


def test_more_rows_than_tokens_pass_and_may_be_zero(model):
    for matrix in (EMBED, HEAD):
        more = torch.zeros(10, 32)
        change_weights(model, lambda w, m=matrix, more=more: w.update({m: torch.cat((w[m], more))}))
    change_json(model, "config.json", vocab_size=410)
    assert not failures(model)
    rows = next(check for check in verify_model(model) if check.name == "row counts")
    assert "10 unused" in rows.found


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id", "pad_token_id"])
def test_special_token_id_that_differs(model, name, key):
    change_json(model, name, **{key: 50})
    found = failures(model)
    assert found.keys() == {"special tokens"}
    assert f"{key} differs" in found["special tokens"]


def test_missing_generation_config(model):
    (model / "generation_config.json").unlink()
    assert failures(model) == {"special tokens": "generation_config.json is missing"}


def test_padding_that_is_the_end_token(model):
    change_json(model, "tokenizer_config.json", pad_token="<|endoftext|>")
    for name in ("config.json", "generation_config.json"):
        change_json(model, name, pad_token_id=0)
    found = failures(model)["padding"]
    assert found.startswith("padding and end of sequence are both token 0: ")


def test_untied_weights_told_as_tied(model):
    change_json(model, "config.json", tie_word_embeddings=True)
    assert "tied or untied" in failures(model)


def test_tied_weights_told_as_untied(source_model, tmp_path):
    folder = shutil.copytree(source_model, tmp_path / "model")
    change_json(folder, "config.json", tie_word_embeddings=False)
    assert {"tied or untied", "parameters"} <= failures(folder).keys()


def test_dtype_that_is_not_the_tensors(model):
    change_json(model, "config.json", dtype="bfloat16")
    assert failures(model).keys() == {"dtype"}


def test_missing_and_surplus_tensors(model):
    change_weights(model, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    assert "up_proj.weight is not in the files" in failures(model)["parameters"]
    change_weights(model, lambda w: w.pop("model.layers.0.mlp.up_proj.weight"))
    change_weights(model, lambda w: w.update(surplus=torch.ones(1)))
    assert "is not in the files" in failures(model)["parameters"]


def test_tokenizer_that_loses_text(model):
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(tokenizer))
    assert "round trip" in failures(model)


def test_missing_tokenizer(model):
    (model / "tokenizer.json").unlink()
    assert failures(model)["round trip"] == "tokenizer.json is missing"


def test_altered_file(model):
    artifacts.seal(model, {"kind": "model"})
    assert not failures(model)
    path = model / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # one bit of one weight of a layer: only the hash can tell
    path.write_bytes(content)
    assert failures(model).keys() == {"files"}


def test_damaged_weights_are_a_failure_not_a_crash(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert {"parameters", "row counts"} <= failures(model).keys()


def test_no_model_at_all(tmp_path):
    with pytest.raises(ArtifactError, match="is not a Hugging Face model folder"):
        verify_model(tmp_path)


def test_command_names_the_first_failure_on_one_line(model, capsys):
    change_weights(model, lambda w: w[HEAD][300].zero_())
    change_json(model, "generation_config.json", eos_token_id=50)
    code = cli.run(["verify", str(model)])
    output = capsys.readouterr()
    assert code == cli.USER_ERROR
    assert "zero rows" in output.out and "FAIL" in output.out
    assert output.err.count("\n") == 1
    assert "failed 'zero rows': LM head rows that are zero: 300" in output.err
    assert "(and 1 more checks)" in output.err
    with pytest.raises(ArtifactError, match="zero rows"):
        require_verified(model)


def test_command_passes_a_good_model(model, capsys):
    code = cli.run(["verify", str(model)])
    assert code == 0
    assert "FAIL" not in capsys.readouterr().out
