"""Ids of documents. The id alone decides the split, the sample and the order."""

import hashlib
from collections.abc import Iterable

import numpy as np

from s2t2_dist.errors import DataError


def id_hash(identifier: str, purpose: str) -> int:
    """A 64-bit hash of a document's id. Hashes for different purposes are independent."""
    return int(id_hashes([identifier], purpose)[0])


def id_hashes(identifiers: Iterable[str], purpose: str) -> np.ndarray:
    """`id_hash` of each id, (ids,) uint64."""
    start = hashlib.blake2b(digest_size=8, person=purpose.encode())
    digests = bytearray()
    for identifier in identifiers:
        state = start.copy()
        state.update(identifier.encode())
        digests += state.digest()
    return np.frombuffer(bytes(digests), "<u8")


def text_id(text: str) -> str:
    """The id of a document that has none: the sha256 of its text."""
    return hashlib.sha256(text.encode()).hexdigest()


def fasta_id(header: bytes) -> str:
    """The first word of a FASTA header without its `>`; empty if there is none."""
    words = header.split(maxsplit=1)
    return words[0].decode("utf-8", "backslashreplace") if words else ""


def json_id(record: dict, name: str, text: str) -> str:
    """The field `name` of a record, or the hash of its text if that is missing, null or empty.

    Raises:
        ValueError: a field that was asked for is missing, or is neither text nor a number.
    """
    if not name or (name == "id" and "id" not in record):
        return text_id(text)
    if name not in record:
        raise ValueError(
            f"the id field {name!r} is missing; name another one with --id-field, or '' to name "
            "documents by the hash of their text"
        )
    value = record[name]
    if isinstance(value, bool | list | dict):
        raise ValueError(
            f"the id field {name!r} is neither text nor a number ({str(value)[:30]}); name "
            "another one with --id-field, or '' to name documents by the hash of their text"
        )
    if value is None or value != value or not str(value).strip():  # null, NaN (pandas), blank
        return text_id(text)
    return str(value)


# So many documents of a thousand, and in any case FEW, may have the id of another one.
SHARED_PER_MILLE = 1
FEW = 10


def shared_ids_note(shared: int, example: str) -> str:
    """What a summary says of documents whose id another document with another text has."""
    return f"{shared:,} documents share their id with another one (such as {example!r})"


def require_few_shared(shared: int, documents: int, example: str) -> None:
    """Check that ids tell documents apart.

    Args:
        shared: documents whose id an earlier document with another text has.
        example: one such id.

    Raises:
        DataError: they are more than a few.
    """
    if shared > max(FEW, documents * SHARED_PER_MILLE // 1000):
        raise DataError(
            f"{shared:,} of {documents:,} documents have the id of another one, such as "
            f"{example!r}; split, order and sample follow the id, so give ids that differ "
            "(--id-field; in a FASTA, the first word of the header), or --id-field '' for the "
            "hash of the text"
        )
