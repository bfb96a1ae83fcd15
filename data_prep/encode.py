"""Encode documents as token ids, and check that the ids spell the documents.

A BPE model drops a character that it does not know, or writes the unknown token for it; a
normalizer may change the text. Either would make bits per byte wrong. So there are three checks:

- the tokens of each document spell as many bytes as the document has;
- the tokens of all documents of a call spell each byte value as often as their text contains it;
- the tokens that spell nothing are one end token for each document.

A tokenizer that drops, replaces or adds anything fails one of them. No tokenizer permutes
characters, so their order is not checked.

Index letters: D documents of a batch, N their token ids end to end, V tokens of the vocabulary.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from data_prep.bpe import plain_bpe
from data_prep.cuts import LONGEST_PIECE, PIECE_CHARACTERS, Cuts, cut
from data_prep.readers import Document
from data_prep.tokenizer import LoadedTokenizer
from s2t2_dist.data.shards import token_dtype
from s2t2_dist.errors import DataError

# Characters per call of the tokenizer; the result takes 100 bytes for each, and so fits a cache.
BATCH_CHARACTERS = 100_000
# Characters of a batch's first document that are encoded with both libraries.
CHECKED_CHARACTERS = 100_000
# Values per call of np.bincount, which takes 8 bytes for each.
COUNTED_AT_ONCE = 1 << 20

# Token ids end to end (tokens_N), and the number of tokens of each document (lengths_D).
Tokens = tuple[np.ndarray, np.ndarray]


class Encoded(NamedTuple):
    """Encoded documents.

    Attributes:
        tokens_N: token ids end to end, uint16 or uint32; each document ends with the end token.
        lengths_D: tokens per document, int64; the end token counts.
        byte_counts: how often each byte value occurs in the text, (256,) int64.
    """

    tokens_N: np.ndarray
    lengths_D: np.ndarray
    byte_counts: np.ndarray


class Encoder:
    """Encodes batches of documents.

    Args:
        characters: encode every character as one token, ignoring the tokenizer's segmentation.
    """

    def __init__(self, tokenizer: LoadedTokenizer, characters: bool):
        self._tokenizer = tokenizer
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._table = _CharacterTable(tokenizer) if characters else None
        self._cuts = Cuts(tokenizer, characters)
        self._bpe = None if characters else plain_bpe(tokenizer.backend)
        self._sizes = np.array([len(text) for text in tokenizer.token_texts], np.int32)

    def encode(self, documents: Sequence[Document]) -> Encoded:
        """Encode documents in their order.

        Raises:
            DataError: the tokenizer cannot spell a document; names it and, if it is in no token,
                the character.
        """
        tokens, lengths = [np.empty(0, self._dtype)], [np.empty(0, np.int64)]
        byte_counts = np.zeros(256, np.int64)
        for batch in batches(documents):
            is_long = len(batch[0].text) > PIECE_CHARACTERS
            found = self._encode_long(batch[0]) if is_long else self._encode_batch(batch)
            tokens.append(found.tokens_N)
            lengths.append(found.lengths_D)
            byte_counts += found.byte_counts
        encoded = Encoded(np.concatenate(tokens), np.concatenate(lengths), byte_counts)
        token_counts = count_values(encoded.tokens_N, self._tokenizer.vocab_size)
        if (spelled_bytes(self._tokenizer, token_counts) != byte_counts).any():
            raise self._lost_text(documents)
        ends = token_counts[self._tokenizer.eos_token_id]
        if not ends == silent_tokens(self._tokenizer, token_counts) == len(documents):
            raise self._lost_text(documents)
        return encoded

    def _encode_batch(self, batch: list[Document]) -> Encoded:
        texts = [document.text.encode() for document in batch]
        found = self._encode_merges(batch[0], texts) or self._encode_lists(batch)
        if not self._fits(texts, *found):
            raise self._lost_text(batch)
        byte_counts = count_values(np.frombuffer(b"".join(texts), np.uint8), 256)
        return Encoded(*found, byte_counts)

    def _encode_long(self, document: Document) -> Encoded:
        """Encode a document in pieces, because the libraries take 40 to 130 bytes a character."""
        longest = None if self._bpe else LONGEST_PIECE
        pieces = cut(document, self._cuts, longest)
        found = [self._encode_batch(batch) for batch in batches(pieces)]
        tokens_N = np.concatenate([each.tokens_N for each in found])
        lengths_P = np.concatenate([each.lengths_D for each in found])
        ends = np.cumsum(lengths_P) - 1  # of the pieces; only the last is the document's
        tokens_N = np.delete(tokens_N, ends[:-1])
        byte_counts = sum(each.byte_counts for each in found)
        return Encoded(tokens_N, np.array([len(tokens_N)], np.int64), byte_counts)

    def _encode_merges(self, first: Document, texts: list[bytes]) -> Tokens | None:
        """Encode with `PlainBPE`; None if it cannot encode with this tokenizer or these texts.

        Checks the first document against `tokenizers`.
        """
        if self._bpe is None:
            return None
        end = self._tokenizer.eos_token_id
        found = self._bpe.encode(texts, end, self._dtype)
        if found is not None:
            tokens_N, lengths_D = found
            text = first.text
            if len(text) > CHECKED_CHARACTERS:
                text = text[:CHECKED_CHARACTERS]
                tokens_N, lengths_D = self._bpe.encode([text.encode()], end, self._dtype)
            (expected,) = _encode(self._tokenizer, [text])
            same = tokens_N[: lengths_D[0] - 1].tolist() == expected
            assert same, f"bpe.cpp and `tokenizers` encode {first.id} differently"
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
            if problem := self._problem(document.text):
                return DataError(f"document {document.id}: {problem}")
        raise AssertionError("each document is spelled correctly, but all together are not")

    def _problem(self, text: str) -> str | None:
        """What is wrong with the token ids of a text, and what to do; None if nothing is."""
        backend, end = self._tokenizer.backend, self._tokenizer.eos_token_id
        ids, spelled = self._spelling(text)
        if end in ids:
            return (
                f"the tokenizer writes its end token {backend.id_to_token(end)!r} for text; name "
                "an eos_token in tokenizer_config.json that no text contains"
            )
        if spelled == text.encode():
            silent = [i for i in ids if not self._tokenizer.token_texts[i]]
            return silent and (
                f"the tokenizer adds the token {backend.id_to_token(silent[0])!r}, which stands "
                "for no text; use a tokenizer that adds none"
            )
        for character in dict.fromkeys(text):
            _, other = self._spelling(character)
            normalizer = backend.normalizer
            normal = normalizer.normalize_str(character) if normalizer else character
            if normal != character:  # and so the alphabet may have it
                other = normal.encode()
            elif not other or b"\xef\xbf\xbd" in other:
                return (
                    f"the tokenizer's alphabet has no {character!r}; use a tokenizer trained on "
                    "data of this kind"
                )
            if other != character.encode():
                return (
                    f"its tokens do not spell its text: {character!r} becomes "
                    f"{other.decode(errors='backslashreplace')!r} (a normalizer or an added "
                    "prefix); use a tokenizer that keeps text as it is"
                )
        return (
            "its tokens do not spell its text (a normalizer or an added prefix changes it); use a "
            "tokenizer that keeps text as it is"
        )

    def _spelling(self, text: str) -> tuple[list[int], bytes]:
        """Token ids of a text, and the bytes that they stand for."""
        (ids,) = _encode(self._tokenizer, [text])
        return ids, b"".join([self._tokenizer.token_texts[i] for i in ids])


def silent_tokens(tokenizer: LoadedTokenizer, token_counts_V: np.ndarray) -> int:
    """How many of the counted tokens stand for no text."""
    sizes_V = np.array([len(text) for text in tokenizer.token_texts])
    return int(token_counts_V[sizes_V == 0].sum())


def spelled_bytes(tokenizer: LoadedTokenizer, token_counts_V: np.ndarray) -> np.ndarray:
    """How often each byte value occurs in the text of the counted tokens, (256,) int64."""
    letters = np.frombuffer(b"".join(tokenizer.token_texts), np.uint8)
    weights = np.repeat(token_counts_V, [len(text) for text in tokenizer.token_texts])
    # bincount sums in float64, which is exact below 2^53.
    return np.bincount(letters, weights, minlength=256).astype(np.int64)


def count_values(values: np.ndarray, size: int) -> np.ndarray:
    """How often each of 0 to size - 1 occurs, (size,) int64: `np.bincount` in little memory."""
    counts = np.zeros(size, np.int64)
    for first in range(0, len(values), COUNTED_AT_ONCE):
        counts += np.bincount(values[first : first + COUNTED_AT_ONCE], minlength=size)
    return counts


def batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Yield the documents in lists of about BATCH_CHARACTERS characters; long ones alone."""
    batch, size = [], 0
    for document in documents:
        if len(document.text) > PIECE_CHARACTERS and batch:
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += len(document.text)
        if size >= min(BATCH_CHARACTERS, PIECE_CHARACTERS):
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(tokenizer: LoadedTokenizer, texts: list[str]) -> list[list[int]]:
    encodings = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


class _CharacterTable:
    """The single token of each character, looked up when the character first occurs."""

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
