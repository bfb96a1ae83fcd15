"""Text that the model writes at an evaluation: `samples.jsonl`, and a line each in the log."""

import json
import logging
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from s2t2_dist import artifacts
from s2t2_dist.config import Stage
from s2t2_dist.data.batches import load_batch
from s2t2_dist.data.shards import TOKENIZER_DIR, TOKENIZER_JSON
from s2t2_dist.run.tracking import SAMPLES
from s2t2_dist.training.context import Context, StageRunner

_log = logging.getLogger(__name__)

PROMPT, NEW = 16, 48  # tokens of a validation row, and those that follow


def sample(runner: StageRunner, context: Context, stage: Stage, step: int) -> None:
    """Continue `stage.samples` rows of the validation split. A collective.

    Every rank runs the same passes; rank 0 writes. Tokens are drawn at temperature 1 from a
    generator of this step, so that a resumed run draws the same.
    """
    count = min(stage.samples, len(context.validation))
    if not count:
        return
    words = np.random.SeedSequence([context.recipe.seed, step]).generate_state(1, np.uint64)
    random = torch.Generator().manual_seed(int(words[0]))
    rows = range(0, count, stage.per_device_eval_batch_size)
    last = (min(first + stage.per_device_eval_batch_size, count) for first in rows)
    ids = [
        _continued(runner, context, range(first, end), random)
        for first, end in zip(rows, last, strict=True)
    ]
    if context.comm.rank != 0:
        return
    folder = context.train.directory / TOKENIZER_DIR
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_JSON))
    texts = [
        {"prompt": tokenizer.decode(row[:PROMPT]), "text": tokenizer.decode(row)}
        for part in ids
        for row in part.tolist()
    ]
    for made in texts:
        print(f"[{stage.name} {step}] {made['text']!r}", flush=True)
    try:
        _write(context.run_dir / SAMPLES, stage.name, step, texts)
    except (OSError, ValueError, KeyError, TypeError) as error:  # an extra, which ends no run
        _log.warning("%s is not written: %s", context.run_dir / SAMPLES, error)


@torch.no_grad()
def _continued(
    runner: StageRunner, context: Context, rows: range, random: torch.Generator
) -> torch.Tensor:
    """The rows' first PROMPT tokens and NEW more, (rows, tokens), on the CPU."""
    ids = load_batch(context.validation, rows).input_ids[:, :PROMPT]
    for _ in range(min(NEW, context.train.context - ids.shape[1])):
        logits = runner.logits(ids.to(context.device))[:, -1].float().cpu()
        drawn = torch.multinomial(logits.nan_to_num().softmax(1), 1, generator=random)
        ids = torch.cat((ids, drawn), 1)
    return ids


def _write(path: Path, stage: str, step: int, texts: list[dict]) -> None:
    """Add lines; those of the same step, from before a kill, are replaced."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if (line["stage"], line["step"]) != (stage, step)]
    lines += [{"stage": stage, "step": step, **made} for made in texts]
    artifacts.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
