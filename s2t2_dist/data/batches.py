"""Rows as batches for a causal LM; the shards themselves are `shards`, their order is `order`.

Shape letters: B rows of a batch, T tokens of a row.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from s2t2_dist.data.shards import ShardReader

IGNORE_LABEL = -100

Item = TypeVar("Item")


@dataclass(frozen=True)
class Batch:
    """Rows ready for a causal LM.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64, equal to `input_ids` but -100 at padding; not shifted.
        position_ids: (B, T) int64, counting from each document's start, or None: from each row's.
            transformers masks attention between documents where positions start again, but only
            with `use_cache=False`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        moved = (t if t is None else t.to(device) for t in (self.labels, self.position_ids))
        return Batch(self.input_ids.to(device), *moved)

    @property
    def predicted(self) -> int:
        """Positions that enter the loss: labels after the shift that are not padding."""
        return int((self.labels[:, 1:] != IGNORE_LABEL).sum())


def load_batch(
    reader: ShardReader, rows: Sequence[int] | np.ndarray, document_mask: bool = False
) -> Batch:
    """Read rows (B of them) into tensors.

    Args:
        document_mask: keep the documents of a row apart: positions count from each start, and a
            document's first token is not predicted from the document before it.
    """
    input_ids = torch.from_numpy(np.stack([reader[row] for row in rows]).astype(np.int64))
    labels = input_ids.clone()
    for i, row in enumerate(rows):
        labels[i, reader.length(row) :] = IGNORE_LABEL
    if not document_mask:
        return Batch(input_ids, labels)
    position_ids = np.tile(np.arange(reader.context), (len(rows), 1))
    for i, row in enumerate(rows):
        for start in reader.document_starts(row):
            position_ids[i, start:] -= position_ids[i, start]
            labels[i, start] = IGNORE_LABEL
    return Batch(input_ids, labels, torch.from_numpy(position_ids))


def count_predicted(
    reader: ShardReader, rows: Sequence[int] | np.ndarray, document_mask: bool = False
) -> int:
    """`Batch.predicted` of these rows, without reading their tokens."""
    count = sum(reader.length(row) - 1 for row in rows)
    if document_mask:
        count -= sum(int(np.count_nonzero(reader.document_starts(row))) for row in rows)
    return count


def read_ahead(read: Callable[[int], Item], steps: range, ahead: int = 2) -> Iterator[Item]:
    """`read(step)` for each step, by a thread that stays so many ahead; an error comes in its turn.

    Close the iterator (or let it go) to end the thread.
    """
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        pending = deque(thread.submit(read, step) for step in steps[:ahead])
        for following in range(ahead, ahead + len(steps)):
            item = pending.popleft().result()
            if following < len(steps):
                pending.append(thread.submit(read, steps[following]))
            yield item
