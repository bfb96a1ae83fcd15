"""Documents in the order of their keys -> rows of one length, in shards that are made in any order.

The keys are cut into windows; a window is what memory holds. Where each window's tokens fall in
the split is known before a token is packed, so every shard is a job of its own, and its bytes do
not depend on which process makes it, nor on how the input was cut into parts.

Ways to pack: `concatenate` lays the documents end to end and cuts every `context` tokens; only the
split's last row is short. `best-fit` cuts only documents that are longer than a row and fills each
row with pieces that fit (Ding et al. 2024, "Fewer truncations improve language modeling"), window
by window; rows end with padding.

Index letters: D documents of a window, R rows, N tokens of a window including padding.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from data_prep.parts import read_lengths, read_range, tokens_before
from s2t2_dist.data.shards import ROWS_PER_BATCH, ROWS_PER_SHARD

KEY_BITS = 64
# Tokens of a window, about: 32 or 64 MB.
WINDOW_TOKENS = 1 << 24

Packing = Literal["concatenate", "best-fit"]


class Packed(NamedTuple):
    """A stretch of a split's rows.

    Attributes:
        tokens_N: rows end to end; the stretch may begin or end inside a row.
        starts_D: positions in it at which a document starts, ascending.
        lengths_R: valid tokens of its rows; None where all are full.
    """

    tokens_N: np.ndarray
    starts_D: np.ndarray
    lengths_R: np.ndarray | None


@dataclass(frozen=True)
class SplitPlan:
    """Where the windows of a split fall.

    Attributes:
        edges: keys between which window w lies, from edges[w] to edges[w + 1], as Python integers.
        positions: tokens, padding of whole rows included, before window w; one more than windows.
        tokens: of all documents.
    """

    split: str
    context: int
    packing: Packing
    edges: list[int]
    positions: np.ndarray
    tokens: int

    @property
    def rows(self) -> int:
        """Rows of the split."""
        return -(-int(self.positions[-1]) // self.context)

    @property
    def shards(self) -> int:
        """Shard files of the split."""
        return -(-self.rows // ROWS_PER_SHARD)

    def shard_rows(self, shard: int) -> tuple[int, int]:
        """The first row of a shard, and the first after it."""
        return shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, self.rows)


def plan_split(
    parts: Sequence[Path],
    split: str,
    context: int,
    packing: Packing,
    map_windows: Callable[[list[tuple]], Iterable[int]],
) -> SplitPlan:
    """Lay a split out from the parts' indexes; no token is read.

    Args:
        map_windows: `window_rows` over a list of its arguments, in their order.
    """
    nothing = np.empty(0, np.uint64)
    total = sum(int(tokens_before(part, split, nothing)[-1]) for part in parts)
    bits = max(0, (total // WINDOW_TOKENS).bit_length())
    edges = [window << (KEY_BITS - bits) for window in range((1 << bits) + 1)]
    if packing == "concatenate":
        below = np.array(edges[:-1], np.uint64)
        positions = sum(tokens_before(part, split, below) for part in parts)
    else:
        rows = map_windows([(split, low, high) for low, high in pairwise(edges)])
        positions = np.cumsum([0, *rows]) * context
    return SplitPlan(split, context, packing, edges, positions, total)


def window_rows(parts: Sequence[Path], split: str, low: int, high: int, context: int) -> int:
    """Rows that best-fit makes of the documents with keys in [low, high)."""
    return len(best_fit(read_lengths(parts, split, low, high).tolist(), context))


def best_fit(lengths: Sequence[int], context: int) -> list[list[tuple[int, int, int]]]:
    """Rows of pieces (document, first token, end), no row longer than `context`.

    Documents are cut only where they are longer than a row. The longest piece is placed first,
    each into the fullest row that has room for it. Rows come by their first document.
    """
    pieces = [
        (document, first, min(first + context, length))
        for document, length in enumerate(lengths)
        for first in range(0, length, context)
    ]
    pieces.sort(key=lambda piece: piece[1] - piece[2])
    rows: list[list[tuple[int, int, int]]] = []
    with_room: list[list[int]] = [[] for _ in range(context + 1)]
    rooms = 0  # bit r: some row has room for r tokens
    for piece in pieces:
        length = piece[2] - piece[1]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = context, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = room - length
        if left:
            with_room[left].append(row)
            rooms |= 1 << left
    return sorted(sorted(row) for row in rows)


def shard_stretches(
    plan: SplitPlan, parts: Sequence[Path], shard: int, pad_token_id: int
) -> Iterator[Packed]:
    """What a shard holds, window by window."""
    first, end = (row * plan.context for row in plan.shard_rows(shard))
    window = int(np.searchsorted(plan.positions, first, side="right")) - 1
    while window < len(plan.edges) - 1 and plan.positions[window] < end:
        low = int(plan.positions[window])
        packed = _pack_window(plan, parts, window, pad_token_id)
        yield _clip(packed, max(first - low, 0), end - low, plan.context)
        window += 1


def _pack_window(plan: SplitPlan, parts: Sequence[Path], window: int, pad_token_id: int) -> Packed:
    documents = read_range(parts, plan.split, plan.edges[window], plan.edges[window + 1])
    starts_D = np.cumsum(documents.lengths_D) - documents.lengths_D
    if plan.packing == "concatenate":
        return Packed(documents.tokens_N, starts_D, None)
    rows = best_fit(documents.lengths_D.tolist(), plan.context)
    tokens_N = np.full(len(rows) * plan.context, pad_token_id, documents.tokens_N.dtype)
    starts, lengths = [], []
    for number, row in enumerate(rows):
        begin = at = number * plan.context
        for document, first, end in row:
            source = int(starts_D[document])
            tokens_N[at : at + end - first] = documents.tokens_N[source + first : source + end]
            starts += [at] * (first == 0)
            at += end - first
        lengths.append(at - begin)
    return Packed(tokens_N, np.array(starts, np.int64), np.array(lengths, np.int32))


def _clip(packed: Packed, first: int, end: int, context: int) -> Packed:
    """The stretch between two positions; both are edges of rows where `lengths_R` is given."""
    starts_D, lengths_R = packed.starts_D, packed.lengths_R
    starts_D = starts_D[(starts_D >= first) & (starts_D < end)] - first
    if lengths_R is not None:
        lengths_R = lengths_R[first // context : end // context]
    return Packed(packed.tokens_N[first:end], starts_D, lengths_R)


def write_shard(
    path: Path, schema: pa.Schema, stretches: Iterable[Packed], pad_token_id: int
) -> None:
    """Write stretches, which together begin with a row, as an Arrow file of equal batches."""
    with path.open("wb") as sink, pa.ipc.new_file(sink, schema) as file:
        batch = _Batch(file, schema, pad_token_id)
        for stretch in stretches:
            batch.add(stretch)
        batch.flush()


class _Batch:
    """The rows of the record batch that is being filled."""

    def __init__(self, file: pa.RecordBatchFileWriter, schema: pa.Schema, pad_token_id: int):
        self._file, self._schema, self._pad = file, schema, pad_token_id
        tokens_type = schema.field("tokens").type
        self._context = tokens_type.list_size
        dtype = tokens_type.value_type.to_pandas_dtype()
        self._tokens = np.empty(ROWS_PER_BATCH * self._context, dtype)
        self._lengths = np.full(ROWS_PER_BATCH, self._context, np.int32)
        self._starts: list[np.ndarray] = []
        self._fill = 0

    def add(self, stretch: Packed) -> None:
        """Append a stretch, writing every batch that it fills."""
        position = 0
        while position < len(stretch.tokens_N):
            size = min(len(self._tokens) - self._fill, len(stretch.tokens_N) - position)
            part = _clip(stretch, position, position + size, self._context)
            self._tokens[self._fill : self._fill + size] = part.tokens_N
            self._starts.append(part.starts_D + self._fill)
            if part.lengths_R is not None:
                row = self._fill // self._context
                self._lengths[row : row + len(part.lengths_R)] = part.lengths_R
            self._fill += size
            position += size
            if self._fill == len(self._tokens):
                self.flush()

    def flush(self) -> None:
        """Write what is there, the last row padded, as one record batch."""
        if not self._fill:
            return
        rows = -(-self._fill // self._context)
        self._tokens[self._fill : rows * self._context] = self._pad
        if self._fill % self._context:
            self._lengths[rows - 1] = self._fill % self._context
        starts = np.concatenate(self._starts)
        offsets = np.searchsorted(starts, np.arange(rows + 1) * self._context).astype(np.int32)
        tokens = pa.array(self._tokens[: rows * self._context])
        columns = [
            pa.FixedSizeListArray.from_arrays(tokens, self._context),
            pa.array(self._lengths[:rows]),
            pa.ListArray.from_arrays(
                pa.array(offsets), pa.array((starts % self._context).astype(np.int32))
            ),
        ]
        self._file.write_batch(pa.record_batch(columns, schema=self._schema))
        self._lengths[:] = self._context
        self._starts, self._fill = [], 0
