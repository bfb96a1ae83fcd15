"""Standard output and error that are closed under a run: a terminal hangs up, `head` has enough.

Training must not end for that. What could not be written is lost; the metrics are in the run
directory.
"""

import contextlib
import os
import sys
from typing import TextIO


class _Surviving:
    """A text stream whose file is replaced by /dev/null at the first failed write."""

    def __init__(self, stream: TextIO, name: str):
        self._stream, self._name = stream, name

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _attempt(self, act) -> None:
        try:
            act()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)
        with contextlib.suppress(OSError):
            self._stream.flush()
        if self._name == "output":
            line = f"standard output is closed ({error.strerror}); the run goes on without it"
            print(line, file=sys.stderr, flush=True)


def survive_closed_output() -> None:
    """From now on, no closed standard output or error ends this process."""
    sys.stdout = _Surviving(sys.stdout, "output")
    sys.stderr = _Surviving(sys.stderr, "error")
