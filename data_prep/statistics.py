"""How a tokenizer cuts a corpus: compression, the use of each token, the longest; and a sweep."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.encode import Encoder, count_values
from data_prep.readers import DEFAULT_READ, Document, ReadOptions, read_documents
from data_prep.tokenizer import (
    LoadedTokenizer,
    is_protein,
    load_tokenizer,
    sample_documents,
    view_tokenizer,
)
from data_prep.trainers import Algorithm, Kind, special_tokens, train

# Of the sampled documents, the share that a sweep measures on and does not train on.
MEASURED = 5


@dataclass(frozen=True)
class TokenStatistics:
    """Of one tokenizer on some documents.

    Attributes:
        characters: of the documents.
        counts_V: how often each token occurs, int64; end tokens not counted.
        texts: what each token spells.
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
        """Tokens with a text that do not occur."""
        return [i for i in np.flatnonzero(self.counts_V == 0).tolist() if self.texts[i]]

    @property
    def most_used(self) -> list[int]:
        """Tokens by falling count."""
        return np.argsort(-self.counts_V, kind="stable")[: np.count_nonzero(self.counts_V)].tolist()

    @property
    def longest(self) -> list[int]:
        """Tokens by falling length of their text."""
        return sorted(range(len(self.texts)), key=lambda i: (-len(self.texts[i]), i))


def token_statistics(tokenizer: LoadedTokenizer, documents: Sequence[Document]) -> TokenStatistics:
    """Encode documents and count.

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
    """Statistics of a tokenizer folder on a hash sample of so many characters of the inputs."""
    tokenizer = load_tokenizer(directory)
    return token_statistics(tokenizer, sample_documents(read_documents(inputs, read), sample))


def sweep(
    inputs: Sequence[Path],
    sizes: Sequence[int],
    kind: Kind,
    algorithm: Algorithm,
    sample: int,
    read: ReadOptions = DEFAULT_READ,
) -> dict[int, TokenStatistics]:
    """Train a tokenizer of each size on four fifths of a hash sample, and measure on the rest.

    Raises:
        DataError: bad input, or too little of it for a size.
    """
    protein = is_protein(inputs)
    documents = sample_documents(read_documents(inputs, read), sample)
    measured, trained = documents[::MEASURED], documents
    if len(documents) >= MEASURED:
        trained = [d for i, d in enumerate(documents) if i % MEASURED]
    texts = [document.text for document in trained]
    found = {}
    for size in sizes:
        backend = train(texts, size, protein, kind, algorithm)
        found[size] = token_statistics(view_tokenizer(backend, special_tokens(protein)), measured)
    return found
