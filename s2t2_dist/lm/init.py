"""Starts of the new embedding and LM head without training: the rivals of a learned plan.

Each makes the rows of the U target tokens from the rows of the V source tokens by one linear map,
the same for E, L and the head's bias: `X' = W X`. The rows of W sum to 1, so a plan with W as its
columns is a translation too. `fold` applies it, so ties, biases and every architecture are as for
S2T2. The table of the starts, with their papers, is in docs/init.md.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

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


def starting_rows(
    init: str, weights: WeightFiles, data: ShardReader, seed: int, alignment: Path | None = None
) -> Start:
    """The start of a name in `config.INITS`.

    Raises:
        ConfigError, DataError: see `source_weights`.
    """
    tokens = source_token_ids("all", weights.folder, weights.vocabulary.size)
    if init == "gaussian":
        return Gaussian(len(data.token_bytes), tokens, seed)
    return Mixture(mixture_weights(init, weights, data, seed, alignment), tokens)


def mixture_weights(
    init: str, weights: WeightFiles, data: ShardReader, seed: int, alignment: Path | None = None
) -> torch.Tensor:
    """W of a `Mixture`, (U, V) sparse float64; for its name and errors see `starting_rows`."""
    found = source_weights(init, weights, data, alignment)
    sparse_UV = sparse_weights(found, weights.vocabulary.size)
    if init == "focus":
        return by_similarity(sparse_UV, data.token_bytes > 0, token_vectors(data, seed))
    return sparse_UV


def source_weights(
    init: str, weights: WeightFiles, data: ShardReader, alignment: Path | None = None
) -> list[dict[int, float]]:
    """What the tokenizers alone say: weights of source ids, for each of the U target tokens.

    Empty where they say nothing. A special token takes the row of the source's token of its role.

    Args:
        init: a name in `config.INITS`.
        alignment: the file that init `alignment` reads.

    Raises:
        ConfigError: they say nothing of any token; or an alignment that does not fit.
        DataError: transformers cannot read the source tokenizer.
    """
    folder, vocab_size = weights.folder, weights.vocabulary.size
    found: list[dict[int, float]] = [{} for _ in data.token_bytes]
    if init in ("mean", "gaussian"):
        return found
    special = special_tokens(folder, data, vocab_size)
    if init == "alignment":
        assert alignment is not None
        aligned = _aligned(alignment, folder, data, vocab_size, special)
        found = [aligned.get(i, {}) for i in range(len(found))]
    else:
        characters = init == "character_mean"
        pieces = sub_tokens(folder, target_texts(data), vocab_size, characters)
        found = [counted(ids) for ids in pieces]
        if init == "focus":  # tokens that both vocabularies have
            found = [row if len(ids) == 1 else {} for row, ids in zip(found, pieces, strict=True)]
        if not any(found):
            what = "has none" if init == "focus" else "writes none"
            raise ConfigError(
                f"the start {init} does not fit: the source tokenizer in {folder} {what} of the "
                f"data's {len(found)} tokens; choose another start"
            )
    for number, match in special.items():
        found[number] = found[number] or {match: 1.0}
    return found


def counted(ids: list[int]) -> dict[int, float]:
    """Fast Vocabulary Transfer: a sub-token weighs what it occurs (Gee et al. 2022)."""
    return {i: ids.count(i) / len(ids) for i in ids}


def _aligned(
    path: Path, folder: Path, data: ShardReader, vocab_size: int, special: Mapping[int, int]
) -> dict[int, dict[int, float]]:
    """The rows of an alignment file, which must know every target token that is not special."""
    tokens = read_tokenizer(data.directory / TOKENIZER_DIR).get_vocab()
    target = {token: i for token, i in tokens.items() if i < len(data.token_bytes)}
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
    values = [w for entries in weights for w in entries.values()]
    indices = torch.tensor([rows, columns], dtype=torch.int64)
    shape = len(weights), vocab_size
    return sparse_matrix(indices, torch.tensor(values, dtype=torch.float64), shape)


def by_similarity(
    shared_UV: torch.Tensor, text_U: torch.Tensor, vectors_UK: torch.Tensor
) -> torch.Tensor:
    """FOCUS (Dobler and de Melo 2023): tokens of both vocabularies keep their rows.

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


def warm_start(
    weights_UV: torch.Tensor,
    token_ids_R: torch.Tensor,
    mu_R: torch.Tensor,
    nu_U: torch.Tensor,
    share: float,
) -> tuple[torch.Tensor, Callable[[slice], torch.Tensor]]:
    """A mixture as a plan from which C can start, and the source marginal that goes with it.

    P = share W^T diag(nu) + mu r^T, where r is what is left of nu: 1 - share of it, and all of it
    for a token without weights. P is positive, its column sums are nu, and its row sums are the new
    mu: a plan of these marginals is its own projection, so C = P gives P. With the convex scale
    E' = share W E + (1 - share) mean(E).

    Args:
        weights_UV: of a `Mixture`; what it gives to tokens without a row of P is left out.
        token_ids_R: the R source tokens with a row of P.
        mu_R, nu_U: marginals, float64, total 1; mu says how the rest is spread.
        share: of each target token's mass, above 0 and below 1.

    Returns:
        the row sums of P, (R,) float64; and P by blocks of rows, (h, U) float32.
    """
    row_of_V = torch.full((weights_UV.shape[1],), -1)
    row_of_V[token_ids_R] = torch.arange(len(token_ids_R))
    (targets, sources), values = weights_UV.indices(), weights_UV.values()
    held = row_of_V[sources] >= 0
    targets, rows, values = targets[held], row_of_V[sources[held]], values[held]
    total_U = torch.zeros_like(nu_U).index_add_(0, targets, values)
    masses = share * nu_U[targets] * values / total_U[targets]
    start_RU = sparse_matrix(torch.stack((rows, targets)), masses, (len(mu_R), len(nu_U)))
    rest_U = torch.where(total_U > 0, (1 - share) * nu_U, nu_U)
    new_mu_R = torch.zeros_like(mu_R).index_add_(0, rows, masses) + mu_R * rest_U.sum()

    def plan(block: slice) -> torch.Tensor:
        first, last, _ = block.indices(len(mu_R))
        start_hU = start_RU.narrow_copy(0, first, last - first).float().to_dense()
        return start_hU.addr_(mu_R[block].float(), rest_U.float())

    return new_mu_R, plan
