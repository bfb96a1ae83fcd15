"""The marginals of the transport plan: how much mass each source and each target token has.

Shapes: R source tokens with a row of P, U target tokens.
"""

from pathlib import Path

import numpy as np
import torch

from s2t2_dist.data import ShardReader, require_tokenizer
from s2t2_dist.errors import ConfigError

# 17 million tokens at 512 a row: a token of one in a million is then counted 17 times.
COUNTED_ROWS = 1 << 15
BLOCK = 1024  # rows counted at a time


def token_counts(reader: ShardReader) -> torch.Tensor:
    """How often each token id occurs in at most COUNTED_ROWS rows, spread evenly: (vocab,) int64.

    A pure function of the data, so every rank counts the same. Padding does not count.
    """
    chosen = np.linspace(0, len(reader) - 1, min(len(reader), COUNTED_ROWS)).astype(np.int64)
    counts = np.zeros(reader.metadata["vocab_size"], dtype=np.int64)
    for start in range(0, len(chosen), BLOCK):
        rows = chosen[start : start + BLOCK].tolist()
        tokens = np.concatenate([reader[row][: reader.length(row)] for row in rows])
        counts += np.bincount(tokens, minlength=len(counts))
    return torch.from_numpy(counts)


def source_marginal(
    choice: str, tokenizer_dir: Path, token_ids_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The source tokens that have mass, and mu: float64, positive, total 1.

    Args:
        choice: `uniform`, or a data directory whose token frequencies are taken. Tokens that it
            does not hold are left out, since a row without mass could not be divided by it.
        tokenizer_dir: folder of the tokenizer that the data must have been made with.
        token_ids_R: the source tokens to choose from.

    Raises:
        ConfigError: no such directory, or it holds none of these tokens.
        DataError: it was made with another tokenizer.
        ArtifactError: it is unfinished or altered.
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
        choice: `uniform`, or `frequency`: the tokens' counts in the training rows plus 1 each. A
            token that the rows do not hold would else have a column without mass, and no E' or L'.
    """
    if choice == "uniform":
        return _normalised(torch.ones(reader.metadata["vocab_size"]))
    return _normalised(token_counts(reader) + 1)


def _normalised(weights: torch.Tensor) -> torch.Tensor:
    return weights.double() / weights.double().sum()
