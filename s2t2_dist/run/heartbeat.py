"""Failure detection: a dead or unreachable rank ends the whole job, and one line names it.

A collective notices a dead peer late, a cut link only when it times out, and names neither. So
every rank keeps a TCP connection to rank 0, on which both sides send a heartbeat every
`BEAT_SECONDS`. A connection that closes without a final message means a dead process; one that is
silent for `timeout` seconds means an unreachable host or a frozen process. Rank 0 tells the others
which rank was lost. Every rank then exits with `EXIT_LOST`, from the monitor's thread: the main
thread may be stuck in a collective.
"""

import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from s2t2_dist.comm import Comm, agree, cut_short
from s2t2_dist.errors import S2T2Error

EXIT_LOST = 4
BEAT_SECONDS = 1.0
CONNECT_SECONDS = 30.0
GRACE_SECONDS = 3.0  # between an error and its report, for the rank failure behind it to show


@contextmanager
def monitored(
    comm: Comm, timeout: float, on_lost: Callable[[str], None]
) -> Iterator[Callable[[BaseException], None]]:
    """Monitor the other ranks while the block runs. A collective; with one rank it does nothing.

    If the block raises on this rank alone, the other ranks are told and exit too: they may be
    waiting for this one.

    Args:
        timeout: seconds without a heartbeat after which a rank counts as lost.
        on_lost: called on rank 0 with the line that names the lost rank, before the process exits.

    Yields:
        a function to call with an error before it is reported. If a lost rank caused the error,
        that shows within seconds, and the process exits inside the call.

    Raises:
        S2T2Error: on every rank, if one cannot connect to rank 0.
    """
    if comm.size == 1:
        yield lambda _: None
        return
    monitor = _Monitor(comm, _connect(comm), timeout, on_lost)
    monitor.thread.start()
    try:
        yield monitor.await_cause
    except Exception as error:
        monitor.await_cause(error)
        if isinstance(error, S2T2Error):
            what = None if error.collective else f"stopped: {error}"
        else:
            what = f"failed: {type(error).__name__}: {error}"
        monitor.close(what)
        raise
    monitor.close()


class _Peer:
    """The rank at the other end of a connection, and what is known of it."""

    def __init__(self, rank: int, connection: socket.socket):
        self.rank, self.connection = rank, connection
        connection.setblocking(False)
        self.silent = 0.0  # seconds of listening without a heartbeat
        self.unread = b""

    def send(self, message: dict) -> None:
        """Best effort: a failed connection shows by its silence."""
        with suppress(OSError):
            self.connection.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """The messages that have arrived; None if the other side closed the connection."""
        try:
            found = self.connection.recv(65536)
        except BlockingIOError:
            return []
        except OSError:
            return None
        if not found:
            return None
        self.silent = 0.0
        *lines, self.unread = (self.unread + found).split(b"\n")
        return [json.loads(line) for line in lines]

    def close(self, deadline: float) -> None:
        """Wait for the other side to close first.

        TCP resets a connection that is closed with unread data, and this side's last message may
        then be lost.
        """
        with suppress(OSError):
            while (left := deadline - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(65536):
                    break
        self.connection.close()


class _Monitor:
    """The connections of one rank (rank 0: to every other; else: to rank 0) and their thread."""

    def __init__(
        self,
        comm: Comm,
        peers: list[_Peer],
        timeout: float,
        on_lost: Callable[[str], None],
    ):
        self.comm, self.peers, self.timeout, self.on_lost = comm, peers, timeout, on_lost
        self.closing = threading.Event()
        self.failure: str | None = None
        self.awaited: BaseException | None = None
        self.waited: dict[int, str] = {}  # ranks whose collective was cut short, and how
        self.judging = 0.0
        self.thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def await_cause(self, error: BaseException) -> None:
        """Wait a moment: if another rank was lost, this process exits here."""
        if error is self.awaited or (isinstance(error, S2T2Error) and error.collective):
            return
        self.awaited = error
        if how := cut_short(error):
            self.waited[self.comm.rank] = how
            time.sleep(2 * GRACE_SECONDS)  # rank 0 finds out which rank they waited for
        time.sleep(GRACE_SECONDS)

    def close(self, failure: str | None = None) -> None:
        """Stop monitoring; with `failure`, make every rank exit."""
        if failure:
            self.failure = f"{self.comm.name(self.comm.rank)} {' '.join(failure.split())[:500]}"
        self.closing.set()
        self.thread.join()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer in self.peers:
                selector.register(peer.connection, selectors.EVENT_READ, peer)
            while not self.closing.is_set():
                begun = time.monotonic()
                for peer in self.peers:
                    peer.send({"waited": self.waited.get(self.comm.rank)})
                while time.monotonic() < begun + BEAT_SECONDS and not self.closing.is_set():
                    for key, _ in selector.select(BEAT_SECONDS / 10):
                        self._hear(key.data, selector)
                self._find_silent()
                self._find_missing()
        self._send_last({"lost": self.failure} if self.failure else {"done": True})
        self._await_receipt()

    def _send_last(self, message: dict) -> None:
        for peer in self.peers:
            peer.send(message)
            with suppress(OSError):
                peer.connection.shutdown(socket.SHUT_WR)

    def _await_receipt(self) -> None:
        """Close each connection after its peer did; live peers share GRACE_SECONDS."""
        deadline = time.monotonic() + GRACE_SECONDS
        for peer in self.peers:
            if peer.silent <= self.timeout:
                peer.close(deadline)

    def _hear(self, peer: _Peer, selector: selectors.BaseSelector) -> None:
        messages = peer.receive()
        if messages is None:
            self._end(f"{self.comm.name(peer.rank)} was lost: its process ended")
        for message in messages:
            if "lost" in message:
                self._end(message["lost"], told=self.comm.rank != 0)
            elif how := message.get("waited"):
                self.waited[peer.rank] = how
            elif "done" in message:
                selector.unregister(peer.connection)
                self.peers.remove(peer)
                peer.connection.close()
                return

    def _find_silent(self) -> None:
        """Count beats listened to, not the clock: this process may have been frozen itself."""
        for peer in self.peers:
            peer.silent += BEAT_SECONDS
            if peer.silent > self.timeout:
                name = self.comm.name(peer.rank)
                self._end(f"{name} was lost: no heartbeat for {self.timeout:g} s")

    def _find_missing(self) -> None:
        """On rank 0, after a collective timed out: name the live ranks that never joined it."""
        if self.comm.rank != 0 or "timeout" not in self.waited.values():
            return
        self.judging = self.judging or time.monotonic() + GRACE_SECONDS
        if time.monotonic() < self.judging:
            return
        missing = sorted(set(range(self.comm.size)) - self.waited.keys())
        names = ", ".join(map(self.comm.name, missing)) or "every rank"
        self._end(f"{names} did not come to a collective within collective_timeout")

    def _end(self, line: str, told: bool = False) -> NoReturn:
        """Exit. Rank 0 makes the others exit first and prints the reason for all of them.

        If rank 0 itself was lost, the first rank of each host prints it.
        """
        rank, hosts = self.comm.rank, self.comm.hosts
        if rank == 0:
            self._send_last({"lost": line})
        if rank == 0 or (not told and hosts.index(hosts[rank], 1) == rank):
            text = f"error: {line}; start the job again to go on from its last checkpoint\n"
            with suppress(OSError):
                os.write(sys.stderr.fileno(), text.encode())
        if rank == 0:
            threading.Timer(GRACE_SECONDS, os._exit, [EXIT_LOST]).start()  # a disk may hang
            with suppress(Exception):
                self.on_lost(line)
            self._await_receipt()
        os._exit(EXIT_LOST)


def _connect(comm: Comm) -> list[_Peer]:
    """The handshake: every rank connects to rank 0. The key turns other programs away."""
    listener, invitation = None, None
    if comm.rank == 0:
        listener = _listen(comm.size)
        invitation = listener.getsockname()[1], secrets.token_hex(16)
    port, key = comm.broadcast_object(invitation)

    def call() -> list[_Peer]:
        if comm.rank == 0:
            return []
        address = os.environ["MASTER_ADDR"], port
        try:
            connection = socket.create_connection(address, CONNECT_SECONDS)
            connection.sendall(f"{key} {comm.rank}\n".encode())
        except OSError as error:
            raise S2T2Error(
                f"no connection to rank 0 at {address[0]}:{port} ({error}); the nodes must reach "
                "each other on every port"
            ) from None
        return [_Peer(0, connection)]

    def answer() -> list[_Peer]:
        return [] if listener is None else _accept(listener, key, comm.size - 1)

    return agree(comm, call, "connecting to rank 0") + agree(comm, answer, "waiting for the ranks")


def _listen(backlog: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        everywhere = {"family": socket.AF_INET6, "dualstack_ipv6": True}
        return socket.create_server(("", 0), backlog=backlog, **everywhere)
    return socket.create_server(("", 0), backlog=backlog)


def _accept(listener: socket.socket, key: str, count: int) -> list[_Peer]:
    """Accept `count` ranks; close every connection that does not send the key."""
    peers: list[_Peer] = []
    with listener:
        listener.settimeout(CONNECT_SECONDS)
        while len(peers) < count:
            connection, _ = listener.accept()
            connection.settimeout(1)
            greeting = b""
            with suppress(OSError):
                greeting = connection.makefile("rb").readline(80)
            found, _, rank = greeting.partition(b" ")
            if hmac.compare_digest(found, key.encode()):
                peers.append(_Peer(int(rank), connection))
            else:
                connection.close()
    return peers
