"""Start real training runs from tests, kill them, and read what they leave."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import yaml

from tests.jobs.forked import Job, Start

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CPU_SETTINGS = ROOT / "ds_configs" / "cpu.json"
# Short stages with several checkpoints; rows of 32 tokens from the shared fixtures.
# Two micro-batches per step on two ranks, four on one.
STAGE = {"train_batch_size": 8, "per_device_train_batch_size": 2, "eval_steps": 8, "save_steps": 5}


def write_recipe(folder: Path, base: Path, shards: Path, **changes) -> Path:
    """A recipe of a translate and a finetune stage; `changes` replace its top-level keys."""
    values = {
        "output_dir": str(folder / "run"),
        "model": {"model_name_or_path": str(base), "dtype": "bfloat16"},
        "data": {"path": str(shards)},
        "deepspeed": str(CPU_SETTINGS),
        "stages": [
            {"kind": "translate", "max_steps": 24, "learning_rate": 0.01, **STAGE},
            {"kind": "finetune", "max_steps": 24, "learning_rate": 0.002, **STAGE},
        ],
        "tracking": {"enabled": False},
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def quickstart_workspace(folder: Path) -> Path:
    """A working directory as the quickstart leaves it, with a tenth of its validation rows."""
    for name in ("launch", "ds_configs"):
        (folder / name).symlink_to(ROOT / name)
    data, proteins = folder / "runs" / "data", "launch/assets/proteins.fasta.gz"
    tokenizer = ("--tokenizer", data / "tokenizer-512", "--context", "128")
    split = ("--validation-fraction", "0.005")
    for words in (
        ("tokenizer", "train", proteins, "--vocab-size", "512", "--out", data / "tokenizer-512"),
        ("data", "build", proteins, *tokenizer, *split, "--out", data / "proteins-512"),
    ):
        subprocess.run([BIN / "s2t2", *words], cwd=folder, check=True)
    return folder


def short_quickstart(name: str) -> list[str]:
    """The shipped recipe in runs/NAME, in fewer and smaller steps with more checkpoints."""
    short = ("max_steps=16", "save_steps=5", "eval_steps=16", "train_batch_size=16")
    overrides = [f"stages.{stage}.{key}" for stage in ("translate", "finetune") for key in short]
    where = [f"output_dir=runs/{name}", "tracking.enabled=false"]
    return ["launch/recipes/quickstart.yaml", *where, *overrides]


def command(recipe: Path, ranks: int, *overrides: str) -> list[str]:
    """The command that trains: `s2t2 train` for 0 ranks, else the DeepSpeed launcher's."""
    if ranks == 0:
        return [str(BIN / "s2t2"), "train", str(recipe), *overrides]
    deepspeed = [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", free_port()]
    return [*deepspeed, "--module", "s2t2_dist.train", str(recipe), *overrides]


def free_port() -> str:
    """Below those that the kernel gives to any listener, so that none takes it before its user."""
    while True:
        port = random.SystemRandom().randint(10_000, 19_999)  # hypothesis seeds `random` alike
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return str(port)


def environment() -> dict[str, str]:
    """One thread per rank, gloo on the CPU, this interpreter's programs first."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    cpu = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
    return {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")} | cpu


def start(
    recipe: Path, ranks: int, *overrides: str, launcher: bool = False
) -> subprocess.Popen | Job:
    """Start a run in a session of its own, its output in `recipe`'s folder.

    Args:
        launcher: by the command of a user; else the ranks are forked, which takes no time.
    """
    output, folder = recipe.parent / "output.txt", recipe.parent
    if not launcher:
        arguments = [str(recipe), *overrides]
        return Job(Start(arguments, ranks, free_port(), environment(), folder, output))
    with output.open("ab") as file:
        return subprocess.Popen(
            command(recipe, ranks, *overrides),
            cwd=folder,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def train(recipe: Path, ranks: int, *overrides: str, timeout: float = 300) -> int:
    """Run to the end; returns the exit code."""
    process = start(recipe, ranks, *overrides)
    try:
        return process.wait(timeout)
    finally:
        kill(process)


def output(recipe: Path) -> str:
    """Everything that the runs of a recipe printed."""
    return (recipe.parent / "output.txt").read_text(errors="replace")


def ranks_of(process: subprocess.Popen | Job) -> list[psutil.Process]:
    """The training processes of a job, rank 0 first."""
    parent = psutil.Process(process.pid)
    if isinstance(process, Job):
        return parent.children()
    return [child for child in parent.children(recursive=True) if _is_rank(child)]


def _is_rank(process: psutil.Process) -> bool:
    try:
        return any(arg.startswith("--local_rank") for arg in process.cmdline())
    except psutil.NoSuchProcess:
        return False


def kill(process: subprocess.Popen | Job) -> None:
    """SIGKILL the launcher and everything below it."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(signal.SIGKILL)
    process.kill()
    process.wait()
    psutil.wait_procs(family)


def wait_for_line(
    run_dir: Path, stage: str, step: int, process: subprocess.Popen | Job, timeout: float = 240
) -> None:
    """Return as soon as this process has written this step, or one after it."""
    old = len(metrics(run_dir))  # of the job before; a resume cuts the file, then adds to it
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        lines = metrics(run_dir)
        old = min(old, len(lines))
        if any(line["stage"] == stage and line["step"] >= step for line in lines[old:]):
            return
        assert process.poll() is None, f"the run ended before {stage} {step}"
        time.sleep(0.005)
    raise TimeoutError(f"{stage} {step} not reached in {timeout} s")


def metrics(run_dir: Path) -> list[dict]:
    """The complete lines of `metrics.jsonl`."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def losses(run_dir: Path) -> list[tuple]:
    """Everything in `metrics.jsonl` that must not depend on when a run was stopped."""
    kept = ("stage", "step", "loss", "eval_loss", "grad_norm", "learning_rate", "entropy")
    return [tuple(line.get(key) for key in kept) for line in metrics(run_dir)]


def status(run_dir: Path) -> dict:
    return json.loads((run_dir / "status.json").read_text())
