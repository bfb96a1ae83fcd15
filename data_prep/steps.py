"""The steps of a build, for any process to run: each writes one file, atomically."""

import io
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep import packing
from data_prep.encode import Encoder, count_values, spelled_bytes
from data_prep.packing import KEY_BITS, Packing, SplitPlan
from data_prep.parts import Documents, part_path, read_counts, write_part
from data_prep.readers import (
    ReadCounts,
    ReadOptions,
    id_hash,
    id_hashes,
    parse_chunk,
    require_documents,
)
from data_prep.sources import Chunk
from data_prep.tokenizer import LoadedTokenizer, load_tokenizer
from s2t2_dist import artifacts
from s2t2_dist.data.shards import SPLITS, TOKEN_BYTES, TOKENIZER_DIR, shard_schema
from s2t2_dist.errors import DataError

# Files of a tokenizer; its folder may be a whole model, whose weights stay where they are.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TEMPORARY = "tmp"


@dataclass(frozen=True)
class BuildOptions:
    """How rows are made.

    Attributes:
        context: tokens per row.
        validation_fraction: share of the documents, chosen by the hash of their ids.
        characters: one token of the tokenizer for every character (the paper, section 3:
            "training domain tokens are bytes").
        seed: of the document order; the split does not depend on it.
        packing: how rows are filled, see `data_prep.packing`.
        drop_ids: a file whose lines begin with the id of a document to leave out.
        read: how the input is read.
    """

    context: int
    validation_fraction: float = 0.01
    characters: bool = False
    seed: int = 0
    packing: Packing = "concatenate"
    drop_ids: Path | None = None
    read: ReadOptions = field(default_factory=ReadOptions)

    def __post_init__(self):
        if self.context < 2:
            raise DataError(f"a context of {self.context} is too short; 2 tokens are the least")
        if not 0 < self.validation_fraction < 1:
            raise DataError(
                f"a validation fraction of {self.validation_fraction} is not between 0 and 1"
            )
        if self.drop_ids and not self.drop_ids.is_file():
            raise DataError(f"{self.drop_ids} is not a file; give a list of ids, one a line")


def is_validation(identifier: str, fraction: float) -> bool:
    """Which split a document belongs to: a function of its id alone."""
    return id_hash(identifier, "split") < fraction * 2**KEY_BITS


@dataclass(frozen=True)
class Steps:
    """What a build does, in a folder that its processes share.

    Args:
        request: what decides the result; goes into the manifest and every shard.
        partial: the folder.
        rank: keeps temporary files of several machines apart.
    """

    tokenizer_dir: Path
    options: BuildOptions
    request: dict
    inputs: tuple[Path, ...]
    partial: Path
    rank: int

    @cached_property
    def tokenizer(self) -> LoadedTokenizer:
        """Read once in each process."""
        return load_tokenizer(self.tokenizer_dir)

    @cached_property
    def encoder(self) -> Encoder:
        """Made once in each process."""
        return Encoder(self.tokenizer, self.options.characters)

    @cached_property
    def dropped(self) -> np.ndarray:
        """The split hashes of the ids to leave out, ascending uint64: 8 bytes for each."""
        if self.options.drop_ids is None:
            return np.empty(0, np.uint64)
        with self.options.drop_ids.open(encoding="utf-8", errors="replace") as lines:
            ids = (line.split()[0] for line in lines if line.strip())
            return np.unique(id_hashes(ids, "split"))

    @property
    def work(self) -> Path:
        """Everything that is not part of the result."""
        return self.partial / "work"

    def part(self, number: int) -> Path:
        """Where the part of a chunk is."""
        return part_path(self.work, number)

    def encode(self, chunk: Chunk) -> None:
        """Write the part of a chunk."""
        documents, read = parse_chunk(chunk, self.options.read)
        ids = [document.id for document in documents]
        sides = id_hashes(ids, "split")
        keys = id_hashes(ids, f"order {self.options.seed}")
        lost = self._is_dropped(sides)
        limit = self.options.validation_fraction * 2**KEY_BITS
        validation = np.array([side < limit for side in sides.tolist()], bool)
        counts = {
            "input": self.inputs.index(chunk.path),
            "read": read.record(),
            "dropped": {
                "documents": int(lost.sum()),
                "characters": sum(len(documents[i].text) for i in np.flatnonzero(lost)),
            },
        }
        splits = []
        for number, split in enumerate(SPLITS):
            chosen = np.flatnonzero((validation == number) & ~lost)
            chosen = chosen[np.argsort(keys[chosen], kind="stable")]
            encoded = self.encoder.encode([documents[i] for i in chosen.tolist()])
            splits.append(Documents(keys[chosen], encoded.lengths_D, encoded.tokens_N))
            byte_counts = encoded.byte_counts.tolist()
            counts[split] = {"documents": len(chosen), "byte_counts": byte_counts}
        self.work.mkdir(exist_ok=True)
        write_part(self.part(chunk.number), splits, counts, self._temporary)

    def set_part_count(self, count: int) -> None:
        """State how many parts there are; only one rank does."""
        self.work.mkdir(exist_ok=True)
        artifacts.write_json(self.work / "parts.json", {"parts": count})

    @property
    def parts(self) -> list[Path]:
        """Every part, once their number is known."""
        count = artifacts.read_json(self.work / "parts.json")["parts"]
        return [self.part(number) for number in range(count)]

    def missing_parts(self) -> list[Path] | None:
        """The parts that are still to be made; None if nobody knows how many there are."""
        if not (self.work / "parts.json").exists():
            return None
        there = {path.name for path in self.work.iterdir()}
        return [path for path in self.parts if path.name not in there]

    @cached_property
    def counts(self) -> dict:
        """What was counted in all parts together."""
        total = {"read": ReadCounts(), "dropped": Counter(), "held": Counter()}
        total |= {split: {"documents": 0, "byte_counts": np.zeros(256, int)} for split in SPLITS}
        for part in self.parts:
            found = read_counts(part)
            read = ReadCounts.of(found["read"])
            total["read"].add(read)
            total["dropped"].update(found["dropped"])
            total["held"][self.inputs[found["input"]]] += read.documents
            for split in SPLITS:
                total[split]["documents"] += found[split]["documents"]
                total[split]["byte_counts"] += np.array(found[split]["byte_counts"])
        return total

    def check_counts(self) -> None:
        """Refuse an input file, or a split, that holds nothing.

        Raises:
            DataError: names it.
        """
        require_documents(self.inputs, self.counts["held"])
        documents = {split: self.counts[split]["documents"] for split in SPLITS}
        for split, count in documents.items():
            if not count:
                raise DataError(
                    f"none of the {sum(documents.values())} documents falls into {split} at a "
                    f"validation fraction of {self.options.validation_fraction}; give more data "
                    "or another fraction"
                )

    def plan(self, split: str, map_windows: Callable[[list[tuple]], Iterable[int]]) -> SplitPlan:
        """Where everything of a split goes; `map_windows` maps `window_rows`."""
        options = self.options
        return packing.plan_split(self.parts, split, options.context, options.packing, map_windows)

    def window_rows(self, split: str, low: int, high: int) -> int:
        """Rows of one window."""
        return packing.window_rows(self.parts, split, low, high, self.options.context)

    def pack(self, plan: SplitPlan, shard: int) -> None:
        """Write a shard, and then the mark that it is done."""
        pad, size = self.tokenizer.pad_token_id, self.tokenizer.vocab_size
        schema = shard_schema(self.options.context, size, {**self.request, "split": plan.split})
        target = self.partial / plan.split / f"shard-{shard:05d}.arrow"
        target.parent.mkdir(exist_ok=True)
        scratch = self.work / f"{plan.split}-{target.name}.{self._temporary}"
        token_counts = np.zeros(size, np.int64)

        def counted() -> Iterable[packing.Packed]:
            for stretch in packing.shard_stretches(plan, self.parts, shard, pad):
                token_counts[:] += count_values(stretch.tokens_N, size)
                if stretch.lengths_R is not None:
                    room = len(stretch.lengths_R) * plan.context
                    token_counts[pad] -= room - int(stretch.lengths_R.sum())
                yield stretch

        packing.write_shard(scratch, schema, counted(), pad)
        (entry,) = artifacts.describe_files(self.work, [scratch.name]).values()
        scratch.replace(target)
        first, end = plan.shard_rows(shard)
        mark = {"file": entry, "rows": end - first, "token_counts": token_counts.tolist()}
        own = self.work / f"{self._mark(plan, shard).name}.{self._temporary}"
        artifacts.write_json(own, mark)
        own.replace(self._mark(plan, shard))

    def missing_shards(self, plans: list[SplitPlan]) -> list[tuple[SplitPlan, int]]:
        """The shards that are still to be made."""
        there = {path.name for path in self.work.iterdir()}
        shards = [(plan, shard) for plan in plans for shard in range(plan.shards)]
        return [each for each in shards if self._mark(*each).name not in there]

    def seal(self, plans: list[SplitPlan]) -> None:
        """Write the manifest and the completion mark.

        Raises:
            AssertionError: the shards do not spell what was read, byte value by byte value.
        """
        files, splits = {}, {}
        for plan in plans:
            shards = [artifacts.read_json(self._mark(plan, s)) for s in range(plan.shards)]
            names = [f"{plan.split}/shard-{number:05d}.arrow" for number in range(plan.shards)]
            files |= {name: shard["file"] for name, shard in zip(names, shards, strict=True)}
            tokens = sum(np.array(shard["token_counts"]) for shard in shards)
            spelled = spelled_bytes(self.tokenizer, tokens)
            counted = self.counts[plan.split]["byte_counts"]
            assert (spelled == counted).all(), f"{plan.split} does not spell what was read"
            splits[plan.split] = {
                "documents": self.counts[plan.split]["documents"],
                "bytes": int(counted.sum()),
                "byte_counts": {chr(b): int(n) for b, n in enumerate(counted) if n},
                "rows": plan.rows,
                "tokens": plan.tokens,
                "shards": [
                    {"file": name, "rows": shard["rows"]}
                    for name, shard in zip(names, shards, strict=True)
                ],
            }
        copied = _copy_tokenizer(self.tokenizer_dir, self.partial / TOKENIZER_DIR)
        sizes = np.array([len(text) for text in self.tokenizer.token_texts], np.int64)
        _write_array(sizes, self.partial / TOKEN_BYTES)
        others = [*(f"{TOKENIZER_DIR}/{name}" for name in copied), TOKEN_BYTES]
        files |= artifacts.describe_files(self.partial, others)
        record = {
            **self.request,
            "reading": self.counts["read"].record(),
            "dropped": dict(self.counts["dropped"]),
            "splits": splits,
        }
        artifacts.seal(self.partial, record, files)

    def publish(self, target: Path) -> None:
        """Leave only what the manifest lists, and give the folder its name."""
        listed = {name.split("/")[0] for name in artifacts.read_manifest(self.partial)["files"]}
        for path in self.partial.iterdir():  # the work, and what killed processes left
            if path.is_dir() and path.name not in listed:
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in {*listed, artifacts.MANIFEST, artifacts.COMPLETE}:
                path.unlink(missing_ok=True)
        artifacts.publish(self.partial, target)

    def remove_temporaries(self) -> None:
        """Remove what killed processes left; only where no other rank can be at work."""
        for path in self.work.glob(f"*.{TEMPORARY}-*"):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove everything that was made."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _is_dropped(self, sides: np.ndarray) -> np.ndarray:
        if not len(self.dropped):
            return np.zeros(len(sides), bool)
        places = np.searchsorted(self.dropped, sides)
        return self.dropped[np.minimum(places, len(self.dropped) - 1)] == sides

    @property
    def _temporary(self) -> str:
        return f"{TEMPORARY}-{self.rank}-{os.getpid()}"

    def _mark(self, plan: SplitPlan, shard: int) -> Path:
        return self.work / f"{plan.split}-{shard:05d}.json"


def _write_array(array: np.ndarray, path: Path) -> None:
    """Through memory: `np.save` into a file reports a full disk without its errno."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getvalue())


def _copy_tokenizer(source: Path, target: Path) -> list[str]:
    target.mkdir(exist_ok=True)
    copied = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, target / name)
    return copied
