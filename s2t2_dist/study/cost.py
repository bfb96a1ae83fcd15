"""What a finished run has cost: the columns by which runs are compared fairly.

Equal steps, equal bytes of text and equal operations are three comparisons; the author of a study
chooses `max_steps` for one of them, and these numbers say how far the others hold.
"""

from dataclasses import dataclass

import numpy as np
import torch

from s2t2_dist.comm import Comm
from s2t2_dist.config import Translate
from s2t2_dist.data.order import rows_at
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.lm.folder import WeightFiles, local_folder
from s2t2_dist.lm.sizes import count_weights, plan_count
from s2t2_dist.report.runs import FinishedRun
from s2t2_dist.training.context import Context
from s2t2_dist.training.usage import Usage


@dataclass(frozen=True)
class Cost:
    """Of all stages of a run together.

    Attributes:
        tokens: rows times tokens of a row.
        text_bytes: bytes of the text of those rows; text that is read twice counts twice.
        flops: floating-point operations of the steps: the model's (see `usage.token_flops`) and the
            products of P with E and L. The solver's comparisons and evaluations do not count.
        seconds: of the optimizer steps, without evaluations, checkpoints and the start.
    """

    steps: int
    tokens: int
    text_bytes: int
    flops: float
    seconds: float


def cost_of(run: FinishedRun) -> Cost:
    """Count what a run's stages did. Every stage of a run goes on in one order of the rows."""
    recipe, reader = run.recipe, ShardReader(run.recipe.data.path, "train")
    context = Context(recipe, run.path, Comm(), torch.device("cpu"), {}, reader, reader)
    rows, flops = 0, 0.0
    for stage in recipe.stages:
        rows += stage.max_steps * stage.train_batch_size
        tokens = stage.max_steps * stage.train_batch_size * reader.context
        flops += Usage(context, stage).flops * tokens
        if isinstance(stage, Translate):
            flops += stage.max_steps * translator_flops(run, stage)
    return Cost(
        steps=sum(stage.max_steps for stage in recipe.stages),
        tokens=rows * reader.context,
        text_bytes=text_bytes(reader, rows, recipe.seed),
        flops=flops,
        seconds=sum(line.get("step_seconds", 0.0) for line in run.metrics),
    )


def translator_flops(run: FinishedRun, stage: Translate) -> float:
    """Of one step: Y = P^T X forward and dP = X dY^T backward, 2 V U K each.

    X (V, K) is E and L side by side, or one of them where a tied model needs one only: see
    `ot.weights.translated_rows`.
    """
    weights, plan = WeightFiles(local_folder(run.recipe.model)), run.translation_of(stage)
    rows, columns = plan.embed_plan.shape
    width = count_weights(weights.config).width
    factor = stage.embed_scale == "convex" or len(plan.source_marginal.unique()) == 1
    one = weights.vocabulary.tied and factor and plan_count(stage) == 1
    return 4.0 * rows * columns * width * (1 if one else 2)


def text_bytes(reader: ShardReader, rows: int, seed: int) -> int:
    """Bytes of text in the first rows of the training order; whole epochs are the whole split."""
    epochs, rest = divmod(rows, len(reader))
    total = epochs * reader.metadata["splits"][reader.split]["bytes"]
    positions = np.arange(rows - rest, rows)
    for row in rows_at(positions, len(reader), seed):
        total += int(reader.token_bytes[reader[row][: reader.length(row)]].sum())
    return total
