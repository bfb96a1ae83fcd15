"""Non-finite numbers: such steps are skipped, and a model that has diverged is never saved."""

import logging
import math
from pathlib import Path

from s2t2_dist.comm import Comm
from s2t2_dist.config import Stage
from s2t2_dist.data.evaluate import gives_finite_logits
from s2t2_dist.errors import S2T2Error, collective
from s2t2_dist.run import checkpoint
from s2t2_dist.training.context import Context, StageRunner

_log = logging.getLogger(__name__)


class SkippedSteps:
    """Counts the steps that were skipped because their gradient was not finite.

    Args:
        most: `max_bad_steps` of the recipe.

    Attributes:
        total, in_a_row: of the run, those before this job included.
    """

    def __init__(self, most: int, rank: int):
        self.most, self.rank = most, rank
        self.total = self.in_a_row = 0

    def go_on(self, lines: list[dict], comm: Comm) -> None:
        """Count on from the run's metrics, which rank 0 has read. A collective."""
        bad = ["grad_norm" not in line for line in lines if line["step"]]
        in_a_row = next((n for n, is_bad in enumerate(reversed(bad)) if not is_bad), len(bad))
        self.total, self.in_a_row = comm.broadcast_object((sum(bad), in_a_row))

    def count(self, stage: Stage, step: int, grad_norm: float) -> int:
        """Count a step if its gradient is not finite; returns the run's total."""
        if math.isfinite(grad_norm):
            self.in_a_row = 0
            return self.total
        self.in_a_row += 1
        self.total += 1
        if self.rank == 0:
            _log.warning("stage %s: step %d skipped, its gradient is not finite", stage.name, step)
        return self.total

    @property
    def is_over(self) -> bool:
        """Whether there are too many in a row to go on."""
        return self.in_a_row >= self.most

    def require_fewer(self, run_dir: Path, stage: Stage, step: int) -> None:
        """Raise an S2T2Error, on every rank, after `most` skipped steps in a row."""
        if not self.is_over:
            return
        saved = checkpoint.list_checkpoints(run_dir)
        where = f"the weights before them are in {saved[0]}" if saved else "nothing is saved"
        message = (
            f"stage {stage.name}: the gradient was not finite in {self.in_a_row} steps in a row "
            f"(max_bad_steps), all skipped, the last of them {step}; {where}: raise "
            "max_bad_steps to go on with the rows after them, or lower the learning rate in a new "
            "output_dir"
        )
        raise collective(S2T2Error(message))


def require_finite(runner: StageRunner, context: Context, stage: Stage, step: int) -> None:
    """Check before a save that the model has not diverged: a finite gradient is no proof of that.

    Raises:
        S2T2Error: on every rank, if no row of a validation pass has finite logits.
    """
    runner.evaluation_mode(True)
    rows = stage.per_device_eval_batch_size
    reader, device = context.validation, context.device
    finite = gives_finite_logits(runner.logits, reader, rows, device, context.comm)
    runner.evaluation_mode(False)
    if finite:
        return
    saved = checkpoint.list_checkpoints(context.run_dir)
    last = f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint"
    message = (
        f"stage {stage.name}: the model has diverged: after step {step} no row has finite logits; "
        f"nothing is saved; {last}; lower the learning rate in a new output_dir"
    )
    raise collective(S2T2Error(message))


def never_better(lines: list[dict], stage: Stage, index: int) -> str | None:
    """What to tell about a stage that never got below its first evaluation; None if it did.

    Args:
        lines: the run's metrics.
    """
    losses = {
        line["step"]: line.get("eval_bits_per_byte", math.inf)
        for line in lines
        if line["stage_index"] == index and (line["step"] == 0 or "eval_loss" in line)
    }
    later = {step: loss for step, loss in losses.items() if step}
    if not later or 0 not in losses or min(later.values()) < losses[0]:
        return None
    best = min(later, key=lambda step: later[step])
    return (
        f"stage {stage.name} learned nothing: it never got below the {losses[0]:.4f} bits per byte "
        f"of its start (best after it: {later[best]:.4f} at step {best}); "
        f"change learning_rate ({stage.learning_rate:g}) in a new output_dir"
    )
