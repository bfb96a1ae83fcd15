"""`s2t2 evaluate --marginal`: bits per byte over all tokenizations of every text of a split.

The text is what `evaluate` counts, piece by piece: the part of a document in a row, without the
row's first token, given the tokens before it in the row. The end token of a document belongs to
it. A document that its row cuts off is a text that goes on (see `lm.marginal`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from transformers import PreTrainedModel

from s2t2_dist.data.batches import load_batch
from s2t2_dist.data.evaluate import Evaluation
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.errors import ArtifactError, DataError
from s2t2_dist.lm.architecture import one_line
from s2t2_dist.lm.marginal import Marginal, Piece, marginals
from s2t2_dist.lm.paths import PathTree, last_position
from s2t2_dist.lm.probe import TOLERANCE, difference
from s2t2_dist.lm.spellings import Spellings
from s2t2_dist.report.evaluate import evaluate_all, progress_bar, report

# The estimate's bits are less than the marginal's by log2(ODDS) at most once in ODDS runs.
ODDS = 1000
SEED = 17


class TokenTexts(Protocol):
    """What is needed of a tokenizer.

    Attributes:
        token_texts: the bytes of text of each token id; empty for special tokens.
        eos_token_id: the token that ends a document.
    """

    token_texts: Sequence[bytes]
    eos_token_id: int


@dataclass(frozen=True)
class MarginalEvaluation:
    """A split over all tokenizations, beside its evaluation with the rows' own.

    Attributes:
        evaluation: with the rows' own tokenization.
        nats_rows: the same nats by the paths, in float64.
        nats_at_most: at least the marginal nats of all pieces, for certain.
        nats_estimate: of the unbiased estimate of their probability.
        pieces: of text; `whole` are documents that a row holds in full, `exact` are summed in full.
    """

    evaluation: Evaluation
    beam: int
    nats_rows: float
    nats_at_most: float
    nats_estimate: float
    pieces: int
    whole: int
    exact: int

    def bits_per_byte(self, nats: float) -> float:
        """Nats of the whole split in bits per byte."""
        return replace(self.evaluation, nats=nats).bits_per_byte

    @property
    def nats_likely(self) -> float:
        """At least the marginal nats, with probability 1 - 1 / ODDS over the draws."""
        return min(self.nats_estimate + math.log(ODDS), self.nats_at_most)


def score_marginal(
    lm: PreTrainedModel,
    reader: ShardReader,
    tokenizer: TokenTexts,
    batch_size: int,
    beam: int,
) -> MarginalEvaluation:
    """Evaluate a model on every row of a split over all tokenizations.

    Args:
        tokenizer: of the rows.
        batch_size: rows at a time.
        beam: see `lm.marginal.marginals`; nothing is drawn, and the estimate is none, below 2.

    Raises:
        ArtifactError: logits that are not finite, or an architecture whose paths cannot share rows.
        DataError: the tokenizer is not that of the rows, or a document holds a token that spells
            nothing.
    """
    if [len(text) for text in tokenizer.token_texts] != reader.token_bytes.tolist():
        raise DataError(
            f"the tokenizer of {reader.directory} spells other bytes than its token_bytes.npy says;"
            " build the data again"
        )
    evaluation = evaluate_all(lm, reader, batch_size)
    spellings = Spellings(tokenizer.token_texts, tokenizer.eos_token_id)
    found: list[Marginal] = []
    whole = 0
    with progress_bar() as progress:
        task = progress.add_task(f"All tokenizations of {reader.split}", total=evaluation.bytes)
        for start in range(0, len(reader), batch_size):
            rows = range(start, min(start + batch_size, len(reader)))
            more, documents = _score_rows(
                lm, reader, rows, spellings, beam, lambda count: progress.advance(task, count)
            )
            found += more
            whole += documents
    nats_rows = -math.fsum(each.canonical for each in found)
    off = abs(nats_rows / evaluation.nats - 1)
    if off > _tolerance(lm):
        raise ArtifactError(_refused(lm, f"gives other nats where paths share a row ({off:.1%})"))
    return MarginalEvaluation(
        evaluation,
        beam,
        nats_rows,
        -math.fsum(each.bound for each in found),
        -math.fsum(each.estimate for each in found),
        len(found),
        whole,
        sum(each.exact for each in found),
    )


def _score_rows(
    lm: PreTrainedModel,
    reader: ShardReader,
    rows: range,
    spellings: Spellings,
    beam: int,
    advance: Callable[[int], None],
) -> tuple[list[Marginal], int]:
    """The marginals of the rows' pieces, and how many of these are whole documents."""
    pieces = [p for n, row in enumerate(rows) for p in row_pieces(reader, row, n, spellings)]
    if not pieces:
        return [], 0
    ids_RT = load_batch(reader, rows).input_ids.to(lm.device)
    found = marginals(
        read_rows(lm, ids_RT),
        ids_RT.tolist(),
        pieces,
        spellings,
        beam,
        [(SEED, rows[piece.row], piece.first) for piece in pieces],
        last_position(lm),
        advance=advance,
    )
    starts = [set(reader.document_starts(row).tolist()) for row in rows]
    return found, sum(piece.ends and piece.first in starts[piece.row] for piece in pieces)


def row_pieces(reader: ShardReader, row: int, number: int, spellings: Spellings) -> list[Piece]:
    """The predicted texts of a row that has this number in the tree.

    Raises:
        DataError: a token inside a document spells nothing.
    """
    length = reader.length(row)
    ids = reader[row][:length].tolist()
    starts = [start for start in reader.document_starts(row).tolist() if start > 1]
    pieces = []
    for first, stop in zip([1, *starts], [*starts, length], strict=True):
        if first >= stop:
            continue
        ends = ids[stop - 1] == spellings.end_id
        piece = Piece(number, first, stop - ends, ends)
        if not reader.token_bytes[ids[piece.first : piece.stop]].all():
            raise DataError(
                f"{reader.directory}: row {row} of {reader.split} holds a token that spells "
                "nothing inside a document; build the data again"
            )
        pieces.append(piece)
    return pieces


def read_rows(lm: PreTrainedModel, input_ids_RT: torch.Tensor) -> PathTree:
    """Rows as a tree of paths, proved to give the logits of a plain pass.

    Raises:
        ArtifactError: it does not.
    """
    try:
        tree = PathTree(lm, input_ids_RT)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # what a model makes of an unexpected mask is of many kinds
        what = f"cannot read paths that share a row ({one_line(error)})"
        raise ArtifactError(_refused(lm, what)) from None
    with torch.no_grad():
        plain = lm(input_ids_RT, use_cache=False).logits
    off = difference(tree.logits_RTU, plain)
    if off > _tolerance(lm):
        raise ArtifactError(
            _refused(lm, f"gives other logits where paths share a row (off by {off:.1%})")
        )
    return tree


def _tolerance(lm: PreTrainedModel) -> float:
    return TOLERANCE.get(lm.dtype, TOLERANCE[torch.bfloat16])


def _refused(lm: PreTrainedModel, what: str) -> str:
    return (
        f"{lm.name_or_path}: {type(lm).__name__} {what}; --marginal needs attention to all tokens "
        "before, and rows no longer than a sliding window: leave it out"
    )


def report_marginal(found: MarginalEvaluation) -> str:
    """The lines of the evaluation, then those over all tokenizations."""
    own = found.bits_per_byte(found.nats_rows)
    nats = (found.nats_estimate, found.nats_likely, found.nats_at_most)
    estimate, likely, sure = map(found.bits_per_byte, nats)
    less = own - estimate
    exact = found.exact == found.pieces
    middle = (
        f"bits per byte    {sure:.6f}, exact\n"
        if exact
        else f"bits per byte    {estimate:.6f} estimated\n"
        f"                 {likely:.6f} at most, with {1 - 1 / ODDS:.1%} confidence\n"
        f"                 {sure:.6f} at most, for certain\n"
    )
    return (
        f"{report(found.evaluation)}\n"
        f"over all tokenizations\n"
        f"texts            {found.pieces:,}: {found.whole:,} documents, "
        f"{found.pieces - found.whole:,} parts of documents in a row\n"
        f"exact sums       {found.exact:,}; else {found.beam} tokenizations kept at each byte, "
        f"{found.beam} drawn\n"
        f"{middle}"
        f"overstated by    {less:.6f} bits per byte ({less / own:.2%})"
    )
