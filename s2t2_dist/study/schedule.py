"""Which runs a study lacks, and the processes that make them.

The disk says what is there: each run is an ordinary run directory, so a study that was killed
anywhere goes on with the same command, and two commands at once share the work.
"""

import contextlib
import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait

from s2t2_dist import artifacts
from s2t2_dist.comm import Comm
from s2t2_dist.lm.inputs import identified
from s2t2_dist.run import directory
from s2t2_dist.run.metrics import METRICS
from s2t2_dist.run.stopping import StopRequest
from s2t2_dist.study.config import Study, StudyRun
from s2t2_dist.study.measure import read_record
from s2t2_dist.study.work import BUSY, DONE, FAILED, STOPPED, Answer, work

LOGS = "logs"
POLL_SECONDS = 0.5
BUSY_SECONDS = 5.0  # until a run that another job holds is asked for again
NEW, RESUME, MEASURE = "missing", "to resume", "to measure"


def standing(study: Study, run: StudyRun) -> str:
    """What a run needs: it is missing, to resume, to measure, or done. Writes nothing.

    Raises:
        ConfigError: its directory holds a run of another recipe or other inputs.
        ArtifactError: its directory holds something else.
    """
    run_dir, settings = run.recipe.output_dir, artifacts.read_json(run.recipe.deepspeed)
    if not (run_dir / directory.CONFIG).exists():
        return NEW
    inputs = identified(run.recipe, run_dir, settings, Comm())
    directory.check(run_dir, run.recipe, inputs, "auto")
    if directory.read_state(run_dir) != "done":
        return RESUME
    return DONE if read_record(study.output_dir, run) else MEASURE


@dataclass
class Worker:
    """One process of `work`, and the run that it has."""

    process: multiprocessing.Process
    connection: Connection
    run: StudyRun | None = None


@dataclass
class Schedule:
    """Makes the runs that are missing.

    Args:
        queue: in this order.
        told: called with every run that ended, and its answer.
        shown: called every POLL_SECONDS with the runs that are being made.

    Attributes:
        failed: what is wrong, by the run's name.
        stopped: runs that were stopped, with a checkpoint written.
    """

    study: Study
    queue: deque[StudyRun]
    jobs: int
    told: Callable[[StudyRun, Answer], None]
    shown: Callable[[list[StudyRun]], None]
    failed: dict[str, str] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    workers: list[Worker] = field(default_factory=list)
    stopping: bool = False
    busy: dict[str, float] = field(default_factory=dict)  # run -> when to ask for it again

    def run(self) -> bool:
        """Returns whether every run ended; False if a signal or `max_hours` stopped one."""
        (self.study.output_dir / LOGS).mkdir(parents=True, exist_ok=True)
        _share_cores(self.jobs)
        stop = StopRequest(None, None)
        try:
            while self.queue or any(worker.run for worker in self.workers):
                if not self.stopping and stop.asked():
                    self._stop()
                self._hand_out()
                self._hear()
                self.shown([worker.run for worker in self.workers if worker.run])
        finally:
            self._end()
        return not (self.stopping or self.stopped)

    def _hand_out(self) -> None:
        """Give each idle worker a run, and start workers while there are more runs than they."""
        idle = [worker for worker in self.workers if worker.run is None]
        while self.queue and (idle or len(self.workers) < self.jobs):
            run = self._next()
            if run is None:
                return
            worker = idle.pop() if idle else self._start()
            worker.run = run
            with contextlib.suppress(OSError):  # it has just ended, which `_hear` sees
                worker.connection.send(run)

    def _next(self) -> StudyRun | None:
        """The first run that no other job held a moment ago."""
        now = time.monotonic()
        for run in self.queue:
            if self.busy.get(run.name, now) <= now:
                self.queue.remove(run)
                return run
        return None

    def _start(self) -> Worker:
        spawn = multiprocessing.get_context("spawn")
        mine, its = spawn.Pipe()
        number = next(n for n in range(1, self.jobs + 1) if n not in self._numbers())
        name = f"study-{number}"
        log = self.study.output_dir / LOGS / f"{name}.txt"
        arguments = (its, self.study.output_dir, log)
        process = spawn.Process(target=work, name=name, args=arguments)
        process.start()
        its.close()
        self.workers.append(Worker(process, mine))
        return self.workers[-1]

    def _numbers(self) -> set[int]:
        return {int(worker.process.name.rpartition("-")[2]) for worker in self.workers}

    def _hear(self) -> None:
        """Wait a moment for answers and ends."""
        if not self.workers:
            time.sleep(POLL_SECONDS)
        wait([worker.connection for worker in self.workers], POLL_SECONDS)
        for worker in list(self.workers):
            if worker.connection.poll():
                self._take_answer(worker)
            elif not worker.process.is_alive():
                self._lost(worker)

    def _take_answer(self, worker: Worker) -> None:
        try:
            answer = worker.connection.recv()
        except (EOFError, OSError):
            self._lost(worker)
            return
        run, worker.run = worker.run, None
        if answer.state == BUSY:
            if run.name not in self.busy:
                self.told(run, answer)
            self.busy[run.name] = time.monotonic() + BUSY_SECONDS
            self.queue.append(run)
        elif answer.state == FAILED:
            self.failed[run.name] = answer.told
        elif answer.state == STOPPED:
            self.stopped.append(run.name)
        if answer.state in (FAILED, STOPPED):  # its process ends
            self._remove(worker)
        if answer.state != BUSY:
            self.told(run, answer)

    def _lost(self, worker: Worker) -> None:
        """A process ended without an answer."""
        worker.process.join()
        run, code = worker.run, worker.process.exitcode
        self._remove(worker)
        if run is None:
            return
        if self.stopping:  # before it had begun to listen to signals
            self.told(run, Answer(STOPPED))
            return
        log = self.study.output_dir / LOGS / f"{worker.process.name}.txt"
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        told = f"its process {how}; see {log}"
        self.failed[run.name] = told
        self.told(run, Answer(FAILED, told))

    def _remove(self, worker: Worker) -> None:
        worker.connection.close()
        worker.process.join()
        self.workers.remove(worker)

    def _stop(self) -> None:
        """Start nothing more; what is being made is saved first."""
        self.stopping = True
        self.queue.clear()
        for worker in list(self.workers):
            if worker.run is None:
                self._remove(worker)
            else:
                worker.process.terminate()

    def _end(self) -> None:
        """End the workers; those that still have a run save first."""
        for worker in self.workers:
            if worker.run is None:
                worker.connection.close()  # what it waits for ends it
            else:
                worker.process.terminate()
        for worker in self.workers:
            worker.process.join()


def _share_cores(jobs: int) -> None:
    """Each process gets its share of the cores, unless the user chose a number."""
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))


def steps_done(run: StudyRun) -> int:
    """Optimizer steps that a run has in its `metrics.jsonl`, read from its end."""
    path = run.recipe.output_dir / METRICS
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 8192))
            lines = file.read().split(b"\n")[:-1]
        last = json.loads(lines[-1])
        before = run.recipe.stages[: last["stage_index"]]
    except (OSError, ValueError, IndexError, KeyError):
        return 0
    return sum(stage.max_steps for stage in before) + last["step"]
