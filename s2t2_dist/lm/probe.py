"""Proof at run time that an engine computes what transformers computes from the same folder.

Wrong weights, a scale that was left out, a buffer that was lost, attention to later tokens or to
another document: each would train without an error. A few tokens show them all.

Shapes: B rows, T tokens, U vocabulary of the engine.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from s2t2_dist.comm import Comm, agree
from s2t2_dist.errors import ArtifactError, ConfigError, collective

TOKENS = 16  # of a probe's row
# Largest difference of logits, as a share of the largest logit. Two orders of the same float32 sums
# differ by some 1e-6 in models of this depth, of bfloat16 by some 1e-2; a lost scale or buffer
# changes the first digit.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

_log = logging.getLogger(__name__)

Logits = Callable[..., torch.Tensor]


def probe_rows(vocab_size: int, device: torch.device) -> torch.Tensor:
    """Two rows (2, TOKENS) that differ in the last token alone. The same on every rank."""
    generator = torch.Generator().manual_seed(17)
    row_T = torch.randint(vocab_size, (TOKENS,), generator=generator)
    rows_BT = row_T.repeat(2, 1)
    rows_BT[1, -1] = (rows_BT[1, -1] + 1) % vocab_size
    return rows_BT.to(device)


@torch.no_grad()
def plain_logits(
    folder: Path, input_ids_BT: torch.Tensor, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Logits by transformers alone, on the ids' device, or on the CPU where that is full."""
    lm = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", trust_remote_code=False
    ).eval()
    try:
        return lm.to(input_ids_BT.device)(input_ids=input_ids_BT, use_cache=False).logits
    except torch.OutOfMemoryError:
        return lm.cpu()(input_ids=input_ids_BT.cpu(), use_cache=False).logits


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of finite logits, as a share of the largest expected one.

    Infinite if they are not finite in the same places. A model may have a row that is not finite
    (the steps that read it are skipped); if no logit is finite, one line says so.
    """
    expected = expected.float()
    found = found.float().to(expected.device)
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return torch.inf
    if not finite.any():
        _log.warning("the model's own logits are not finite for the tokens that were compared")
        return 0.0
    off = (found - expected)[finite].abs().max() / expected[finite].abs().max()
    return float(off.nan_to_num(torch.inf))


@torch.no_grad()
def probe_engine(
    logits: Logits,
    input_ids_BT: torch.Tensor,
    expected: Callable[[], torch.Tensor],
    document_mask: bool,
    comm: Comm,
) -> None:
    """Check the engine's logits of `probe_rows` before anything is trained. A collective.

    Args:
        logits: of the engine, from ids and position ids.
        expected: the same by transformers alone; called on rank 0.
        document_mask: whether documents of a row are to be kept apart.

    Raises:
        ConfigError: on every rank: they differ, a row's earlier tokens see its last, or its second
            document sees its first.
    """
    found = logits(input_ids_BT)
    later = difference(found[1, :-1], found[0, :-1])

    def check() -> None:
        if comm.rank != 0:
            return
        if (off := difference(found, expected())) > TOLERANCE[found.dtype]:
            raise ConfigError(
                f"the model under DeepSpeed differs from the model by transformers alone: logits "
                f"of the same tokens are off by {off:.1%} of the largest; this architecture cannot "
                "be trained here: choose another model, and report this"
            )
        if later > TOLERANCE[found.dtype]:
            raise ConfigError(
                f"a token's logits depend on the tokens after it (they change by {later:.1%}): "
                "this is no causal language model; choose another model"
            )

    agree(comm, check, "comparing the engine with the plain model")
    if document_mask:
        _require_documents_apart(logits, input_ids_BT)


def _require_documents_apart(logits: Logits, input_ids_BT: torch.Tensor) -> None:
    """A change in a row's first document does not reach its second."""
    half = TOKENS // 2
    rows_BT = input_ids_BT.clone()
    rows_BT[1] = rows_BT[0]
    rows_BT[1, :half] = rows_BT[0, half:]
    positions_T = torch.arange(TOKENS, device=rows_BT.device) % half
    try:
        found = logits(rows_BT, positions_T.repeat(2, 1))
    except TypeError as error:
        raise collective(
            ConfigError(
                "data.document_mask: this architecture takes no position ids, by which documents "
                f"are kept apart ({error}); leave it out"
            )
        ) from None
    off = difference(found[1, half:], found[0, half:])
    if off > TOLERANCE[found.dtype]:  # the same on every rank, which all run the same rows
        raise collective(
            ConfigError(
                f"data.document_mask: this architecture reads across documents (a change in the "
                f"first changes the logits of the second by {off:.1%}); leave it out"
            )
        )


def require_folded(before: float, after: float, dtype: torch.dtype) -> None:
    """Check that a folded model starts with the loss at which its translation ended.

    Args:
        before, after: nats per token on the validation split, the same on every rank.

    Raises:
        ArtifactError: on every rank: the folded model is not the translated one.
    """
    if not abs(after - before) <= TOLERANCE[dtype] * max(1.0, before):
        raise collective(
            ArtifactError(
                f"the folded model has a loss of {after:.6f} nats per token, its translation ended "
                f"at {before:.6f}: this architecture cannot be folded exactly; choose another "
                "model, and report this"
            )
        )


def require_written(folder: Path, input_ids_BT: torch.Tensor, logits_BTU: torch.Tensor) -> None:
    """Check that a written model, loaded by transformers alone, gives the trainer's logits.

    Raises:
        ArtifactError: it does not.
    """
    off = difference(plain_logits(folder, input_ids_BT), logits_BTU)
    if off > TOLERANCE[logits_BTU.dtype]:
        raise ArtifactError(
            f"the model written to {folder.name} is not the one that was trained: its logits on "
            f"validation rows are off by {off:.1%} of the largest; the checkpoints are intact"
        )
