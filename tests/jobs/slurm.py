"""A Slurm of one node in a folder of its own: munged, slurmctld and slurmd, removed afterwards.

Made by root from Debian's slurm-wlm and munge; `missing` says what is not there.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.jobs.launching import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")
SETTINGS = """
ClusterName=box
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
# A requeued job waits for as long as its old credential holds.
AuthInfo=socket={room}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
JobRequeue=1
ReturnToService=2
MailProg=/bin/true
StateSaveLocation={room}/state
SlurmdSpoolDir={room}/spool
SlurmctldPidFile={room}/slurmctld.pid
SlurmdPidFile={room}/slurmd.pid
SlurmctldLogFile={room}/slurmctld.log
SlurmdLogFile={room}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE
"""


def missing() -> str:
    """Why no Slurm can be started here; empty where one can."""
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    return f"not installed: {', '.join(absent)} (tests/install_cluster.sh)" if absent else ""


@dataclass(frozen=True)
class Slurm:
    """A running Slurm; `environment` makes its commands find it."""

    room: Path

    def environment(self, base: dict[str, str]) -> dict[str, str]:
        return {**base, "SLURM_CONF": str(self.room / "slurm.conf")}

    def run(self, *command: str | Path) -> str:
        done = subprocess.run(
            command, env=self.environment(dict(os.environ)), capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """`scontrol show job`, such as JobState, Restarts and ExitCode."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)


@contextmanager
def slurm(room: Path) -> Iterator[Slurm]:
    """Start a Slurm in an empty folder; afterwards no process of it is left."""
    host = socket.gethostname().split(".")[0]
    ports = {"controller_port": free_port(), "node_port": free_port()}
    settings = SETTINGS.format(room=room, host=host, cpus=os.cpu_count(), **ports)
    (room / "slurm.conf").write_text(settings)
    (room / "state").mkdir()
    (room / "spool").mkdir()
    (room / "munge.key").write_bytes(os.urandom(128))
    (room / "munge.key").chmod(0o400)
    names = {"key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    munge = [f"--{option}={room}/munge.{name}" for option, name in names.items()]
    made = Slurm(room)
    with ExitStack() as started:
        started.callback(_kill_jobs, room)
        _daemon(started, made, "munged", "--foreground", "--force", *_socket(room), *munge)
        _wait(lambda: (room / "munge.socket").exists(), "munged", room)
        _daemon(started, made, "slurmctld", "-D", "-f", room / "slurm.conf")
        _daemon(started, made, "slurmd", "-D", "-f", room / "slurm.conf")
        _wait(lambda: "idle" in made.run("sinfo", "--noheader"), "slurmd", room)
        yield made


def _socket(room: Path) -> list[str]:
    return [f"--socket={room}/munge.socket"]


def _daemon(started: ExitStack, made: Slurm, *command: str | Path) -> None:
    """Start a daemon that is killed when the stack unwinds."""
    with (made.room / f"{command[0]}.txt").open("w") as output:
        environment = made.environment(dict(os.environ))
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    started.callback(process.wait)
    started.callback(process.kill)


def _wait(ready, what: str, room: Path, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if ready():
                return
        except AssertionError:  # slurmctld does not answer yet
            pass
        time.sleep(0.2)
    raise TimeoutError(f"{what} did not come up: see the logs in {room}")


def _kill_jobs(room: Path) -> None:
    """What jobs left: every process that Slurm started carries the path of its settings."""
    for process in psutil.process_iter():
        try:
            ours = process.environ().get("SLURM_CONF") == str(room / "slurm.conf")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if ours:
            process.kill()
