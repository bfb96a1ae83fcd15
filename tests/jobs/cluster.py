"""A cluster in a box: hosts in network namespaces with sshd, joined by a bridge.

Each host has its own address, host name and processes; the file system is shared, as a cluster's
is. Made by root from iproute2, openssh-server and pdsh; `missing` says what is not there.
"""

import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

SSHD = "/usr/sbin/sshd"
_numbers = itertools.count()  # of the clusters of this process
PROGRAMS = ("ip", "pdsh", "ssh", "ssh-keygen", "unshare", SSHD)


def missing() -> str:
    """Why no cluster can be made here; empty where one can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent:
        return f"not installed: {', '.join(absent)} (tests/install_cluster.sh)"
    allowed = subprocess.run(["unshare", "--net", "--mount", "--uts", "true"], capture_output=True)
    return "" if allowed.returncode == 0 else "this container may not make network namespaces"


def run(*command: str | Path, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Host:
    """One host: its name, address and network namespace."""

    name: str
    address: str
    namespace: str
    link: str  # the bridge's end of its cable

    def pids(self) -> list[int]:
        return [int(pid) for pid in run("ip", "netns", "pids", self.namespace, check=False).split()]

    def ranks(self) -> list[psutil.Process]:
        """Its training processes."""
        found = [psutil.Process(pid) for pid in self.pids()]
        return [p for p in found if any(x.startswith("--local_rank") for x in p.cmdline())]

    def cut(self) -> None:
        """Pull the cable: nothing arrives any more and nobody is told."""
        run("ip", "link", "set", self.link, "down")

    def mend(self) -> None:
        run("ip", "link", "set", self.link, "up")

    def run(self, *command: str | Path, **kwargs) -> subprocess.Popen:
        """Start a command on it, without ssh."""
        inside = ["ip", "netns", "exec", self.namespace, *command]
        return subprocess.Popen(inside, start_new_session=True, **kwargs)


@dataclass(frozen=True)
class Cluster:
    """The hosts and what a user of them has: a hostfile and an ssh that knows them."""

    hosts: list[Host]
    hostfile: Path
    bin: Path

    def environment(self, base: dict[str, str]) -> dict[str, str]:
        return {**base, "PATH": f"{self.bin}{os.pathsep}{base['PATH']}"}


@contextmanager
def cluster(room: Path, count: int = 2, slots: int = 1) -> Iterator[Cluster]:
    """Hosts `node1`, `node2`, ... that are there for as long as the block runs.

    Afterwards nothing is left of them: no process, namespace, link or bridge.

    Args:
        room: an empty folder for keys and settings.
        slots: ranks per host, for the hostfile.
    """
    number = next(_numbers)
    tag = f"{os.getpid() % 10**6}{number}"
    bridge, network = f"s2t2b{tag}", f"10.{213 + number}.{os.getpid() % 250}"
    hosts = [
        Host(f"node{i}", f"{network}.{i + 10}", f"s2t2-{tag}-{i}", f"s2t2v{tag}-{i}")
        for i in range(1, count + 1)
    ]
    daemons: list[subprocess.Popen] = []
    try:
        made = _make_keys(room, hosts, slots)
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "address", "add", f"{network}.1/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")
        for host in hosts:
            _plug_in(host, bridge)
            daemons.append(_start_sshd(host, room))
        for host in hosts:
            _wait_for_ssh(host, made)
        yield made
    finally:
        for host in hosts:
            _remove(host)
        for daemon in daemons:
            daemon.wait(10)
        run("ip", "link", "delete", bridge, check=False)


def _make_keys(room: Path, hosts: list[Host], slots: int) -> Cluster:
    for name in ("user", "host"):
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", room / name)
    known = " ".join((room / "host.pub").read_text().split()[:2])
    (room / "known").write_text("".join(f"{host.address} {known}\n" for host in hosts))
    (room / "config").write_text(
        f"IdentityFile {room}/user\nUserKnownHostsFile {room}/known\nIdentitiesOnly yes\n"
        + "User root\n"
        + "".join(f"Host {host.name}\n  HostName {host.address}\n" for host in hosts)
    )
    programs = room / "bin"
    programs.mkdir()
    ssh = programs / "ssh"
    ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {room}/config "$@"\n')
    ssh.chmod(0o755)
    hostfile = room / "hostfile"
    hostfile.write_text("".join(f"{host.name} slots={slots}\n" for host in hosts))
    return Cluster(hosts, hostfile, programs)


def _plug_in(host: Host, bridge: str) -> None:
    inside = ("ip", "-n", host.namespace)
    run("ip", "netns", "add", host.namespace)
    far_end = ("name", "eth0", "netns", host.namespace)
    run("ip", "link", "add", host.link, "type", "veth", "peer", *far_end)
    run("ip", "link", "set", host.link, "master", bridge, "up")
    run(*inside, "address", "add", f"{host.address}/24", "dev", "eth0")
    run(*inside, "link", "set", "eth0", "up")
    run(*inside, "link", "set", "lo", "up")


def _start_sshd(host: Host, room: Path) -> subprocess.Popen:
    Path("/run/sshd").mkdir(exist_ok=True)
    options = {
        "ListenAddress": host.address,
        "AuthorizedKeysFile": f"{room}/user.pub",
        "HostKey": f"{room}/host",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
        "PidFile": "none",
        "MaxStartups": "100",
    }
    settings = " ".join(f"-o {key}={value}" for key, value in options.items())
    script = f"hostname {host.name} && exec {SSHD} -D -e -f /dev/null {settings}"
    log = (room / f"{host.name}.log").open("w")
    with log:
        return host.run("unshare", "--uts", "sh", "-c", script, stdout=log, stderr=log)


def _wait_for_ssh(host: Host, made: Cluster, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        asked = (made.bin / "ssh", "-o", "ConnectTimeout=2", host.name, "hostname")
        if run(*asked, check=False).strip() == host.name:
            return
        time.sleep(0.2)
    raise TimeoutError(f"no sshd on {host.name}: see {host.name}.log beside the hostfile")


def _remove(host: Host) -> None:
    for _ in range(50):  # a process may be starting another one
        pids = host.pids()
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if not pids:
            break
        time.sleep(0.1)
    run("ip", "netns", "delete", host.namespace, check=False)
    run("ip", "link", "delete", host.link, check=False)
