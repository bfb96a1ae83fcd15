"""Gradients that are not finite: skipped on every rank, counted, and never a lost weight saved."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from s2t2_dist.data.batches import count_predicted, load_batch
from s2t2_dist.data.order import rows_at
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.lm import engine
from s2t2_dist.lm.result import MODEL_DIR
from s2t2_dist.training.context import Context
from s2t2_dist.training.finetune import WeightStage
from s2t2_dist.training.translate import TranslateStage
from tests.conftest import PROTEIN_VOCAB, make_source_model
from tests.jobs import launching as runs
from tests.jobs.distributed import run_ranks
from tests.report.runs import make_recipe

pytestmark = pytest.mark.slow

TRANSLATE = {"kind": "translate", "max_steps": 9, "train_batch_size": 8}
FINETUNE = {"kind": "finetune", "init": "source", "max_steps": 9, "train_batch_size": 8}


def _context(comm, model: Path, data: Path, run_dir: Path, zero: dict) -> Context:
    names = {"RANK": comm.rank, "LOCAL_RANK": comm.rank, "WORLD_SIZE": comm.size}
    os.environ.update({name: str(value) for name, value in names.items()})
    recipe = make_recipe(run_dir, model, data, [TRANSLATE, FINETUNE])
    settings = engine.load_settings(runs.CPU_SETTINGS)
    settings["zero_optimization"] |= zero
    train, validation = ShardReader(data, "train"), ShardReader(data, "validation")
    return Context(recipe, run_dir, comm, torch.device("cpu"), settings, train, validation)


def _around_a_bad_step(stage, state) -> list[float]:
    """Norms of a good, a bad and a good step; the bad one must not change the state by a bit."""

    def take(step: int, bad: bool = False) -> float:
        context = stage.context
        rows = np.arange(8 * step, 8 * step + 8)
        mine = np.split(rows, context.comm.size)[context.comm.rank]
        logits = stage.logits
        if bad and context.comm.rank == 1:  # one rank alone overflows
            stage.logits = lambda *inputs: logits(*inputs) * math.inf
        batches = [load_batch(context.train, mine)]
        predicted = count_predicted(context.train, rows)
        _, values = stage.train_step(batches, predicted, 0.01)
        stage.logits = logits
        return values["grad_norm"]

    def differ(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
        assert one.keys() == other.keys()
        return [name for name in one if not torch.equal(one[name], other[name])]

    norms = [take(0)]
    before = state(stage)
    norms.append(take(1, bad=True))
    after = state(stage)
    norms.append(take(2))
    assert before and not differ(before, after)
    assert differ(after, state(stage)), "a good step must change it"
    stage.close()
    return norms


def _translate_state(stage) -> dict[str, torch.Tensor]:
    (cost,) = stage.translator.costs
    moments = stage.optimizer.state[cost]
    return {"cost": cost.detach().clone(), **{key: t.clone() for key, t in moments.items()}}


def _weight_state(stage) -> dict[str, torch.Tensor]:
    state = dict(stage.lm.state_dict() or {})
    for i, moments in enumerate(stage.lm.engine.optimizer.optimizer.state.values()):
        state |= {f"{i}.{key}": tensor.clone() for key, tensor in moments.items()}
    return state


def _bad_steps(comm, model: Path, data: Path, run_dir: Path) -> dict[str, list[float]]:
    norms = {}
    for zero in ({}, {"stage": 2}):
        context = _context(comm, model, data, run_dir, zero)
        translate, finetune = context.recipe.stages
        weights = WeightStage(context, finetune, model)
        norms[f"finetune {zero}"] = _around_a_bad_step(weights, _weight_state)
        if not zero:
            plan = TranslateStage(context, translate)
            norms["translate"] = _around_a_bad_step(plan, _translate_state)
    return norms


def test_a_step_that_overflows_on_one_rank_changes_nothing_on_any(
    source_model, protein_data, tmp_path
):
    """Weights, moments and step counts are bit for bit those of the good steps alone."""
    zero, one = run_ranks(
        _bad_steps, 2, tmp_path, source_model, protein_data, tmp_path / "run", timeout=240
    )
    assert len(zero) == 3
    for norms in (*zero.values(), *one.values()):
        assert [math.isfinite(norm) for norm in norms] == [True, False, True], (zero, one)


STEPS, ROWS = 12, 4


def _steps_with(token: int, reader: ShardReader) -> list[int]:
    rows = rows_at(np.arange(STEPS * ROWS), len(reader), 17).reshape(STEPS, ROWS)
    return [step + 1 for step in range(STEPS) if any(token in reader[row] for row in rows[step])]


def _broken_model(folder: Path, tokenizer: Path, data: Path) -> tuple[Path, list[int]]:
    """A model whose embedding of a rare token is infinite, and the steps in which it occurs."""
    reader = ShardReader(data, "train")
    occurs = {token: _steps_with(token, reader) for token in range(4, PROTEIN_VOCAB)}
    token = min((t for t in occurs if len(occurs[t]) >= 2), key=lambda t: len(occurs[t]))
    assert 2 <= len(occurs[token]) < 5
    make_source_model(folder, tokenizer, tied=False)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = math.inf
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, occurs[token]


def _error_of(recipe: Path) -> str:
    (error,) = {x for x in runs.output(recipe).splitlines() if x.startswith("error:")}
    return error


def test_bad_rows_are_skipped_counted_and_passed_by(source_tokenizer, protein_data, tmp_path):
    """Where they come too often in a row, the run ends with a checkpoint, and goes on behind it."""
    model, bad = _broken_model(tmp_path / "model", source_tokenizer, protein_data)
    stage = {**runs.STAGE, "max_steps": STEPS, "train_batch_size": ROWS, "learning_rate": 0.002}
    changes = {
        "stages": [{"kind": "finetune", "init": "truncate", **stage}],
        "model": {"model_name_or_path": str(model), "dtype": "float32"},
    }
    whole = runs.write_recipe(tmp_path / "whole", model, protein_data, **changes)
    assert runs.train(whole, 0) == 0, runs.output(whole)
    lines = {line["step"]: line for line in runs.metrics(whole.parent / "run") if line["step"]}
    assert [step for step, line in lines.items() if "loss" not in line] == bad
    for step, line in lines.items():
        assert line["skipped_steps"] == sum(b <= step for b in bad)
    assert "NaN" not in (whole.parent / "run/metrics.jsonl").read_text()

    strict = runs.write_recipe(tmp_path / "strict", model, protein_data, **changes)
    assert runs.train(strict, 0, "max_bad_steps=1") == 2, runs.output(strict)
    saved = f"finetune-{bad[0]:06d}"
    assert "was not finite in 1 steps in a row" in _error_of(strict) and saved in _error_of(strict)
    assert (strict.parent / "run/checkpoints" / saved / "COMPLETE").exists()
    before = runs.losses(strict.parent / "run")
    assert runs.train(strict, 0, "max_bad_steps=1") == 2, "the same command ends again"
    assert runs.output(strict).count("was not finite in 1 steps in a row") == 2
    assert runs.losses(strict.parent / "run") == before
    assert runs.train(strict, 0) == 0, runs.output(strict)
    assert runs.losses(strict.parent / "run") == runs.losses(whole.parent / "run")


def test_lost_weights_are_never_saved(source_model, protein_data, tmp_path):
    """A learning rate that throws the weights away in a step whose gradient was finite."""
    short = {**runs.STAGE, "save_steps": 1, "max_grad_norm": 0}
    stages = [
        {"kind": "translate", "max_steps": 2, "learning_rate": 0.01, **short},
        {"kind": "finetune", "max_steps": 20, "learning_rate": 1e30, **short},
    ]
    recipe = runs.write_recipe(tmp_path, source_model, protein_data, stages=stages)
    assert runs.train(recipe, 2) == 2, runs.output(recipe)
    last = tmp_path / "run/checkpoints/translate-000002"
    assert "the model has diverged: after step 1 no row has finite logits" in _error_of(recipe)
    assert f"the last good checkpoint is {last};" in _error_of(recipe)
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert saved == ["translate-000001", "translate-000002"]
    assert runs.status(tmp_path / "run")["state"] == "failed"
    assert not (tmp_path / "run" / MODEL_DIR).exists()
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_cost_that_is_lost_is_the_users_error(source_model, protein_data, tmp_path):
    """One line of one rank, with what to do; the first step's C is not saved."""
    short = {**runs.STAGE, "learning_rate": 1e39, "warmup_ratio": 0.0}
    stages = [{"kind": "translate", "max_steps": 4, **short}]
    recipe = runs.write_recipe(tmp_path, source_model, protein_data, stages=stages)
    assert runs.train(recipe, 2) == 2, runs.output(recipe)
    error = _error_of(recipe)
    assert error.startswith("error: stage translate: cost holds NaN or infinite entries"), error
    assert error.endswith("lower learning_rate (1e+39) in a new output_dir"), error
    assert "Traceback" not in runs.output(recipe)
    assert not list((tmp_path / "run/checkpoints").glob("*"))


def test_a_stage_that_learned_nothing_is_said_at_the_end(source_model, protein_data, tmp_path):
    """The run is done, and says that its result is no better than its start."""
    stages = [{"kind": "translate", **runs.STAGE, "max_steps": 4, "learning_rate": 0}]
    recipe = runs.write_recipe(tmp_path, source_model, protein_data, stages=stages)
    assert runs.train(recipe, 2) == 0, runs.output(recipe)
    line = "stage translate learned nothing: it never got below the "
    assert runs.output(recipe).count(line) == 1
    (warning,) = runs.status(tmp_path / "run")["warnings"]
    assert warning.startswith(line) and "change learning_rate (0)" in warning
