"""Inputs as files that can be read twice: folders are walked, pipes are spooled.

A build reads its input once for the sha256 and once for the documents, so standard input (`-`),
`<(...)` and named pipes are copied into a temporary folder ($TMPDIR) first.
"""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_prep.formats import FASTA_NAMES, NAMED, detect_format, name_suffix, text_suffix
from data_prep.progress import waiting
from data_prep.release import CHECKED
from s2t2_dist.errors import DataError

STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
SUFFIXES = (*FASTA_NAMES, *NAMED, ".parquet")
SHOWN = 3


@contextmanager
def gathered(paths: Sequence[Path], ranks: int = 1, walk: bool = True) -> Iterator[list[Path]]:
    """Yield the files that the inputs stand for; spooled ones are removed afterwards.

    Args:
        ranks: processes that read the same inputs; a pipe has only one reader.
        walk: read the files of folders.

    Raises:
        DataError: a folder without inputs, a pipe for several ranks, or a file given twice.
    """
    files = []
    with tempfile.TemporaryDirectory(prefix="s2t2-") as spool:
        for number, path in enumerate(paths, start=1):
            if walk and path.is_dir():
                files += _walk(path)
            elif _is_pipe(path):
                if ranks > 1:
                    raise DataError(
                        f"{path} is a pipe, which only one of {ranks} ranks could read; give a file"
                    )
                folder = Path(spool) / str(number)
                folder.mkdir()
                files.append(_spool(path, folder))
            else:
                files.append(path)
        _require_once(files)
        yield files


def _require_once(files: Sequence[Path]) -> None:
    """Raise a DataError if two files are the same one, whose documents would count twice."""
    first: dict[Path, Path] = {}
    for path in files:
        place = path.resolve()
        if place in first:
            raise DataError(
                f"{path} is given twice (also as {first[place]}); give it once, or name the files "
                "of a folder one by one"
            )
        first[place] = path


def _is_pipe(path: Path) -> bool:
    return str(path) in STDIN or path.is_fifo() or path.is_char_device()


def _spool(path: Path, folder: Path) -> Path:
    """Copy a pipe into a file, named .txt or .jsonl if it is text without a format."""
    is_stdin = str(path) in STDIN
    name = "stdin" if is_stdin else path.name if path.parent.name != "fd" else "pipe"
    copy = folder / name
    with (
        waiting(f"Reading {name}"),
        open(0 if is_stdin else path, "rb", closefd=not is_stdin) as source,
        copy.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
    try:
        detect_format(copy)
    except DataError:
        if suffix := text_suffix(copy):
            copy = copy.rename(copy.with_name(f"{name}{suffix}"))
        if suffix == ".txt":
            logging.getLogger(__name__).warning(
                "%s is read as text, with a document between two blank lines", name
            )
    return copy


def _walk(folder: Path) -> list[Path]:
    """The files of a folder whose names say what they are, sorted; says what it passes over.

    Links to folders are not followed.
    """
    found, others = [], []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or (path.is_dir() and not path.is_symlink()):
            continue
        known = path.is_file() and name_suffix(path) in SUFFIXES and path.name != CHECKED
        (found if known else others).append(path)
    if not found:
        raise DataError(
            f"{folder} holds no file named {', '.join(SUFFIXES)}, plain or compressed; name its "
            "files one by one"
        )
    if others:
        shown = ", ".join(str(path.relative_to(folder)) for path in others[:SHOWN])
        logging.getLogger(__name__).warning(
            "%s: %d files are read, %d are passed over (%s%s); name them one by one to read them",
            folder, len(found), len(others), shown, " ..." * (len(others) > SHOWN),
        )  # fmt: skip
    return found
