"""The training loop: a run directory, its stages, checkpoints, metrics and status.

One loop serves every stage. A run can be stopped anywhere: the data order, the learning rate and
the random state of a step are pure functions of (seed, stage, step), so a checkpoint holds only
weights, moments and a position.
"""

import contextlib
import logging
import random
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from s2t2_dist.comm import agree, announced
from s2t2_dist.config import Stage, Translate, recipe_values
from s2t2_dist.data.batches import Batch, count_predicted, load_batch, read_ahead
from s2t2_dist.data.evaluate import Evaluation, evaluate
from s2t2_dist.data.order import rows_at
from s2t2_dist.lm import engine
from s2t2_dist.lm.probe import require_folded
from s2t2_dist.lm.result import MODEL_DIR
from s2t2_dist.lm.translation import TRANSLATION_DIR
from s2t2_dist.run import checkpoint, directory
from s2t2_dist.run.link import flatten
from s2t2_dist.run.metrics import MetricsFile, read_metrics
from s2t2_dist.run.progress import Progress
from s2t2_dist.run.stopping import Launchers, StopRequest
from s2t2_dist.run.tracking import MLflowShipper
from s2t2_dist.training.context import Context, StageRunner
from s2t2_dist.training.finetune import make_stage, uses_translation_of_run
from s2t2_dist.training.nonfinite import SkippedSteps, never_better, require_finite
from s2t2_dist.training.preflight import check_resume
from s2t2_dist.training.samples import sample
from s2t2_dist.training.schedule import learning_rate
from s2t2_dist.training.usage import Usage, explained

_log = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_PREEMPTED = 3


class PreemptedError(Exception):
    """A stop was asked for and a checkpoint was written."""


def start_shipper(context: Context) -> MLflowShipper:
    """What sends MLflow the lines of this run's `metrics.jsonl`. On rank 0 only."""
    params = flatten(recipe_values(context.recipe))
    files = (directory.CONFIG,)
    return MLflowShipper(context.run_dir, context.recipe.tracking, params, files)


class Trainer:
    """One run on one rank, in a run directory that is its own.

    Args:
        resume: the checkpoint to resume from; None: the newest valid one, if there is any.
        await_cause: from `heartbeat.monitored`.
        launchers: of this process; they count in a job of several ranks.
        outer: see `start.run_joined`.
    """

    def __init__(
        self,
        context: Context,
        resume: Path | None,
        await_cause: Callable[[BaseException], None],
        launchers: Launchers,
        outer: StopRequest | None = None,
    ):
        self.context = context
        self.recipe, self.run_dir, self.comm = context.recipe, context.run_dir, context.comm
        self.await_cause = await_cause
        watched = launchers if self.comm.size > 1 else None
        self.stop = StopRequest(watched, self.recipe.max_hours, outer)
        self.skipped = SkippedSteps(self.recipe.max_bad_steps, self.comm.rank)
        found = checkpoint.find(self.run_dir, self.comm, resume)
        self.resume_dir, self.position = found or (None, None)
        if found:
            check_resume(context, *found)
            if self.comm.rank == 0:
                print(f"resuming from {self.resume_dir.name}", flush=True)
        self.metrics: MetricsFile | None = None
        self.mlflow: MLflowShipper | None = None
        lines = agree(self.comm, self._open_metrics, "opening the metrics")
        self.skipped.go_on(lines, self.comm)

    def _open_metrics(self) -> list[dict]:
        """Open the metrics file and MLflow; on rank 0 only. Returns the lines so far."""
        if self.comm.rank != 0:
            return []
        self.metrics = MetricsFile(self.run_dir)
        self.metrics.truncate(self.position.metrics_bytes if self.position else 0)
        if self.recipe.tracking.enabled:
            self.mlflow = start_shipper(self.context)
        return read_metrics(self.run_dir)

    def run(self) -> int:
        """Run the stages from the checkpoint's on; returns the exit code."""
        first = self.position.stage_index if self.position else 0
        self._write_status("running", stage=self.recipe.stages[first].name)
        evaluation = None
        try:
            for index in range(first, len(self.recipe.stages)):
                with explained(self.recipe.stages[index], self.context.device):
                    evaluation = self._run_stage(index, evaluation)
            more = self._warnings()
        except PreemptedError:
            self._end("preempted", "KILLED")
            return EXIT_PREEMPTED
        except BaseException as error:
            self.await_cause(error)
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                self._end("failed", "FAILED", reason=f"{type(error).__name__}: {error}")
            raise
        if self.metrics:
            more["metrics_sha256"] = self.metrics.sha256
        self._end("done", "FINISHED", **evaluation.metrics(), **more)
        return EXIT_DONE

    def _warnings(self) -> dict[str, object]:
        """On rank 0, say which stages learned nothing, and return it for the status."""
        lines = read_metrics(self.run_dir) if self.metrics else []
        found = [never_better(lines, stage, i) for i, stage in enumerate(self.recipe.stages)]
        told = [line for line in found if line]
        for line in told:
            _log.warning(line)
        return {"warnings": told} if told else {}

    def _write_status(self, state: str, **more: object) -> None:
        if self.comm.rank == 0:
            directory.write_status(self.run_dir, state, **more)

    def _end(self, state: str, mlflow_status: str, **more: object) -> None:
        """Close the files and write the status; only then wait for MLflow, which may be slow."""
        if self.metrics:
            self.metrics.sync()
            self.metrics.close()
        self._write_status(state, **more)
        if self.mlflow:
            self.mlflow.close(mlflow_status)

    def _run_stage(self, index: int, before: Evaluation | None) -> Evaluation:
        """Run a stage from its start or checkpoint.

        Args:
            before: the last evaluation of the stage before it, if this job ran it.
        """
        stage = self.recipe.stages[index]
        if self.position:
            self.skipped.require_fewer(self.run_dir, stage, self.position.step)
        seed_step(self.recipe.seed, index, 0, 0)
        with announced(engine.compile_lock):
            runner = make_stage(self.context, stage)
        resuming = self.position is not None and self.position.stage_index == index
        start = self.position.step if resuming else 0
        if resuming:
            runner.load(self.resume_dir, self.position.world_size)
        progress = Progress(stage.name, start, stage.max_steps, self.comm.rank)
        usage = Usage(self.context, stage)
        if not resuming:
            runner.probe()
            evaluation = self._evaluate(runner, stage, 0)
            self._log(stage, index, 0, evaluation.metrics(), progress)
            if before is not None and uses_translation_of_run(stage):
                dtype = getattr(torch, self.recipe.model.dtype)
                require_folded(before.loss, evaluation.loss, dtype)
        elif start == stage.max_steps:  # its last evaluation is in the metrics already
            evaluation = self._evaluate(runner, stage, start)
        steps = range(start, stage.max_steps)
        read = read_ahead(partial(self._batches, index), steps)
        for step, (batches, predicted) in zip(steps, read, strict=True):
            usage.begin()
            values = self._step(runner, stage, index, step, batches, predicted)
            values |= usage.values(values["tokens_per_second"])
            done = step + 1
            if done == stage.max_steps or (stage.eval_steps and done % stage.eval_steps == 0):
                evaluation = self._evaluate(runner, stage, done)
                values |= evaluation.metrics()
            self._log(stage, index, done, values, progress)
            stopping = self._stop_asked()
            ending = stopping or self.skipped.is_over
            if done == stage.max_steps or done % stage.save_steps == 0 or ending:
                self._save(runner, stage, index, done)
            self.skipped.require_fewer(self.run_dir, stage, done)
            if stopping and done < stage.max_steps:
                raise PreemptedError
        record = {"recipe": recipe_values(self.recipe), "evaluation": asdict(evaluation)}
        if not self._is_written(stage):
            runner.finish({**record, "stage": stage.name, "s2t2_dist": version("s2t2-dist")})
        runner.close()
        return evaluation

    def _is_written(self, stage: Stage) -> bool:
        """Whether an earlier job wrote the stage's result; a damaged one is set aside, with a line.

        Rank 0 decides: other hosts may see an older state of the disk.
        """
        name = TRANSLATION_DIR if isinstance(stage, Translate) else MODEL_DIR
        target = self.run_dir / name

        def look() -> bool:
            return self.comm.rank == 0 and checkpoint.is_intact(target)

        return self.comm.broadcast_object(agree(self.comm, look, f"reading {target}"))

    def _step(
        self,
        runner: StageRunner,
        stage: Stage,
        index: int,
        step: int,
        batches: list[Batch],
        predicted: int,
    ) -> dict[str, float]:
        """One optimizer step on this rank's share of the global batch, and its metrics."""
        started = time.perf_counter()
        seed_step(self.recipe.seed, index, step, self.comm.rank)
        rate = learning_rate(
            step, stage.max_steps, stage.learning_rate, stage.warmup_ratio, stage.min_lr_ratio
        )
        nats, values = runner.train_step(batches, predicted, rate)
        loss = float(self.comm.sum_(nats)) / predicted
        values |= {"skipped_steps": self.skipped.count(stage, step + 1, values["grad_norm"])}
        seconds = time.perf_counter() - started
        tokens = stage.train_batch_size * self.context.train.context
        speed = {"tokens_per_second": tokens / seconds, "step_seconds": seconds}
        return {"loss": loss, "learning_rate": rate, **values, **speed}

    def _batches(self, index: int, step: int) -> tuple[list[Batch], int]:
        """This rank's micro-batches of a step, and the predicted tokens of the whole step.

        The stages share one order of the rows: each continues where the one before stopped.
        """
        reader = self.context.train
        *before, stage = self.recipe.stages[: index + 1]
        first = sum(earlier.max_steps * earlier.train_batch_size for earlier in before)
        first += step * stage.train_batch_size
        positions = np.arange(first, first + stage.train_batch_size)
        rows = rows_at(positions, len(reader), self.recipe.seed)
        mine = np.split(rows, self.comm.size)[self.comm.rank]
        _, passes = engine.split_batch(stage, self.comm.size)
        micro = np.split(mine, passes)
        mask = self.recipe.data.document_mask
        batches = [load_batch(reader, part, mask) for part in micro]
        return batches, count_predicted(reader, rows, mask)

    def _evaluate(self, runner: StageRunner, stage: Stage, step: int) -> Evaluation:
        runner.evaluation_mode(True)
        evaluation = evaluate(
            runner.logits,
            self.context.validation,
            stage.per_device_eval_batch_size,
            self.context.device,
            self.comm,
            self.recipe.data.document_mask,
        )
        sample(runner, self.context, stage, step)
        runner.evaluation_mode(False)
        return evaluation

    def _log(
        self, stage: Stage, index: int, step: int, values: dict[str, float], progress: Progress
    ) -> None:
        if self.metrics:
            self.metrics.append(stage.name, index, step, values)
        progress.update(step, values)

    def _save(self, runner: StageRunner, stage: Stage, index: int, step: int) -> None:
        """Write a checkpoint.

        Raises:
            S2T2Error: on every rank, if the model has diverged; nothing is saved.
        """
        started = time.monotonic()
        require_finite(runner, self.context, stage, step)
        length = self.metrics.sync() if self.metrics else 0
        sha256 = self.metrics.sha256 if self.metrics else None
        position = checkpoint.Position(index, stage.name, step, self.comm.size, length, sha256)
        keep = self.recipe.save_total_limit, self.recipe.keep_steps
        checkpoint.save(self.run_dir, position, runner.save, self.comm, *keep)
        self.stop.saved(time.monotonic() - started)

    def _stop_asked(self) -> bool:
        """Whether any rank was asked to stop: the same answer on every rank."""
        flag = torch.tensor([int(self.stop.asked())], device=self.context.device)
        return bool(self.comm.max_(flag))


def seed_step(seed: int, stage_index: int, step: int, rank: int) -> None:
    """Set every generator for one step: a resume needs no saved random state."""
    words = np.random.SeedSequence([seed, stage_index, step, rank]).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]))
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
