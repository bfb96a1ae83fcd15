"""A closed standard output does not end a run, and ends other commands without a traceback."""

import os
import pty
import subprocess
import sys

import pytest

from tests.jobs.launching import BIN

SPEAK = """
import sys, time
from s2t2_dist.run.output import survive_closed_output
survive_closed_output()
print("first", flush=True)
sys.stdin.readline()
for i in range(3):
    print("x" * 100_000, flush=True)
    print("progress", end="\\r", flush=True)
print("goes on", file=sys.stderr, flush=True)
with open(sys.argv[1], "w") as f:
    f.write("done")
"""


def test_a_reader_that_has_enough_does_not_end_a_run(tmp_path):
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = [sys.executable, "-c", SPEAK, tmp_path / "end"]
    with subprocess.Popen(words, text=True, **pipe) as job:
        assert job.stdout.readline() == "first\n"
        job.stdout.close()
        job.stdin.write("go\n")
        job.stdin.close()
        told = job.stderr.read()
        assert job.wait(60) == 0
    assert told.splitlines() == [
        "standard output is closed (Broken pipe); the run goes on without it",
        "goes on",
    ]
    assert (tmp_path / "end").read_text() == "done"


def test_a_terminal_that_hangs_up_does_not_end_a_run(tmp_path):
    """Output and error are the terminal; what is written to it fails with EIO."""
    ours, theirs = pty.openpty()
    words = [sys.executable, "-c", SPEAK, tmp_path / "end"]
    streams = {"stdin": subprocess.PIPE, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen(words, text=True, start_new_session=True, **streams) as job:
        os.close(theirs)
        assert os.read(ours, 100).startswith(b"first")
        os.close(ours)
        job.stdin.write("go\n")
        job.stdin.close()
        assert job.wait(60) == 0
    assert (tmp_path / "end").read_text() == "done"


@pytest.mark.parametrize("command", ["config schema", "data --help"])
def test_other_commands_end_without_a_word(command):
    with subprocess.Popen(
        [BIN / "s2t2", *command.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as job:
        job.stdout.close()
        assert job.stderr.read() == b""
        assert job.wait(60) in (0, 1)  # click's code for a closed pipe
