"""Documents, how they are read, and the counts of everything that is changed or left out."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from s2t2_dist.errors import DataError

SHOWN_PLACES = 10


class Document(NamedTuple):
    """One protein or one text."""

    id: str
    text: str


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    Attributes:
        strict: raise an error for what is otherwise only counted: bytes of a FASTA that are no
            amino acid letter, empty documents, and records without an id.
        field: JSON field or Parquet column that holds the text.
        id_field: the one that holds the id; with "" the hash of the text is the id of every
            document, of a FASTA too.
        skip_bad: leave out and count each record that would be an error.
    """

    strict: bool = False
    field: str = "text"
    id_field: str = "id"
    skip_bad: bool = False

    def request(self) -> dict:
        """The options as part of a request; the later ones only where they are not the default."""
        later = {"id_field": self.id_field, "skip_bad": self.skip_bad}
        changed = {key: value for key, value in later.items() if value != getattr(DEFAULT, key)}
        return {"strict": self.strict, "field": self.field} | changed


DEFAULT = ReadOptions()


@dataclass
class ReadCounts:
    """Counts of what was read, left out and changed.

    Attributes:
        documents, characters: kept.
        empty: documents without text, left out.
        unnamed: FASTA records without an id, kept; the hash of the sequence is their id.
        stops: `*` at the end of a sequence, left out.
        lower_case: letters read as upper case.
        illegal: bytes that are no amino acid letter, left out; how often each occurred.
        places: file and line of the first of these bytes, at most SHOWN_PLACES.
        comments: lines of a FASTA that begin with `;` or `#`, and titles of PIR records, left out.
        bad: records that could not be read, left out (`skip_bad`).
        bad_places: file and line of the first of them, at most SHOWN_PLACES.
    """

    documents: int = 0
    characters: int = 0
    empty: int = 0
    unnamed: int = 0
    stops: int = 0
    lower_case: int = 0
    illegal: Counter = field(default_factory=Counter)
    places: list[str] = field(default_factory=list)
    comments: int = 0
    bad: int = 0
    bad_places: list[str] = field(default_factory=list)

    def add(self, other: "ReadCounts") -> None:
        """Add the counts of the next part of the input."""
        for name, value in vars(other).items():
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
        self.illegal.update(other.illegal)
        self.places = (self.places + other.places)[:SHOWN_PLACES]
        self.bad_places = (self.bad_places + other.bad_places)[:SHOWN_PLACES]

    def add_illegal(self, path: Path, line: int, shown: list[str]) -> None:
        """Count bytes of a line that are no amino acid letter."""
        self.illegal.update(map(repr, shown))
        self.places = [*self.places, f"{path.name} line {line}"][:SHOWN_PLACES]

    @classmethod
    def of(cls, record: dict) -> "ReadCounts":
        """The inverse of `record`."""
        return cls(**{**record, "illegal": Counter(record.get("illegal", {}))})

    def record(self) -> dict:
        """The counts as a JSON object, for the manifest."""
        return {**asdict(self), "illegal": dict(sorted(self.illegal.items()))}

    def summary(self) -> str:
        """One line on what was changed or left out; empty if nothing was."""
        shown = ", ".join(f"{byte} {count:,}" for byte, count in sorted(self.illegal.items()))
        parts = [
            f"{self.bad:,} bad records left out ({_places(self.bad_places)})" * bool(self.bad),
            f"{self.illegal.total():,} bytes that are no amino acid letter left out ({shown}; "
            f"{_places(self.places)})" * bool(self.illegal),
            f"{self.empty:,} empty documents left out" * bool(self.empty),
            f"{self.unnamed:,} records without an id" * bool(self.unnamed),
            f"{self.stops:,} stops '*' left out" * bool(self.stops),
            f"{self.comments:,} lines of comments left out" * bool(self.comments),
            f"{self.lower_case:,} lower-case letters read as upper case" * bool(self.lower_case),
        ]
        return "; ".join(filter(None, parts))


def _places(places: list[str]) -> str:
    return ", ".join(places) + " ..." * (len(places) == SHOWN_PLACES)


def bad_record(
    path: Path, line: int, problem: str, options: ReadOptions, counts: ReadCounts
) -> None:
    """Count a record that cannot be read.

    Raises:
        DataError: bad records are not skipped; names the file, the line and the problem.
    """
    if not options.skip_bad:
        raise DataError(f"{path} line {line}: {problem}")
    counts.bad += 1
    counts.bad_places = [*counts.bad_places, f"{path.name} line {line}"][:SHOWN_PLACES]
