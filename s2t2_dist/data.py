"""Rows as batches for a causal LM, and the order in which rows are trained on.

The order is a pure function of (seed, position), so it does not depend on the world size, and a
position is all that a resume needs. The shards themselves are `s2t2_dist.shards`.

Shape letters: B rows of a batch, T tokens of a row.
"""

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from s2t2_dist.shards import TOKENIZER_DIR, ShardReader, require_tokenizer, tokenizer_sha256

__all__ = [
    "IGNORE_LABEL",
    "TOKENIZER_DIR",
    "Batch",
    "ShardReader",
    "count_predicted",
    "load_batch",
    "prefetched",
    "require_tokenizer",
    "row_at",
    "rows_at",
    "tokenizer_sha256",
]

IGNORE_LABEL = -100

Item = TypeVar("Item")

# Measured: 6 rounds leave a bias of 5% in the first row of a 7-row epoch, 8 none above 1%.
FEISTEL_ROUNDS = 12


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


def prefetched(items: Iterable[Item], ahead: int = 2) -> Iterator[Item]:
    """The same items, made by a thread that stays so many ahead; an error comes in its turn.

    Close the iterator (or let it go) to end the thread.
    """
    ready: queue.Queue = queue.Queue(ahead)
    closed = threading.Event()

    def put(entry: tuple) -> bool:
        while not closed.is_set():
            try:
                ready.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def make() -> None:
        try:
            for item in items:
                if not put((item, None, False)):
                    return
            put((None, None, True))
        except BaseException as error:
            put((None, error, True))

    threading.Thread(target=make, name="prefetch", daemon=True).start()
    try:
        while True:
            item, error, last = ready.get()
            if error is not None:
                raise error
            if last:
                return
            yield item
    finally:
        closed.set()


def row_at(position: int, rows: int, seed: int) -> int:
    """The row at one position of the endless training order: see `rows_at`."""
    return int(rows_at(np.array([position]), rows, seed)[0])


def rows_at(positions: np.ndarray, rows: int, seed: int) -> np.ndarray:
    """Rows at these positions of the endless training order, a pure function of its arguments.

    Epoch e covers the positions [e * rows, (e + 1) * rows) and visits every row once, in an order
    of its own. The permutation is a keyed Feistel network over the smallest 2^(2h) >= rows, walked
    until it falls below `rows` (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002),
    so it needs no memory for the rows.

    Args:
        positions: int64, any shape, not negative.

    Returns:
        int64 rows in [0, rows), of the same shape.
    """
    positions = np.asarray(positions, dtype=np.int64)
    assert rows > 0 and positions.min(initial=0) >= 0
    half = max(1, -(-(rows - 1).bit_length() // 2))
    epoch, offset = np.divmod(positions.reshape(-1), rows)
    key = _mix(_mix(np.full_like(epoch, seed).astype(np.uint64)) + epoch.astype(np.uint64))
    value = _feistel(offset.astype(np.uint64), key, half)
    while (outside := value >= rows).any():
        value[outside] = _feistel(value[outside], key[outside], half)
    return value.astype(np.int64).reshape(positions.shape)


def _feistel(value: np.ndarray, key: np.ndarray, half: int) -> np.ndarray:
    """A permutation of [0, 2^(2 half)) for each key; uint64 arrays of one shape."""
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> shift, value & mask
    for number in range(FEISTEL_ROUNDS):
        subkey = _mix(key + np.uint64(number + 1))
        left, right = right, left ^ (_mix(right ^ subkey) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea and Flood, 2014); wraps around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
