"""A list of documents to leave out, as search tools, spreadsheets and `data ids` write it.

Each line names a document: by the whole line, the text before a comma or semicolon, or the first
word, whichever is the id of a document. Where a line has a tab, its first column counts; quotes
and a `>` before the id are left out. `sp|ACC|NAME` may be called ACC or NAME, in the list or in
the input. The file may be compressed, and in UTF-8, UTF-16 or UTF-32.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep.formats import decoded
from data_prep.ids import aliases, id_hashes
from s2t2_dist.errors import DataError

QUOTES = "\"'"
# More readings than any line has.
READINGS = 4


class DropList:
    """The lines of a list, and which documents they name.

    Attributes:
        lines: distinct lines, in the file's order, stripped.

    Raises:
        DataError: the file is damaged or lists nothing.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines = list(dict.fromkeys(_lines(path)))
        if not self.lines:
            raise DataError(f"{path} lists no id; leave out --drop-ids if nothing is to be dropped")

    @cached_property
    def _readings(self) -> tuple[np.ndarray, np.ndarray]:
        """Split hashes of all names, ascending, uint64; and the reading that each belongs to.

        A reading is a line's number times READINGS plus the place among that line's readings.
        """
        names, readings = [], []
        for number, line in enumerate(self.lines):
            for place, reading in enumerate(_readings_of(line)):
                for name in (reading, *aliases(reading)):
                    names.append(name)
                    readings.append(number * READINGS + place)
        hashes_N = id_hashes(names, "split")
        order = np.argsort(hashes_N, kind="stable")
        return hashes_N[order], np.array(readings, np.int64)[order]

    def match(self, ids: Sequence[str], split_hashes: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Which documents the list names.

        Args:
            split_hashes: `id_hashes(ids, "split")`.

        Returns:
            A mask over the documents, bool, and the readings of lines that name them.
        """
        hashes_N, readings_N = self._readings
        dropped = np.isin(split_hashes, hashes_N)
        found = [split_hashes[dropped]]
        others = [(i, name) for i, each in enumerate(ids) if "|" in each for name in aliases(each)]
        if others:
            owners = np.array([i for i, _ in others])
            hashes = id_hashes([name for _, name in others], "split")
            named = np.isin(hashes, hashes_N)
            dropped[owners[named]] = True
            found.append(hashes[named])
        named = np.isin(hashes_N, np.concatenate(found))
        return dropped, sorted(set(readings_N[named].tolist()))

    def check(self, readings: set[int]) -> tuple[int, int]:
        """Number of lines that name a document, and of lines in all, without comments.

        Args:
            readings: what `match` returned for all documents.

        Raises:
            DataError: no line names a document, or one names two by different readings.
        """
        found: dict[int, int] = {}
        for reading in sorted(readings):
            number, place = divmod(reading, READINGS)
            if found.setdefault(number, place) != place:
                whole, part = (_readings_of(self.lines[number])[p] for p in (found[number], place))
                raise DataError(
                    f"{self.path}: the line {self.lines[number]!r} may name the document "
                    f"{whole!r} or {part!r}, and there are both; write the one that is meant in "
                    "double quotes"
                )
        listed = [
            line
            for number, line in enumerate(self.lines)
            if number in found or not line.startswith("#")
        ]
        if not found:
            raise DataError(
                f"none of the {len(listed):,} ids listed in {self.path} is the id of a document "
                f"(the first is {(listed or self.lines)[0]!r}); list ids as `s2t2 data ids` "
                "prints them"
            )
        return len(found), len(listed)


def _readings_of(line: str) -> list[str]:
    """The ids that a line may stand for."""
    text = line[1:].strip() if line.startswith(">") else line
    if text[:1] in QUOTES and (end := text.find(text[0], 1)) > 0:
        return [text[1:end].strip()]
    if "\t" in text:
        return [text.partition("\t")[0].strip(QUOTES + " ")]
    before = text.partition(";")[0].partition(",")[0].strip()
    words = (before or text).split()
    return list(dict.fromkeys([text, *filter(None, [before]), words[0]]))


def _lines(path: Path) -> Iterator[str]:
    """The lines that are not blank, stripped."""
    with path.open("rb") as raw:
        text = b"".join(decoded(path, raw))
    try:
        lines = text.decode().splitlines()
    except UnicodeDecodeError as error:
        number = text.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} line {number}: not UTF-8 text; convert the file to UTF-8"
        ) from None
    yield from filter(None, map(str.strip, lines))
