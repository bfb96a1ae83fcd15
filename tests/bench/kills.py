"""Kill a small run of both stages again and again: python -m tests.bench.kills --kills 100

Sends SIGKILL to a random rank, to DeepSpeed's launcher or to the whole job, at random moments, some
inside a checkpoint write. SIGTERM to DeepSpeed's runner and SIGHUP to the whole job, as of a
terminal, must lose no step. Each start resumes the run that was killed before. A run that is done
is compared with an undisturbed one. A later call with the same --work continues where an earlier
one stopped.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from mlflow import MlflowClient

from s2t2_dist import artifacts
from s2t2_dist.errors import ArtifactError
from s2t2_dist.run.checkpoint import list_checkpoints
from tests.conftest import make_small_inputs
from tests.jobs import launching
from tests.jobs.forked import Job

KINDS = ("rank", "launcher", "job", "runner", "terminal")
SIGNALS = {"runner": signal.SIGTERM, "terminal": signal.SIGHUP}  # else SIGKILL
MEASURED = ("tokens_per_second", "peak_memory_gib", "model_tflops", "mfu")
RANKS = 2
STEPS = 14
STAGE = {"train_batch_size": 8, "per_device_train_batch_size": 2, "eval_steps": 7, "save_steps": 3}
END_SECONDS = 120
EXTENSIONS = Path(os.environ.get("TORCH_EXTENSIONS_DIR", launching.BIN.parent / "torch_extensions"))
STARTUP_SHARE = 0.1  # of the kills at random moments


@dataclass(frozen=True)
class Kill:
    """One kill: what was killed, when, and from what this start had resumed.

    Attributes:
        run: number of the run, from 1.
        kind: one of KINDS.
        stage, step: of the last line in metrics.jsonl.
        inside_write: the kill fell inside a checkpoint write.
        seconds_to_end: from the kill until all processes of the job had ended.
        resumed_from: name of the checkpoint, or empty.
    """

    run: int
    kind: str
    stage: str
    step: int
    inside_write: bool
    seconds_to_end: float
    resumed_from: str = ""


class Killer:
    """Starts, kills and checks a series of runs in `work`."""

    def __init__(self, work: Path, seed: int):
        self.work, self.rng = work, random.Random(seed)
        self.log = work / "kills.jsonl"
        self.ports: set[str] = set()
        for name in ("home", "tmp"):
            (work / name).mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))
        os.environ.update({"HOME": str(work / "home"), "TMPDIR": str(work / "tmp")})
        self.model, self.data = make_small_inputs(work / "inputs")
        self.uri = f"sqlite:///{work}/mlflow.db"
        MlflowClient(tracking_uri=self.uri).search_experiments()  # makes the database, undisturbed
        self.reference = self._reference()

    @property
    def kills(self) -> list[dict]:
        """The kills of all calls with this `work`."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines]

    def run(self, kills: int) -> None:
        """Kill until `kills` are recorded in all, and let the last run finish."""
        while True:
            number = len(list(self.work.glob("run-*/checked"))) + 1
            recipe = self._recipe(f"run-{number:03d}")
            done = len(self.kills)
            if done >= kills:
                if (recipe.parent / "run").exists():
                    self._finish(recipe)
                return
            kind = KINDS[done % len(KINDS)]
            block = done // len(KINDS)  # one kill of each kind; a third inside a write, some late
            record = self._start_and_kill(recipe, number, kind, block % 3 == 0, block % 4 == 1)
            if record is None:
                self._check(recipe)
                continue
            with self.log.open("a") as f:
                f.write(json.dumps(asdict(record)) + "\n")
            print(f"{len(self.kills)}: {record}", flush=True)

    def _recipe(self, name: str) -> Path:
        stages = [
            {"kind": "translate", "max_steps": STEPS, "learning_rate": 0.01, **STAGE},
            {"kind": "finetune", "max_steps": STEPS, "learning_rate": 0.002, **STAGE},
        ]
        tracking = {"enabled": True, "uri": self.uri}
        options = {"stages": stages, "tracking": tracking}
        return launching.write_recipe(self.work / name, self.model, self.data, **options)

    def _reference(self) -> list[tuple]:
        recipe = self._recipe("reference")
        run_dir = recipe.parent / "run"
        if not run_dir.exists() or launching.status(run_dir)["state"] != "done":
            assert launching.train(recipe, RANKS) == 0, launching.output(recipe)
            outside = self.work / "outside.json"
            outside.write_text(json.dumps(sorted(self._outside())))
        return launching.losses(run_dir)

    def _start_and_kill(
        self, recipe: Path, number: int, kind: str, inside: bool, late: bool
    ) -> Kill | None:
        """Start or resume the run and kill it; None if the run finished first.

        Args:
            inside: kill it while it writes a checkpoint.
            late: kill it in the finetune stage.
        """
        run_dir = recipe.parent / "run"
        good = {path.name for path in list_checkpoints(run_dir) if _is_good(path)}
        (recipe.parent / "output.txt").write_text("")
        before = _last_write(run_dir)
        process = launching.start(recipe, RANKS, launcher=kind not in ("rank", "job"))
        self.ports.add(_port(process))
        try:
            if not self._wait_for_moment(process, run_dir, kind, inside, late):
                assert process.wait(END_SECONDS) == 0, launching.output(recipe)
                return None
            within = _is_writing(run_dir)
            began = time.monotonic()
            self._kill(process, SIGNALS.get(kind, signal.SIGKILL))
            seconds = time.monotonic() - began
        finally:
            launching.kill(process)
        last = (launching.metrics(run_dir) or [{"stage": "start", "step": 0}])[-1]
        if kind in SIGNALS and launching.status(run_dir)["state"] != "done":
            saved = run_dir / f"checkpoints/{last['stage']}-{last['step']:06d}"
            assert _is_good(saved), f"{kind}: the last step is {saved.name}, it is not saved"
        resumed = _resumed_from(recipe)
        assert not resumed or resumed in good, f"resumed from {resumed}, good were {good}"
        trained = _last_write(run_dir) != before  # otherwise it was killed before it could resume
        assert resumed or not good or not trained, f"started anew, good were {good}"
        return Kill(number, kind, last["stage"], last["step"], within, round(seconds, 2), resumed)

    def _wait_for_moment(
        self, process: subprocess.Popen | Job, run_dir: Path, kind: str, inside: bool, late: bool
    ) -> bool:
        """Wait for the moment to kill; False if the run ended first."""
        # Ranks notice the death of their launcher only from the first step on, so no earlier kill.
        early = kind in ("rank", "job") and not (inside or late)
        if early and self.rng.random() < STARTUP_SHARE:
            time.sleep(self.rng.uniform(0.5, 5))
            if process.poll() is not None:
                return False
            self._aim(process, kind)
            return True
        before = _last_write(run_dir)
        steps = self.rng.randint(1, 6)
        seen = None
        while process.poll() is None:
            time.sleep(0.001)
            if _last_write(run_dir) == before:
                continue
            text = (run_dir / "metrics.jsonl").read_bytes()
            if late and b'"finetune"' not in text:
                continue
            lines = text.count(b"\n")
            if seen is None:
                seen = lines
                self._aim(process, kind)
            if inside and _is_writing(run_dir):
                time.sleep(self.rng.uniform(0, 0.01))
                return True
            if not inside and lines >= seen + steps:
                time.sleep(self.rng.uniform(0, 0.05))
                return True
        return False

    def _aim(self, process: subprocess.Popen | Job, kind: str) -> None:
        """Choose the processes to kill; searching for them later would miss the moment."""
        parent = psutil.Process(process.pid)
        self.family = [parent, *parent.children(recursive=True)]
        ranks = launching.ranks_of(process)
        if kind in ("job", "terminal") or not ranks:
            self.targets = self.family
        elif kind == "runner":
            self.targets = [parent]
        elif kind == "rank":
            self.targets = [self.rng.choice(ranks)]
        else:
            self.targets = [psutil.Process(ranks[0].ppid())]

    def _kill(self, process: subprocess.Popen | Job, number: int) -> None:
        """Send the signal. The rest of the job must then end by itself within END_SECONDS."""
        for target in self.targets:
            with contextlib.suppress(psutil.NoSuchProcess):
                target.send_signal(number)
        process.wait(END_SECONDS)
        _, alive = psutil.wait_procs(self.family, END_SECONDS)
        assert not alive, f"{alive} still run"

    def _finish(self, recipe: Path) -> None:
        """Let a run finish, and check it."""
        process = launching.start(recipe, RANKS)
        self.ports.add(_port(process))
        assert process.wait(300) == 0, launching.output(recipe)
        self._check(recipe)

    def _check(self, recipe: Path) -> None:
        """Check a finished run: its loss curve, its MLflow run, and leftover files."""
        run_dir = recipe.parent / "run"
        assert launching.losses(run_dir) == self.reference, f"{run_dir}: another loss curve"
        assert not list((run_dir / "checkpoints").glob(".*")), "a part of a checkpoint was left"
        check_mlflow(run_dir, self.uri)
        left = self._outside() - set(json.loads((self.work / "outside.json").read_text()))
        if left:  # files of other programs may be short-lived: look again
            time.sleep(1)
            left &= self._outside()
        assert not left, f"left outside the run directory: {sorted(left)}"
        assert {path.name for path in recipe.parent.iterdir()} == {
            "run",
            "recipe.yaml",
            "output.txt",
        }
        (recipe.parent / "checked").touch()
        print(f"{recipe.parent.name} is done and equal to the undisturbed run", flush=True)

    def _outside(self) -> set[str]:
        """Files in the home and temporary folders and in shared memory, and compile locks."""
        found = {str(p) for name in ("home", "tmp") for p in (self.work / name).rglob("*")}
        found |= {str(p) for p in Path("/dev/shm").iterdir() if _is_ours(p.name, self.ports)}
        locks = {str(p) for p in EXTENSIONS.rglob("lock")}
        return found | locks


def check_mlflow(run_dir: Path, uri: str) -> None:
    """Check that MLflow has every point of `metrics.jsonl`, in order, once.

    MLflow keeps what the first run of a step that ran twice measured, so that is not compared.
    """
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(json.loads((run_dir / "mlflow.json").read_text())["run_id"])
    assert run.info.status == "FINISHED"
    lines = launching.metrics(run_dir)
    for key in run.data.metrics:
        stage, _, name = key.partition("/")
        written = [(x["step"], x[name]) for x in lines if x["stage"] == stage and name in x]
        points = client.get_metric_history(run.info.run_id, key)
        history = [(point.step, point.value) for point in points]
        if name.endswith("seconds") or name in MEASURED:
            written, history = [w[0] for w in written], [h[0] for h in history]
        assert history == written, key


def _is_writing(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob(".tmp-[tf]*"))


def _last_write(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.stat().st_mtime_ns if path.exists() else 0


def _is_good(path: Path) -> bool:
    try:
        artifacts.verify(path, exact=True)
    except ArtifactError:
        return False
    return True


def _is_ours(name: str, ports: set[str]) -> bool:
    """Whether torch, Python or DeepSpeed makes such files, except DeepSpeed's for other jobs."""
    if name.startswith("deepspeed_"):
        return any(f"_{port}_" in name for port in ports)
    return name.startswith(("torch_", "psm_", "sem."))


def _port(process: subprocess.Popen | Job) -> str:
    return process.args[process.args.index("--master_port") + 1]


def _resumed_from(recipe: Path) -> str:
    lines = launching.output(recipe).splitlines()
    return next((x.split()[-1] for x in lines if x.startswith("resuming from ")), "")


def write_report(work: Path, path: Path, command: str) -> None:
    """Write a page on what was killed and what was checked."""
    lines = (work / "kills.jsonl").read_text().splitlines()
    kills = [json.loads(line) for line in lines]
    counts = Counter((kill["kind"], kill["stage"]) for kill in kills)
    stages = sorted({kill["stage"] for kill in kills})
    table = [f"| killed | {' | '.join(stages)} | inside a checkpoint write |"]
    table.append("|---|" + "---:|" * (len(stages) + 1))
    for kind in KINDS:
        inside = sum(kill["inside_write"] for kill in kills if kill["kind"] == kind)
        cells = [str(counts[kind, stage]) for stage in stages] + [str(inside)]
        table.append(f"| {kind} | {' | '.join(cells)} |")
    inside = sum(kill["inside_write"] for kill in kills)
    runs = len(list(work.glob("run-*/checked")))
    slowest = max(kill["seconds_to_end"] for kill in kills)
    text = f"""# {len(kills)} kills

`{command}`, two gloo ranks on the CPU, in consecutive calls with the same `--work`.

{chr(10).join(table)}

The stage is that of the last line in `metrics.jsonl` after the kill. {inside} kills fell inside a
checkpoint write. The script stops if one of these does not hold:

- every start that reached a training step had resumed from a checkpoint that was complete and
  verified before it, if there was one; {runs} runs finished, each killed several times;
- their losses, gradient norms and evaluations are bit for bit those of an undisturbed run;
- MLflow has every point of `metrics.jsonl`, in order, once;
- after a SIGTERM to the runner or a SIGHUP to the job, the last step in `metrics.jsonl` was saved;
- after every kill the rest of the job ended by itself, at most {slowest:.1f} s later;
- no files were left in the home and temporary folders or `/dev/shm`, and no compile locks, beyond
  those of the undisturbed run; no part of a checkpoint was left in the run directory.
"""
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, required=True, help="total, earlier calls included")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder of the runs; earlier ones are continued"
    )
    parser.add_argument("--seed", type=int, help="seed of ranks and moments; default: random")
    parser.add_argument("--report", type=Path, help="Markdown page to write at the end")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the running job is killed too
    Killer(options.work.resolve(), seed).run(options.kills)
    if options.report:
        command = f"python -m tests.bench.kills --kills {options.kills} --work DIR"
        write_report(options.work, options.report, command)


if __name__ == "__main__":
    main()
