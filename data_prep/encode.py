"""Documents -> token ids, with the proof that the ids spell the document.

Every document is checked: a BPE model that does not know a character drops it or
writes the unknown token, and a normalizer may change the text; both would make bits per byte wrong.

Index letters: D documents of a batch, N their token ids end to end, V tokens of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from data_prep.readers import Document
from data_prep.tokenizer import LoadedTokenizer
from s2t2_dist.errors import DataError
from s2t2_dist.shards import token_dtype

# Characters per call of the tokenizer: its result takes 100 bytes for each, and fits a cache so.
BATCH_CHARACTERS = 100_000


class Encoded(NamedTuple):
    """Documents end to end as token ids (uint16 or uint32), each closed by the end token."""

    tokens_N: np.ndarray
    lengths_D: np.ndarray


class Encoder:
    """Encodes batches of documents.

    Args:
        characters: one token for every character, instead of the tokenizer's own segmentation.
    """

    def __init__(self, tokenizer: LoadedTokenizer, characters: bool):
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._table = _CharacterTable(tokenizer) if characters else None
        self._sizes = np.array([len(text) for text in tokenizer.token_texts], np.int32)

    def encode(self, documents: Sequence[Document]) -> Encoded:
        """Encode documents in their order.

        Raises:
            DataError: the tokenizer cannot spell a document; names it and the character.
        """
        nothing = Encoded(np.empty(0, self._dtype), np.empty(0, np.int64))
        encoded = [nothing, *map(self._encode_batch, batches(documents))]
        return Encoded(*map(np.concatenate, zip(*encoded, strict=True)))

    def _encode_batch(self, documents: list[Document]) -> Encoded:
        texts = [document.text for document in documents]
        table = self._table
        rows = [table.encode(t) for t in texts] if table else _encode(self._tokenizer, texts)
        for row in rows:
            row.append(self._tokenizer.eos_token_id)
        lengths_D = np.fromiter(map(len, rows), np.int64, len(rows))
        tokens_N = np.fromiter(chain.from_iterable(rows), self._dtype, int(lengths_D.sum()))
        if not self._is_spelled(texts, tokens_N, lengths_D):
            raise self._lost_text(documents, rows)
        return Encoded(tokens_N, lengths_D)

    def _is_spelled(self, texts: list[str], tokens_N: np.ndarray, lengths_D: np.ndarray) -> bool:
        """Whether the tokens spell as many bytes as each text has, and together the same ones.

        A tokenizer that drops, replaces or adds a character fails this; none permutes them.
        """
        encoded = [text.encode() for text in texts]
        ends_N = np.cumsum(self._sizes[tokens_N], dtype=np.int32)
        ends_D = np.cumsum(np.fromiter(map(len, encoded), np.int32, len(encoded)))
        if (ends_N[np.cumsum(lengths_D) - 1] != ends_D).any():
            return False
        counted = np.bincount(tokens_N, minlength=len(self._sizes))
        return (spelled_bytes(self._tokenizer, counted) == count_bytes(b"".join(encoded))).all()

    def _lost_text(self, documents: list[Document], rows: list[list[int]]) -> DataError:
        """The error for the first of the documents that its token ids do not spell."""
        spelling = self._tokenizer.token_texts
        for document, row in zip(documents, rows, strict=True):
            if b"".join([spelling[i] for i in row]) == document.text.encode():
                continue
            for character in dict.fromkeys(document.text):
                (ids,) = _encode(self._tokenizer, [character])
                if b"".join([spelling[i] for i in ids]) != character.encode():
                    return DataError(
                        f"document {document.id}: the tokenizer's alphabet has no {character!r}; "
                        "use a tokenizer trained on data of this kind"
                    )
            return DataError(
                f"document {document.id}: the tokenizer does not give its text back (a normalizer "
                "or an added prefix changes it); use a tokenizer that keeps text as it is"
            )
        raise AssertionError("every document is spelled, but not all of them together")


def spelled_bytes(tokenizer: LoadedTokenizer, token_counts_V: np.ndarray) -> np.ndarray:
    """How often each byte value occurs in what so many of each token spell, (256,)."""
    letters = np.frombuffer(b"".join(tokenizer.token_texts), np.uint8)
    weights = np.repeat(token_counts_V, [len(text) for text in tokenizer.token_texts])
    # Exact: the sums stay below 2^53.
    return np.bincount(letters, weights, minlength=256).astype(np.int64)


def count_bytes(text: bytes) -> np.ndarray:
    """How often each byte value occurs, (256,); takes 8 times the text's memory."""
    return np.bincount(np.frombuffer(text, np.uint8), minlength=256)


def batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Documents in lists of about BATCH_CHARACTERS characters."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: LoadedTokenizer, texts: list[str]) -> list[list[int]]:
    encodings = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


class _CharacterTable:
    """The single token of each character, filled as characters are met."""

    def __init__(self, tokenizer: LoadedTokenizer):
        self._tokenizer = tokenizer
        self._ids: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        for character in set(text) - self._ids.keys():
            self._ids[character] = self._single_token(character)
        return [self._ids[character] for character in text]

    def _single_token(self, character: str) -> int:
        (ids,) = _encode(self._tokenizer, [character])
        if len(ids) != 1 or self._tokenizer.token_texts[ids[0]] != character.encode():
            raise DataError(
                f"the tokenizer has no single token for the character {character!r}; "
                "build without --characters"
            )
        return ids[0]
