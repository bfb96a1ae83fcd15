"""Documents -> token ids, with the proof that the ids spell the document.

A BPE model that does not know a character drops it or writes the unknown token, and a normalizer
may change the text; both would make bits per byte wrong. So the tokens of every document must spell
as many bytes as it has, and those of many documents together the same bytes: a tokenizer that
drops, replaces or adds a character fails this, and none permutes them.

Index letters: D documents of a batch, N their token ids end to end, V tokens of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from data_prep.bpe import plain_bpe
from data_prep.readers import Document
from data_prep.tokenizer import LoadedTokenizer
from s2t2_dist.data.shards import token_dtype
from s2t2_dist.errors import DataError

# Characters per call of the tokenizer: its result takes 100 bytes for each, and fits a cache so.
BATCH_CHARACTERS = 100_000
# np.bincount takes 8 bytes for each.
COUNTED_AT_ONCE = 1 << 20

# Token ids end to end, and how many each document has.
Tokens = tuple[np.ndarray, np.ndarray]


class Encoded(NamedTuple):
    """Documents end to end as token ids (uint16 or uint32), each closed by the end token.

    `byte_counts` says how often each byte value occurs in their text, (256,) int64.
    """

    tokens_N: np.ndarray
    lengths_D: np.ndarray
    byte_counts: np.ndarray


class Encoder:
    """Encodes batches of documents.

    Args:
        characters: one token for every character, instead of the tokenizer's own segmentation.
    """

    def __init__(self, tokenizer: LoadedTokenizer, characters: bool):
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._table = _CharacterTable(tokenizer) if characters else None
        self._bpe = None if characters else plain_bpe(tokenizer.backend)
        self._sizes = np.array([len(text) for text in tokenizer.token_texts], np.int32)

    def encode(self, documents: Sequence[Document]) -> Encoded:
        """Encode documents in their order.

        Raises:
            DataError: the tokenizer cannot spell a document; names it and the character.
        """
        tokens, lengths = [np.empty(0, self._dtype)], [np.empty(0, np.int64)]
        byte_counts = np.zeros(256, np.int64)
        for batch in batches(documents):
            texts = [document.text.encode() for document in batch]
            found = self._encode_merges(batch[0], texts) or self._encode_lists(batch)
            tokens.append(found[0])
            lengths.append(found[1])
            byte_counts += count_values(np.frombuffer(b"".join(texts), np.uint8), 256)
            if not self._fits(texts, *found):
                raise self._lost_text(batch)
        encoded = Encoded(np.concatenate(tokens), np.concatenate(lengths), byte_counts)
        token_counts = count_values(encoded.tokens_N, self._tokenizer.vocab_size)
        if (spelled_bytes(self._tokenizer, token_counts) != byte_counts).any():
            raise self._lost_text(documents)
        return encoded

    def _encode_merges(self, first: Document, texts: list[bytes]) -> Tokens | None:
        """By `PlainBPE`; None if it does not apply, or not to a byte of these texts.

        The first document is compared with what `tokenizers` gives.
        """
        if self._bpe is None:
            return None
        found = self._bpe.encode(texts, self._tokenizer.eos_token_id, self._dtype)
        if found is not None:
            tokens_N, lengths_D = found
            (expected,) = _encode(self._tokenizer, [first.text])
            same = tokens_N[: lengths_D[0] - 1].tolist() == expected
            assert same, f"bpe.cpp cuts {first.id} otherwise than `tokenizers` does"
        return found

    def _encode_lists(self, documents: list[Document]) -> Tokens:
        texts, table = [document.text for document in documents], self._table
        rows = [table.encode(t) for t in texts] if table else _encode(self._tokenizer, texts)
        for row in rows:
            row.append(self._tokenizer.eos_token_id)
        lengths_D = np.fromiter(map(len, rows), np.int64, len(rows))
        tokens_N = np.fromiter(chain.from_iterable(rows), self._dtype, int(lengths_D.sum()))
        return tokens_N, lengths_D

    def _fits(self, texts: list[bytes], tokens_N: np.ndarray, lengths_D: np.ndarray) -> bool:
        """Whether the tokens of each text spell as many bytes as it has."""
        ends_N = np.cumsum(self._sizes[tokens_N], dtype=np.int32)
        ends_D = np.cumsum(np.fromiter(map(len, texts), np.int32, len(texts)))
        return bool((ends_N[np.cumsum(lengths_D) - 1] == ends_D).all())

    def _lost_text(self, documents: list[Document]) -> DataError:
        """The error for the first of the documents that its token ids do not spell."""
        for document in documents:
            if self._spells(document.text):
                continue
            for character in dict.fromkeys(document.text):
                if not self._spells(character):
                    return DataError(
                        f"document {document.id}: the tokenizer's alphabet has no {character!r}; "
                        "use a tokenizer trained on data of this kind"
                    )
            return DataError(
                f"document {document.id}: the tokenizer does not give its text back (a normalizer "
                "or an added prefix changes it); use a tokenizer that keeps text as it is"
            )
        raise AssertionError("every document is spelled, but not all of them together")

    def _spells(self, text: str) -> bool:
        spelling = self._tokenizer.token_texts
        (ids,) = _encode(self._tokenizer, [text])
        return b"".join([spelling[i] for i in ids]) == text.encode()


def spelled_bytes(tokenizer: LoadedTokenizer, token_counts_V: np.ndarray) -> np.ndarray:
    """How often each byte value occurs in what so many of each token spell, (256,)."""
    letters = np.frombuffer(b"".join(tokenizer.token_texts), np.uint8)
    weights = np.repeat(token_counts_V, [len(text) for text in tokenizer.token_texts])
    # Exact: the sums stay below 2^53.
    return np.bincount(letters, weights, minlength=256).astype(np.int64)


def count_values(values: np.ndarray, size: int) -> np.ndarray:
    """How often each of 0 to size - 1 occurs, (size,) int64; `np.bincount` in little memory."""
    counts = np.zeros(size, np.int64)
    for first in range(0, len(values), COUNTED_AT_ONCE):
        counts += np.bincount(values[first : first + COUNTED_AT_ONCE], minlength=size)
    return counts


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
