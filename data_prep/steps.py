"""The pieces of work of a build, which any process can do: each writes one file, atomically."""

import io
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep import packing
from data_prep.drop_ids import DropList
from data_prep.encode import Encoder, count_values, silent_tokens, spelled_bytes
from data_prep.options import BuildOptions
from data_prep.packing import KEY_BITS, SplitPlan
from data_prep.parts import Documents, part_path, write_part
from data_prep.progress import OpenFile, reading_progress
from data_prep.readers import id_hashes, parse_chunk
from data_prep.requests import beside, is_folder_of
from data_prep.sources import Chunk, open_binary, read_chunks
from data_prep.tokenizer import LoadedTokenizer, load_tokenizer
from data_prep.totals import Totals, check_totals, nucleotides, read_totals, reading_record
from s2t2_dist import artifacts
from s2t2_dist.data.shards import SPLITS, TOKEN_BYTES, TOKENIZER_DIR, shard_schema
from s2t2_dist.errors import DataError, S2T2Error

# Files copied from the tokenizer's folder, which may be a model folder with weights.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
TEMPORARY = "tmp"


@dataclass(frozen=True)
class Steps:
    """The work of a build, in a folder that its processes share.

    Args:
        request: everything that decides the result; the manifest and every shard record it.
        partial: the shared folder.
        rank: part of the names of temporary files, so that machines do not share one.
    """

    tokenizer_dir: Path
    options: BuildOptions
    request: dict
    inputs: tuple[Path, ...]
    partial: Path
    rank: int

    @cached_property
    def tokenizer(self) -> LoadedTokenizer:
        """The tokenizer, read once in each process."""
        return load_tokenizer(self.tokenizer_dir)

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder, made once in each process."""
        return Encoder(self.tokenizer, self.options.characters)

    @cached_property
    def drop_list(self) -> DropList | None:
        """The documents to leave out."""
        return self.options.drop_ids and DropList(self.options.drop_ids)

    @property
    def work(self) -> Path:
        """The folder for everything that is not part of the result."""
        return self.partial / "work"

    def part(self, number: int) -> Path:
        """The path of the part of a chunk."""
        return part_path(self.work, number)

    def chunks(self, open_file: OpenFile = open_binary) -> Iterator[Chunk]:
        """The chunks of the input, in order."""
        read = self.options.read
        return read_chunks(self.inputs, None, open_file, (read.field, read.id_field))

    def encode(self, chunk: Chunk) -> None:
        """Parse and encode a chunk, and write its part."""
        documents, read = parse_chunk(chunk, self.options.read)
        ids = [document.id for document in documents]
        split_hashes = id_hashes(ids, "split")
        keys = self._keys(ids)
        dropped, listed = np.zeros(len(ids), bool), []
        if self.drop_list:
            dropped, listed = self.drop_list.match(ids, split_hashes)
        limit = self.options.validation_fraction * 2**KEY_BITS
        validation = np.array([each < limit for each in split_hashes.tolist()], bool)
        counts = {
            "input": self.inputs.index(chunk.path),
            "kind": chunk.kind,
            "read": read.record(),
            "listed": listed,
            "dropped": {
                "documents": int(dropped.sum()),
                "characters": sum(len(documents[i].text) for i in np.flatnonzero(dropped)),
            },
        }
        splits = []
        for number, split in enumerate(SPLITS):
            chosen = np.flatnonzero((validation == number) & ~dropped)
            chosen = chosen[np.argsort(keys[chosen], kind="stable")]
            try:
                encoded = self.encoder.encode([documents[i] for i in chosen.tolist()])
            except DataError as error:
                raise DataError(f"{chunk.path}: {error}") from None
            splits.append(Documents(keys[chosen], encoded.lengths_D, encoded.tokens_N))
            byte_counts = encoded.byte_counts.tolist()
            counts[split] = {"documents": len(chosen), "byte_counts": byte_counts}
        self._require_folder()
        self.work.mkdir(exist_ok=True)
        write_part(self.part(chunk.number), splits, counts, self._temporary)

    def set_part_count(self, count: int) -> None:
        """Record how many parts there are; rank 0 calls this when it has read the whole input."""
        self.work.mkdir(exist_ok=True)
        artifacts.write_json(self.work / "parts.json", {"parts": count})

    @property
    def parts(self) -> list[Path]:
        """Paths of all parts; their number must have been recorded."""
        count = artifacts.read_json(self.work / "parts.json")["parts"]
        return [self.part(number) for number in range(count)]

    def missing_parts(self) -> list[int] | None:
        """Numbers of the parts that are still to be made; None until they were counted."""
        if not (self.work / "parts.json").exists():
            return None
        there = {path.name for path in self.work.iterdir()}
        return [number for number, path in enumerate(self.parts) if path.name not in there]

    @cached_property
    def totals(self) -> Totals:
        """The counts of all parts together."""
        return read_totals(self.parts, self.inputs, self._id_of)

    def check_counts(self) -> None:
        """Check that every input file and every split has documents; see `check_totals`."""
        if self.drop_list:
            self.drop_list.check(self.totals.listed)
        check_totals(self.totals, self.inputs, self.options.validation_fraction)

    def _id_of(self, part: int, key: int) -> str:
        """The id of a document that has this key, from the input."""
        with reading_progress("Looking up an id in") as open_file:
            chunk = next(each for each in self.chunks(open_file) if each.number == part)
        ids = [document.id for document in parse_chunk(chunk, self.options.read)[0]]
        return ids[int(np.flatnonzero(self._keys(ids) == key)[0])]

    def _keys(self, ids: list[str]) -> np.ndarray:
        return id_hashes(ids, f"order {self.options.seed}")

    def plan(self, split: str, map_windows: Callable[[list[tuple]], Iterable[int]]) -> SplitPlan:
        """The layout of a split; for `map_windows` see `packing.plan_split`."""
        options = self.options
        return packing.plan_split(self.parts, split, options.context, options.packing, map_windows)

    def window_rows(self, split: str, low: int, high: int) -> int:
        """Number of best-fit rows of one window."""
        return packing.window_rows(self.parts, split, low, high, self.options.context)

    def pack(self, plan: SplitPlan, shard: int) -> None:
        """Write a shard, and then the JSON file that marks it as done."""
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
        self._require_folder()
        scratch.replace(target)
        first, end = plan.shard_rows(shard)
        mark = {"file": entry, "rows": end - first, "token_counts": token_counts.tolist()}
        own = self.work / f"{self._mark(plan, shard).name}.{self._temporary}"
        artifacts.write_json(own, mark)
        own.replace(self._mark(plan, shard))

    def is_packed(self, plan: SplitPlan, shard: int) -> bool:
        """Whether a shard is made."""
        return self._mark(plan, shard).exists()

    def seal(self, plans: list[SplitPlan]) -> None:
        """Write the tokenizer, `token_bytes.npy`, the manifest and the completion mark.

        Raises:
            AssertionError: the shards do not spell each byte value as often as the input has it.
        """
        files, splits = {}, {}
        for plan in plans:
            shards = [artifacts.read_json(self._mark(plan, s)) for s in range(plan.shards)]
            names = [f"{plan.split}/shard-{number:05d}.arrow" for number in range(plan.shards)]
            files |= {name: shard["file"] for name, shard in zip(names, shards, strict=True)}
            tokens = sum(np.array(shard["token_counts"]) for shard in shards)
            spelled = spelled_bytes(self.tokenizer, tokens)
            counted = self.totals.splits[plan.split].byte_counts
            assert (spelled == counted).all(), f"{plan.split} shards do not spell what was read"
            documents = self.totals.splits[plan.split].documents
            assert silent_tokens(self.tokenizer, tokens) == documents, "a token spells nothing"
            splits[plan.split] = {
                "documents": documents,
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
            **reading_record(self.totals.read, self.totals.shared),
            "dropped": self._dropped_record(),
            "splits": splits,
            **nucleotides(self.totals),
        }
        artifacts.seal(self.partial, record, files)

    def _dropped_record(self) -> dict:
        """Documents and characters left out; with a list also lines in it and those found."""
        record = dict(self.totals.dropped)
        if self.drop_list:
            found, listed = self.drop_list.check(self.totals.listed)
            record |= {"ids_found": found, "ids_listed": listed}
        return record

    def publish(self, target: Path) -> None:
        """Remove what the manifest does not list, and rename the folder to `target`."""
        listed = {name.split("/")[0] for name in artifacts.read_manifest(self.partial)["files"]}
        for path in self.partial.iterdir():  # the work folder, and leftovers of killed processes
            if path.is_dir() and path.name not in listed:
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in {*listed, artifacts.MANIFEST, artifacts.COMPLETE}:
                path.unlink(missing_ok=True)
        artifacts.publish(self.partial, target)
        shutil.rmtree(beside(target, "ranks"), ignore_errors=True)

    def remove_temporaries(self) -> None:
        """Remove leftovers of killed processes; safe only if no other rank runs."""
        for path in self.work.glob(f"*.{TEMPORARY}-*"):
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the shared folder."""
        shutil.rmtree(self.partial, ignore_errors=True)

    def _require_folder(self) -> None:
        """Raise an S2T2Error if another build has taken the shared folder over."""
        if not is_folder_of(self.partial, self.request):
            raise S2T2Error(
                f"{self.partial} was removed or replaced by another build while this one ran; run "
                "this command again when that has ended"
            )

    @property
    def _temporary(self) -> str:
        return f"{TEMPORARY}-{self.rank}-{os.getpid()}"

    def _mark(self, plan: SplitPlan, shard: int) -> Path:
        return self.work / f"{plan.split}-{shard:05d}.json"


def _write_array(array: np.ndarray, path: Path) -> None:
    """Write through memory, because `np.save` to a file loses the errno of a full disk."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getvalue())


def _copy_tokenizer(source: Path, target: Path) -> list[str]:
    target.mkdir(exist_ok=True)
    copied = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in copied:
        shutil.copyfile(source / name, target / name)
    return copied
