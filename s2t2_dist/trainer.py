"""The training loop: a run directory, its stages, checkpoints, metrics and status.

One loop serves every stage. A run can be stopped anywhere: the data order, the learning rate and
the random state of a step are pure functions of (seed, stage, step), so a checkpoint holds only
weights, moments and a position.
"""

import contextlib
import os
import random
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import yaml

from s2t2_dist import artifacts, checkpoint, comm, engine, stages
from s2t2_dist.config import Recipe, Stage, changed_keys, recipe_values
from s2t2_dist.data import (
    Batch,
    ShardReader,
    count_predicted,
    load_batch,
    require_tokenizer,
    rows_at,
)
from s2t2_dist.errors import ArtifactError, ConfigError, S2T2Error
from s2t2_dist.evaluate import Evaluation, evaluate
from s2t2_dist.progress import Progress
from s2t2_dist.schedule import learning_rate
from s2t2_dist.stage import Context, StageRunner
from s2t2_dist.tracking import MetricsFile, MLflowShipper, flatten

EXIT_DONE = 0
EXIT_PREEMPTED = 3
STATUS = "status.json"
CONFIG = "config.yaml"
T = TypeVar("T")


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
    context = agree(world, lambda: _open_inputs(recipe, world, device))
    agree(world, lambda: _check_run_directory(context, resume))
    agree(world, lambda: _make_run_directory(context))
    if world.broadcast_object(read_state(context.run_dir) == "done"):
        if world.rank == 0:
            print(f"{context.run_dir} is done; nothing to do")
        code = EXIT_DONE
    else:
        code = Trainer(context, resume).run()
    comm.destroy()
    return code


def agree(world: comm.LocalComm, check: Callable[[], T]) -> T:
    """Run a check on every rank; where it fails on any, every rank raises the same error.

    The check itself must hold no collective.
    """
    result, problem = None, None
    try:
        result = check()
    except S2T2Error as error:
        problem = error
    except OSError as error:
        problem = artifacts.disk_error(error, "starting the run") or S2T2Error(str(error))
    problems = world.gather_objects(problem)
    failed = [rank for rank, found in enumerate(problems) if found]
    if failed:
        where = "" if len(failed) == world.size else f"rank {failed[0]}: "
        shared = type(problems[failed[0]])(f"{where}{problems[failed[0]]}")
        shared.everywhere = True
        raise shared
    return result


def _open_inputs(recipe: Recipe, world: comm.LocalComm, device: torch.device) -> Context:
    """Check and open what a run reads, before anything is written."""
    data = recipe.data
    train = ShardReader(data.path, "train", data.verify)
    if data.tokenizer is not None:
        require_tokenizer(train.metadata, data.tokenizer)
    for stage in recipe.stages:
        engine.accumulation_steps(stage, world.size)
    context = Context(
        recipe=recipe,
        run_dir=recipe.output_dir.resolve(),
        comm=world,
        device=device,
        deepspeed=engine.load_settings(recipe.deepspeed),
        train=train,
        validation=ShardReader(data.path, "validation"),
    )
    stages.check_inputs(context)
    return context


def read_state(run_dir: Path) -> str | None:
    """The state in a run's `status.json`: running, preempted, failed or done."""
    path = run_dir / STATUS
    return artifacts.read_json(path)["state"] if path.exists() else None


class Trainer:
    """One run on one rank, in a run directory that is its own.

    Args:
        resume: as for `run`.
    """

    def __init__(self, context: Context, resume: str):
        self.context = context
        self.recipe, self.run_dir, self.comm = context.recipe, context.run_dir, context.comm
        self.stop = _StopRequest()
        if resume in ("auto", "never"):
            found = checkpoint.find(self.run_dir, self.comm)
        else:
            found = agree(self.comm, lambda: checkpoint.load(self.run_dir, Path(resume)))
        self.resume_dir, self.position = found or (None, None)
        self.metrics: MetricsFile | None = None
        self.mlflow: MLflowShipper | None = None
        if self.comm.rank == 0:
            self.metrics = MetricsFile(self.run_dir)
            self.metrics.truncate(self.position.metrics_bytes if self.position else 0)
            if self.recipe.tracking.enabled:
                params = flatten(recipe_values(self.recipe))
                self.mlflow = MLflowShipper(self.run_dir, self.recipe.tracking, params)

    def run(self) -> int:
        """Run every stage that is not behind the checkpoint; returns the exit code."""
        first = self.position.stage_index if self.position else 0
        self._write_status("running", stage=self.recipe.stages[first].name)
        try:
            for index in range(first, len(self.recipe.stages)):
                evaluation = self._run_stage(index)
        except PreemptedError:
            self._close("KILLED")
            self._write_status("preempted")
            return EXIT_PREEMPTED
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                self._write_status("failed", reason=f"{type(error).__name__}: {error}")
                self._close("FAILED")
            raise
        self._close("FINISHED")
        self._write_status("done", **evaluation.metrics())
        return EXIT_DONE

    def _write_status(self, state: str, **more: object) -> None:
        if self.comm.rank == 0:
            where = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
            artifacts.write_json(self.run_dir / STATUS, {"state": state, **more, **where})

    def _close(self, mlflow_status: str) -> None:
        """Ship the last metrics and close the files."""
        if self.metrics:
            self.metrics.sync()
            self.metrics.close()
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
        for step in range(start, stage.max_steps):
            values = self._step(runner, stage, index, step)
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
        if start == stage.max_steps:  # resumed after the last step: its evaluation is logged
            evaluation = self._evaluate(runner, stage)
        record = {"recipe": recipe_values(self.recipe), "evaluation": asdict(evaluation)}
        runner.finish({**record, "stage": stage.name, "s2t2_dist": version("s2t2-dist")})
        runner.close()
        return evaluation

    def _step(self, runner: StageRunner, stage: Stage, index: int, step: int) -> dict[str, float]:
        """One optimizer step on this rank's share of the global batch, and its metrics."""
        started = time.perf_counter()
        seed_step(self.recipe.seed, index, step, self.comm.rank)
        batches, predicted = self._batches(stage, step)
        rate = learning_rate(
            step, stage.max_steps, stage.learning_rate, stage.warmup_ratio, stage.min_lr_ratio
        )
        nats, values = runner.train_step(batches, predicted, rate)
        loss = float(self.comm.sum_(nats)) / predicted
        seconds = time.perf_counter() - started
        tokens = stage.train_batch_size * self.context.train.context
        speed = {"tokens_per_second": tokens / seconds, "step_seconds": seconds}
        return {"loss": loss, "learning_rate": rate, **values, **speed}

    def _batches(self, stage: Stage, step: int) -> tuple[list[Batch], int]:
        """This rank's micro-batches of a step, and the predicted tokens of the whole step."""
        reader = self.context.train
        positions = np.arange(step * stage.train_batch_size, (step + 1) * stage.train_batch_size)
        rows = rows_at(positions, len(reader), self.recipe.seed)
        mine = np.split(rows, self.comm.size)[self.comm.rank]
        micro = np.split(mine, len(mine) // stage.per_device_train_batch_size)
        return [load_batch(reader, part) for part in micro], count_predicted(reader, rows)

    def _evaluate(self, runner: StageRunner, stage: Stage) -> Evaluation:
        runner.evaluation_mode(True)
        evaluation = evaluate(
            runner.logits,
            self.context.validation,
            stage.per_device_eval_batch_size,
            self.context.device,
            self.comm,
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


def _check_run_directory(context: Context, resume: str) -> None:
    """Check that the run directory is new or belongs to this recipe.

    Raises:
        ConfigError: it is there with another recipe (names the keys), or does not fit `resume`.
        ArtifactError: something else is there.
    """
    run_dir = context.run_dir
    config = run_dir / CONFIG
    if not config.exists():
        if run_dir.exists() and any(run_dir.iterdir()):
            raise ArtifactError(
                f"{run_dir} exists and is no run directory (no {CONFIG} in it); choose another "
                "output_dir or remove it yourself"
            )
        if resume not in ("auto", "never"):
            raise ConfigError(f"--resume {resume}: {run_dir} holds no run to resume")
        return
    if resume == "never":
        raise ConfigError(f"{run_dir} holds a run and --resume is never; choose another output_dir")
    old = yaml.safe_load(config.read_text(encoding="utf-8"))
    new = recipe_values(context.recipe)
    changes = changed_keys({**old, "output_dir": None}, {**new, "output_dir": None})
    if changes:
        raise ConfigError(
            f"{run_dir} was started with another recipe ({'; '.join(changes)}); "
            "undo the change or choose another output_dir"
        )


def _make_run_directory(context: Context) -> None:
    """On rank 0, make a new run directory with its resolved recipe."""
    config = context.run_dir / CONFIG
    if context.comm.rank == 0 and not config.exists():
        context.run_dir.mkdir(parents=True, exist_ok=True)
        values = recipe_values(context.recipe)
        artifacts.write_text(config, yaml.safe_dump(values, sort_keys=False))
