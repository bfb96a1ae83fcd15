"""native.cpp, compiled once per machine and called through ctypes: the passes on a CPU.

It takes a second to compile, and five to ten times less time per pass than torch, which cannot
keep a row's iterates in cache. Where there is no C++ compiler, `passes.TorchPasses` does the work.
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

from s2t2_dist.ot.passes import State

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = "-std=c++17 -O3 -march=native -fopenmp-simd -fno-trapping-math -shared -fPIC -pthread"
MASKED = 4  # iterations whose supports, 2 bits each, fit in a byte
SUFFIXES = {torch.float32: "float32", torch.float64: "float64"}


class NativePasses:
    """One sweep over the rows per call; `TorchPasses` says what each one does."""

    def __init__(self, state: State):
        self.state = state
        self.matrix = state.cost.contiguous()
        self.masks = None  # during a backward: the supports, a byte per entry
        self.threads = max(1, min(torch.get_num_threads(), len(self.matrix)))

    def search(self, k: int, mu_V: torch.Tensor, col_guess_U: torch.Tensor) -> torch.Tensor:
        s, U = self.state, len(col_guess_U)
        sums = torch.zeros(self.threads, 3, U, dtype=torch.float64)
        self._call(
            "search", self.matrix, *self.matrix.shape, s.shift, s.tau, s.sigma, k, mu_V,
            s.row_count[k], col_guess_U.contiguous(), sums, self.threads,
        )  # fmt: skip
        return sums.sum(0)

    def column_sums(self, k: int, threshold_U: torch.Tensor, moving: torch.Tensor) -> torch.Tensor:
        s, (V, U) = self.state, self.matrix.shape
        sums = torch.zeros(self.threads, 2, len(moving), dtype=torch.float64)
        everything = len(moving) == U
        columns = None if everything else moving
        sigma = s.sigma if everything else s.sigma[:, moving].contiguous()
        self._call(
            "column_sums", self.matrix, V, len(moving), U, s.shift, s.tau, sigma, columns, k,
            threshold_U[moving], sums, self.threads,
        )  # fmt: skip
        return sums.sum(0)

    def plan(self, rows: slice) -> torch.Tensor:
        s, (V, U) = self.state, self.matrix.shape
        first, last, _ = rows.indices(V)
        out = self.matrix.new_empty(last - first, U)
        self._call(
            "plan", self.matrix, V, U, s.shift, s.tau, s.sigma, len(s.tau), first, last - first,
            out, self.threads,
        )  # fmt: skip
        return out

    def backward(
        self, grad_VU: torch.Tensor, col_mean: torch.Tensor, row_mean: torch.Tensor, known: int
    ) -> torch.Tensor:
        s, (V, U) = self.state, self.matrix.shape
        sums = torch.zeros(self.threads, U, dtype=torch.float64)
        if known == 0 and len(s.tau) <= MASKED:
            self.masks = torch.empty(V, U, dtype=torch.uint8)
        self._call(
            "backward", self.matrix, V, U, s.shift, s.tau, s.sigma, len(s.tau), known, grad_VU,
            col_mean, row_mean, s.row_count, self.masks, sums, self.threads,
        )  # fmt: skip
        if known == len(s.tau):
            self.masks = None
        return sums.sum(0)

    def _call(self, name, *arguments):
        function = getattr(_library(), f"{name}_{SUFFIXES[self.matrix.dtype]}")
        function(*map(_as_c, arguments))


def has_native() -> bool:
    """Whether the passes could be compiled here; says why not in the log, once."""
    return _library() is not None


def _as_c(argument: object):
    if isinstance(argument, torch.Tensor):
        assert argument.is_contiguous(), argument.shape
        return ctypes.c_void_p(argument.data_ptr())
    return None if argument is None else ctypes.c_int64(argument)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled passes; compiled and kept for later processes if need be."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        _log("no C++ compiler was found; set CXX")
        return None
    path = _cache_folder() / f"s2t2-native-{_machine_hash(compiler)}.so"
    if not path.exists():
        # Several ranks may compile at once: each renames a file of its own.
        temporary = path.with_suffix(f".{os.getpid()}")
        command = [compiler, *FLAGS.split(), str(SOURCE), "-o", str(temporary)]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
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
