"""The ids of a split without a build: `s2t2 data ids`."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.ids import SharedIds
from data_prep.options import is_validation, require_fraction
from data_prep.progress import reading_progress
from data_prep.readers import ReadCounts, ReadOptions, read_documents
from data_prep.totals import print_note, reading_record
from s2t2_dist.data.shards import SPLITS
from s2t2_dist.errors import DataError


def split_ids(
    inputs: Sequence[Path], split: str, fraction: float, read: ReadOptions
) -> Iterator[str]:
    """Yield the id of each document of a split, in the order of the input.

    Takes 16 bytes of memory for each document. Says at the end on stderr what was left out.

    Raises:
        DataError: bad input or fraction; an id that is no line; or, at the end, many documents
            share their id.
    """
    require_fraction(fraction)
    counts, shared = ReadCounts(), SharedIds()
    with reading_progress("Listing") as open_file:
        for identifier, text in read_documents(inputs, read, counts, open_file):
            shared.add(identifier, text)
            if SPLITS[is_validation(identifier, fraction)] != split:
                continue
            if len(identifier.splitlines()) > 1:
                raise DataError(
                    f"the id {identifier!r} has a line break and cannot be listed; name another "
                    "field with --id-field"
                )
            yield identifier
    shared.require_few()
    print_note(reading_record(counts, shared.found))
