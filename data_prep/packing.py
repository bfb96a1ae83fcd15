"""Pack documents, in key order, into rows of one length and shards that any process can make.

The key range is cut into windows, and memory holds one window. The position of each window in the
split is computed before any token is packed. So every shard is a job of its own, and its bytes do
not depend on which process makes it or on how the input was cut into parts.

There are two ways to pack:

- `concatenate` puts the documents end to end and cuts every `context` tokens. Only the last row of
  a split is short.
- `best-fit` cuts only documents that are longer than a row, and fills each row with pieces that fit
  (Ding et al. 2024, "Fewer truncations improve language modeling"), window by window. Rows end
  with padding.

Index letters: D documents of a window, R rows, N tokens of a window including padding.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa

from data_prep.parts import KEY_BITS, read_lengths, read_range, tokens_before
from s2t2_dist.data.shards import ROWS_PER_BATCH, ROWS_PER_SHARD

# Approximate number of tokens per window: 32 MB as uint16, 64 MB as uint32.
WINDOW_TOKENS = 1 << 24

Packing = Literal["concatenate", "best-fit"]


class Packed(NamedTuple):
    """A stretch of a split: consecutive tokens of its rows.

    Attributes:
        tokens_N: rows end to end; the stretch may begin or end inside a row.
        starts_D: positions in `tokens_N` at which a document starts, int64, ascending.
        lengths_R: valid tokens per row, int32; None if every row is full.
    """

    tokens_N: np.ndarray
    starts_D: np.ndarray
    lengths_R: np.ndarray | None


@dataclass(frozen=True)
class SplitPlan:
    """The layout of a split: which tokens each window contributes.

    Attributes:
        edges: window w holds the keys in [edges[w], edges[w + 1]); Python integers.
        positions: tokens before each window, then the total, (windows + 1,) int64; with `best-fit`
            padding counts.
        tokens: tokens of all documents, without padding.
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
        """The first row of a shard, and the first row after it."""
        return shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, self.rows)


def plan_split(
    parts: Sequence[Path],
    split: str,
    context: int,
    packing: Packing,
    map_windows: Callable[[list[tuple]], Iterable[int]],
) -> SplitPlan:
    """Compute the layout of a split from the parts' indexes, without reading tokens.

    Args:
        map_windows: maps `window_rows` over (split, low, high) tuples and keeps their order.
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
    """Number of rows that best-fit makes of the documents with keys in [low, high)."""
    return len(best_fit(read_lengths(parts, split, low, high).tolist(), context))


def best_fit(lengths: Sequence[int], context: int) -> list[list[tuple[int, int, int]]]:
    """Pack documents of these lengths into rows of at most `context` tokens.

    Only documents longer than a row are cut. Pieces are placed from the longest to the shortest,
    each into the fullest row that has room for it.

    Returns:
        Rows of pieces (document, first token, token after the last), sorted by first document.
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
    """Yield the content of a shard, one window at a time."""
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
    """The stretch between two positions, which are row edges if `lengths_R` is given."""
    starts_D, lengths_R = packed.starts_D, packed.lengths_R
    starts_D = starts_D[(starts_D >= first) & (starts_D < end)] - first
    if lengths_R is not None:
        lengths_R = lengths_R[first // context : end // context]
    return Packed(packed.tokens_N[first:end], starts_D, lengths_R)


def write_shard(
    path: Path, schema: pa.Schema, stretches: Iterable[Packed], pad_token_id: int
) -> None:
    """Write stretches as an Arrow file of equal record batches; the first begins with a row."""
    with path.open("wb") as sink, pa.ipc.new_file(sink, schema) as file:
        batch = _Batch(file, schema, pad_token_id)
        for stretch in stretches:
            batch.add(stretch)
        batch.flush()


class _Batch:
    """Collects rows and writes them in record batches of ROWS_PER_BATCH rows."""

    def __init__(self, file: pa.RecordBatchFileWriter, schema: pa.Schema, pad_token_id: int):
        self._file, self._schema, self._pad = file, schema, pad_token_id
        tokens_type = schema.field("tokens").type
        self._context = tokens_type.list_size
        dtype = str(tokens_type.value_type)  # uint16: the name that numpy has for it too
        self._tokens = np.empty(ROWS_PER_BATCH * self._context, dtype)
        self._lengths = np.full(ROWS_PER_BATCH, self._context, np.int32)
        self._starts: list[np.ndarray] = []
        self._fill = 0

    def add(self, stretch: Packed) -> None:
        """Append a stretch, and write every batch that it fills."""
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
        """Write the collected rows as one record batch; pad the last row."""
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
