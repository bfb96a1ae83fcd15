"""Every rank reads its own part of every weight: right values, and less memory the more ranks."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, OlmoConfig

from s2t2_dist.config import ModelConfig, Translate
from s2t2_dist.errors import ArtifactError
from s2t2_dist.lm import engine
from s2t2_dist.lm.folder import WeightFiles
from s2t2_dist.lm.load import load_lm, read_flat
from tests.bench import measure
from tests.bench.memory import MALLOC, as_launched
from tests.jobs.distributed import run_ranks

SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
IDS = {"eos_token_id": 0, "pad_token_id": 1}


def save_model(folder, tied, vocab_size, layers):
    """Random float32 weights in several files."""
    torch.manual_seed(3)
    sizes = {**SIZES, "vocab_size": vocab_size, "num_hidden_layers": layers}
    config = OlmoConfig(**sizes, **IDS, tie_word_embeddings=tied)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lm.save_pretrained(folder, max_shard_size="4MB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return WeightFiles(save_model(tmp_path_factory.mktemp("m") / "m", False, 1001, 2))


def test_any_part_of_a_weight_is_read_in_its_order(weights):
    name = weights.vocabulary.embed
    whole = weights.read(name)
    flat = whole.reshape(-1)
    for start, stop in [(0, 1), (255, 257), (300, 300), (0, flat.numel()), (250_000, 300_000)]:
        part = read_flat(weights, name, whole.shape, start, stop)
        assert torch.equal(part, flat[start:stop])
    beyond = read_flat(weights, name, whole.shape, flat.numel() + 5, flat.numel() + 9)
    assert len(beyond) == 0


def test_a_weight_of_another_shape_is_refused(weights):
    with pytest.raises(ArtifactError, match=r"has shape \(1001, 256\), but the config makes it"):
        read_flat(weights, weights.vocabulary.embed, torch.Size((1001, 255)), 0, 5)


def test_a_scalar_is_read(tmp_path, weights):
    save_file({"scale": torch.tensor(3.0)}, tmp_path / "model.safetensors")
    files = WeightFiles(weights.folder)
    files.folder, files.file_of = tmp_path, {"scale": "model.safetensors"}
    assert read_flat(files, "scale", torch.Size(()), 0, 1).tolist() == [3.0]
    assert read_flat(files, "scale", torch.Size(()), 1, 2).tolist() == []


def test_weights_that_transformers_renames_are_left_to_it(tmp_path, weights):
    assert weights.as_stored
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, bos_token_id=0, **IDS)
    lm = AutoModelForCausalLM.from_config(config)
    lm.transformer.save_pretrained(tmp_path)  # GPT-2's own files have no prefix either
    assert not WeightFiles(tmp_path).as_stored


def _load(comm, folder, miniature, dtype):
    """Differences to the files, of this rank's parts; peak bytes above the baseline."""
    as_launched(comm)
    lm = ModelConfig(model_name_or_path=str(folder), dtype=dtype)
    stage = Translate(kind="translate", max_steps=1, train_batch_size=comm.size)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    settings = engine.engine_settings({"zero_optimization": zero}, lm, stage, comm.size)
    load_lm(miniature, lm, settings)
    base = measure.reset_peak()
    loaded = load_lm(folder, lm, settings)
    peak = measure.status_bytes("VmHWM") - base
    files, found = WeightFiles(folder), []
    for name, parameter in loaded.named_parameters():
        whole = files.read(name).reshape(-1).to(parameter.dtype)
        size = parameter.ds_tensor.ds_numel
        part = whole[comm.rank * size : (comm.rank + 1) * size]
        assert torch.equal(parameter.ds_tensor[: len(part)], part), name
        assert not parameter.ds_tensor[len(part) :].any(), name
        found.append(parameter.dtype)
    rope = loaded.base_model.rotary_emb.inv_freq
    tied = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    return {"peak": peak, "dtypes": set(found), "tied": tied, "rope": rope.tolist()}


@pytest.mark.slow
def test_partitions_equal_the_files_and_memory_falls_with_ranks(tmp_path, monkeypatch):
    """Tied, in bfloat16, on 1 rank; untied, in float32, on 3, which no size divides into."""
    for key, value in MALLOC.items():
        monkeypatch.setenv(key, value)
    mini = save_model(tmp_path / "mini", True, 5000, 1)
    tied = save_model(tmp_path / "tied", True, 5001, 30)
    untied = save_model(tmp_path / "untied", False, 5001, 30)
    (one,) = run_ranks(_load, 1, tmp_path, tied, mini, "bfloat16", fresh=True)
    three = run_ranks(_load, 3, tmp_path, untied, mini, "float32", fresh=True)
    assert one["dtypes"] == {torch.bfloat16} and one["tied"]
    assert one["rope"] == pytest.approx([1e4 ** (-2 * i / 64) for i in range(32)], rel=1e-6)
    assert all(r["dtypes"] == {torch.float32} and not r["tied"] for r in three)
    weights = 30 * (4 * 256**2 + 3 * 256 * 1024)
    embedding = 5001 * 256
    # A partition, and one whole weight before it is cut, in float32; a process' own few MiB.
    # A tied model too is made with a head of its own.
    sizes = {1: 2 * (weights + 2 * embedding), 3: 4 * (weights + 2 * embedding)}
    for found in ([one], three):
        for rank in found:
            planned = sizes[len(found)] / len(found) + 4 * embedding
            assert planned < 1.05 * rank["peak"], (rank["peak"], planned)
            assert rank["peak"] < 1.15 * planned + 4 * measure.MIB, (rank["peak"], planned)
