"""Both stages of the demo model by a user's script: on a GPU with NCCL, ZeRO-3 and bf16."""

import re
import subprocess
import sys

import pytest
import torch

from tests.gpu import runs
from tests.jobs import launching

pytestmark = pytest.mark.slow

LOSS = 1e-3  # between devices: float32 products that are summed in another order, over few steps
TOO_LITTLE = """
import resource, sys, torch
from s2t2_dist import cli
device, arguments = sys.argv[1], sys.argv[2:]
if device == "cuda":
    torch.cuda.set_per_process_memory_fraction(0.004)
else:
    from s2t2_dist.training import loop
    start, calls = loop.seed_step, []
    def limited(*args):
        calls.append(args)
        if len(calls) != 2:  # of the first step
            return start(*args)
        pages = int(open("/proc/self/statm").read().split()[0])
        limit = pages * resource.getpagesize() + (64 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        start(*args)
    loop.seed_step = limited
sys.exit(cli.run(arguments))
"""


# In small on a CPU as long as on a card, and there jobs/ has the same of longer runs.
long_on_a_cpu = () if torch.cuda.is_available() else pytest.mark.soak


def test_both_stages_learn(uninterrupted, device):
    assert launching.status(uninterrupted)["state"] == "done"
    losses = runs.training_losses(uninterrupted)
    for stage in ("translate", "finetune"):
        of_stage = [loss for name, _, loss in losses if name == stage]
        assert len(of_stage) == runs.STEPS[device.type]
        assert of_stage[-1] < of_stage[0], of_stage


@pytest.mark.parametrize("stage", [pytest.param("translate", marks=long_on_a_cpu), "finetune"])
def test_a_killed_run_resumes_bit_for_bit(stage, uninterrupted, device, demo_data, tmp_path):
    """From the checkpoint before; the steps after it are made again, from the same bits."""
    recipe = runs.write_recipe(tmp_path / "killed", demo_data, device.type)
    runs.kill_after(recipe, device.type, stage, runs.STEPS[device.type] // 3 + 1)
    assert runs.train(recipe, device.type) == 0, runs.output(recipe)
    assert "resuming from" in runs.output(recipe)
    run_dir = recipe.parent / "run"
    difference = runs.first_difference(run_dir, uninterrupted)
    assert runs.losses(run_dir) == runs.losses(uninterrupted), difference


def test_losses_equal_those_of_a_cpu(device, demo_data, tmp_path):
    """The same float32 run; the devices round differently, and draw no random number."""
    found = {}
    for where in dict.fromkeys((device.type, "cpu")):
        short = {"max_steps": 4, "eval_steps": 4, "save_steps": 4, "train_batch_size": 4}
        short["per_device_train_batch_size"] = 4
        recipe = runs.write_recipe(tmp_path / where, demo_data, where, "float32", **short)
        assert runs.train(recipe, where) == 0, runs.output(recipe)
        found[where] = runs.training_losses(recipe.parent / "run")
    assert len(found["cpu"]) == 8
    for (*one, loss), (*other, expected) in zip(found[device.type], found["cpu"], strict=True):
        assert one == other and loss == pytest.approx(expected, abs=LOSS)


def test_export_and_evaluate(device, demo_data, tmp_path):
    """The exported folder scores as the run did: bf16 logits, in other batches.

    Truncated: so few steps of translation leave rare tokens with equal rows, which no export has.
    """
    recipe = runs.write_recipe(tmp_path, demo_data, device.type)
    runs.keep_stage(recipe, "finetune")
    assert runs.train(recipe, device.type) == 0, runs.output(recipe)
    runs.s2t2(tmp_path, device.type, "export", tmp_path / "run", "--out", tmp_path / "hf")
    printed = runs.s2t2(tmp_path, device.type, "evaluate", tmp_path / "hf", demo_data)
    last = [line for line in launching.metrics(tmp_path / "run") if "eval_loss" in line][-1]
    (loss,) = re.findall(r"loss\W+(\d+\.\d+)", printed)
    assert float(loss) == pytest.approx(last["eval_loss"], abs=0.02), printed


@pytest.mark.parametrize("stage", ["translate", pytest.param("finetune", marks=long_on_a_cpu)])
def test_out_of_memory_is_one_line(stage, device, demo_data, tmp_path):
    """It names the stage, the peak and what to lower; exit code 2."""
    large = {"train_batch_size": 256, "per_device_train_batch_size": 256}
    recipe = runs.write_recipe(tmp_path, demo_data, device.type, **large)
    runs.keep_stage(recipe, stage)
    command = [sys.executable, "-c", TOO_LITTLE, device.type, "train", str(recipe)]
    env = runs.environment(tmp_path, device.type)
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"stage {stage}" in line and "GiB" in line and "per_device_train_batch_size" in line
