"""The training loop: a run directory, its stages, checkpoints, metrics and status.

One loop serves every stage. A run can be stopped anywhere: the data order, the learning rate and
the random state of a step are pure functions of (seed, stage, step), so a checkpoint holds only
weights, moments and a position.
"""

import os
import random
import signal
import socket
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import yaml

from s2t2_dist import artifacts, checkpoint, comm, engine, stages
from s2t2_dist.config import Recipe, Stage, changed_keys, recipe_values
from s2t2_dist.data import Batch, ShardReader, count_predicted, load_batch, rows_at
from s2t2_dist.errors import ArtifactError, ConfigError, S2T2Error
from s2t2_dist.evaluate import Evaluation, evaluate
from s2t2_dist.progress import Progress
from s2t2_dist.schedule import learning_rate
from s2t2_dist.tracking import MetricsFile, MLflowShipper, flatten

EXIT_DONE = 0
EXIT_PREEMPTED = 3


class _StopRequest:
    """Set by SIGTERM or SIGINT; the handler does nothing else."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, *_: object) -> None:
        self.asked = True


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
        S2T2Error: a user's mistake, found before training starts, or a full disk.
    """
    device = engine.init_distributed()
    world = comm.world_comm()
    status = Status(recipe.output_dir, world.rank)
    try:
        trainer = Trainer(recipe, resume, world, device, status)
        try:
            trainer.run()
        except BaseException as error:
            trainer.close("KILLED" if isinstance(error, PreemptedError) else "FAILED")
            raise
        trainer.close("FINISHED")
        return EXIT_DONE
    except PreemptedError:
        status.write("preempted")
        return EXIT_PREEMPTED
    except BaseException as error:
        status.write("failed", reason=f"{type(error).__name__}: {error}")
        raise
    finally:
        comm.destroy()


class Status:
    """`status.json`: running, preempted, failed with the reason, or done. Rank 0 writes it."""

    def __init__(self, run_dir: Path, rank: int):
        self.path = run_dir / "status.json"
        self.rank = rank

    def write(self, state: str, **more: object) -> None:
        """Replace the status; does nothing where the run directory was never made."""
        if self.rank == 0 and self.path.parent.is_dir():
            where = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
            artifacts.write_json(self.path, {"state": state, **more, **where})


class Trainer:
    """One run on one rank."""

    def __init__(
        self,
        recipe: Recipe,
        resume: str,
        world: comm.LocalComm,
        device: torch.device,
        status: Status,
    ):
        self.recipe = recipe
        self.comm = world
        self.status = status
        self.run_dir = recipe.output_dir.resolve()
        self.stop = _StopRequest()
        data = recipe.data
        self.context = stages.Context(
            recipe=recipe,
            run_dir=self.run_dir,
            comm=world,
            device=device,
            deepspeed=engine.load_settings(recipe.deepspeed),
            train=ShardReader(data.path, "train", data.verify),
            validation=ShardReader(data.path, "validation", data.verify),
        )
        for stage in recipe.stages:
            engine.accumulation_steps(stage, world.size)
        found = self._open_run_directory(resume)
        self.resume_dir, self.position = found if found else (None, None)
        self.metrics: MetricsFile | None = None
        self.mlflow: MLflowShipper | None = None
        if world.rank == 0:
            self.metrics = MetricsFile(self.run_dir)
            self.metrics.truncate(self.position.metrics_bytes if self.position else 0)
            if recipe.tracking.enabled:
                params = flatten(recipe_values(recipe))
                self.mlflow = MLflowShipper(self.run_dir, recipe.tracking, params)

    def _open_run_directory(self, resume: str):
        """Make the run directory or check the one that is there; returns the checkpoint to load."""
        problem = None
        if self.comm.rank == 0:
            try:
                _make_or_match(self.run_dir, self.recipe, resume)
            except S2T2Error as error:
                problem = error
            except OSError as error:
                problem = artifacts.disk_error(error, f"making {self.run_dir}") or error
        problem = self.comm.broadcast_object(problem)
        if problem:
            raise problem
        if resume in ("auto", "never"):
            return checkpoint.find(self.run_dir, self.comm)
        path = Path(resume)
        return path, checkpoint.position_of(artifacts.verify(path))

    def run(self) -> None:
        """Run every stage that is not behind the checkpoint."""
        first = self.position.stage_index if self.position else 0
        self.status.write("running", stage=self.recipe.stages[first].name)
        evaluation = None
        for index in range(first, len(self.recipe.stages)):
            evaluation = self._run_stage(index)
        self.status.write("done", **evaluation.metrics())

    def close(self, mlflow_status: str) -> None:
        """Ship the last metrics and close the files."""
        if self.metrics:
            self.metrics.sync()
        if self.mlflow:
            self.mlflow.close(mlflow_status)

    def _run_stage(self, index: int) -> Evaluation:
        stage = self.recipe.stages[index]
        previous = self.recipe.stages[index - 1] if index else None
        seed_step(self.recipe.seed, index, 0, 0)
        runner = stages.make_stage(self.context, stage, previous)
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

    def _step(
        self, runner: stages.StageRunner, stage: Stage, index: int, step: int
    ) -> dict[str, float]:
        """One optimizer step on this rank's share of the global batch, and its metrics."""
        started = time.perf_counter()
        seed_step(self.recipe.seed, index, step, self.comm.rank)
        batches, predicted = self._batches(stage, step)
        rate = learning_rate(
            step, stage.max_steps, stage.learning_rate, stage.warmup_ratio, stage.min_lr_ratio
        )
        values = runner.train_step(batches, predicted, rate)
        nats = torch.tensor([values.pop("nats")], dtype=torch.float64, device=self.context.device)
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

    def _evaluate(self, runner: stages.StageRunner, stage: Stage) -> Evaluation:
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

    def _save(self, runner: stages.StageRunner, stage: Stage, index: int, step: int) -> None:
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


def _make_or_match(run_dir: Path, recipe: Recipe, resume: str) -> None:
    """Make a run directory, or check that the one that is there belongs to this recipe.

    Raises:
        ConfigError: it is there with another recipe (names the keys), or resume is `never`.
    """
    config = run_dir / "config.yaml"
    if not config.exists():
        if run_dir.exists() and any(run_dir.iterdir()):
            raise ArtifactError(
                f"{run_dir} exists and is no run directory (no config.yaml); choose another "
                "output_dir or remove it yourself"
            )
        if resume not in ("auto", "never"):
            raise ConfigError(f"--resume {resume}: {run_dir} holds no run to resume")
        run_dir.mkdir(parents=True, exist_ok=True)
        artifacts.write_text(config, yaml.safe_dump(recipe_values(recipe), sort_keys=False))
        return
    if resume == "never":
        raise ConfigError(f"{run_dir} holds a run and --resume is never; choose another output_dir")
    old = yaml.safe_load(config.read_text(encoding="utf-8"))
    changes = changed_keys(old, recipe_values(recipe))
    if changes:
        raise ConfigError(
            f"{run_dir} was started with another recipe ({'; '.join(changes)}); "
            "undo the change or choose another output_dir"
        )
