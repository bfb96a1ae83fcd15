"""Jobs of four ranks each, side by side, in which one rank does something to the others.

`python -m tests.run.heartbeat_ranks FOLDER` forks every rank of every job from one process, so that
torch is imported once. A rank leaves `JOB/RANK.txt` (what it printed); rank 0 leaves `JOB/line`
where one was lost; `codes.json` holds the exit codes by job.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

from s2t2_dist.comm import world_comm
from s2t2_dist.errors import S2T2Error
from s2t2_dist.run import heartbeat

RANKS = 4
TIMEOUT = 2


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise ZeroDivisionError("x")


def stop() -> None:
    raise S2T2Error("no\nroom")


def stay() -> None:
    time.sleep(2 * TIMEOUT)


def hang() -> None:
    """Alive, but in no collective."""
    time.sleep(40)


def sleep(_) -> None:
    """As in a collective whose timeout is long."""
    time.sleep(40)


def meet(comm) -> None:
    comm.sum_(torch.ones(1))


def end(_) -> None:
    pass


# Which rank does what, and what the others do meanwhile.
JOBS = {
    "killed": (3, kill, sleep),
    "frozen": (3, freeze, sleep),
    "failed": (3, fail, sleep),
    "stopped": (3, stop, sleep),
    "hung": (3, hang, meet),
    "rank 0 hung": (0, hang, meet),
    "rank 0 killed": (0, kill, sleep),
    "rank 0 stays": (0, stay, end),
    "rank 3 stays": (3, stay, end),
}


def be_rank(rank: int, job: str) -> None:
    """One rank, to its end; never returns."""
    output = os.open(f"{job}/{rank}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    doer, act, others = JOBS[job]
    place = f"file://{Path(job, 'meet').resolve()}"
    dist.init_process_group("gloo", init_method=place, rank=rank, world_size=RANKS)
    group = world_comm(timeout=4 * TIMEOUT)  # for making it too, where few cores serve all jobs
    code = 0
    try:
        with heartbeat.monitored(world_comm(), TIMEOUT, Path(job, "line").write_text):
            time.sleep(1)
            if rank == doer:
                act()
            else:
                others(group)
        os.write(1, b"ended well\n")
    except Exception:
        traceback.print_exc()
        code = 1
    os._exit(code)


def main() -> None:
    os.chdir(sys.argv[1])
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    ranks, frozen, codes = {}, [], {job: [None] * RANKS for job in JOBS}
    for job in JOBS:
        Path(job).mkdir()
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                be_rank(rank, job)
            ranks[pid] = (job, rank)
    while len(frozen) < len(ranks):
        pid, status = os.waitpid(-1, os.WUNTRACED)
        job, rank = ranks[pid]
        if os.WIFSTOPPED(status):
            frozen.append(pid)
        else:
            del ranks[pid]
            codes[job][rank] = os.waitstatus_to_exitcode(status)
    for pid in frozen:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    Path("codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
