"""Timing, peak memory and memory bandwidth for the benchmarks (Linux only)."""

import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

MIB = 1 << 20
GIB = 1 << 30


def status_bytes(field: str) -> int:
    """A size from /proc/self/status: VmRSS (resident), VmHWM (its peak) or VmSize (addresses)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def reset_peak() -> int:
    """Return freed memory to the system, reset VmHWM, and return the resident bytes.

    Without the trim, free pages kept by the allocator would hide what the next call needs.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    resident = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    return resident


def peak_above(call: Callable[[], object]) -> int:
    """Peak resident bytes during a call minus those before it; the call's result counts.

    The kernel counts pages in batches per thread, so a value below about 1 MiB is noise.
    """
    before = reset_peak()
    result = call()
    peak = status_bytes("VmHWM") - before
    del result
    return peak


def seconds(call: Callable[[], object]) -> float:
    """Wall clock of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def repeated(
    call: Callable[[], object], budget: float = 5.0, least: int = 3, most: int = 50
) -> list[float]:
    """Seconds of each call: at least `least` calls, then up to `most` within `budget` seconds."""
    times: list[float] = []
    while len(times) < least or (len(times) < most and sum(times) < budget):
        times.append(seconds(call))
    return times


def bandwidths(size: int = GIB // 2) -> dict[str, float]:
    """Median bytes per second of this process's threads on float32 vectors of `size` bytes.

    `read` is a sum, and `read two` a dot product of two vectors. `copy` counts the bytes read and
    the bytes written, like the STREAM benchmark.
    """
    source, other = torch.ones(size // 4), torch.ones(size // 4)
    calls = {
        "read": (source.sum, size),
        "read two": (lambda: torch.dot(source, other), 2 * size),
        "copy": (lambda: other.copy_(source), 2 * size),
    }
    return {
        name: moved / statistics.median(repeated(call, budget=0.2))
        for name, (call, moved) in calls.items()
    }


def machine(threads: int) -> dict[str, object]:
    """The hardware and software that figures depend on, without names, paths or dates."""
    text = Path("/proc/cpuinfo").read_text()
    models = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    return {
        "cpu": models[0] if models else "unknown",
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB),
        "torch": torch.__version__,
    }
