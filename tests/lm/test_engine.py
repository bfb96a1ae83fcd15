"""DeepSpeed as we use it: batches, prefetching through a frozen model, a save that fails."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import OlmoConfig, OlmoForCausalLM

from s2t2_dist.config import Finetune, ModelConfig, Translate
from s2t2_dist.errors import ConfigError, S2T2Error
from s2t2_dist.lm import engine
from s2t2_dist.run import checkpoint
from tests.jobs.distributed import run_ranks

ZERO = {"zero_optimization": {"stage": 3, "overlap_comm": False}}
MODEL = ModelConfig(model_name_or_path="unused", dtype="float32")


@pytest.mark.parametrize(
    ("batch", "most", "ranks", "expected"),
    [
        (16, 16, 1, (16, 1)),
        (16, 16, 2, (8, 1)),  # no larger than a rank's share
        (16, 4, 2, (4, 2)),
        (24, 16, 1, (12, 2)),  # the largest divisor of 24 up to 16
        (14, 3, 2, (1, 7)),
    ],
)
def test_a_batch_is_split_into_the_largest_equal_passes(batch, most, ranks, expected):
    stage = Translate(
        kind="translate",
        max_steps=1,
        train_batch_size=batch,
        per_device_train_batch_size=most,
    )
    assert engine.split_batch(stage, ranks) == expected


def test_a_batch_that_the_ranks_cannot_share_is_refused():
    stage = Translate(kind="translate", max_steps=1, train_batch_size=7)
    with pytest.raises(ConfigError, match="train_batch_size is 7, not a multiple of the 2 ranks"):
        engine.split_batch(stage, 2)


def _small_lm() -> OlmoForCausalLM:
    torch.manual_seed(3)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32}
    ids = {"pad_token_id": 1, "eos_token_id": 0}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return OlmoForCausalLM(OlmoConfig(**sizes, **heads, **ids, attention_dropout=0.5)).eval()


def _as_launched(comm) -> None:
    names = {"RANK": comm.rank, "LOCAL_RANK": comm.rank, "WORLD_SIZE": comm.size}
    os.environ.update({name: str(value) for name, value in names.items()})


def _folded(embed, head) -> OlmoForCausalLM:
    """The small model with another vocabulary, by transformers alone."""
    lm = _small_lm()
    lm.model.embed_tokens.weight = torch.nn.Parameter(embed)
    lm.lm_head.weight = torch.nn.Parameter(head)
    return lm


def _frozen(comm) -> dict:
    _as_launched(comm)
    stage = Translate(kind="translate", max_steps=1)
    settings = engine.engine_settings(ZERO, MODEL, stage, comm.size)
    torch.manual_seed(comm.rank)
    embed, head = torch.randn(2, 30, 16).unbind()
    ids = torch.randint(30, (2, 5))
    folded = _folded(embed, head)
    expected = folded(ids).logits
    expected.square().sum().backward()
    expected, largest = expected.detach(), float(expected.detach().abs().max())
    wanted = folded.model.embed_tokens.weight.grad, folded.lm_head.weight.grad
    frozen = engine.FrozenLM(_small_lm(), settings, recompute=False)
    coordinator = frozen.engine.optimizer.get_param_coordinator()
    error, complete = 0.0, []
    for evaluating in (False, False, False, True, True, False, False, False):
        frozen.train_mode(not evaluating)
        with torch.set_grad_enabled(not evaluating):
            leaves = [part.clone().requires_grad_() for part in (embed, head)]
            logits = frozen.logits(ids, (*leaves, None))
        complete.append(coordinator.is_complete_trace())
        if not evaluating:
            logits.square().sum().backward()
            off = (
                (leaf.grad - grad).abs().max() / grad.abs().max()
                for leaf, grad in zip(leaves, wanted, strict=True)
            )
            error = max(error, *map(float, off))
        error = max(error, float((logits.detach() - expected).abs().max()) / largest)
    frozen.train_mode(False)
    with torch.no_grad():
        positions = torch.tensor([[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]])
        apart = frozen.logits(ids, (embed, head, None), positions)
        alone = folded(ids[:1, 2:]).logits
    masked = float((apart[0, 2:] - alone[0]).abs().max()) / largest
    across = float((apart[0, 2:] - expected[0, 2:]).abs().max()) / largest
    frozen.train_mode(True)
    training = {module.training for module in frozen.engine.module.modules()}
    return {
        "error": error,
        "complete": complete,
        "training": training,
        "masked": masked,
        "across": across,
    }


@pytest.mark.slow
def test_a_frozen_model_records_its_trace_and_prefetches(tmp_path):
    """DeepSpeed prefetches along a complete trace only; training and evaluating may alternate."""
    for found in run_ranks(_frozen, 2, tmp_path):
        # The same float32 operations on the same weights, whoever held them.
        assert found["error"] < 1e-6
        assert found["complete"][2] and found["complete"][-1], found["complete"]
        assert found["training"] == {False}
        # Where positions start again a document is by itself, and differs from what it was.
        assert found["masked"] < 1e-6 < 1e-3 < found["across"]


def _save_where_one_rank_fails(comm, run_dir) -> tuple[str, bool, int]:
    _as_launched(comm)
    stage = Finetune(kind="finetune", init="source", max_steps=1)
    settings = engine.engine_settings(ZERO, MODEL, stage, comm.size)
    trained = engine.TrainedLM(_small_lm(), settings, stage)

    def save(step: int, write) -> None:
        where = checkpoint.Position(0, "finetune", step, comm.size, 0)
        checkpoint.save(run_dir, where, write, comm, 9)

    def blocked(directory) -> None:
        if comm.rank == 1:  # a directory where DeepSpeed puts the moments of rank 1
            (directory / "engine/zero_pp_rank_1_mp_rank_00_optim_states.pt").mkdir(parents=True)
        trained.save(directory)

    save(1, trained.save)
    try:
        save(2, blocked)
    except S2T2Error as error:
        path, position = checkpoint.find(run_dir, comm)
        trained.load(path)
        trained.close()
        return str(error), error.collective, position.step
    return "no error", False, 0


@pytest.mark.slow
def test_a_rank_that_cannot_save_leaves_nobody_in_a_barrier(tmp_path):
    """Ends with the same error on both ranks, long before the group's timeout."""
    zero, one = run_ranks(_save_where_one_rank_fails, 2, tmp_path, tmp_path / "run", timeout=90)
    assert zero == one
    message, everywhere, step = zero
    assert message.startswith(f"rank 1 on {socket.gethostname()}: checkpoint ")
    assert "could not be written" in message
    assert everywhere and step == 1
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["finetune-000001"]


@pytest.mark.slow
def test_a_start_on_a_cpu_compiles_nothing_and_leaves_no_shared_memory(tmp_path):
    """The shared-memory operation takes a minute, and leaves a lock where a rank is killed."""
    before = set(Path("/dev/shm").iterdir())
    code = "from s2t2_dist.lm import engine; engine.init_distributed(60.0); import os; os._exit(0)"
    environment = {k: v for k, v in os.environ.items() if k != "RANK"}
    environment |= {"TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert not list(tmp_path.rglob("*"))
    left = set(Path("/dev/shm").iterdir()) - before
    assert not [path for path in left if path.name.startswith("deepspeed")]
