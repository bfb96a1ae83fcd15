"""Parts: encoded chunks on disk, one Arrow file each, sorted so that a range of keys is a slice.

A part holds one record batch per split, with documents in ascending key order. Its metadata holds
the counts that were taken while it was made. Packing reads one range of keys of all parts, merged.

Index letters: D documents, N their token ids end to end.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from s2t2_dist import artifacts
from s2t2_dist.data.shards import SPLITS

COUNTS_KEY = b"counts"
KEY_BITS = 64
# Keys that a search for shared ones holds in memory: 300 MB.
KEYS_AT_ONCE = 1 << 23


class Documents(NamedTuple):
    """Documents in ascending key order.

    Attributes:
        keys_D: uint64.
        lengths_D: tokens per document, int64.
        tokens_N: token ids end to end, uint16 or uint32.
    """

    keys_D: np.ndarray
    lengths_D: np.ndarray
    tokens_N: np.ndarray


def part_path(directory: Path, number: int) -> Path:
    """The path of a part."""
    return directory / f"part-{number:06d}.arrow"


def write_part(path: Path, splits: Sequence[Documents], counts: dict, temporary: str) -> None:
    """Write one part atomically.

    Args:
        splits: the documents of each of SPLITS.
        counts: a JSON object, which `read_counts` returns.
        temporary: suffix of the temporary file; no other process may use it.
    """
    tokens_type = pa.list_(pa.from_numpy_dtype(splits[0].tokens_N.dtype))
    schema = pa.schema(
        [("key", pa.uint64()), ("tokens", tokens_type)],
        metadata={COUNTS_KEY: json.dumps(counts).encode()},
    )
    scratch = path.with_name(f"{path.name}.{temporary}")
    with scratch.open("wb") as sink, pa.ipc.new_file(sink, schema) as file:
        for keys, lengths, tokens in splits:
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
            file.write_batch(pa.record_batch([pa.array(keys), lists], schema=schema))
    artifacts.fsync_path(scratch)
    scratch.replace(path)


def reorder(documents: Documents, order: np.ndarray) -> Documents:
    """The documents with these indexes (int64), in this order."""
    keys_D, lengths_D, tokens_N = documents
    ends_D = np.cumsum(lengths_D)
    spans = zip((ends_D - lengths_D)[order].tolist(), ends_D[order].tolist(), strict=True)
    texts = [tokens_N[first:end] for first, end in spans]
    tokens = np.concatenate(texts) if texts else tokens_N[:0]
    return Documents(keys_D[order], lengths_D[order], tokens)


def read_counts(path: Path) -> dict:
    """The `counts` of a part, as given to `write_part`."""
    return json.loads(pa.ipc.open_file(pa.memory_map(str(path))).schema.metadata[COUNTS_KEY])


def tokens_before(path: Path, split: str, edges: np.ndarray) -> np.ndarray:
    """Tokens of a split whose keys are below each edge (uint64), then all: (edges + 1,) int64."""
    keys, tokens = _columns(path, split)
    bounds = np.append(np.searchsorted(keys, edges), len(keys))
    return tokens.offsets.to_numpy()[bounds].astype(np.int64)


def read_lengths(paths: Sequence[Path], split: str, first: int, end: int) -> np.ndarray:
    """`lengths_D` of `read_range`, without reading tokens."""
    slices = [_slice(path, split, first, end) for path in paths]
    keys_D = np.concatenate([keys for keys, _, _ in slices])
    lengths_D = np.concatenate([np.diff(offsets) for _, offsets, _ in slices])
    return lengths_D[np.argsort(keys_D, kind="stable")].astype(np.int64)


def read_range(paths: Sequence[Path], split: str, first: int, end: int) -> Documents:
    """All parts' documents with keys in [first, end), by key; equal keys in the parts' order."""
    found = []
    for path in paths:
        keys, offsets, tokens = _slice(path, split, first, end)
        # Copies, so that no page of the part stays mapped.
        values = tokens[int(offsets[0]) : int(offsets[-1])].to_numpy().copy()
        found.append((keys.copy(), np.diff(offsets).astype(np.int64), values))
    merged = Documents(*map(np.concatenate, zip(*found, strict=True)))
    return reorder(merged, np.argsort(merged.keys_D, kind="stable"))


class Shared(NamedTuple):
    """Documents whose key an earlier document with other tokens has.

    Attributes:
        count: their number, or one more than the limit if there are more.
        part, key: where to find one of them; None if there is none.
    """

    count: int = 0
    part: int | None = None
    key: int | None = None


def find_shared(paths: Sequence[Path], limit: int) -> Shared:
    """Look for documents that share their key, until there are more than `limit` of them."""
    found = Shared()
    for split in SPLITS if paths else ():
        total = sum(len(_columns(path, split)[0]) for path in paths)
        bits = max(0, (total // KEYS_AT_ONCE).bit_length())
        for window in range(1 << bits):
            low, high = (w << (KEY_BITS - bits) for w in (window, window + 1))
            for part, key in _shared_in(paths, split, low, high):
                found = Shared(found.count + 1, part, key)
                if found.count > limit:
                    return found
    return found


def _shared_in(paths: Sequence[Path], split: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    """Part and key of each document with a key in [low, high) that `Shared` counts."""
    keys, parts, rows = [], [], []
    for part, path in enumerate(paths):
        held = _columns(path, split)[0]
        first, end = _bounds(held, low, high)
        keys.append(held[first:end].copy())
        parts.append(np.full(end - first, part, np.int32))
        rows.append(np.arange(first, end, dtype=np.int64))
    keys_D, parts_D, rows_D = map(np.concatenate, (keys, parts, rows))
    order = np.argsort(keys_D, kind="stable")
    again = np.flatnonzero(np.diff(keys_D[order]) == 0) + 1  # places of `order`
    tokens: dict[int, pa.ListArray] = {}  # by part; opened once, however many documents it shares
    first = None
    for place in again.tolist():
        before, at = order[place - 1], order[place]
        if first is None or keys_D[first] != keys_D[at]:
            first = before
        for part in (int(parts_D[first]), int(parts_D[at])):
            if part not in tokens:
                tokens[part] = _columns(paths[part], split)[1]
        one, other = (tokens[int(parts_D[i])][int(rows_D[i])].values for i in (first, at))
        if not one.equals(other):
            yield int(parts_D[at]), int(keys_D[at])


def _bounds(keys: np.ndarray, low: int, high: int) -> tuple[int, int]:
    """The first of ascending keys in [low, high), and the one after the last."""
    first = int(np.searchsorted(keys, np.uint64(low)))
    return first, len(keys) if high >> KEY_BITS else int(np.searchsorted(keys, np.uint64(high)))


def _slice(path: Path, split: str, first: int, end: int) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """Keys in [first, end), their token offsets (one more), and all tokens; memory-mapped."""
    keys, tokens = _columns(path, split)
    low, high = _bounds(keys, first, end)
    return keys[low:high], tokens.offsets.to_numpy()[low : high + 1], tokens.values


def _columns(path: Path, split: str) -> tuple[np.ndarray, pa.ListArray]:
    """Keys and token lists of a split, memory-mapped."""
    batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(SPLITS.index(split))
    return batch.column("key").to_numpy(), batch.column("tokens")
