"""Run directories in the format that the trainer leaves, made without training."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from s2t2_dist import artifacts
from s2t2_dist.comm import Comm
from s2t2_dist.config import Recipe, recipe_values
from s2t2_dist.data.evaluate import Evaluation, evaluate
from s2t2_dist.data.shards import ShardReader, tokenizer_sha256
from s2t2_dist.lm.inputs import inputs_of
from s2t2_dist.lm.result import special_ids, write_model
from s2t2_dist.lm.translation import fold_translation, save_translation
from s2t2_dist.run import identity
from s2t2_dist.run.identity import DEEPSPEED
from tests.ot.problems import csr_tiles

ROWS = 400
BATCH = 8
TRANSLATE = {"kind": "translate", "max_steps": 10, "train_batch_size": BATCH}
FINETUNE = {"kind": "finetune", "max_steps": 5, "train_batch_size": BATCH}


def make_recipe(run_dir: Path, model: Path, data: Path, stages: list[dict]) -> Recipe:
    values = {
        "output_dir": run_dir,
        "model": {"model_name_or_path": str(model), "dtype": "float32"},
        "data": {"path": data},
        "deepspeed": "ds_configs/cpu.json",
        "stages": [{"per_device_train_batch_size": BATCH, **stage} for stage in stages],
    }
    return Recipe.model_validate(values)


def write_run(recipe: Recipe, lines: list[dict], state: str = "done", **more: object) -> Path:
    """config.yaml, inputs.json, status.json and metrics.jsonl."""
    run_dir = recipe.output_dir
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(recipe_values(recipe), sort_keys=False))
    artifacts.write_json(run_dir / "status.json", {"state": state, **more})
    settings = {DEEPSPEED: identity.of_value({}, recipe.deepspeed)}
    identity.write(run_dir, identity.identify(inputs_of(recipe), {}, Comm()) | settings)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run_dir


def metrics_line(index: int, step: int, loss: float | None, evaluation: Evaluation | None) -> dict:
    line = {"stage": f"stage{index}", "stage_index": index, "step": step, "time": 0.0}
    if loss is not None:
        line |= {"loss": loss, "learning_rate": 1e-3}
    return line | (evaluation.metrics() if evaluation else {})


def random_plan(rows: int, columns: int, density: float = 0.3) -> torch.Tensor:
    """A sparse plan of mass 1; columns 1 and 2 (padding and unknown) are equal."""
    torch.manual_seed(3)
    plan = torch.rand(rows, columns) * (torch.rand(rows, columns) < density)
    plan[0] += 0.1
    plan[:, 2] = plan[:, 1]
    return plan / plan.sum()


def record_of(recipe: Recipe, stage: int, evaluation: Evaluation) -> dict:
    return {
        "recipe": recipe_values(recipe),
        "evaluation": asdict(evaluation),
        "stage": recipe.stages[stage].name,
        "s2t2_dist": "0.1.0",
    }


def write_plan(
    recipe: Recipe, plan: torch.Tensor, evaluation: Evaluation, head: torch.Tensor | None = None
) -> Path:
    """The run's translation/: one plan, or one for E and another for L."""
    rows, columns = plan.shape
    plans = {"plan": plan} if head is None else {"embed": plan, "head": head}
    model = Path(recipe.model.model_name_or_path)
    metadata = ShardReader(recipe.data.path, "train").metadata
    save_translation(
        recipe.output_dir / "translation",
        Comm(),
        plans={name: csr_tiles(dense) for name, dense in plans.items()},
        source_token_ids=torch.arange(rows),
        source_marginal=torch.full((rows,), 1 / rows),
        target_marginal=torch.full((columns,), 1 / columns),
        source_tokenizer_sha256=tokenizer_sha256(model),
        target_tokenizer_sha256=metadata["tokenizer_sha256"],
        embed_scale="paper",
        vocab_size=rows,
        info=record_of(recipe, 0, evaluation),
    )
    return recipe.output_dir / "translation"


def evaluate_folder(model: Path, data: Path) -> Evaluation:
    lm = AutoModelForCausalLM.from_pretrained(model).eval()
    reader = ShardReader(data, "validation")
    return evaluate(lambda ids: lm(ids).logits, reader, 64, torch.device("cpu"))


def make_exportable_run(run_dir: Path, model: Path, data: Path, finetuned: bool) -> Path:
    """A run that can be exported: its plan, and its model/ if it goes on to finetune."""
    recipe = make_recipe(run_dir, model, data, [TRANSLATE, FINETUNE][: 1 + finetuned])
    write_run(recipe, [])
    metadata = ShardReader(data, "train").metadata
    plan = random_plan(ROWS, metadata["vocab_size"])
    translation = write_plan(recipe, plan, Evaluation(1.0, 1, 1))
    folded = run_dir / "folded"
    folded.mkdir()
    fold_translation(translation, model, folded, metadata)
    evaluation = evaluate_folder(folded, data)
    if finetuned:
        weights = load_file(folded / "model.safetensors")
        ids = special_ids(metadata)
        record = record_of(recipe, 1, evaluation)
        write_model(run_dir / "model", weights, folded, data, ids, record)
    else:
        shutil.rmtree(translation)
        write_plan(recipe, plan, evaluation)
    return run_dir
