"""What all parts of a build hold together: counts, the checks of them, and the summary line."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.documents import ReadCounts
from data_prep.ids import FEW_SHARED, SHARED_PER_MILLE, require_few_shared
from data_prep.parts import find_shared, read_counts
from data_prep.readers import require_documents
from s2t2_dist.data.shards import SPLITS
from s2t2_dist.errors import DataError

# Of the residues. Of a protein's, about a quarter are one of these letters.
NUCLEOTIDES, MANY = b"ACGTUN", 0.9


@dataclass
class SplitTotals:
    """Documents of a split, and how often each byte value occurs in their text, (256,) int64."""

    documents: int = 0
    byte_counts: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))


@dataclass
class Totals:
    """Counts of all parts.

    Attributes:
        read: what was read.
        dropped: documents and characters left out by a list of ids.
        listed: what `DropList.match` found of that list.
        held: documents by input file.
        kinds: formats of the input.
        splits: by name.
        shared: documents whose id an earlier document with another text has, and one such id.
    """

    read: ReadCounts
    dropped: Counter
    listed: set[int]
    held: Counter
    kinds: set[str]
    splits: dict[str, SplitTotals]
    shared: tuple[int, str] = (0, "")

    @property
    def documents(self) -> int:
        """Documents of all splits."""
        return sum(split.documents for split in self.splits.values())


def read_totals(
    parts: Sequence[Path], inputs: Sequence[Path], id_of: Callable[[int, int], str]
) -> Totals:
    """Add up the counts of all parts.

    Args:
        id_of: the id of the document of a part (by number) that has a key.
    """
    splits = {split: SplitTotals() for split in SPLITS}
    total = Totals(ReadCounts(), Counter(), set(), Counter(), set(), splits)
    for part in parts:
        found = read_counts(part)
        read = ReadCounts.of(found["read"])
        total.read.add(read)
        total.kinds.add(found["kind"])
        total.listed.update(found.get("listed", ()))
        total.dropped.update(found["dropped"])
        total.held[inputs[found["input"]]] += read.documents
        for name, split in splits.items():
            split.documents += found[name]["documents"]
            split.byte_counts += np.array(found[name]["byte_counts"])
    limit = max(FEW_SHARED, total.documents * SHARED_PER_MILLE // 1000)
    shared = find_shared(parts, limit)
    if shared.part is not None:
        total.shared = shared.count, id_of(shared.part, shared.key)
    return total


def check_totals(total: Totals, inputs: Sequence[Path], fraction: float) -> None:
    """Check that every input file and every split has documents, and that ids tell them apart.

    Raises:
        DataError: names the first that has none, or an id that many documents share.
    """
    require_documents(inputs, total.held)
    require_few_shared(*total.shared, total.documents)
    if not total.documents:
        raise DataError(
            f"all {total.dropped['documents']:,} documents are dropped by --drop-ids; give another "
            "list or more data"
        )
    for name, split in total.splits.items():
        if not split.documents:
            raise DataError(
                f"none of the {total.documents} documents falls into {name} at a validation "
                f"fraction of {fraction}; give more data or another fraction"
            )


def nucleotides(total: Totals) -> dict:
    """What the manifest says if the sequences of a FASTA look like DNA or RNA; else nothing."""
    if total.kinds != {"fasta"}:
        return {}
    return nucleotide_share(sum(split.byte_counts for split in total.splits.values()))


def nucleotide_share(byte_counts: np.ndarray) -> dict:
    """The same from how often each letter occurs, (256,) int64."""
    share = byte_counts[list(NUCLEOTIDES)].sum() / max(int(byte_counts.sum()), 1)
    return {"nucleotide_share": round(float(share), 4)} if share > MANY else {}


def reading_record(read: ReadCounts, shared: tuple[int, str]) -> dict:
    """What a manifest says of what was read; `shared` as in `Totals`."""
    keys = ("documents", "example")
    return {"reading": read.record(), "shared_ids": dict(zip(keys, shared, strict=True))}


def print_note(manifest: dict) -> None:
    """Print the `summary` on stderr, if there is one."""
    if note := summary(manifest):
        print(f"note: {note}", file=sys.stderr)


def summary(manifest: dict) -> str:
    """One line on what a result's input was, changed or left out; empty if nothing was."""
    shared = manifest.get("shared_ids", {"documents": 0})
    parts = [ReadCounts.of(manifest.get("reading", {})).summary()]
    if shared["documents"]:
        parts.append(
            f"{shared['documents']:,} documents have the id of another one, such as "
            f"{shared['example']!r}"
        )
    if "nucleotide_share" in manifest:
        parts.append(
            f"{manifest['nucleotide_share']:.1%} of the residues are A, C, G, T, U or N: is this "
            "DNA or RNA? It was read as protein; translate it first"
        )
    dropped = manifest.get("dropped", {})
    if "ids_listed" in dropped:
        parts.append(
            f"{dropped['ids_found']:,} of {dropped['ids_listed']:,} listed ids found, "
            f"{dropped['documents']:,} documents dropped"
        )
    return "; ".join(filter(None, parts))
