"""Rows and marginals of the transport plan: the mass of each source and each target token.

Shapes: R source tokens with a row of P, U target tokens.
"""

import re
from pathlib import Path

import numpy as np
import torch

from s2t2_dist.config import Translate
from s2t2_dist.data.shards import ShardReader, require_tokenizer
from s2t2_dist.errors import ConfigError
from s2t2_dist.lm.folder import WeightFiles
from s2t2_dist.lm.tokenizer import read_tokenizer

# Rows that are counted: at 512 tokens per row 17 million tokens, so that a token with frequency
# one in a million is counted about 17 times.
COUNTED_ROWS = 1 << 15
BLOCK = 1024  # rows counted at a time
BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


def sampled_rows(reader: ShardReader) -> list[int]:
    """At most COUNTED_ROWS evenly spaced rows: what is counted of a split."""
    count = min(len(reader), COUNTED_ROWS)
    return np.linspace(0, len(reader) - 1, count).astype(np.int64).tolist()


def token_counts(reader: ShardReader) -> torch.Tensor:
    """Counts of each token id, (vocab,) int64, in at most COUNTED_ROWS evenly spaced rows.

    A pure function of the data, so all ranks get the same counts. Padding is not counted.
    """
    chosen = sampled_rows(reader)
    counts = np.zeros(reader.metadata["vocab_size"], dtype=np.int64)
    for start in range(0, len(chosen), BLOCK):
        rows = chosen[start : start + BLOCK]
        tokens = np.concatenate([reader[row][: reader.length(row)] for row in rows])
        counts += np.bincount(tokens, minlength=len(counts))
    return torch.from_numpy(counts)


def source_marginal(
    choice: str, tokenizer_dir: Path, token_ids_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The source tokens with mass, and their marginal mu: float64, positive, total 1.

    Args:
        choice: `uniform`, or a data directory whose token frequencies are used. Tokens that do
            not occur in it are left out, because E' divides each row by its mass.
        tokenizer_dir: folder of the source tokenizer, with which the data must have been built.
        token_ids_R: the source tokens to choose from.

    Raises:
        ConfigError: no such directory, or none of these tokens occurs in it.
        DataError: it was built with another tokenizer.
        ArtifactError: it is incomplete or altered.
    """
    if choice == "uniform":
        return token_ids_R, _normalised(torch.ones(len(token_ids_R)))
    if not Path(choice).is_dir():
        raise ConfigError(
            f"source_marginal: {choice} is neither uniform nor a directory; build one with "
            f"`s2t2 data build --tokenizer {tokenizer_dir}`"
        )
    reader = ShardReader(choice, "train")
    require_tokenizer(reader.metadata, tokenizer_dir)
    counts = token_counts(reader)
    known = token_ids_R[token_ids_R < len(counts)]
    held = known[counts[known] > 0]
    if not len(held):
        raise ConfigError(
            f"source_marginal: {choice} holds none of the {len(token_ids_R)} source tokens; give "
            "text of the source domain, or uniform"
        )
    return held, _normalised(counts[held])


def target_marginal(choice: str, reader: ShardReader) -> torch.Tensor:
    """nu (U,): float64, positive, total 1.

    Args:
        choice: `uniform`, or `frequency`: each token's count in the training rows plus 1. Without
            the 1, a token that does not occur would have a column without mass, and no E' or L'.
    """
    if choice == "uniform":
        return _normalised(torch.ones(reader.metadata["vocab_size"]))
    return _normalised(token_counts(reader) + 1)


def _normalised(weights: torch.Tensor) -> torch.Tensor:
    return weights.double() / weights.double().sum()


def source_rows(stage: Translate, weights: WeightFiles) -> tuple[torch.Tensor, torch.Tensor]:
    """The source tokens that are rows of P, (R,) int64 ascending, and their marginal mu (R,).

    Raises:
        ConfigError, DataError, ArtifactError: see `source_token_ids` and `source_marginal`.
    """
    tokens = source_token_ids(stage.source_tokens, weights.folder, weights.vocabulary.size)
    return source_marginal(stage.source_marginal, weights.folder, tokens)


def source_token_ids(choice: str, folder: Path, vocab_size: int) -> torch.Tensor:
    """The source tokens that are rows of P, (R,) int64 ascending.

    Args:
        choice: one of
            - `all`: every token of the tokenizer, without rows that only pad the embedding;
            - `bytes`: tokens that stand for one character or byte, the paper's setting;
            - a file with one token id per line.
        vocab_size: rows of the embedding.

    Raises:
        ConfigError: the file is missing or contains anything but ids of this vocabulary, or the
            tokenizer has no such token.
    """
    if choice in ("all", "bytes"):
        return _tokenizer_ids(folder, vocab_size, single=choice == "bytes")
    try:
        ids = sorted({int(line) for line in Path(choice).read_text().split()})
    except OSError:
        raise ConfigError(f"source_tokens: {choice} is not all, bytes or a file") from None
    except ValueError as error:
        raise ConfigError(f"source_tokens: {choice} must hold one id per line ({error})") from None
    if not ids or ids[0] < 0 or ids[-1] >= vocab_size:
        raise ConfigError(f"source_tokens: ids in {choice} must be from 0 to {vocab_size - 1}")
    return torch.tensor(ids)


def _tokenizer_ids(folder: Path, vocab_size: int, single: bool) -> torch.Tensor:
    """Ids of the tokenizer's tokens, ascending.

    Args:
        single: only single characters and bytes, without special tokens. A byte token is written
            as one character, or as `<0x41>` by SentencePiece.
    """
    tokenizer = read_tokenizer(folder)
    special = set(tokenizer.all_special_ids)
    ids = [
        number
        for token, number in tokenizer.get_vocab().items()
        if number < vocab_size
        and not (single and number in special)
        and (not single or len(token) == 1 or BYTE_TOKEN.fullmatch(token))
    ]
    if not ids:
        what = "single characters or bytes" if single else f"tokens with ids below {vocab_size}"
        raise ConfigError(
            f"source_tokens: the tokenizer in {folder} has no {what}; give all or a file of ids"
        )
    return torch.tensor(sorted(ids))
