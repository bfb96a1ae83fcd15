import dataclasses
import json

import torch

from s2t2_dist.training.samples import NEW, PROMPT, sample


class Cycling:
    """A model that is sure that the next token is one more than the last."""

    def __init__(self, vocabulary):
        self.vocabulary, self.shapes = vocabulary, []

    def logits(self, ids, position_ids=None):
        self.shapes.append(tuple(ids.shape))
        following = (ids + 1) % self.vocabulary
        return 1e4 * torch.nn.functional.one_hot(following, self.vocabulary)


def test_rows_are_continued_and_a_step_is_written_once(context, capsys):
    context.run_dir.mkdir(parents=True)
    stage = context.recipe.stages[1].model_copy(update={"samples": 3})
    runner = Cycling(context.train.metadata["vocab_size"])
    new = min(NEW, context.train.context - PROMPT)
    for step in (5, 10, 10):  # the last one again, as after a kill
        sample(runner, context, stage, step)
    assert len(runner.shapes) == 3 * new and runner.shapes[0] == (3, PROMPT)
    lines = [
        json.loads(line) for line in (context.run_dir / "samples.jsonl").read_text().splitlines()
    ]
    assert [(line["stage"], line["step"]) for line in lines] == [("finetune", 5)] * 3 + [
        ("finetune", 10)
    ] * 3
    assert all(line["text"].startswith(line["prompt"]) for line in lines)
    assert all(len(line["text"]) > len(line["prompt"]) for line in lines)
    assert capsys.readouterr().out.count("[finetune 10] ") == 6


def test_none_by_default(context):
    stage = context.recipe.stages[0]
    assert stage.samples == 0
    sample(None, context, stage, 5)
    assert not context.run_dir.exists()


def test_many_rows_are_several_passes_and_any_seed_will_do(context):
    context.run_dir.mkdir(parents=True)
    changes = {"samples": 5, "per_device_eval_batch_size": 2}
    stage = context.recipe.stages[1].model_copy(update=changes)
    recipe = context.recipe.model_copy(update={"seed": 2**63 - 1})
    context = dataclasses.replace(context, recipe=recipe)
    runner = Cycling(context.train.metadata["vocab_size"])
    sample(runner, context, stage, 5)
    rows = {shape[0] for shape in runner.shapes}
    assert rows == {1, 2} and len((context.run_dir / "samples.jsonl").read_text().splitlines()) == 5


def test_a_damaged_file_ends_no_run(context, caplog):
    (context.run_dir / "samples.jsonl").mkdir(parents=True)
    stage = context.recipe.stages[1].model_copy(update={"samples": 1})
    sample(Cycling(context.train.metadata["vocab_size"]), context, stage, 5)
    assert "samples.jsonl is not written" in caplog.text
