"""Text that the model writes at an evaluation: `samples.jsonl`, and a line each in the log."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

from s2t2_dist.config import Stage
from s2t2_dist.data.batches import load_batch
from s2t2_dist.data.shards import TOKENIZER_DIR, TOKENIZER_JSON
from s2t2_dist.run.tracking import SAMPLES
from s2t2_dist.training.context import Context, StageRunner

PROMPT, NEW = 16, 48  # tokens of a validation row, and those that follow


def sample(runner: StageRunner, context: Context, stage: Stage, step: int) -> None:
    """Continue `stage.samples` rows of the validation split. A collective.

    Every rank runs the same passes; rank 0 writes. Tokens are drawn at temperature 1 from a
    generator of this step, so that a resumed run draws the same.
    """
    count = min(stage.samples, len(context.validation))
    if not count:
        return
    random = torch.Generator().manual_seed(context.recipe.seed * 1_000_003 + step)
    prompts = load_batch(context.validation, range(count)).input_ids[:, :PROMPT]
    ids = prompts
    for _ in range(min(NEW, context.train.context - ids.shape[1])):
        with torch.no_grad():
            logits = runner.logits(ids.to(context.device))[:, -1].float().cpu()
        drawn = torch.multinomial(logits.nan_to_num().softmax(1), 1, generator=random)
        ids = torch.cat((ids, drawn), 1)
    if context.comm.rank == 0:
        tokenizer = Tokenizer.from_file(
            str(context.train.directory / TOKENIZER_DIR / TOKENIZER_JSON)
        )
        texts = [
            {"prompt": tokenizer.decode(row[: prompts.shape[1]].tolist()), "text": text}
            for row, text in zip(ids, tokenizer.decode_batch(ids.tolist()), strict=True)
        ]
        _write(context.run_dir / SAMPLES, stage.name, step, texts)
        for made in texts:
            print(f"[{stage.name} {step}] {made['text']}", flush=True)


def _write(path: Path, stage: str, step: int, texts: list[dict]) -> None:
    """Add lines; those of the same step, from before a kill, are replaced."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if (line["stage"], line["step"]) != (stage, step)]
    lines += [{"stage": stage, "step": step, **made} for made in texts]
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
    temporary.replace(path)
