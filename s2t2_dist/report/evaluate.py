"""`s2t2 evaluate`: evaluate a Hugging Face folder on a split, in one process, without DeepSpeed."""

import math
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM

from s2t2_dist.data.evaluate import Evaluation, evaluate
from s2t2_dist.data.shards import ShardReader, require_tokenizer
from s2t2_dist.errors import ArtifactError, DataError
from s2t2_dist.lm.folder import WeightFiles


def score(
    model_dir: Path,
    data_dir: Path,
    split: str,
    batch_size: int,
    dtype: str | None = None,
    document_mask: bool = False,
) -> Evaluation:
    """Evaluate a model folder on every row of a split, on a GPU if there is one.

    Args:
        dtype: of weights and activations, `bfloat16` or `float32`; default: as stored.
        document_mask: keep the documents of a row apart, as the recipe's `data.document_mask`.

    Raises:
        ArtifactError: not a model folder, or its weights cannot be read, are missing or give
            logits that are not finite.
        DataError: the data were built with another tokenizer than the folder's.
    """
    if not (model_dir / "config.json").is_file():
        raise ArtifactError(
            f"{model_dir} is not a Hugging Face model folder (no config.json in it); give the "
            "folder of a model"
        )
    WeightFiles(model_dir).check()
    reader = ShardReader(data_dir, split)
    require_tokenizer(reader.metadata, model_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = "auto" if dtype is None else getattr(torch, dtype)
    lm = AutoModelForCausalLM.from_pretrained(model_dir, dtype=wanted, trust_remote_code=False)
    lm = lm.to(device).eval()
    rows = len(lm.get_input_embeddings().weight)
    if reader.metadata["vocab_size"] > rows:
        raise DataError(
            f"{data_dir} holds token ids up to {reader.metadata['vocab_size'] - 1}, but "
            f"the embedding of {model_dir} has {rows} rows; build the data for "
            "this model"
        )
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(f"Evaluating {split}", total=len(reader))

        def logits(
            input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor | None = None
        ) -> torch.Tensor:
            progress.advance(task, len(input_ids_BT))
            return lm(input_ids_BT, position_ids=position_ids_BT, use_cache=False).logits

        found = evaluate(logits, reader, batch_size, device, document_mask=document_mask)
    if not math.isfinite(found.nats):
        raise ArtifactError(
            f"{model_dir} gives logits that are not finite; see which tensors with "
            f"s2t2 verify {model_dir}"
        )
    return found


def report(evaluation: Evaluation) -> str:
    """An evaluation as lines of text."""
    return (
        f"loss             {evaluation.loss:.6f} nats per token\n"
        f"perplexity       {evaluation.perplexity:.4f} per token\n"
        f"bits per byte    {evaluation.bits_per_byte:.6f}\n"
        f"tokens per byte  {evaluation.tokens / evaluation.bytes:.4f} "
        f"({evaluation.tokens:,} tokens, {evaluation.bytes:,} bytes)"
    )
