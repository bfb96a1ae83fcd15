"""Ids of documents. The id alone decides the split, the sample and the order."""

import hashlib
from array import array
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


# So many documents may have the id of another one; of many documents, one of a thousand.
FEW_SHARED, SHARED_PER_MILLE = 10, 1


def require_few_shared(shared: int, example: str, documents: int) -> None:
    """Check that ids tell documents apart.

    Args:
        shared: documents whose id an earlier document with another text has.
        example: one such id.

    Raises:
        DataError: they are more than a few.
    """
    if shared > max(FEW_SHARED, documents * SHARED_PER_MILLE // 1000):
        raise DataError(
            f"at least {shared:,} of {documents:,} documents have the id of another one, such as "
            f"{example!r}; split, order and sample follow the id: give each document its own (in "
            "a FASTA the first word of the header; of JSON, name a field with --id-field), or "
            "take the hash of the text with --id-field ''"
        )


# Documents that `SharedIds` looks through at once; later an eighth of all ids.
SHARED_BLOCK = 1 << 18


class SharedIds:
    """Counts documents whose id an earlier document has, and whose text is not the first one's.

    Takes 16 bytes for each id, and four times that for moments.

    Attributes:
        documents: number of documents.
    """

    def __init__(self):
        self.documents = 0
        self._found, self._example = 0, ""
        self._ids, self._texts = np.empty(0, np.uint64), np.empty(0, np.uint64)  # of first ones
        self._new: list[str] = []
        self._new_texts = array("Q")

    def add(self, identifier: str, text: str) -> None:
        """Add the next document."""
        self.documents += 1
        self._new.append(identifier)
        self._new_texts.append(id_hash(text, "shared"))
        if len(self._new) >= max(SHARED_BLOCK, len(self._ids) // 8):
            self._look()

    @property
    def found(self) -> tuple[int, str]:
        """Their number, and the id of one; an empty one if there is none."""
        self._look()
        return self._found, self._example

    def require_few(self) -> None:
        """Raise a DataError if they are more than a few."""
        require_few_shared(*self.found, self.documents)

    def _look(self) -> None:
        """Look through the new documents."""
        known = len(self._ids)
        ids_D = np.concatenate([self._ids, id_hashes(self._new, "shared")])
        texts_D = np.concatenate([self._texts, np.array(self._new_texts, np.uint64)])
        order = np.argsort(ids_D, kind="stable")
        is_first = np.diff(ids_D[order], prepend=~ids_D[order[:1]]) != 0
        starts = np.flatnonzero(is_first)
        sizes = np.diff(np.append(starts, len(order)))
        firsts = order[starts]
        others = order[texts_D[order] != np.repeat(texts_D[firsts], sizes)]
        if len(others) and not self._found:
            self._example = self._new[int(others.min()) - known]
        self._found += len(others)
        self._ids, self._texts = ids_D[firsts], texts_D[firsts]
        self._new, self._new_texts = [], array("Q")


# The prefixes of a FASTA id whose second field is an accession, of its database alone; of `gi` the
# fourth is. (Of `lcl` anyone's.)
DATABASES = frozenset(["sp", "tr", "ref", "gb", "emb", "dbj", "tpg", "prf", "pir"])


def aliases(identifier: str) -> list[str]:
    """Other names of `sp|ACC|NAME` and its like, by which search tools call it."""
    fields = identifier.split("|")
    if len(fields) < 2:
        return []
    if fields[0] in ("sp", "tr"):
        return [field for field in fields[1:3] if field]
    if fields[0] == "pdb":  # an entry and its chain; BLAST writes 1ABC_A
        return ["_".join(fields[1:3])] if all(fields[1:3]) and len(fields) > 2 else []
    place = 3 if fields[0] == "gi" else 1 if fields[0] in DATABASES else len(fields)
    return [field for field in fields[place : place + 1] if field]
