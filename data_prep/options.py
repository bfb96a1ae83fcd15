"""The options of a build, and the split."""

from dataclasses import dataclass, field
from pathlib import Path

from data_prep.ids import id_hash
from data_prep.packing import KEY_BITS, Packing
from data_prep.readers import ReadOptions
from s2t2_dist.errors import DataError

# Tokens. A record batch of 1024 rows is held in memory.
LONGEST_CONTEXT = 1 << 20


@dataclass(frozen=True)
class BuildOptions:
    """How rows are made.

    Attributes:
        context: tokens per row, 2 to LONGEST_CONTEXT.
        validation_fraction: share of the documents in the validation split, between 0 and 1;
            the hash of its id puts a document there.
        characters: encode every character as one token (the paper, section 3: "training domain
            tokens are bytes").
        seed: seed of the document order; the split does not depend on it.
        packing: how rows are filled; see `data_prep.packing`.
        drop_ids: file of documents to leave out; see `data_prep.drop_ids`.
        read: how the input is read.

    Raises:
        DataError: a value is out of range, or `drop_ids` is not a file.
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
            raise DataError(f"a context of {self.context} is too short; give at least 2 tokens")
        if self.context > LONGEST_CONTEXT:
            raise DataError(
                f"a context of {self.context} is too long; give at most {LONGEST_CONTEXT:,} tokens"
            )
        require_fraction(self.validation_fraction)
        if self.drop_ids and not self.drop_ids.is_file():
            raise DataError(f"{self.drop_ids} is not a file; give a file with one id per line")


def require_fraction(fraction: float) -> None:
    """Raise a DataError unless a validation fraction is between 0 and 1."""
    if not 0 < fraction < 1:
        raise DataError(
            f"a validation fraction of {fraction} is not between 0 and 1; give a share of the "
            "documents such as 0.01"
        )


def is_validation(identifier: str, fraction: float) -> bool:
    """Whether a document is in the validation split; depends on its id and the fraction alone."""
    return id_hash(identifier, "split") < fraction * 2**KEY_BITS
