"""Starts of the new embedding and LM head without training: the rivals of a learned plan.

Each makes the rows of the U target tokens from the rows of the V source tokens by one linear map,
the same for E, L and the head's bias: `X' = W X`. The rows of W sum to 1, so a plan with W as its
columns is a translation too. `fold` applies it, so ties, biases and every architecture are as for
S2T2. The table of the starts, with their papers, is in docs/init.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from s2t2_dist.config import Finetune
from s2t2_dist.data.shards import TOKENIZER_DIR, ShardReader
from s2t2_dist.errors import ConfigError
from s2t2_dist.lm.alignment import read_alignment
from s2t2_dist.lm.auxiliary import sparse_matrix, token_vectors
from s2t2_dist.lm.folder import WeightFiles
from s2t2_dist.lm.subtokens import special_tokens, sub_tokens, target_texts
from s2t2_dist.lm.tokenizer import read_tokenizer
from s2t2_dist.lm.vocabulary import source_token_ids
from s2t2_dist.ot import project_simplex

BLOCK = 256  # target tokens at a time, where W is dense; source rows at a time in a sum


class Start(Protocol):
    """New rows of a weight of the vocabulary."""

    def __call__(self, weight_VD: torch.Tensor) -> torch.Tensor:
        """The rows of the U target tokens, (U, D) float32, from a float32 weight (V, D)."""

    @property
    def record(self) -> dict[str, Any]:
        """What was found, for the manifest: counts of target tokens."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """Each new row is a weighted mean of source rows; without weights it is the mean of all.

    Attributes:
        weights_UV: sparse, not negative; a row sums to 1, or is empty.
        token_ids_R: the source tokens, without rows that pad the embedding.
    """

    weights_UV: torch.Tensor
    token_ids_R: torch.Tensor

    def __call__(self, weight_VD: torch.Tensor) -> torch.Tensor:
        new_UD = torch.sparse.mm(self.weights_UV.float(), weight_VD)
        new_UD[self._empty] = mean_row(weight_VD, self.token_ids_R)
        return new_UD

    @property
    def _empty(self) -> torch.Tensor:
        used = torch.zeros(len(self.weights_UV), dtype=torch.bool)
        used[self.weights_UV.indices()[0]] = True
        return ~used

    @property
    def record(self) -> dict[str, Any]:
        mean = int(self._empty.sum())
        return {"of source tokens": len(self.weights_UV) - mean, "mean of all": mean}


@dataclass(frozen=True, eq=False)
class Gaussian:
    """New rows are drawn from the mean and the covariance of the source rows.

    A draw is mean + sum_i g_i (x_i - mean) / sqrt(R) with g standard normal: its covariance is
    exactly that of the rows x_1 to x_R, no matrix is factorised, and one draw serves E, L and the
    bias together, with the covariance between them (Hewitt 2021, "Initializing new word embeddings
    for pretrained language models", who scales the covariance by 1e-5; without that scale).

    Attributes:
        count: U.
        token_ids_R: as of `Mixture`.
        seed: of g.
    """

    count: int
    token_ids_R: torch.Tensor
    seed: int

    def __call__(self, weight_VD: torch.Tensor) -> torch.Tensor:
        rows_RD, generator = weight_VD[self.token_ids_R], torch.Generator().manual_seed(self.seed)
        new = [weight_VD[:0]]
        for start in range(0, self.count, BLOCK):
            size = min(BLOCK, self.count - start), len(rows_RD)
            normal_BR = torch.randn(size, generator=generator)
            centred_BR = normal_BR - normal_BR.mean(1, keepdim=True)
            new.append(centred_BR @ rows_RD / math.sqrt(len(rows_RD)))
        return torch.cat(new) + mean_row(weight_VD, self.token_ids_R)

    @property
    def record(self) -> dict[str, Any]:
        return {"drawn": self.count}


def mean_row(weight_VD: torch.Tensor, token_ids_R: torch.Tensor) -> torch.Tensor:
    """The mean of the source tokens' rows, (D,) float32, summed in float64."""
    total = torch.zeros(weight_VD.shape[1], dtype=torch.float64)
    for ids in token_ids_R.split(BLOCK):
        total += weight_VD[ids].sum(0, dtype=torch.float64)
    return (total / len(token_ids_R)).float()


def starting_rows(stage: Finetune, weights: WeightFiles, data: ShardReader, seed: int) -> Start:
    """The start that a stage's `init` names, one of `config.INITS`.

    Raises:
        ConfigError, DataError: see `source_weights`.
    """
    vocab_size = weights.vocabulary.size
    tokens = source_token_ids("all", weights.folder, vocab_size)
    count = len(data.token_bytes)
    if stage.init == "gaussian":
        return Gaussian(count, tokens, seed)
    found = source_weights(stage, weights, data)
    sparse = sparse_weights(found, vocab_size)
    if stage.init == "focus":
        sparse = by_similarity(sparse, data.token_bytes > 0, token_vectors(data, seed))
    return Mixture(sparse, tokens)


def source_weights(
    stage: Finetune, weights: WeightFiles, data: ShardReader
) -> list[dict[int, float]]:
    """What the tokenizers alone say: weights of source ids, for each of the U target tokens.

    Empty where they say nothing. A special token takes the row of the source's token of its role.

    Raises:
        ConfigError: they say nothing of any token; or an alignment that does not fit.
        DataError: transformers cannot read the source tokenizer.
    """
    folder, vocab_size = weights.folder, weights.vocabulary.size
    found: list[dict[int, float]] = [{} for _ in data.token_bytes]
    if stage.init in ("mean", "gaussian"):
        return found
    special = special_tokens(folder, data, vocab_size)
    if stage.init == "alignment":
        assert stage.alignment is not None
        aligned = _aligned(stage.alignment, folder, data, vocab_size, special)
        found = [aligned.get(i, {}) for i in range(len(found))]
    else:
        characters = stage.init == "character_mean"
        pieces = sub_tokens(folder, target_texts(data), vocab_size, characters)
        found = [counted(ids) for ids in pieces]
        if stage.init == "focus":  # tokens that both vocabularies have
            found = [row if len(ids) == 1 else {} for row, ids in zip(found, pieces, strict=True)]
        if not any(found):
            what = "has none" if stage.init == "focus" else "writes none"
            raise ConfigError(
                f"stages.{stage.name}.init: {stage.init} does not fit: the source tokenizer in "
                f"{folder} {what} of the data's {len(found)} tokens; take mean"
            )
    for number, match in special.items():
        found[number] = found[number] or {match: 1.0}
    return found


def counted(ids: list[int]) -> dict[int, float]:
    """Fast Vocabulary Transfer: a sub-token weighs what it occurs (Gee et al. 2022, section 3)."""
    return {i: ids.count(i) / len(ids) for i in ids}


def _aligned(
    path: Path, folder: Path, data: ShardReader, vocab_size: int, special: Mapping[int, int]
) -> dict[int, dict[int, float]]:
    """The rows of an alignment file, which must know every target token that is not special."""
    target = read_tokenizer(data.directory / TOKENIZER_DIR).get_vocab()
    source = read_tokenizer(folder).get_vocab()
    aligned = read_alignment(path, source, target, vocab_size)
    missing = sorted(set(target.values()) - aligned.keys() - special.keys())
    if missing:
        raise ConfigError(
            f"alignment: {path} lacks {len(missing)} of {len(target)} target tokens, such as the "
            f"id {missing[0]}; give an alignment of the data's tokenizer"
        )
    return aligned


def sparse_weights(weights: list[dict[int, float]], vocab_size: int) -> torch.Tensor:
    """(U, V) sparse float64 from each target token's weights of source ids."""
    rows = [row for row, entries in enumerate(weights) for _ in entries]
    columns = [i for entries in weights for i in entries]
    values = torch.tensor([w for entries in weights for w in entries.values()]).double()
    indices = torch.tensor([rows, columns], dtype=torch.int64)
    return sparse_matrix(indices, values, (len(weights), vocab_size))


def by_similarity(
    shared_UV: torch.Tensor, text_U: torch.Tensor, vectors_UK: torch.Tensor
) -> torch.Tensor:
    """FOCUS (Dobler and de Melo 2023, section 2): tokens of both vocabularies keep their rows.

    Every other row is a mean of these, weighted by the sparsemax of the cosine similarities of the
    tokens' auxiliary vectors.

    Args:
        shared_UV: one 1 in the row of a token that both have, else nothing.
        text_U: which target tokens stand for text; no other serves as an anchor.
        vectors_UK: zero where a token has none; its row stays as it is.

    Returns:
        (U, V) sparse float64.
    """
    length_U1 = vectors_UK.norm(dim=1, keepdim=True)
    known_U = (length_U1[:, 0] > 0) & torch.as_tensor(text_U)
    unit_UK = vectors_UK / length_U1.clamp(min=torch.finfo(torch.float64).tiny)
    (targets, sources), values = shared_UV.indices(), shared_UV.values()
    anchor = known_U[targets]
    others = known_U.clone()
    others[targets] = False
    found = [(targets, sources, values)]
    if anchor.any():
        for block in others.nonzero()[:, 0].split(BLOCK):
            _, mixed = project_simplex(unit_UK[block] @ unit_UK[targets[anchor]].T, 1.0)
            row, column = mixed.nonzero(as_tuple=True)
            found.append((block[row], sources[anchor][column], mixed[row, column]))
    rows, columns, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
    return sparse_matrix(torch.stack((rows, columns)), weights, shared_UV.shape)
