"""The planner: numbers that a hand count gives, choices, and errors of one line."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from s2t2_dist import cli
from s2t2_dist.config import load_recipe
from s2t2_dist.errors import ConfigError
from s2t2_dist.lm import engine
from s2t2_dist.sizing.dryrun import Pass, pass_bytes
from s2t2_dist.sizing.report import GIB, size_recipe
from s2t2_dist.sizing.stages import Hardware, Inputs, run_disk, size_stage
from tests.bench import sizing

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "configs"
RECIPES = ROOT / "launch" / "recipes"
ONE_B = RECIPES / "olmo-1b-uniref50.yaml"
SEVEN_B = RECIPES / "olmo-7b-transfer.yaml"
# The models of most tests have two layers; slow ones have all.
DEPTH = 2
# Weights of a layer, by hand: attention and MLP. OLMo's norms have none.
LAYER_1B = 4 * 2048**2 + 3 * 2048 * 8192
LAYER_7B = 4 * 4096**2 + 3 * 4096 * 11008
DATA = ["--vocab-size", "512", "--context", "512"]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def planned(recipe, name, ranks, stage, file="zero3", overrides=None, depth=DEPTH, **more):
    recipe = load_recipe(recipe, overrides)
    config = AutoConfig.from_pretrained(CONFIGS / name, num_hidden_layers=depth)
    settings = engine.load_settings(Path(f"ds_configs/{file}.json"))
    (found,) = (s for s in recipe.stages if s.name == stage)
    inputs = Inputs(config, 50_280, 512, 512)
    return size_stage(recipe, found, inputs, settings, Hardware(ranks, **more))


@pytest.mark.parametrize("depth", [DEPTH, pytest.param(32, marks=pytest.mark.slow)])
def test_the_states_of_full_finetuning_take_18_bytes_per_weight(depth):
    N = depth * LAYER_7B + 2 * 512 * 4096  # folded: untied, 512 tokens
    parts = planned(SEVEN_B, "olmo-7b", 8, "finetune", depth=depth).phases["passes"]
    names = ("weights", "gradients", "master weights", "AdamW moments")
    assert [parts[name] for name in names] == [n * N // 8 for n in (2, 4, 4, 8)]
    assert parts["gathered weights"] == min(2 * N, 2 * 10**9)  # DeepSpeed's limit of live weights
    assert parts["reduce bucket"] == 4 * 10**8


def test_offload_moves_the_states_to_the_host():
    N = DEPTH * LAYER_7B + 2 * 512 * 4096
    plan = planned(SEVEN_B, "olmo-7b", 8, "finetune", "zero3-offload")
    assert plan.host == 20 * N  # gradients twice, master weights, moments; 8 ranks of a node
    assert "AdamW moments" not in plan.phases["passes"]
    assert planned(SEVEN_B, "olmo-7b", 8, "finetune").host == 0


def test_hpz_keeps_a_second_copy_of_the_weights_in_the_node():
    batch = ["stages.finetune.train_batch_size=32"]
    N = DEPTH * LAYER_7B + 2 * 512 * 4096
    plain = planned(SEVEN_B, "olmo-7b", 32, "finetune", "zero3", batch)
    hpz = planned(SEVEN_B, "olmo-7b", 32, "finetune", "zero3-hpz", batch)
    assert hpz.peak - plain.peak == 2 * N // 8
    # A ring of W sends (W - 1) / W of what is gathered: twice, or once and once in the node.
    assert plain.traffic["gathering weights"] == 2 * (2 * N * 31 // 32)
    assert hpz.traffic["gathering weights"] == 2 * N * 31 // 32
    assert hpz.traffic["gathering weights in the node"] == 2 * N * 7 // 8
    batch = ["stages.translate.train_batch_size=32"]
    frozen = planned(ONE_B, "olmo-1b", 32, "translate", "zero3-hpz", batch).traffic
    assert frozen["gathering weights"] == 0  # they never change
    N = DEPTH * LAYER_1B  # without the source's vocabulary
    assert frozen["gathering weights in the node"] == 2 * (2 * N * 7 // 8)


def test_a_translate_stage_holds_a_frozen_partition_and_its_rows():
    parts = planned(ONE_B, "olmo-1b", 8, "translate").phases["translator"]
    assert parts["weights"] == 2 * DEPTH * LAYER_1B // 8  # without the source's vocabulary
    assert parts["C"] == 4 * (50_280 // 8) * 512 == parts["AdamW moments"] // 2
    separate = ["stages.translate.plans=separate"]
    twice = planned(ONE_B, "olmo-1b", 8, "translate", overrides=separate).phases["translator"]
    for name in ("C", "gradient of C", "AdamW moments", "rows of E and L"):
        assert twice[name] == 2 * parts[name]
    assert not any("master" in name or name == "gradients" for name in parts)


def test_disk_counts_kept_checkpoints_and_one_in_the_making():
    plan = planned(SEVEN_B, "olmo-7b", 8, "finetune")
    N = DEPTH * LAYER_7B + 2 * 512 * 4096
    assert plan.checkpoint == 12 * N
    assert run_disk(load_recipe(SEVEN_B), [plan]) == 3 * 12 * N + 4 * N


@pytest.mark.slow
def test_a_pass_counts_activations_logits_and_reductions():
    config = AutoConfig.from_pretrained(CONFIGS / "olmo-1b")
    what = {"dtype": "bfloat16", "rows": 1, "tokens": 64, "vocabulary": 512}
    trained = pass_bytes(config, Pass(**what))
    # The logits of 50,304 tokens: bfloat16, and three float32 at once in the backward pass.
    assert trained > 63 * 50_304 * (2 + 3 * 4)
    frozen = pass_bytes(config, Pass(**what, trained=False))
    assert frozen < trained / 2
    again = pass_bytes(config, Pass(**what, trained=False, checkpointing=True))
    assert again < frozen / 2
    evaluated = pass_bytes(config, Pass(**what, trained=False, evaluation=True))
    assert evaluated < frozen / 4
    double = pass_bytes(config, Pass(**{**what, "rows": 2}, trained=False))
    # Nearly: the head in bfloat16 and the gradient of E' do not grow.
    assert double == pytest.approx(2 * frozen, rel=0.05)
    largest = 50_304 * 2048
    bucket = pass_bytes(config, Pass(**what, bucket=largest))
    assert bucket >= 4 * 100_000_000  # what waits in the bucket is copied when it is reduced


def test_a_dry_run_leaves_the_real_library_as_it_was():
    config = AutoConfig.from_pretrained(CONFIGS / "olmo-1b")
    pass_bytes(config, Pass("float32", 1, 8, 64, trained=False))
    assert type(torch.zeros(2)) is torch.Tensor


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "name", "gpus", "memory", "more", "take"),
    [
        (ONE_B, "olmo-1b", 1, 80, [], "zero3.json"),
        (ONE_B, "olmo-1b", 8, 80, [], "zero3.json"),
        (SEVEN_B, "olmo-7b", 8, 80, [], "zero3.json"),
        (SEVEN_B, "olmo-7b", 8, 16, [], "zero3-offload.json"),
        (SEVEN_B, "olmo-7b", 32, 80, ["stages.finetune.train_batch_size=32"], "zero3-hpz.json"),
        (SEVEN_B, "olmo-7b", 8, 2, [], None),
    ],
)
def test_the_file_to_take(recipe, name, gpus, memory, more, take):
    plan = size_recipe(
        load_recipe(recipe, more), Hardware(gpus), memory * GIB, CONFIGS / name, 512, 512
    )
    assert (plan.take.file.name if plan.take else None) == take
    assert ("It fits" in plan.advice()) == (take is not None)
    assert "cpu.json" not in {file.file.name for file in plan.files}


@pytest.mark.slow
def test_checkpointing_is_advised_where_it_makes_the_difference():
    recipe = load_recipe(SEVEN_B, ["model.gradient_checkpointing=false"])
    plan = size_recipe(recipe, Hardware(8), 9 * GIB, CONFIGS / "olmo-7b", 512, 512)
    assert plan.take is None and "gradient_checkpointing=true" in plan.advice()
    (named,) = [f for f in plan.files if plan.advice().endswith(f"deepspeed={f.file}")]
    assert plan.fits(*named.stages[True])


@pytest.mark.slow
def test_command_prints_json(capsys):
    command = ["plan", str(ONE_B), "--gpus", "8", "--gpu-memory", "80", *DATA]
    assert cli.run([*command, "--config", str(CONFIGS / "olmo-1b"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["take"] == "ds_configs/zero3.json"
    # Without a tokenizer there are 256 byte tokens.
    assert (values["source_rows"], values["vocab_size"], values["context"]) == (256, 512, 512)
    for file in values["files"]:
        for stage in file["stages"]:
            assert stage["peak"] == max(stage["totals"].values()) > 0
            assert sum(stage["phases"][stage["peak_phase"]].values()) == stage["peak"]


@pytest.mark.slow
def test_command_prints_every_file_and_the_advice(capsys, print_width):
    print_width(200)
    command = ["plan", str(ONE_B), "--gpus", "16", "--gpu-memory", "80", *DATA]
    assert cli.run([*command, "--config", str(CONFIGS / "olmo-1b")]) == 0
    out = capsys.readouterr().out
    for name in ("zero3.json", "zero3-offload.json", "zero3-hpz.json", "not measured"):
        assert name in out
    assert "take deepspeed=ds_configs/zero3-hpz.json" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "tests/configs/olmo-1b"], "give --vocab-size and --context"),
        ([*DATA, "--config", "tests/configs"], "give --config FOLDER"),
    ],
)
def test_what_is_missing_is_said_in_one_line(arguments, message, capsys):
    assert cli.run(["plan", str(ONE_B), "--gpus", "8", "--gpu-memory", "80", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_ranks_that_cannot_share_the_batch_are_refused():
    with pytest.raises(ConfigError, match="not a multiple of the 3 ranks"):
        planned(ONE_B, "olmo-1b", 3, "translate")


@pytest.mark.soak
def test_the_page_on_sizing_holds_what_its_command_writes():
    assert sizing.PAGE.read_text() == sizing.page()
