"""Bits per byte on two halves of the validation documents, by one pass over the rows.

A learning rate is chosen on the half `select`, and what it reaches is reported on the half
`report`. A document is known by its number in the split, which does not depend on the tokenizer, so
the halves of two vocabularies are the same text. That is checked: `text_sha256`.

Shapes: B rows of a batch, T tokens of a row.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from s2t2_dist.data.batches import IGNORE_LABEL, load_batch
from s2t2_dist.data.evaluate import Evaluation
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.errors import DataError

HALVES = ("select", "report")
RULE = (
    "document number d of the validation split (from 0) is in the half `select` if the first byte "
    "of the sha256 of d in decimal digits is even, else in `report`"
)


def half_of(document: int) -> int:
    """The half of a document: 0 select, 1 report. A pure function of its number."""
    return hashlib.sha256(str(document).encode()).digest()[0] % 2


@dataclass(frozen=True)
class Halves:
    """The halves of a split.

    Attributes:
        reader: of the split.
        first: (rows,) int64: documents that start before each row.
        documents: documents of the split.
    """

    reader: ShardReader
    first: np.ndarray
    documents: int

    @classmethod
    def of(cls, reader: ShardReader) -> "Halves":
        """Number a split's documents.

        Raises:
            DataError: the rows hold another number of documents than the manifest says, or a half
                would be empty.
        """
        starts = [len(reader.document_starts(row)) for row in range(len(reader))]
        ends = np.cumsum(starts, dtype=np.int64)
        documents = int(ends[-1]) if starts else 0
        stated = reader.metadata["splits"][reader.split]["documents"]
        if documents != stated:
            raise DataError(
                f"{reader.directory}: {documents} documents start in the rows of {reader.split}, "
                f"but the manifest says {stated}; build the data again"
            )
        halves = cls(reader, ends - np.array(starts, dtype=np.int64), documents)
        for name, number in zip(HALVES, halves.counts, strict=True):
            if not number:
                raise DataError(
                    f"{reader.directory}: no document of the {documents} in {reader.split} is in "
                    f"the half {name}; hold out more documents"
                )
        return halves

    @cached_property
    def half(self) -> np.ndarray:
        """(documents,) int64: the half of each."""
        return np.array([half_of(number) for number in range(self.documents)], dtype=np.int64)

    @property
    def counts(self) -> list[int]:
        """Documents of each half."""
        return np.bincount(self.half, minlength=len(HALVES)).tolist()

    def documents_of(self, row: int) -> np.ndarray:
        """(T,) int64: the document of each token of a row; of padding, the last one's."""
        starts = self.reader.document_starts(row)
        at = np.arange(self.reader.context)
        return self.first[row] + np.searchsorted(starts, at, side="right") - 1

    @cached_property
    def text_bytes(self) -> np.ndarray:
        """(documents,) int64: bytes of text of each document."""
        total = np.zeros(self.documents, dtype=np.int64)
        for row in range(len(self.reader)):
            length = self.reader.length(row)
            held = self.reader.token_bytes[self.reader[row][:length]]
            np.add.at(total, self.documents_of(row)[:length], held)
        return total

    @property
    def text_sha256(self) -> str:
        """Of the documents' lengths in bytes: equal for every tokenizer of the same text."""
        return hashlib.sha256(self.text_bytes.astype("<i8").tobytes()).hexdigest()


def evaluate_halves(
    logits: Callable[..., torch.Tensor],
    halves: Halves,
    batch_size: int,
    device: torch.device,
    document_mask: bool = False,
) -> list[Evaluation]:
    """Evaluate every row once; each predicted token counts in the half of its document.

    Together they are what `data.evaluate.evaluate` gives: the same tokens and bytes, and its nats
    up to rounding.

    Args:
        logits: as for `data.evaluate.evaluate`.
        batch_size: rows per pass.
    """
    reader = halves.reader
    sums = np.zeros((len(HALVES), 3))
    for start in range(0, len(reader), batch_size):
        rows = range(start, min(start + batch_size, len(reader)))
        batch = load_batch(reader, rows, document_mask)
        inputs = [batch.input_ids, batch.position_ids][: 1 + document_mask]
        with torch.no_grad():
            outputs = logits(*(tensor.to(device) for tensor in inputs))
            nats = _nats(outputs, batch.labels.to(device)).cpu().numpy()
        labels = batch.labels[:, 1:].numpy()
        half = halves.half[np.stack([halves.documents_of(row)[1:] for row in rows])]
        for number in range(len(HALVES)):
            here = (labels != IGNORE_LABEL) & (half == number)
            covered = reader.token_bytes[labels[here]].sum()
            sums[number] += (nats[here].sum(), here.sum(), covered)
    return [Evaluation(float(n), int(tokens), int(covered)) for n, tokens, covered in sums]


def _nats(logits_BTU: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """(B, T - 1) float64: cross entropy of predicting labels[:, t + 1]; 0 where it is ignored."""
    losses = torch.nn.functional.cross_entropy(
        logits_BTU[:, :-1].float().transpose(1, 2),
        labels_BT[:, 1:],
        ignore_index=IGNORE_LABEL,
        reduction="none",
    )
    return losses.double()
