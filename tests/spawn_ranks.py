"""Start the ranks of a job on this machine: what a launcher does, without its own start-up time.

python spawn_ranks.py RANKS PORT ARGUMENTS...  - exits with the first code that is not 0.
"""

import os
import subprocess
import sys
import time

GRACE_SECONDS = 20


def main(ranks: int, port: str, arguments: list[str]) -> int:
    job = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, "-m", "s2t2_dist.train", f"--local_rank={rank}", *arguments]
        processes.append(subprocess.Popen(command, env=os.environ | job | own))
    codes = [process.poll() for process in processes]
    while None in codes:
        time.sleep(0.02)
        codes = [process.poll() for process in processes]
        if any(codes):
            _end(processes)
    return next((code for code in codes if code), 0)


def _end(processes: list[subprocess.Popen]) -> None:
    """One rank failed: the others have a moment to notice, as with DeepSpeed's launcher."""
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
