"""The training loop: a run directory, its stages, checkpoints, metrics and status.

One loop serves every stage. A run can be stopped anywhere: the data order, the learning rate and
the random state of a step are pure functions of (seed, stage, step), so a checkpoint holds only
weights, moments and a position.
"""

import contextlib
import math
import random
import signal
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from s2t2_dist import checkpoint, comm, engine, model, rundir, stages
from s2t2_dist.comm import agree
from s2t2_dist.config import Recipe, Stage, Translate, recipe_values
from s2t2_dist.data import (
    Batch,
    ShardReader,
    count_predicted,
    load_batch,
    prefetched,
    require_tokenizer,
    rows_at,
)
from s2t2_dist.errors import ConfigError, S2T2Error
from s2t2_dist.evaluate import Evaluation, evaluate
from s2t2_dist.inputs import check_inputs
from s2t2_dist.progress import Progress
from s2t2_dist.schedule import learning_rate
from s2t2_dist.stage import Context, StageRunner
from s2t2_dist.tracking import MetricsFile, MLflowShipper, flatten, is_shipped

EXIT_DONE = 0
EXIT_PREEMPTED = 3


class _StopRequest:
    """Set by SIGTERM, SIGUSR1 or SIGINT; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: object) -> None:
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)


class PreemptedError(Exception):
    """A stop was asked for and a checkpoint was written."""


def run(recipe: Recipe, resume: str = "auto") -> int:
    """Run a recipe's stages in its run directory, from its newest checkpoint where there is one.

    Args:
        resume: `auto` (the newest good checkpoint), `never` (a new directory only) or the path of
            a checkpoint of this run.

    Returns:
        the exit code: 0 done, 3 stopped on request with a checkpoint written.

    Raises:
        S2T2Error: a user's mistake, found before anything is written, or a full disk.
    """
    device = engine.init_distributed()
    world = comm.world_comm()
    try:
        code = _run_job(recipe, resume, world, device)
    except S2T2Error as error:
        if error.everywhere:  # else the other ranks may still be waiting in a collective
            comm.destroy()
        raise
    comm.destroy()
    return code


def _run_job(recipe: Recipe, resume: str, world: comm.LocalComm, device: torch.device) -> int:
    context = agree(world, lambda: _open_inputs(recipe, world, device), "opening the inputs")
    with contextlib.ExitStack() as held:
        state = agree(world, lambda: _claim(context, resume, held), "making the run directory")
        if world.broadcast_object(state) != "done":
            return Trainer(context, resume).run()
        if world.rank == 0:
            _finish_shipping(context)
            print(f"{context.run_dir} is done; nothing to do")
        return EXIT_DONE


def _open_inputs(recipe: Recipe, world: comm.LocalComm, device: torch.device) -> Context:
    """Check and open what a run reads, before anything is written."""
    data = recipe.data
    train = ShardReader(data.path, "train", data.verify)
    if data.tokenizer is not None:
        require_tokenizer(train.metadata, data.tokenizer)
    for stage in recipe.stages:
        engine.split_batch(stage, world.size)
    context = Context(
        recipe=recipe,
        run_dir=recipe.output_dir.resolve(),
        comm=world,
        device=device,
        deepspeed=engine.load_settings(recipe.deepspeed),
        train=train,
        validation=ShardReader(data.path, "validation"),
    )
    check_inputs(context)
    return context


def _claim(context: Context, resume: str, held: contextlib.ExitStack) -> str | None:
    """On rank 0, make or take over the run directory, and read its state; `held` unlocks it."""
    if context.comm.rank != 0:
        return None
    recipe = context.recipe
    base = model.local_folder(recipe.model) if recipe.model.config is None else None
    translates = [stage for stage in recipe.stages if isinstance(stage, Translate)]
    others = [path for stage in translates for path in (stage.source_tokens, stage.source_marginal)]
    data = context.train.directory
    inputs = rundir.identify_inputs(data, context.deepspeed, base, others)
    held.enter_context(rundir.claimed(context.run_dir, recipe, inputs, resume))
    return rundir.read_state(context.run_dir)


def _finish_shipping(context: Context) -> None:
    """Send MLflow what a run that is done could not send at its end."""
    if context.recipe.tracking.enabled and not is_shipped(context.run_dir):
        _start_shipper(context).close("FINISHED")


def _start_shipper(context: Context) -> MLflowShipper:
    params = flatten(recipe_values(context.recipe))
    return MLflowShipper(context.run_dir, context.recipe.tracking, params)


class Trainer:
    """One run on one rank, in a run directory that is its own.

    Args:
        resume: as for `run`.
    """

    def __init__(self, context: Context, resume: str):
        self.context = context
        self.recipe, self.run_dir, self.comm = context.recipe, context.run_dir, context.comm
        self.stop = _StopRequest()
        path = None if resume in ("auto", "never") else Path(resume)
        found = checkpoint.find(self.run_dir, self.comm, path)
        self.resume_dir, self.position = found or (None, None)
        self.metrics: MetricsFile | None = None
        self.mlflow: MLflowShipper | None = None
        agree(self.comm, self._open_metrics, "opening the metrics")

    def _open_metrics(self) -> None:
        """Check that this job can go on from the checkpoint; on rank 0, open what it writes."""
        if self.position:
            stage = self.recipe.stages[self.position.stage_index]
            _check_world_size(stage, self.position, self.resume_dir, self.comm.size)
        if self.comm.rank == 0:
            self.metrics = MetricsFile(self.run_dir)
            self.metrics.truncate(self.position.metrics_bytes if self.position else 0)
            if self.recipe.tracking.enabled:
                self.mlflow = _start_shipper(self.context)

    def run(self) -> int:
        """Run every stage that is not behind the checkpoint; returns the exit code."""
        first = self.position.stage_index if self.position else 0
        self._write_status("running", stage=self.recipe.stages[first].name)
        try:
            for index in range(first, len(self.recipe.stages)):
                evaluation = self._run_stage(index)
        except PreemptedError:
            self._end("preempted", "KILLED")
            return EXIT_PREEMPTED
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                self._end("failed", "FAILED", reason=f"{type(error).__name__}: {error}")
            raise
        self._end("done", "FINISHED", **evaluation.metrics())
        return EXIT_DONE

    def _write_status(self, state: str, **more: object) -> None:
        if self.comm.rank == 0:
            rundir.write_status(self.run_dir, state, **more)

    def _end(self, state: str, mlflow_status: str, **more: object) -> None:
        """Close the files and write the status; only then wait for MLflow, which may be slow."""
        if self.metrics:
            self.metrics.sync()
            self.metrics.close()
        self._write_status(state, **more)
        if self.mlflow:
            self.mlflow.close(mlflow_status)

    def _run_stage(self, index: int) -> Evaluation:
        stage = self.recipe.stages[index]
        seed_step(self.recipe.seed, index, 0, 0)
        runner = stages.make_stage(self.context, stage)
        resuming = self.position is not None and self.position.stage_index == index
        start = self.position.step if resuming else 0
        if resuming:
            runner.load(self.resume_dir)
        progress = Progress(stage.name, start, stage.max_steps, self.comm.rank)
        if not resuming:
            evaluation = self._evaluate(runner, stage)
            self._log(stage, index, 0, evaluation.metrics(), progress)
        elif start == stage.max_steps:  # its last evaluation is in the metrics already
            evaluation = self._evaluate(runner, stage)
        steps = range(start, stage.max_steps)
        read = prefetched(self._batches(index, step) for step in steps)
        for step, (batches, predicted) in zip(steps, read, strict=True):
            values = self._step(runner, stage, index, step, batches, predicted)
            done = step + 1
            if done == stage.max_steps or (stage.eval_steps and done % stage.eval_steps == 0):
                evaluation = self._evaluate(runner, stage)
                values |= evaluation.metrics()
            self._log(stage, index, done, values, progress)
            stopping = self._stop_asked()
            if done == stage.max_steps or done % stage.save_steps == 0 or stopping:
                self._save(runner, stage, index, done)
            if stopping and done < stage.max_steps:
                raise PreemptedError
        record = {"recipe": recipe_values(self.recipe), "evaluation": asdict(evaluation)}
        runner.finish({**record, "stage": stage.name, "s2t2_dist": version("s2t2-dist")})
        runner.close()
        return evaluation

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
        self._require_finite(loss, stage, step + 1)
        seconds = time.perf_counter() - started
        tokens = stage.train_batch_size * self.context.train.context
        speed = {"tokens_per_second": tokens / seconds, "step_seconds": seconds}
        return {"loss": loss, "learning_rate": rate, **values, **speed}

    def _batches(self, index: int, step: int) -> tuple[list[Batch], int]:
        """This rank's micro-batches of a step, and the predicted tokens of the whole step.

        A stage goes on in the order of the rows where the stages before it stopped.
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

    def _require_finite(self, loss: float, stage: Stage, step: int) -> None:
        """Stop, on every rank, before a checkpoint could hold weights that are lost."""
        if math.isfinite(loss):
            return
        saved = checkpoint.list_checkpoints(self.run_dir)
        last = f"the last checkpoint is {saved[0]}" if saved else "there is no checkpoint yet"
        error = S2T2Error(
            f"the loss of stage {stage.name} is {loss} at step {step}; {last}; "
            "lower the learning rate in a new output_dir"
        )
        error.everywhere = True
        raise error

    def _evaluate(self, runner: StageRunner, stage: Stage) -> Evaluation:
        runner.evaluation_mode(True)
        evaluation = evaluate(
            runner.logits,
            self.context.validation,
            stage.per_device_eval_batch_size,
            self.context.device,
            self.comm,
            self.recipe.data.document_mask,
        )
        runner.evaluation_mode(False)
        return evaluation

    def _log(
        self, stage: Stage, index: int, step: int, values: dict[str, float], progress: Progress
    ) -> None:
        if self.metrics:
            self.metrics.append(stage.name, index, step, values)
        progress.update(step, values)

    def _save(self, runner: StageRunner, stage: Stage, index: int, step: int) -> None:
        length = self.metrics.sync() if self.metrics else 0
        position = checkpoint.Position(index, stage.name, step, self.comm.size, length)
        keep = self.recipe.save_total_limit
        checkpoint.save(self.run_dir, position, runner.save, self.comm, keep)

    def _stop_asked(self) -> bool:
        """Whether any rank was told to stop; every rank gives the same answer."""
        flag = torch.tensor([int(self.stop.asked)], device=self.context.device)
        return bool(self.comm.max_(flag))


def seed_step(seed: int, stage_index: int, step: int, rank: int) -> None:
    """Set every generator for one step: a resume needs no saved random state."""
    words = np.random.SeedSequence([seed, stage_index, step, rank]).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(int(words[0]))
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


def _check_world_size(
    stage: Stage, position: checkpoint.Position, path: Path, world_size: int
) -> None:
    """DeepSpeed's moments are cut for the ranks that wrote them; a translate stage's rows are not.

    Raises:
        ConfigError: this job cannot resume from the checkpoint.
    """
    if not isinstance(stage, Translate) and position.world_size != world_size:
        raise ConfigError(
            f"checkpoint {path} was written by {position.world_size} ranks, this job has "
            f"{world_size}; start it with {position.world_size} (only a translate stage resumes "
            "at any number)"
        )
