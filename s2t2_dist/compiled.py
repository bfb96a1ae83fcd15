"""C++ beside a module, compiled once per machine and called through ctypes."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

FLAGS = "-std=c++17 -O3 -march=native -fopenmp-simd -fno-trapping-math -shared -fPIC"


def load_compiled(source: Path, otherwise: str, *flags: str) -> ctypes.CDLL | None:
    """The library of a C++ file; compiled, and kept for later processes, if need be.

    It may include headers beside it whose names begin with its own.

    Args:
        otherwise: what is done without it, for the log; said where None is returned.
        flags: of the compiler, besides FLAGS.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        _log("no C++ compiler was found; set CXX", otherwise)
        return None
    path = _cache_folder() / f"s2t2-{source.stem}-{_machine_hash(source, compiler, flags)}.so"
    try:
        if not path.exists():
            # Several ranks may compile at once: each renames a file of its own.
            temporary = path.with_suffix(f".{os.getpid()}")
            command = [compiler, *FLAGS.split(), *flags, str(source), "-o", str(temporary)]
            path.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(command, check=True, capture_output=True, text=True)
            temporary.replace(path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        _log(getattr(error, "stderr", None) or str(error), otherwise)
        return None


def _cache_folder() -> Path:
    default = Path.home() / ".cache" / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR", default)) / "s2t2_dist"


def _machine_hash(source: Path, compiler: str, flags: tuple[str, ...]) -> str:
    """What the compiled code depends on. Nodes of different kinds may share a home folder."""
    sources = [source, *sorted(source.parent.glob(f"{source.stem}*.h"))]
    parts = [path.read_text() for path in sources] + [FLAGS, *flags, compiler, platform.machine()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        parts += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    except OSError:
        pass
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _log(problem: str, otherwise: str) -> None:
    logging.getLogger(__name__).warning("%s: %s", otherwise, problem.strip().splitlines()[-1])
