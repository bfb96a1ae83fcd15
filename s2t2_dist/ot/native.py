"""native.cpp, compiled once per machine and called through ctypes.

It takes some seconds to compile, and five to ten times less time per pass than torch, which cannot
keep an entry's iterates in registers. Without a C++ compiler torch does the work.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = "-std=c++17 -O3 -march=native -fopenmp-simd -fno-trapping-math -shared -fPIC -pthread"
REALS = {torch.float32: "float", torch.float64: "double"}  # compiled when first asked for


def can_call(*tensors: torch.Tensor) -> bool:
    """Whether native.cpp is there for such tensors: contiguous, of one float dtype, on a CPU.

    Says in the log, once, why it could not be compiled.
    """
    dtype = tensors[0].dtype
    fit = all(t.is_cpu and t.is_contiguous() and t.dtype == dtype for t in tensors)
    return fit and dtype in REALS and _library(dtype) is not None


def call(name: str, dtype: torch.dtype, *arguments: torch.Tensor | int | None) -> None:
    """Call a function of native.cpp; tensors must be contiguous."""
    getattr(_library(dtype), f"s2t2_{name}")(*map(_as_c, arguments))


def threads(parts: int) -> int:
    """How many threads share so many parts."""
    return max(1, min(torch.get_num_threads(), parts))


def _as_c(argument: object):
    if isinstance(argument, torch.Tensor):
        assert argument.is_contiguous(), argument.shape
        return ctypes.c_void_p(argument.data_ptr())
    return None if argument is None else ctypes.c_int64(argument)


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The compiled code for a dtype; compiled and kept for later processes if need be."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        _log("no C++ compiler was found; set CXX")
        return None
    path = _cache_folder() / f"s2t2-{REALS[dtype]}-{_machine_hash(compiler)}.so"
    if not path.exists():
        # Several ranks may compile at once: each renames a file of its own.
        temporary = path.with_suffix(f".{os.getpid()}")
        command = [compiler, *FLAGS.split(), f"-DREAL={REALS[dtype]}", str(SOURCE)]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            command += ["-o", str(temporary)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            temporary.replace(path)
        except (OSError, subprocess.CalledProcessError) as error:
            _log(getattr(error, "stderr", None) or str(error))
            return None
    return ctypes.CDLL(str(path))


def _cache_folder() -> Path:
    default = Path.home() / ".cache" / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", default)) / "s2t2_dist"


def _machine_hash(compiler: str) -> str:
    """What the compiled code depends on. Nodes of different kinds may share a home folder."""
    parts = [SOURCE.read_text(), Path(__file__).read_text(), compiler, platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        parts += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    except OSError:
        pass
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _log(problem: str) -> None:
    logging.getLogger(__name__).warning(
        "the solver's passes could not be compiled, and torch's slower ones are used: %s",
        problem.strip().splitlines()[-1],
    )
