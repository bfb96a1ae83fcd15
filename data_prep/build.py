"""`s2t2 data build`: documents -> a sealed directory of Arrow shards that `ShardReader` reads."""

import io
import shutil
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.encode import encode_documents
from data_prep.outputs import already_made, describe_sources
from data_prep.packing import KEY_BITS, RowWriter, Spill
from data_prep.readers import Document, detect_format, id_hash, read_documents, reading_progress
from data_prep.tokenizer import LoadedTokenizer, load_tokenizer
from s2t2_dist import artifacts
from s2t2_dist.errors import DataError
from s2t2_dist.shards import (
    KIND,
    SPLITS,
    TOKEN_BYTES,
    TOKENIZER_DIR,
    shard_schema,
    token_dtype,
)

# Files of a tokenizer; its folder may be a whole model, whose weights stay where they are.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class BuildOptions:
    """How rows are made.

    Attributes:
        context: tokens per row.
        validation_fraction: share of the documents, chosen by the hash of their ids.
        characters: one token of the tokenizer for every character (the paper, section 3:
            "training domain tokens are bytes").
        seed: of the document order; the split does not depend on it.
    """

    context: int
    validation_fraction: float = 0.01
    characters: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.context < 2:
            raise DataError(f"a context of {self.context} is too short; 2 tokens are the least")
        if not 0 < self.validation_fraction < 1:
            raise DataError(
                f"a validation fraction of {self.validation_fraction} is not between 0 and 1"
            )


@dataclass
class SplitCount:
    """Documents of a split, and how often each byte value occurs in their text."""

    documents: int = 0
    byte_counts: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))

    def add(self, text: bytes) -> None:
        """Count one document."""
        self.documents += 1
        self.byte_counts += np.bincount(np.frombuffer(text, np.uint8), minlength=256)

    def record(self) -> dict:
        """For the manifest; the key of a byte's count is the character of that code."""
        return {
            "documents": self.documents,
            "bytes": int(self.byte_counts.sum()),
            "byte_counts": {chr(b): int(n) for b, n in enumerate(self.byte_counts) if n},
        }


def build_shards(
    inputs: Sequence[Path], tokenizer_dir: Path, target: Path, options: BuildOptions
) -> bool:
    """Encode, split, order and pack documents into `target`, sealed with a manifest.

    Returns:
        False if `target` already holds exactly this.

    Raises:
        DataError: bad input, or a character that the tokenizer cannot encode.
        ArtifactError: `target` exists and is something else.
    """
    for path in inputs:
        detect_format(path)  # a wrong name is reported before gigabytes are hashed
    tokenizer = load_tokenizer(tokenizer_dir)
    request = _request(inputs, tokenizer, options)
    if already_made(target, request):
        return False
    record = dict(request)
    with artifacts.sealed_directory(target, record) as directory:
        spill_dir = directory / "spill"
        with reading_progress("Encoding") as open_file:
            documents = read_documents(inputs, open_file)
            spill, counts = _spill(documents, tokenizer, options, spill_dir)
        token_bytes = np.array([len(text) for text in tokenizer.token_texts], np.int64)
        packed = _pack(spill, directory, request, token_bytes)
        shutil.rmtree(spill_dir)
        record["splits"] = {split: counts[split].record() for split in SPLITS}
        for split, held in record["splits"].items():
            spelled = packed[split].pop("spelled_bytes")
            assert spelled == held["bytes"], f"{split} spells {spelled} of {held['bytes']} bytes"
            held.update(packed[split])
        _copy_tokenizer(tokenizer_dir, directory / TOKENIZER_DIR)
        _write_array(token_bytes, directory / TOKEN_BYTES)
    return True


def is_validation(identifier: str, fraction: float) -> bool:
    """Which split a document belongs to: a function of its id alone."""
    return id_hash(identifier, "split") < fraction * 2**KEY_BITS


def _request(inputs: Sequence[Path], tokenizer: LoadedTokenizer, options: BuildOptions) -> dict:
    """Everything that decides the result; the manifest records it."""
    return {
        "kind": KIND,
        "sources": describe_sources(inputs),
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "context": options.context,
        "characters": options.characters,
        "validation_fraction": options.validation_fraction,
        "seed": options.seed,
    }


def _spill(
    documents: Iterable[Document],
    tokenizer: LoadedTokenizer,
    options: BuildOptions,
    directory: Path,
) -> tuple[Spill, dict[str, SplitCount]]:
    """First pass: encode every document and write it to its bucket."""
    counts = {split: SplitCount() for split in SPLITS}
    with Spill(directory, token_dtype(tokenizer.vocab_size)) as spill:
        for document in encode_documents(documents, tokenizer, options.characters):
            group = int(is_validation(document.id, options.validation_fraction))
            key = id_hash(document.id, f"order {options.seed}")
            spill.add(key, group, document.tokens)
            counts[SPLITS[group]].add(document.text)
    for split, count in counts.items():
        if not count.documents:
            raise DataError(
                f"none of the {sum(c.documents for c in counts.values())} documents falls into "
                f"{split} at a validation fraction of {options.validation_fraction}; give more "
                "data or another fraction"
            )
    return spill, counts


def _pack(spill: Spill, directory: Path, request: dict, token_bytes: np.ndarray) -> dict[str, dict]:
    """Second pass: write the rows of each split; returns what was written, by split."""
    schema = shard_schema(request["context"], request["vocab_size"], request)
    spelled = [0 for _ in SPLITS]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(RowWriter(directory / split, schema, request["pad_token_id"]))
            for split in SPLITS
        ]
        for group, tokens in spill.read():
            writers[group].add(tokens)
            spelled[group] += int(token_bytes[tokens].sum())
    return {
        split: {
            "rows": sum(shard["rows"] for shard in writer.shards),
            "tokens": writer.tokens,
            "shards": writer.shards,
            "spelled_bytes": count,
        }
        for split, writer, count in zip(SPLITS, writers, spelled, strict=True)
    }


def _write_array(array: np.ndarray, path: Path) -> None:
    """Through memory: `np.save` into a file reports a full disk without its errno."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getvalue())


def _copy_tokenizer(source: Path, target: Path) -> None:
    target.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
