"""Token vectors of the new domain alone, from which tokens occur near each other.

FOCUS (Dobler and de Melo 2023) trains fastText on the target data for this. Our substitute needs
no other program: positive pointwise mutual information and its singular vectors, which is what
skip-gram models factorise (Levy and Goldberg 2014, "Neural word embedding as implicit matrix
factorization"). It sees tokens as wholes, where fastText sees their letters too.

Shapes: U target tokens, K dimensions.
"""

import numpy as np
import torch

from s2t2_dist.data.shards import ShardReader
from s2t2_dist.lm.vocabulary import BLOCK, sampled_rows

WINDOW = 5  # tokens to either side, as fastText's default
DIMENSIONS = 300  # of fastText vectors in FOCUS
POWER_ITERATIONS = 8


def token_vectors(data: ShardReader, seed: int) -> torch.Tensor:
    """A vector of each target token, (U, K) float64; zero where a token has no neighbour."""
    keys, counts = cooccurrences(data)
    return singular_vectors(ppmi(keys, counts, len(data.token_bytes)), DIMENSIONS, seed)


def cooccurrences(data: ShardReader) -> tuple[np.ndarray, np.ndarray]:
    """How often two tokens stand near each other in a document, in at most COUNTED_ROWS rows.

    A pair d tokens apart counts (WINDOW + 1 - d) / WINDOW, as in word2vec on average. Special
    tokens are not counted.

    Returns:
        keys a U + b, ascending, of ordered pairs: b after a; and their counts, float64.
    """
    vocab_size = len(data.token_bytes)
    keys, counts = np.zeros(0, np.int64), np.zeros(0)
    rows = sampled_rows(data)
    for start in range(0, len(rows), BLOCK):
        tokens, documents = _in_documents(data, rows[start : start + BLOCK])
        for d in range(1, WINDOW + 1):
            near = documents[d:] == documents[:-d]
            pairs = (tokens[:-d] * vocab_size + tokens[d:])[near]
            found, times = np.unique(pairs, return_counts=True)
            keys, place = np.unique(np.concatenate((keys, found)), return_inverse=True)
            weighted = np.concatenate((counts, times * ((WINDOW + 1 - d) / WINDOW)))
            counts = np.bincount(place, weighted, len(keys))
    return keys, counts


def _in_documents(data: ShardReader, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Text tokens of rows, one after the other, and a number for the document of each."""
    tokens, starts = [], []
    for row in rows:
        length = data.length(row)
        begins = np.zeros(length, np.int64)
        begins[data.document_starts(row)] = 1
        begins[:1] = 1  # what came before is in another row
        tokens.append(data[row][:length].astype(np.int64))
        starts.append(begins)
    every, documents = np.concatenate(tokens), np.cumsum(np.concatenate(starts))
    text = data.token_bytes[every] > 0
    return every[text], documents[text]


def ppmi(keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> torch.Tensor:
    """max(log(n_ab n / (n_a n_b)), 0) of symmetric counts, (U, U) sparse float64.

    Args:
        keys, counts: see `cooccurrences`.
    """
    a, b = (torch.from_numpy(part) for part in np.divmod(keys, vocab_size))
    both = torch.stack((torch.cat((a, b)), torch.cat((b, a))))
    values = torch.from_numpy(counts).repeat(2)
    n_ab = sparse_matrix(both, values, (vocab_size, vocab_size))
    n_a = torch.sparse.sum(n_ab, 1).to_dense()
    rows, columns = n_ab.indices()
    information = (n_ab.values() * n_a.sum() / (n_a[rows] * n_a[columns])).log().clamp(min=0)
    return sparse_matrix(n_ab.indices(), information, n_ab.shape)


def singular_vectors(matrix_UU: torch.Tensor, dimensions: int, seed: int) -> torch.Tensor:
    """The leading left singular vectors times the roots of their values, (U, K) float64.

    By randomised iteration (Halko et al. 2011) with twice the vectors that are kept, so exact up to
    U = 2 K. A row of zeros gives zeros.

    Args:
        matrix_UU: sparse float64, not negative.
    """
    occurs_U = torch.sparse.sum(matrix_UU, 1).to_dense() > 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        iterated = min(2 * dimensions, len(matrix_UU))
        left, values, _ = torch.svd_lowrank(matrix_UU, iterated, niter=POWER_ITERATIONS)
    vectors_UK = (left * values.sqrt())[:, :dimensions]
    return torch.where(occurs_U[:, None], vectors_UK, 0.0)


def sparse_matrix(
    indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """A coalesced sparse matrix of rows and columns (2, n) and their values; equal ones add up."""
    with torch.sparse.check_sparse_tensor_invariants():
        return torch.sparse_coo_tensor(indices, values, shape).coalesce()
