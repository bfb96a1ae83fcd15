"""The quickstart's recipe on two hosts: launched both ways, stopped, killed, cut off, resumed."""

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from s2t2_dist.comm import Comm
from s2t2_dist.config import load_recipe
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.lm import engine
from s2t2_dist.training import preflight
from s2t2_dist.training.context import Context
from tests.jobs import launching as runs
from tests.jobs.cluster import Cluster, Host, cluster, missing

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

RUN_NODE = runs.ROOT / "launch" / "run_node.sh"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster")) as made:
        yield made


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return runs.quickstart_workspace(tmp_path_factory.mktemp("workspace"))


def launch_command(name: str, *options: str | Path) -> list[str | Path]:
    """The quickstart's recipe in the run directory runs/NAME."""
    return [RUN_NODE, *options, *runs.short_quickstart(name)]


class Job:
    """`run_node.sh --hostfile` from outside of the hosts; what it prints is in `output`."""

    def __init__(self, hosts: Cluster, workspace: Path, name: str):
        self.run_dir = workspace / "runs" / name
        self.log = workspace / f"{name}-{time.monotonic_ns()}.txt"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                launch_command(name, "--hostfile", hosts.hostfile),
                cwd=workspace,
                env=hosts.environment(runs.environment()),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait_for(self, stage: str, step: int) -> None:
        runs.wait_for_line(self.run_dir, stage, step, self.process)

    def end(self, after: str = "", seconds: float = 60) -> int:
        """Its exit code, and on stdout how long it took; fails where it takes longer."""
        begin = time.monotonic()
        try:
            code = self.process.wait(seconds)
        finally:
            self.process.kill()
        if after:
            print(f"{after}: run_node.sh ended with {code} after {time.monotonic() - begin:.0f} s")
        return code

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


@pytest.fixture(scope="module")
def uninterrupted(hosts, workspace) -> Path:
    """The run that nothing disturbed: one command per node, no ssh."""
    first = hosts.hosts[0].address
    rare = [f"stages.{stage}.save_steps=99" for stage in ("translate", "finetune")]
    processes = [
        host.run(
            *launch_command("whole", "--nodes", "2", "--node-rank", str(i), "--master-addr", first),
            *rare,
            cwd=workspace,
            env=runs.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i, host in enumerate(hosts.hosts)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    return workspace / "runs" / "whole"


def test_a_run_on_two_hosts_survives_what_happens_to_it(hosts, workspace, uninterrupted):
    """Through `deepspeed --hostfile`: stopped, a worker killed, a link cut; and started again.

    The losses are those of the undisturbed run, bit for bit.
    """
    one, two = hosts.hosts
    _stop_is_code_3(hosts, workspace)
    _killed_worker_is_named(hosts, workspace, two)
    _cut_link_is_named(hosts, workspace, two)
    assert not one.ranks() and not two.ranks(), "a rank outlived its job"

    job = Job(hosts, workspace, "disturbed")
    assert job.end(seconds=240) == 0, job.output
    assert runs.status(job.run_dir)["state"] == "done"
    assert runs.losses(job.run_dir) == runs.losses(uninterrupted)


def test_the_disk_that_preflight_asks_for_is_what_checkpoints_take(workspace, uninterrupted):
    """Within 5%: the rest is headers."""
    with contextlib.chdir(workspace):
        recipe = load_recipe(uninterrupted / "config.yaml")
        context = Context(
            recipe=recipe,
            run_dir=uninterrupted,
            comm=Comm(),
            device=torch.device("cpu"),
            deepspeed=engine.load_settings(recipe.deepspeed),
            train=ShardReader(recipe.data.path, "train"),
            validation=ShardReader(recipe.data.path, "validation"),
        )
        for stage in recipe.stages:
            (newest,) = uninterrupted.glob(f"checkpoints/{stage.name}-000016")
            taken = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
            foreseen = preflight._stage_needs(context, stage).checkpoint
            assert taken == pytest.approx(foreseen, rel=0.05), stage.name


def _stop_is_code_3(hosts: Cluster, workspace: Path) -> None:
    """SIGTERM to the script alone reaches rank 0 on another host."""
    job = Job(hosts, workspace, "disturbed")
    job.wait_for("translate", 3)
    job.process.send_signal(signal.SIGTERM)
    assert job.end("SIGTERM to run_node.sh") == 3, job.output
    assert runs.status(job.run_dir)["state"] == "preempted"


def _killed_worker_is_named(hosts: Cluster, workspace: Path, host: Host) -> None:
    job = Job(hosts, workspace, "disturbed")
    job.wait_for("translate", 12)
    (rank,) = host.ranks()
    rank.kill()
    assert job.end("SIGKILL of a rank") == 1, job.output
    _check_named(job, "rank 1 on node2 was lost: its process ended")


def _cut_link_is_named(hosts: Cluster, workspace: Path, host: Host) -> None:
    job = Job(hosts, workspace, "disturbed")
    job.wait_for("finetune", 7)
    host.cut()
    begin = time.monotonic()
    try:
        assert job.end("link cut") == 1, job.output
        _check_named(job, "rank 1 on node2 was lost: no heartbeat for 20 s")
        while host.ranks() and time.monotonic() < begin + 60:
            time.sleep(0.5)  # the host that is cut off ends its own
    finally:
        host.mend()


def _check_named(job: Job, line: str) -> None:
    lines = [x for x in job.output.splitlines() if f"error: {line}; start the job again" in x]
    assert len(lines) == 1, job.output
    assert f", runs/disturbed/status.json: failed {line})" in job.output
    status = runs.status(job.run_dir)
    assert (status["state"], status["reason"]) == ("failed", line)


def test_a_host_that_does_not_answer_is_named_before_anything_starts(hosts, workspace):
    (workspace / "hostfile").write_text(hosts.hostfile.read_text() + "nowhere slots=1\n")
    done = subprocess.run(
        launch_command("refused", "--hostfile", "hostfile"),
        cwd=workspace,
        env=hosts.environment(runs.environment()),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr == "error: nowhere does not answer to ssh without a password\n"
    assert not (workspace / "runs" / "refused").exists()


def test_nothing_is_left_of_a_cluster_whose_test_fails(tmp_path):
    """Also of what runs on it in sessions of its own."""
    with pytest.raises(ZeroDivisionError), cluster(tmp_path) as made:
        sleeper = made.hosts[0].run("sleep", "1000")
        raise ZeroDivisionError
    assert sleeper.wait(10) == -signal.SIGKILL
    for kind in ("netns", "link"):
        listed = subprocess.run(["ip", kind, "list"], capture_output=True, text=True).stdout
        for host in made.hosts:
            assert host.namespace not in listed and host.link not in listed
    processes = psutil.process_iter(["cmdline"])
    assert not [p for p in processes if str(tmp_path) in " ".join(p.info["cmdline"] or [])]
