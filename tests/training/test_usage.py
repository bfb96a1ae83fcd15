"""What a step's metrics say of the hardware: operations as torch counts them, peaks, messages."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from s2t2_dist.errors import S2T2Error
from s2t2_dist.training.usage import Usage, explained, peak_flops, token_flops
from tests.lm.families import tiny_config


def model_of(context, stage):
    """(config, model): eager attention, whose products the counter sees."""
    config = context.config_of(stage)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return config, lm.float()


def assert_counted(ours, counter, config, T):
    """Some versions of transformers make the angles of the rotary embedding by a product."""
    angles = 2 * T * (config.hidden_size // config.num_attention_heads // 2)
    assert counter.get_total_flops() - ours in (0, angles)


@pytest.mark.parametrize("tied", [True, False])
def test_operations_of_finetuning_are_those_that_torch_counts(context, tied):
    stage, T = context.recipe.stages[1], context.train.context
    config, lm = model_of(context, stage)
    if tied:
        config.tie_word_embeddings = True
        lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
    ids = torch.arange(2 * T).view(2, T) % config.vocab_size
    with FlopCounterMode(display=False) as counter:
        lm(input_ids=ids, labels=ids).loss.backward()
    assert_counted(token_flops(config, context, stage) * 2 * T, counter, config, T)


def test_operations_of_translation_are_those_that_torch_counts(context):
    """Frozen weights; E' and L' learn."""
    stage, T = context.recipe.stages[0], context.train.context
    config, lm = model_of(context, stage)
    lm.requires_grad_(False)
    U = context.train.metadata["vocab_size"]
    embed, head = torch.randn(2, U, config.hidden_size).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        embeds = torch.nn.functional.embedding(torch.arange(2 * T).view(2, T) % U, embed)
        (lm.base_model(inputs_embeds=embeds).last_hidden_state @ head.T).sum().backward()
    assert_counted(token_flops(config, context, stage) * 2 * T, counter, config, T)


@pytest.mark.parametrize("name", ["mamba", "gpt_neo", "xlstm", "gemma3", "rwkv"])
def test_every_architecture_has_a_number_of_operations(context, name):
    config = tiny_config(name, 300)
    assert all(token_flops(config, context, stage) > 0 for stage in context.recipe.stages)


def test_a_step_s_metrics(context, monkeypatch):
    found = Usage(context, context.recipe.stages[1])
    found.begin()
    values = found.values(1000.0)
    assert values["model_tflops"] == pytest.approx(found.flops * 1000 / 1e12)
    assert 0.05 < values["peak_memory_gib"] < 64  # of this process
    assert "mfu" not in values  # nobody knows a CPU's rate
    found.peak_flops = 1e9
    assert found.values(1000.0)["mfu"] == pytest.approx(found.flops * 1000 / 1e9)


def test_rates_of_cards(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    for name, rate in {
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H200": 989e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "Tesla T4": None,
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        assert peak_flops(torch.device("cuda")) == rate


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_says_what_to_lower(context, error):
    stage = context.recipe.stages[1]
    message = r"stage finetune: out of memory on cpu, with a peak of \d+\.\d\d GiB; lower "
    message += re.escape("stages.finetune.per_device_train_batch_size (")
    with pytest.raises(S2T2Error, match=message), explained(stage, context.device):
        raise error


def test_other_errors_pass(context):
    stage = context.recipe.stages[0]
    with pytest.raises(RuntimeError, match="shape"), explained(stage, context.device):
        raise RuntimeError("shape mismatch")
