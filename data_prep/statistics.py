"""How a tokenizer segments a corpus: compression, token counts, longest tokens; a size sweep."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.encode import Encoder, count_values
from data_prep.progress import waiting
from data_prep.readers import DEFAULT_READ, Document, ReadOptions
from data_prep.tokenizer import (
    LoadedTokenizer,
    is_protein,
    load_tokenizer,
    read_sample,
    view_tokenizer,
)
from data_prep.totals import print_note
from data_prep.trainers import (
    Algorithm,
    Kind,
    require_vocabulary,
    smallest_vocabulary,
    special_tokens,
    train,
)
from s2t2_dist.errors import DataError

SWEEP_LARGEST = 8192
# A sweep measures on every fifth sampled document and trains on the others.
HOLD_OUT_EVERY = 5


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of one tokenizer on some documents.

    Attributes:
        characters: total of the documents.
        counts_V: how often each token occurs, int64; end tokens are not counted.
        texts: the bytes that each token spells.
    """

    characters: int
    counts_V: np.ndarray
    texts: list[bytes]

    @property
    def characters_per_token(self) -> float:
        """Compression: residues per token for proteins."""
        return self.characters / int(self.counts_V.sum())

    @property
    def unused(self) -> list[int]:
        """Ids of the tokens that have a text and do not occur."""
        return [i for i in np.flatnonzero(self.counts_V == 0).tolist() if self.texts[i]]

    @property
    def most_used(self) -> list[int]:
        """Ids of the tokens that occur, by descending count."""
        return np.argsort(-self.counts_V, kind="stable")[: np.count_nonzero(self.counts_V)].tolist()

    @property
    def longest(self) -> list[int]:
        """Ids of all tokens, by descending length of their text."""
        return sorted(range(len(self.texts)), key=lambda i: (-len(self.texts[i]), i))


def token_statistics(tokenizer: LoadedTokenizer, documents: Sequence[Document]) -> TokenStatistics:
    """Encode documents and count their tokens.

    Raises:
        DataError: the tokenizer cannot spell one of them.
    """
    encoded = Encoder(tokenizer, characters=False).encode(documents)
    counts = count_values(encoded.tokens_N, tokenizer.vocab_size)
    counts[tokenizer.eos_token_id] = 0
    characters = sum(len(document.text) for document in documents)
    return TokenStatistics(characters, counts, tokenizer.token_texts)


def statistics_of(
    directory: Path, inputs: Sequence[Path], sample: int, read: ReadOptions = DEFAULT_READ
) -> TokenStatistics:
    """Statistics of a tokenizer folder on a hash sample of `sample` characters of the inputs.

    Raises:
        DataError: bad input or tokenizer, or a document that the tokenizer cannot spell.
    """
    tokenizer = load_tokenizer(directory)
    documents = _told_sample(inputs, sample, read)
    with waiting("Encoding the sample"):
        return token_statistics(tokenizer, documents)


def _told_sample(inputs: Sequence[Path], characters: int, read: ReadOptions) -> list[Document]:
    """The documents of `read_sample`; says on stderr what was left out."""
    sample = read_sample(inputs, characters, read)
    print_note(sample.reading)
    return sample.documents


def sweep(
    inputs: Sequence[Path],
    sizes: Sequence[int],
    kind: Kind,
    algorithm: Algorithm,
    sample: int,
    read: ReadOptions = DEFAULT_READ,
    each: Callable[[int, TokenStatistics], None] | None = None,
) -> dict[int, TokenStatistics]:
    """Train a tokenizer of each size on four fifths of a hash sample, and measure on the rest.

    A sample of fewer than five documents is used for both.

    Args:
        sizes: vocabulary sizes, special tokens included; none: powers of 2 that the alphabet
            allows, to SWEEP_LARGEST, as far as the data yield so many.
        sample: characters of the hash sample.
        each: is given every size with its statistics as soon as they are there.

    Returns:
        Statistics by size.

    Raises:
        DataError: bad input, or too little of it for a size.
    """
    protein = is_protein(inputs)
    smallest = smallest_vocabulary(protein)
    powers = [1 << bit for bit in range(smallest.bit_length(), SWEEP_LARGEST.bit_length())]
    chosen, sizes = sizes, sizes or powers
    for size in sizes:
        require_vocabulary(size, protein)
    documents = _told_sample(inputs, sample, read)
    measured, trained = documents[::HOLD_OUT_EVERY], documents
    if len(documents) >= HOLD_OUT_EVERY:
        trained = [d for i, d in enumerate(documents) if i % HOLD_OUT_EVERY]
    texts = [document.text for document in trained]
    found = {}
    for size in sizes:
        with waiting(f"Training {size} tokens"):
            try:
                backend = train(texts, size, protein, kind, algorithm)
            except DataError as error:
                if chosen or not found:
                    raise
                logging.getLogger(__name__).warning("no size from %d on: %s", size, error)
                break
            loaded = view_tokenizer(backend, special_tokens(protein))
            found[size] = token_statistics(loaded, measured)
        if each:
            each(size, found[size])
    return found
