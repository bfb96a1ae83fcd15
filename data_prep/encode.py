"""Documents -> token ids, with the proof that the ids spell the document.

Every document is checked byte by byte: a BPE model that does not know a character drops it or
writes the unknown token, and a normalizer may change the text; both would make bits per byte wrong.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from data_prep.readers import Document
from data_prep.tokenizer import LoadedTokenizer
from s2t2_dist.errors import DataError
from s2t2_dist.shards import token_dtype

# Characters per call of the tokenizer: enough for its threads, little enough for memory.
BATCH_CHARACTERS = 1_000_000


class Encoded(NamedTuple):
    """A document's UTF-8 text and its token ids (uint16 or uint32), the end token last."""

    id: str
    text: bytes
    tokens: np.ndarray


def encode_documents(
    documents: Iterable[Document], tokenizer: LoadedTokenizer, characters: bool
) -> Iterator[Encoded]:
    """Encode documents in their order.

    Args:
        characters: one token for every character, instead of the tokenizer's own segmentation.

    Raises:
        DataError: the tokenizer cannot spell a document; names it and the character.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    table = _CharacterTable(tokenizer) if characters else None
    for batch in _batches(documents):
        texts = [document.text for document in batch]
        rows = [table.encode(t) for t in texts] if table else _encode_bpe(tokenizer, texts)
        for document, ids in zip(batch, rows, strict=True):
            text = document.text.encode()
            if b"".join([tokenizer.token_texts[i] for i in ids]) != text:
                raise _lost_text(document, tokenizer)
            yield Encoded(document.id, text, np.array([*ids, tokenizer.eos_token_id], dtype))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode_bpe(tokenizer: LoadedTokenizer, texts: list[str]) -> list[list[int]]:
    encodings = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def _lost_text(document: Document, tokenizer: LoadedTokenizer) -> DataError:
    """The error for a document that its token ids do not spell."""
    for character in dict.fromkeys(document.text):
        (ids,) = _encode_bpe(tokenizer, [character])
        if b"".join(tokenizer.token_texts[i] for i in ids) != character.encode():
            return DataError(
                f"document {document.id}: the tokenizer's alphabet has no {character!r}; "
                "use a tokenizer trained on data of this kind"
            )
    return DataError(
        f"document {document.id}: the tokenizer does not give its text back (a normalizer or an "
        "added prefix changes it); use a tokenizer that keeps text as it is"
    )


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
        (ids,) = _encode_bpe(self._tokenizer, [character])
        if len(ids) != 1 or self._tokenizer.token_texts[ids[0]] != character.encode():
            raise DataError(
                f"the tokenizer has no single token for the character {character!r}; "
                "build without --characters"
            )
        return ids[0]
