"""The ids of a split without a build: `s2t2 data ids`."""

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_prep.ids import id_hash, require_few_shared
from data_prep.options import is_validation, require_fraction
from data_prep.progress import reading_progress
from data_prep.readers import ReadOptions, read_documents
from s2t2_dist.data.shards import SPLITS
from s2t2_dist.errors import DataError


def split_ids(
    inputs: Sequence[Path], split: str, fraction: float, read: ReadOptions
) -> Iterator[str]:
    """Yield the id of each document of a split, in the order of the input.

    Takes 16 bytes of memory for each document.

    Raises:
        DataError: bad input or fraction; an id that is no line; or, at the end, many documents
            share their id.
    """
    require_fraction(fraction)
    ids, texts = array("Q"), array("Q")
    with reading_progress("Listing") as open_file:
        for identifier, text in read_documents(inputs, read, open_file=open_file):
            ids.append(id_hash(identifier, "shared"))
            texts.append(id_hash(text, "shared"))
            if SPLITS[is_validation(identifier, fraction)] != split:
                continue
            if len(identifier.splitlines()) > 1:
                raise DataError(
                    f"the id {identifier!r} has a line break and cannot be listed; name another "
                    "field with --id-field"
                )
            yield identifier
    _require_few_shared(np.array(ids), np.array(texts))


def _require_few_shared(ids: np.ndarray, texts: np.ndarray) -> None:
    order = np.lexsort((texts, ids))
    same = np.diff(ids[order]) == 0
    others = np.flatnonzero(same & (np.diff(texts[order]) != 0)) + 1
    if len(others):
        shown = f"that of document {int(order[others[0]]) + 1}"
        require_few_shared(len(others), shown, len(ids))
