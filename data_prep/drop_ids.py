"""A list of documents to leave out, as search tools, spreadsheets and `data ids` write it.

Each line names a document: by the whole line, the text before a comma or semicolon, or the first
word, whichever is the id of a document. Where a line has a tab, its first column counts; quotes
and a `>` before the id are left out. `sp|ACC|NAME` may be called ACC or NAME, in the list or in
the input, and `pdb|ENTRY|CHAIN` ENTRY_CHAIN. The file may be compressed, and in UTF-8, UTF-16 or
UTF-32.
"""

from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.formats import decoded
from data_prep.ids import aliases, id_hashes
from s2t2_dist.errors import DataError

QUOTES = "\"'"
# More readings than any line has.
READINGS = 4
LINES_AT_ONCE = 10_000


class _Names(NamedTuple):
    """The names of all distinct lines, N of them, and the L lines.

    Attributes:
        hashes_N: their split hashes, ascending, uint64.
        readings_N: number of the reading that each belongs to, int64.
        firsts_N: split hash of that reading, of which the name may be an alias.
        listed_L: whether a line is the first of its kind and no comment, bool.
    """

    hashes_N: np.ndarray
    readings_N: np.ndarray
    firsts_N: np.ndarray
    listed_L: np.ndarray


class DropList:
    """The lines of a list, and which documents they name.

    It holds hashes, 25 bytes for each name. Lines with the same readings count once. A reading has
    a number: that of its line, from 0, times READINGS plus its place among the line's readings.

    Raises:
        DataError: the file is damaged or lists nothing.
    """

    def __init__(self, path: Path):
        self.path = path
        if next(_lines(path), None) is None:
            raise DataError(f"{path} lists no id; leave out --drop-ids if nothing is to be dropped")

    @cached_property
    def _names(self) -> _Names:
        """The names of the file's lines; a first line of its kind stands for the later ones."""
        keys, hashes, readings, first_names = (array("Q") for _ in range(4))
        comments = bytearray()
        all_lines = _lines(self.path)
        while lines := list(islice(all_lines, LINES_AT_ONCE)):
            read = [_readings_of(line) for line in lines]
            names, firsts, codes = [], [], []
            for number, line in enumerate(read, start=len(keys)):
                for place, reading in enumerate(line):
                    for name in (reading, *aliases(reading)):
                        names.append(name)
                        firsts.append(reading)
                        codes.append(number * READINGS + place)
            hashes.frombytes(id_hashes(names, "split").tobytes())
            first_names.frombytes(id_hashes(firsts, "split").tobytes())
            readings.extend(codes)
            keys.frombytes(id_hashes(map("\0".join, read), "split").tobytes())
            comments += bytes(line.startswith("#") for line in lines)
        keys_L, hashes_N, readings_N, firsts_N = (
            np.array(each, np.uint64) for each in (keys, hashes, readings, first_names)
        )
        distinct_L = np.zeros(len(keys_L), bool)
        distinct_L[np.unique(keys_L, return_index=True)[1]] = True
        order = np.argsort(hashes_N, kind="stable")
        order = order[distinct_L[readings_N[order] // READINGS]]
        columns = (each[order] for each in (hashes_N, readings_N.astype(np.int64), firsts_N))
        listed_L = distinct_L & ~np.frombuffer(comments, bool)
        return _Names(*columns, listed_L)

    def match(self, ids: Sequence[str], split_hashes: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Which documents the list names.

        Args:
            split_hashes: `id_hashes(ids, "split")`.

        Returns:
            A mask over the documents, bool, and the readings of lines that name them.
        """
        dropped, readings = self._named(split_hashes)
        others = [(i, name) for i, each in enumerate(ids) if "|" in each for name in aliases(each)]
        if others:
            owners = np.array([i for i, _ in others])
            named, found = self._named(id_hashes([name for _, name in others], "split"))
            dropped[owners[named]] = True
            readings |= found
        return dropped, sorted(readings)

    def _named(self, hashes: np.ndarray) -> tuple[np.ndarray, set[int]]:
        """Which hashes are of names in the list, bool, and the readings that these belong to."""
        first, end = (
            np.searchsorted(self._names.hashes_N, hashes, side) for side in ("left", "right")
        )
        named = first < end
        spans = zip(first[named].tolist(), end[named].tolist(), strict=True)
        readings_N = self._names.readings_N
        return named, {code for low, high in spans for code in readings_N[low:high].tolist()}

    def check(self, readings: set[int]) -> tuple[int, int]:
        """Number of ids that are of documents, and of ids in all, without comments.

        Args:
            readings: what `match` returned for all documents.

        Raises:
            DataError: no line names a document, or one names two by different readings.
        """
        found: dict[int, int] = {}
        for reading in sorted(readings):
            number, place = divmod(reading, READINGS)
            if found.setdefault(number, place) != place:
                line = self._line(number)
                whole, part = (_readings_of(line)[p] for p in (found[number], place))
                raise DataError(
                    f"{self.path}: the line {line!r} may name the document {whole!r} or {part!r}, "
                    "and there are both; write the one that is meant in double quotes"
                )
        listed_L = self._names.listed_L.copy()
        if not found:
            first = self._line(int(listed_L.argmax()))
            raise DataError(
                f"none of the {int(listed_L.sum()):,} ids listed in {self.path} is the id of a "
                f"document (the first is {first!r}); list ids as `s2t2 data ids` prints them"
            )
        listed_L[list(found)] = False
        named = np.isin(self._names.readings_N, list(readings))
        count = len(np.unique(self._names.firsts_N[named]))
        return count, count + int(listed_L.sum())

    def _line(self, number: int) -> str:
        return next(islice(_lines(self.path), number, None))


def _readings_of(line: str) -> list[str]:
    """The ids that a line may stand for."""
    text = line[1:].strip() if line.startswith(">") else line
    if text and text[0] in QUOTES and (end := text.find(text[0], 1)) > 0:
        return [text[1:end].strip()]
    if "\t" in text:
        return [text.partition("\t")[0].strip(QUOTES + " ")]
    before = text.partition(";")[0].partition(",")[0].strip()
    words = (before or text).split()
    return list(dict.fromkeys([text, *filter(None, [before]), *words[:1]])) if text else []


def _lines(path: Path) -> Iterator[str]:
    """The lines that are not blank, stripped."""
    number = 1
    with path.open("rb") as raw:
        for text in _whole_lines(decoded(path, raw)):
            try:
                lines = text.decode().splitlines()
            except UnicodeDecodeError as error:
                number += text.count(b"\n", 0, error.start)
                raise DataError(
                    f"{path} line {number}: not UTF-8 text; convert the file to UTF-8"
                ) from None
            yield from filter(None, map(str.strip, lines))
            number += text.count(b"\n")


def _whole_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """The blocks, cut anew after a line end."""
    held = []
    for block in blocks:
        before, end, after = block.rpartition(b"\n")
        if end:
            yield b"".join([*held, before, end])
            held = []
        held.append(after)
    yield b"".join(held)
