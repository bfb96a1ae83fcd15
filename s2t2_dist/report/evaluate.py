"""`s2t2 evaluate`: evaluate a Hugging Face folder on a split, in one process, without DeepSpeed."""

import math
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM, PreTrainedModel

from s2t2_dist.data.evaluate import Evaluation, evaluate
from s2t2_dist.data.shards import ShardReader, require_tokenizer
from s2t2_dist.errors import ArtifactError, DataError
from s2t2_dist.lm.folder import WeightFiles


def load(
    model_dir: Path, data_dir: Path, split: str, dtype: str | None = None
) -> tuple[PreTrainedModel, ShardReader]:
    """A model folder, on a GPU if there is one, and the split that it is evaluated on.

    Args:
        dtype: of weights and activations, `bfloat16` or `float32`; default: as stored.

    Raises:
        ArtifactError: not a model folder, or its weights cannot be read or are missing.
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
    rows = len(lm.get_input_embeddings().weight)
    if reader.metadata["vocab_size"] > rows:
        raise DataError(
            f"{data_dir} holds token ids up to {reader.metadata['vocab_size'] - 1}, but "
            f"the embedding of {model_dir} has {rows} rows; build the data for "
            "this model"
        )
    return lm.to(device).eval(), reader


def evaluate_all(
    lm: PreTrainedModel, reader: ShardReader, batch_size: int, document_mask: bool = False
) -> Evaluation:
    """Evaluate a model on every row of a split.

    Args:
        document_mask: keep the documents of a row apart, as the recipe's `data.document_mask`.

    Raises:
        ArtifactError: its logits are not finite.
    """
    with progress_bar() as progress:
        task = progress.add_task(f"Evaluating {reader.split}", total=len(reader))

        def logits(
            input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor | None = None
        ) -> torch.Tensor:
            progress.advance(task, len(input_ids_BT))
            return lm(input_ids_BT, position_ids=position_ids_BT, use_cache=False).logits

        found = evaluate(logits, reader, batch_size, lm.device, document_mask=document_mask)
    if not math.isfinite(found.nats):
        raise ArtifactError(
            f"{lm.name_or_path} gives logits that are not finite; see which tensors with "
            f"s2t2 verify {lm.name_or_path}"
        )
    return found


def progress_bar() -> Progress:
    """On stderr, if that is a terminal."""
    console = Console(stderr=True)
    return Progress(console=console, disable=not console.is_terminal, transient=True)


def score(
    model_dir: Path,
    data_dir: Path,
    split: str,
    batch_size: int,
    dtype: str | None = None,
    document_mask: bool = False,
) -> Evaluation:
    """Evaluate a model folder on every row of a split; see `load` and `evaluate_all`."""
    lm, reader = load(model_dir, data_dir, split, dtype)
    return evaluate_all(lm, reader, batch_size, document_mask)


def report(evaluation: Evaluation) -> str:
    """An evaluation as lines of text."""
    return (
        f"loss             {evaluation.loss:.6f} nats per token\n"
        f"perplexity       {evaluation.perplexity:.4f} per token\n"
        f"bits per byte    {evaluation.bits_per_byte:.6f}\n"
        f"tokens per byte  {evaluation.tokens / evaluation.bytes:.4f} "
        f"({evaluation.tokens:,} tokens, {evaluation.bytes:,} bytes)"
    )
