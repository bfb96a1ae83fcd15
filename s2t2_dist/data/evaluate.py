"""Perplexity and bits per byte, exact whatever the number of ranks.

A row's first token is not predicted and its bytes do not count; special tokens cover 0 bytes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from s2t2_dist.comm import Comm
from s2t2_dist.data.batches import IGNORE_LABEL, Batch, load_batch
from s2t2_dist.data.shards import ShardReader


@dataclass(frozen=True)
class Evaluation:
    """Sums over a whole split: nats of all predicted tokens, their number, their bytes of text."""

    nats: float
    tokens: int
    bytes: int

    @property
    def loss(self) -> float:
        """Mean cross entropy in nats per predicted token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Nats over (ln 2 * bytes): comparable between tokenizers (paper, section 3)."""
        return self.nats / (math.log(2) * self.bytes)

    def metrics(self) -> dict[str, float]:
        """The metrics of one evaluation, by the names that `metrics.jsonl` uses."""
        return {
            "eval_loss": self.loss,
            "eval_perplexity": self.perplexity,
            "eval_bits_per_byte": self.bits_per_byte,
        }


def sum_of_nats(logits_BTU: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy of predicting labels[:, t + 1] from logits[:, t], in float32."""
    flat = logits_BTU[:, :-1].float().reshape(-1, logits_BTU.shape[-1])
    labels = labels_BT[:, 1:].reshape(-1)
    return torch.nn.functional.cross_entropy(
        flat, labels, ignore_index=IGNORE_LABEL, reduction="sum"
    )


def evaluate(
    logits: Callable[..., torch.Tensor],
    reader: ShardReader,
    batch_size: int,
    device: torch.device,
    comm: Comm | None = None,
    document_mask: bool = False,
) -> Evaluation:
    """Evaluate on every row of a split. A collective: every rank runs the same number of passes.

    Args:
        logits: maps input ids (B, T) on `device`, and position ids where `document_mask` is set, to
            next-token logits (B, T, U).
        batch_size: rows per pass and rank.
        document_mask: as for `load_batch`; first tokens of documents do not count then.
    """
    comm = comm or Comm()
    sums = torch.zeros(3, dtype=torch.float64)
    per_pass = batch_size * comm.size
    for start in range(0, len(reader), per_pass):
        first = start + comm.rank * batch_size
        rows = list(range(first, min(first + batch_size, len(reader))))
        # A rank that has run out of rows still takes part in the partitioned forward pass.
        batch = load_batch(reader, rows or [0], document_mask)
        inputs = [batch.input_ids, batch.position_ids][: 1 + document_mask]
        with torch.no_grad():
            outputs = logits(*(tensor.to(device) for tensor in inputs))
            nats = sum_of_nats(outputs, batch.labels.to(device))
        if rows:
            sums += torch.tensor([float(nats), batch.predicted, _predicted_bytes(batch, reader)])
    total = comm.sum_(sums.to(device)).tolist()
    return Evaluation(nats=total[0], tokens=int(total[1]), bytes=int(total[2]))


def gives_finite_logits(
    logits: Callable[[torch.Tensor], torch.Tensor],
    reader: ShardReader,
    batch_size: int,
    device: torch.device,
    comm: Comm,
) -> bool:
    """Whether any row of one pass over a split has finite logits; if none has, the model diverged.

    Some rows may overflow without that. A collective; arguments as `evaluate`.
    """
    rows = np.arange(comm.rank * batch_size, (comm.rank + 1) * batch_size) % len(reader)
    with torch.no_grad():
        found = logits(load_batch(reader, rows).input_ids.to(device))
    finite = found.isfinite().all(2).all(1).any()
    return bool(comm.max_(finite.int()[None]))


def _predicted_bytes(batch: Batch, reader: ShardReader) -> int:
    labels = batch.labels[:, 1:]
    return int(reader.token_bytes[labels[labels != IGNORE_LABEL].numpy()].sum())
