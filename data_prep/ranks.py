"""Ranks that make one result: each says that it is there, so that none waits for one that is not.

Beside the target `NAME` lie, while a build runs:

- `.NAME.lock-RANK`: locked by the process that is this rank, so that no other is it too;
- `.NAME.ranks/RANK.json`, with several ranks: its state, touched every BEAT seconds.

A rank that fails says why there, and the others end with its words.
"""

import errno
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.requests import beside
from s2t2_dist import artifacts
from s2t2_dist.errors import ArtifactError, DataError, S2T2Error

BEAT = 5.0
# Seconds between looks at the other ranks.
LOOK = 1.0
# Seconds without a sign after which a rank that is waited for is given up.
SILENCE = 300.0
# Seconds for which a failure from before this rank's start must stand to be believed: until then
# the rank may start anew.
BELIEF = 15.0
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def exclusive(target: Path, rank: int = 0) -> Iterator[None]:
    """Be the only process that makes `target` as this rank; on a file system with locks.

    Raises:
        S2T2Error: another process is this rank.
    """
    artifacts.make_parent(target)
    path = beside(target, f"lock-{rank}")
    lock = None
    while lock is None:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(lock, path):  # the former holder has just removed it
                os.close(lock)
                lock = None
        except BlockingIOError:
            holder = os.read(lock, 200).decode(errors="backslashreplace") or "another process"
            os.close(lock)
            raise S2T2Error(
                f"{target} is being made by {holder}; wait until that has ended, or choose another "
                "folder"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
    try:
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {os.uname().nodename}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _is_at(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


class Ranks:
    """One rank among the ranks of a build; a context manager, in which it shows itself.

    With one rank it does nothing.

    Args:
        together: the ranks run at the same time. Otherwise one that failed before this one began
            may be done with that, and is not looked at.
    """

    def __init__(self, target: Path, rank: int, ranks: int, together: bool = True):
        self.target, self.rank, self.ranks, self.together = target, rank, ranks, together
        self.folder = beside(target, "ranks")
        self._token = f"process {os.getpid()} on {os.uname().nodename} from {time.time():.3f}"
        self._done = threading.Event()
        self._signs: dict[int, tuple[object, float]] = {}  # of others: mtime, when it was new
        self._own_start, self._looked = 0, 0.0

    def __enter__(self) -> "Ranks":
        if self.ranks > 1 and not artifacts.is_complete(self.target):
            artifacts.make_parent(self.target)
            self.folder.mkdir(exist_ok=True)
            self._say("running")
            self._own_start = self._path(self.rank).stat().st_mtime_ns
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        self._done.set()
        if self.ranks == 1 or not self.folder.exists():
            return
        if artifacts.is_complete(self.target):
            shutil.rmtree(self.folder, ignore_errors=True)
        elif kind is None:
            self._say("done")
        elif not isinstance(error, OtherRankError):
            self._say("failed", f"{error or kind.__name__}", isinstance(error, DataError))

    def require(self, waited_for: Iterable[int]) -> None:
        """Check, at most every LOOK seconds, that the ranks that are waited for may still come.

        Raises:
            OtherRankError: one of any ranks has failed, or one of these gave no sign.
        """
        now = time.monotonic()
        if self.ranks == 1 or now - self._looked < LOOK:
            return
        self._looked = now
        for rank in range(self.ranks):
            sign, since, record = self._look(rank, now)
            if record.get("state") != "failed":
                continue
            if (sign or 0) >= self._own_start or (self.together and now - since > BELIEF):
                raise OtherRankError(
                    f"rank {rank} of {self.ranks} has ended: {record['error']}",
                    record.get("refused", False),
                )
        silent = [rank for rank in waited_for if now - self._look(rank, now)[1] > SILENCE]
        if silent:
            raise OtherRankError(
                f"rank {self.rank} gave up waiting for rank {_listed(silent)} of {self.ranks}, "
                f"without a sign for {SILENCE:.0f} s; start every rank, and this one again"
                f"{self.alone()}"
            )

    def alone(self) -> str:
        """What to do if no other rank was meant."""
        size = os.environ.get("WORLD_SIZE")
        because = f" (WORLD_SIZE={size} is set)" if size == str(self.ranks) else ""
        return f"; if it is to work alone{because}, give --ranks 1 --rank 0"

    def describe(self, waited_for: Iterable[int]) -> str:
        """Who is waited for, and who of them was never seen."""
        waited_for = sorted(set(waited_for))
        absent = [rank for rank in waited_for if self._look(rank, time.monotonic())[0] is None]
        text = f"rank {_listed(waited_for)} of {self.ranks}"
        if absent:
            text += f"; no sign of rank {_listed(absent)} yet{self.alone()}"
        return text

    def _look(self, rank: int, now: float) -> tuple[int | None, float, dict]:
        """A rank's last sign (the time of its file, ns), when it was new here, and what it says."""
        try:
            sign = self._path(rank).stat().st_mtime_ns
            record = artifacts.read_json(self._path(rank))
        except (OSError, ArtifactError):
            sign, record = None, {}
        if rank not in self._signs or self._signs[rank][0] != sign:
            self._signs[rank] = sign, now
        return sign, self._signs[rank][1], record

    def _path(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

    def _say(self, state: str, error: str = "", refused: bool = False) -> None:
        """Write this rank's state, unless a later process is this rank."""
        path = self._path(self.rank)
        with suppress(OSError, ArtifactError):
            if state != "running" and artifacts.read_json(path).get("token") != self._token:
                return
            said = {"state": state, "token": self._token, "error": error, "refused": refused}
            artifacts.write_json(path, said)

    def _beat(self) -> None:
        while not self._done.wait(BEAT):
            with suppress(OSError):
                os.utime(self._path(self.rank))


class OtherRankError(S2T2Error):
    """Another rank has failed or is not there.

    Attributes:
        refused: it has refused the input or the options, so that the command must be corrected.
    """

    def __init__(self, message: str, refused: bool = False):
        super().__init__(message)
        self.refused = refused


def _listed(ranks: list[int]) -> str:
    """Such as "1, 2, 3" or "1, 2, ... 7"."""
    if len(ranks) <= 4:
        return ", ".join(map(str, ranks))
    return f"{ranks[0]}, {ranks[1]}, ... {ranks[-1]}"
