"""Compile the C++ file beside a module, once per kind of machine, and call it through ctypes."""

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
    """Load the library of a C++ file; compile it first unless an earlier process has done so.

    The file may include headers beside it whose names begin with its own.

    Args:
        otherwise: what the caller does without the library; logged when None is returned.
        flags: compiler flags besides FLAGS.

    Returns:
        The library, or None if there is no compiler or it fails.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        _log("no C++ compiler was found; set CXX", otherwise)
        return None
    path = _cache_folder() / f"s2t2-{source.stem}-{_machine_hash(source, compiler, flags)}.so"
    try:
        if not path.exists():
            # Ranks may compile at the same time: each renames a file of its own.
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
    """A hash of all that the compiled code depends on; unlike nodes may share a home folder."""
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
