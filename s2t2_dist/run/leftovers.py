"""What a killed job leaves outside its run directory on a CPU machine, and how not to.

Both come from DeepSpeed's shared-memory operation, which every CPU rank loads as it starts.
"""

import contextlib
import logging
import os
import time
from pathlib import Path

OPERATION = "deepspeed_shm_comm"
SHARED_MEMORY = Path("/dev/shm")
# A lock of nobody on this host may be another host's: of one that looks up the finished operation,
# which takes a second, or of one that compiles it, which takes minutes.
LOOKUP_SECONDS = 10.0
COMPILE_SECONDS = 600.0

_log = logging.getLogger(__name__)


def clear_stale_lock() -> None:
    """Remove the lock of a process that was killed while it held it: torch waits for it forever.

    To be called before DeepSpeed loads its operation, by one rank of each host.
    """
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions"
    for lock in Path(root).expanduser().glob(f"**/{OPERATION}/lock"):
        compiled = (lock.parent / f"{OPERATION}.so").exists()
        patience = LOOKUP_SECONDS if compiled else COMPILE_SECONDS
        with contextlib.suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime < patience:
                _log.warning("waiting up to %.0f s for the holder of %s", patience, lock)
            while not _is_held(lock):
                if time.time() - lock.stat().st_mtime > patience:
                    lock.unlink()
                time.sleep(0.1)


def _is_held(lock: Path) -> bool:
    """Whether a process of this host has the file open."""
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):  # the process has ended meanwhile
            for descriptor in descriptors.iterdir():
                with contextlib.suppress(OSError):
                    if descriptor.readlink() == lock.resolve():
                        return True
    return False


def unlink_shared_buffer() -> None:
    """Unlink this rank's all-reduce buffer (66 MB), which DeepSpeed itself never does.

    To be called when every rank has opened every buffer; the memory lives as long as they do.
    """
    job = f"{os.getuid()}_{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    name = f"deepspeed_allreduce_buffer_{job}_{os.environ['RANK']}"
    (SHARED_MEMORY / name).unlink(missing_ok=True)
