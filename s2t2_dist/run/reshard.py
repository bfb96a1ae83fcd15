"""Resharding of DeepSpeed checkpoints (pretrain and finetune stages) for another number of ranks.

DeepSpeed partitions weights and moments for the ranks that save them. Its own converter,
`ds_to_universal`, merges them into one file per parameter, which any number of ranks can load.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from s2t2_dist.comm import RANK_VARIABLES, Comm, agree
from s2t2_dist.errors import S2T2Error
from s2t2_dist.run.checkpoint import CONVERTED

ENGINE_DIR = "engine"
CONVERTER = "deepspeed.checkpoint.ds_to_universal"
WORKERS = 2
POLL_SECONDS = 0.2


@contextmanager
def converted(checkpoint: Path, comm: Comm) -> Iterator[Path]:
    """A universal copy of a checkpoint, in the same directory, removed at the end. A collective.

    Rank 0 converts. The other ranks wait in a loop of short collectives, so a long conversion does
    not run into the collective timeout. It needs about twice the checkpoint's size on the disk.

    Args:
        checkpoint: verified by `checkpoint.find`; the converter unpickles its files.

    Raises:
        S2T2Error: on every rank, if the conversion failed; the message has its last output line.
    """
    copy = checkpoint.with_name(f"{CONVERTED}{checkpoint.name}-{os.getpid()}")
    copy = comm.broadcast_object(copy)
    first = comm.rank == 0
    started = time.monotonic()
    process = None
    if first:
        print(f"converting {checkpoint.name} to {comm.size} ranks", flush=True)
    try:
        process = agree(comm, lambda: _start(checkpoint, copy) if first else None, "converting")
        while _running(process, comm):
            time.sleep(POLL_SECONDS)
        agree(comm, lambda: _check(process, checkpoint, copy), f"converting {checkpoint}")
        if first:
            seconds = time.monotonic() - started
            print(f"{checkpoint.name} converted to {comm.size} ranks in {seconds:.0f} s")
        yield copy
        comm.barrier()
    finally:
        if process is not None:
            _end(process)
        if first:
            shutil.rmtree(copy, ignore_errors=True)


def _start(checkpoint: Path, copy: Path) -> subprocess.Popen:
    copy.mkdir()
    folders = {"--input_folder": checkpoint / ENGINE_DIR, "--output_folder": copy / ENGINE_DIR}
    workers = {"--num_extract_workers": WORKERS, "--num_merge_workers": WORKERS}
    options = [str(word) for pair in (folders | workers).items() for word in pair]
    # The converter is not a rank of the job.
    environment = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES}
    with (copy / "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-u", "-m", CONVERTER, *options],  # -u: the error comes last
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _end(process: subprocess.Popen) -> None:
    """Kill the converter if it still runs, and its workers, which would wait for it forever."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _running(process: subprocess.Popen | None, comm: Comm) -> bool:
    return any(comm.gather_objects(process is not None and process.poll() is None))


def _check(process: subprocess.Popen | None, checkpoint: Path, copy: Path) -> None:
    if process is None or process.returncode == 0:
        return
    lines = (copy / "log").read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    free = shutil.disk_usage(copy).free
    raise S2T2Error(
        f"{checkpoint} could not be converted to another number of ranks ({free / 2**20:.0f} MiB "
        f"free on its disk): {last.strip()[:200]}; free space for twice its size, or start with "
        "the number of ranks that wrote it"
    )
