"""The format of a data directory, and its reader. Needs neither torch nor a trainer.

A data directory holds `{train,validation}/shard-*.arrow`, `tokenizer/`, `token_bytes.npy` and a
sealed manifest. Every row has `context` token ids; only the last row of a split is shorter and
padded.
"""

import json
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Literal, NamedTuple, overload

import numpy as np
import pyarrow as pa

from s2t2_dist import artifacts
from s2t2_dist.errors import ArtifactError, DataError

KIND = "data"
SPLITS = ("train", "validation")
TOKENIZER_DIR = "tokenizer"
TOKENIZER_JSON = "tokenizer.json"
# Keys of tokenizer.json that change no id of a text's tokens.
TOKENIZER_SETTINGS = ("version", "truncation", "padding")
TOKEN_BYTES = "token_bytes.npy"
SCHEMA_KEY = b"s2t2"
# Equal record batches and shards make row -> (shard, batch, offset) a division.
ROWS_PER_BATCH = 1024
ROWS_PER_SHARD = 256 * ROWS_PER_BATCH


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def shard_schema(context: int, vocab_size: int, record: dict) -> pa.Schema:
    """Columns of a shard: `tokens`, `length` (valid tokens) and `document_starts` (positions)."""
    return pa.schema(
        [
            ("tokens", pa.list_(pa.from_numpy_dtype(token_dtype(vocab_size)), context)),
            ("length", pa.int32()),
            ("document_starts", pa.list_(pa.int32())),
        ],
        metadata={SCHEMA_KEY: json.dumps(record, sort_keys=True).encode()},
    )


def tokenizer_sha256(directory: Path | str) -> str:
    """Hex sha256 of what a tokenizer folder's `tokenizer.json` says: the tokenizer's identity.

    Two tokenizers are the same if they give every text the same ids: vocabulary, merges, special
    tokens, normalizer, pre-tokenizer, post-processor and decoder are equal. The file's formatting,
    its version and the settings `truncation` and `padding` do not count, nor do other files.

    Raises:
        DataError: the folder has no such file, or it is not a JSON object.
    """
    path = Path(directory) / TOKENIZER_JSON
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a folder with a Hugging Face tokenizer")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); copy the tokenizer again") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a tokenizer (no JSON object); copy the tokenizer again")
    rules = {key: value for key, value in content.items() if key not in TOKENIZER_SETTINGS}
    return artifacts.sha256_json(rules)


def require_tokenizer(metadata: dict, tokenizer_dir: Path | str) -> None:
    """Check that shards were made with this tokenizer.

    Raises:
        DataError: they were made with another one; names both hashes.
    """
    found, expected = metadata["tokenizer_sha256"], tokenizer_sha256(tokenizer_dir)
    if found != expected:
        raise DataError(
            f"the shards were made with the tokenizer {found}, but {tokenizer_dir} is {expected}; "
            "build the data again with this tokenizer or name the other one"
        )


def _verify_files(directory: Path, manifest: dict, hashes: bool) -> None:
    """Check the files; an error about a shard says which rows are in it.

    Args:
        hashes: of the shards too; all other files are small, and always hashed.
    """
    rows_of = {}
    for split, held in manifest.get("splits", {}).items():
        first = 0
        for shard in held["shards"]:
            rows_of[shard["file"]] = f" ({split} rows {first} to {first + shard['rows'] - 1})"
            first += shard["rows"]
    for name, entry in manifest["files"].items():
        try:
            artifacts.verify_file(directory / name, entry, hashes or name not in rows_of)
        except ArtifactError as error:
            raise ArtifactError(f"{error}{rows_of.get(name, '')}") from None


class _RowBatch(NamedTuple):
    """Views into one memory-mapped record batch."""

    tokens: np.ndarray
    lengths: np.ndarray
    start_offsets: np.ndarray
    starts: np.ndarray


class ShardReader:
    """Rows of one split by number, memory-mapped: `reader[i]` is a view, read in constant time.

    Numbers count from the end if they are negative, as in a list. A pickled reader opens the
    directory again, so that spawned processes can have it.

    Args:
        directory: what `s2t2 data build` wrote.
        split: `train` or `validation`.
        verify: compare the files' sizes with the manifest, or their sha256 as well (`full`).

    Raises:
        ArtifactError: unfinished, altered or damaged.
        DataError: not a data directory, or no such split.
    """

    def __init__(self, directory: Path | str, split: str, verify: Literal["size", "full"] = "size"):
        self.directory = Path(directory)
        manifest = artifacts.read_manifest(self.directory)
        _verify_files(self.directory, manifest, hashes=verify == "full")
        if manifest.get("kind") != KIND:
            raise DataError(
                f"{self.directory} holds {manifest.get('kind')!r}, not data; give a folder made by "
                "`s2t2 data build`"
            )
        if split not in manifest["splits"]:
            raise DataError(f"{self.directory} has no split {split!r}, only {', '.join(SPLITS)}")
        self.split = split
        self.metadata = {key: value for key, value in manifest.items() if key != "files"}
        self.context: int = manifest["context"]
        self._rows: int = manifest["splits"][split]["rows"]
        self._shards = [self._open(shard) for shard in manifest["splits"][split]["shards"]]
        self._batches: dict[int, _RowBatch] = {}

    def _open(self, shard: dict) -> pa.RecordBatchFileReader:
        path = self.directory / shard["file"]
        try:
            return pa.ipc.open_file(pa.memory_map(str(path)))
        except pa.ArrowInvalid as error:
            raise DataError(f"{path} is not an Arrow file ({error}); build it again") from None

    def __len__(self) -> int:
        return self._rows

    def __reduce__(self) -> tuple:
        return type(self), (self.directory.absolute(), self.split)

    @overload
    def __getitem__(self, row: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, row: slice) -> list[np.ndarray]: ...

    def __getitem__(self, row: int | slice) -> np.ndarray | list[np.ndarray]:
        """Token ids of a row, (context,) uint16 or uint32, read-only; padded if it is the last.

        A slice gives a list of rows.
        """
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(self._rows))]
        batch, offset = self._locate(row)
        return batch.tokens[offset]

    def length(self, row: int) -> int:
        """Valid tokens of a row; what follows is padding."""
        batch, offset = self._locate(row)
        return int(batch.lengths[offset])

    def document_starts(self, row: int) -> np.ndarray:
        """Positions in the row at which a document starts, int32, ascending."""
        batch, offset = self._locate(row)
        return batch.starts[batch.start_offsets[offset] : batch.start_offsets[offset + 1]]

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each token id stands for, (vocab_size,) int64; 0 if special."""
        return np.load(self.directory / TOKEN_BYTES)

    def _locate(self, row: int) -> tuple[_RowBatch, int]:
        place = row if type(row) is int else index(row)
        place = place + self._rows if place < 0 else place
        if not 0 <= place < self._rows:
            raise IndexError(f"row {row} of {self._rows}")
        number, offset = divmod(place, ROWS_PER_BATCH)
        if number not in self._batches:
            self._batches[number] = self._map_batch(number)
        return self._batches[number], offset

    def _map_batch(self, number: int) -> _RowBatch:
        shard, index = divmod(number, ROWS_PER_SHARD // ROWS_PER_BATCH)
        batch = self._shards[shard].get_batch(index)
        starts = batch.column("document_starts")
        return _RowBatch(
            batch.column("tokens")
            .flatten()
            .to_numpy(zero_copy_only=True)
            .reshape(-1, self.context),
            batch.column("length").to_numpy(zero_copy_only=True),
            starts.offsets.to_numpy(zero_copy_only=True),
            starts.values.to_numpy(zero_copy_only=True),
        )
