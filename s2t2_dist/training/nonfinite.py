"""What happens when numbers stop being finite: steps are skipped, lost weights are never saved."""

import logging
import math
from pathlib import Path

from s2t2_dist.config import Stage
from s2t2_dist.data.evaluate import gives_finite_logits
from s2t2_dist.errors import S2T2Error, collective
from s2t2_dist.run import checkpoint
from s2t2_dist.training.context import Context, StageRunner

_log = logging.getLogger(__name__)


class SkippedSteps:
    """Counts the steps whose gradient was not finite: they change no weight.

    Args:
        most: `max_bad_steps` of the recipe.

    Attributes:
        total: of the run; rank 0 knows those before this job from the metrics.
    """

    def __init__(self, most: int, rank: int):
        self.most, self.rank = most, rank
        self.total = self.in_a_row = 0

    def count(self, stage: Stage, step: int, grad_norm: float) -> int:
        """Take note of a step; returns the total."""
        if math.isfinite(grad_norm):
            self.in_a_row = 0
            return self.total
        self.in_a_row += 1
        self.total += 1
        if self.rank == 0:
            _log.warning("stage %s: step %d skipped, its gradient is not finite", stage.name, step)
        return self.total

    def require_fewer(self, run_dir: Path, stage: Stage, step: int) -> None:
        """Raises S2T2Error, on every rank, where there were `most` in a row."""
        if self.in_a_row < self.most:
            return
        message = (
            f"stage {stage.name}: the gradient was not finite in {self.in_a_row} steps in a row "
            f"(max_bad_steps), all skipped, the last of them {step}; the weights before them are "
            f"in {checkpoint.list_checkpoints(run_dir)[0]}: start again to go on with other rows, "
            "or lower the learning rate in a new output_dir"
        )
        raise collective(S2T2Error(message))


def require_sound(runner: StageRunner, context: Context, stage: Stage, step: int) -> None:
    """A step with a finite gradient may still have thrown the weights away: look before a save.

    Raises:
        S2T2Error: on every rank, where no row of a validation pass gets finite logits.
    """
    runner.evaluation_mode(True)
    rows = stage.per_device_eval_batch_size
    reader, device = context.validation, context.device
    sound = gives_finite_logits(runner.logits, reader, rows, device, context.comm)
    runner.evaluation_mode(False)
    if sound:
        return
    saved = checkpoint.list_checkpoints(context.run_dir)
    last = f"the last good checkpoint is {saved[0]}" if saved else "there is no checkpoint"
    message = (
        f"stage {stage.name}: after step {step} the weights give no finite output for any row, so "
        f"they are not saved; {last}; lower the learning rate in a new output_dir"
    )
    raise collective(S2T2Error(message))
