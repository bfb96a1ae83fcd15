"""Token ids -> hash-ordered rows in Arrow files: an external bucket sort, then packing.

Spilling puts every document into a bucket by the high bits of its key; reading sorts one bucket at
a time. Buckets are key ranges, so documents come back in the global key order whatever the order
they came in (UniRef is sorted by length), and memory holds one bucket.
"""

import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa

from s2t2_dist.shards import ROWS_PER_BATCH, ROWS_PER_SHARD

BUCKET_BITS = 6
KEY_BITS = 64
ENTRY = struct.Struct("<QII")
ENTRY_DTYPE = np.dtype([("key", "<u8"), ("length", "<u4"), ("group", "<u4")])


class Spill:
    """Documents on disk, written in any order and read back by ascending 64-bit key.

    Equal keys keep the order in which they were written. Use as a context manager while writing.

    Args:
        directory: made here; the caller removes it.
    """

    def __init__(self, directory: Path, dtype: np.dtype):
        self._directory, self._dtype = directory, dtype
        self._stack = ExitStack()
        directory.mkdir()
        buckets = range(1 << BUCKET_BITS)
        self._tokens = [self._stack.enter_context(self._tokens_path(b).open("wb")) for b in buckets]
        self._index = [self._stack.enter_context(self._index_path(b).open("wb")) for b in buckets]

    def __enter__(self) -> "Spill":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def add(self, key: int, group: int, tokens: np.ndarray) -> None:
        """Write one document; `group` is given back with it."""
        assert tokens.dtype == self._dtype
        bucket = key >> (KEY_BITS - BUCKET_BITS)
        self._tokens[bucket].write(tokens.tobytes())
        self._index[bucket].write(ENTRY.pack(key, len(tokens), group))

    def read(self) -> Iterator[tuple[int, np.ndarray]]:
        """(group, tokens) of every document, by ascending key."""
        for bucket in range(1 << BUCKET_BITS):
            tokens = np.fromfile(self._tokens_path(bucket), self._dtype)
            index = np.fromfile(self._index_path(bucket), ENTRY_DTYPE)
            ends = np.cumsum(index["length"], dtype=np.int64)
            for i in np.argsort(index["key"], kind="stable"):
                entry = index[i]
                yield int(entry["group"]), tokens[ends[i] - entry["length"] : ends[i]]

    def _tokens_path(self, bucket: int) -> Path:
        return self._directory / f"{bucket:02d}.tokens"

    def _index_path(self, bucket: int) -> Path:
        return self._directory / f"{bucket:02d}.index"


class RowWriter:
    """Packs documents end to end into rows and rows into shards; nothing is dropped.

    Args:
        directory: of the split; made here.
        schema: `s2t2_dist.data.shard_schema`.
        pad_token_id: fills the last row.

    Attributes:
        tokens: written so far, without padding.
        shards: file (relative to the parent of `directory`) and rows of each shard.
    """

    def __init__(self, directory: Path, schema: pa.Schema, pad_token_id: int):
        directory.mkdir()
        self._directory, self._schema, self._pad = directory, schema, pad_token_id
        tokens_type = schema.field("tokens").type
        self._context = tokens_type.list_size
        dtype = tokens_type.value_type.to_pandas_dtype()
        self._buffer = np.empty(ROWS_PER_BATCH * self._context, dtype)
        self._fill = 0
        self._starts: list[int] = []
        self._stack = ExitStack()
        self._file: pa.RecordBatchFileWriter | None = None
        self.tokens = 0
        self.shards: list[dict] = []

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if kind is None and self._fill:
            self._flush()
        self._stack.close()

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, its end token included."""
        self._starts.append(self._fill)
        self.tokens += len(tokens)
        while len(tokens):
            part = tokens[: len(self._buffer) - self._fill]
            self._buffer[self._fill : self._fill + len(part)] = part
            self._fill += len(part)
            tokens = tokens[len(part) :]
            if self._fill == len(self._buffer):
                self._flush()

    def _flush(self) -> None:
        """Write what is in the buffer as one record batch."""
        rows = -(-self._fill // self._context)
        self._buffer[self._fill : rows * self._context] = self._pad
        lengths = np.full(rows, self._context, np.int32)
        lengths[-1] = self._fill - (rows - 1) * self._context
        starts = np.array(self._starts, np.int64)
        offsets = np.searchsorted(starts, np.arange(rows + 1) * self._context).astype(np.int32)
        tokens = pa.array(self._buffer[: rows * self._context])
        positions = pa.array((starts % self._context).astype(np.int32))
        columns = [
            pa.FixedSizeListArray.from_arrays(tokens, self._context),
            pa.array(lengths),
            pa.ListArray.from_arrays(pa.array(offsets), positions),
        ]
        self._shard_file().write_batch(pa.record_batch(columns, schema=self._schema))
        self.shards[-1]["rows"] += rows
        self._fill, self._starts = 0, []

    def _shard_file(self) -> pa.RecordBatchFileWriter:
        """The open shard, or the next one when it is full."""
        if self._file is None or self.shards[-1]["rows"] == ROWS_PER_SHARD:
            self._stack.close()
            path = self._directory / f"shard-{len(self.shards):05d}.arrow"
            sink = self._stack.enter_context(path.open("wb"))
            self._file = self._stack.enter_context(pa.ipc.new_file(sink, self._schema))
            self.shards.append({"file": f"{self._directory.name}/{path.name}", "rows": 0})
        return self._file
