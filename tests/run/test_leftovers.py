"""What killed jobs leave outside their run directory: a lock of nobody, a buffer of a job."""

import os
import subprocess
import sys
import time

from s2t2_dist.run import leftovers

HOLD = "import os, sys, time; os.open(sys.argv[1], os.O_CREAT | os.O_EXCL); time.sleep(60)"


def test_a_lock_of_a_dead_process_goes_and_one_of_a_living_process_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(leftovers, "LOOKUP_SECONDS", 0.2)
    folder = tmp_path / leftovers.OPERATION
    folder.mkdir()
    lock = folder / "lock"
    (folder / f"{leftovers.OPERATION}.so").touch()
    leftovers.clear_stale_lock()
    with subprocess.Popen([sys.executable, "-c", HOLD, lock]) as holder:
        while not lock.exists():
            time.sleep(0.01)
        time.sleep(0.3)
        leftovers.clear_stale_lock()
        assert lock.exists()
        holder.kill()
    leftovers.clear_stale_lock()
    assert not lock.exists()


def test_only_the_buffer_of_this_rank_of_this_job_is_unlinked(tmp_path, monkeypatch):
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path)
    for name, value in (("MASTER_ADDR", "10.0.0.1"), ("MASTER_PORT", "5"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    leftovers.unlink_shared_buffer()
    prefix = f"deepspeed_allreduce_buffer_{os.getuid()}_10.0.0.1_5_"
    for rank in (0, 1):
        (tmp_path / f"{prefix}{rank}").touch()
    leftovers.unlink_shared_buffer()
    assert [path.name for path in tmp_path.iterdir()] == [f"{prefix}0"]
