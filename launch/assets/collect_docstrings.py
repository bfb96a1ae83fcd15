"""Collect the English text that every install has: the docstrings of its packages.

    python launch/assets/collect_docstrings.py --out english.jsonl.gz --sources english-sources.json

Reads the source of the standard library and of every installed distribution under a permissive
licence, and imports none of it. The same interpreter and package versions give the same bytes.
"""

import argparse
import ast
import gzip
import hashlib
import inspect
import json
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib.metadata import Distribution, distributions
from pathlib import Path

MIN_CHARACTERS = 80
PERMISSIVE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|Unlicense)\b", re.IGNORECASE
)
RESTRICTED = re.compile(r"GPL|General Public|MPL|Mozilla|proprietary|commercial", re.IGNORECASE)
BLOCK_FIELDS = ("body", "orelse", "finalbody", "handlers", "cases")


def declared_licence(package: Distribution) -> str:
    """The licence that a distribution's metadata states, on one line; empty if it states none.

    It is the SPDX expression, else the classifiers, else the first line of `License`.
    """
    metadata = package.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    prefix = "License :: OSI Approved :: "
    classifiers = [c for c in metadata.get_all("Classifier", []) if c.startswith(prefix)]
    if classifiers:
        return " / ".join(sorted(c.removeprefix(prefix) for c in classifiers))
    return (metadata.get("License") or "").strip().split("\n")[0]


def is_permissive(licence: str) -> bool:
    """Whether a declared licence names a permissive one and no restricted one.

    No licence, or one that is not recognised, counts as not permissive.
    """
    return bool(PERMISSIVE.search(licence)) and not RESTRICTED.search(licence)


def standard_library_files(root: Path) -> list[tuple[str, Path]]:
    """(path relative to the library, path) of each module of the standard library, sorted."""
    names = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = [name.as_posix() for name in names if "site-packages" not in name.parts]
    return [(name, root / name) for name in sorted(kept)]


def package_files(package: Distribution) -> list[tuple[str, Path]]:
    """(path relative to site-packages, path) of each module of a distribution, sorted."""
    names = [file.as_posix() for file in package.files or [] if file.suffix == ".py"]
    return [(n, Path(package.locate_file(n))) for n in sorted(names) if not n.startswith("..")]


def docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, cleaned docstring) of a node and of all definitions inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=False)
        if text is not None:
            yield name, inspect.cleandoc(text)
    for field in BLOCK_FIELDS:
        for child in getattr(node, field, []):
            inner = getattr(child, "name", None)
            defines = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            separator = "." if ":" in name else ":"
            yield from docstrings(child, f"{name}{separator}{inner}" if defines else name)


def read_module(relative: str, path: Path) -> list[tuple[str, str]]:
    """The docstrings of one source file; none if it cannot be parsed (templates, Python 2)."""
    module = relative.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return []
    return list(docstrings(tree, module))


def usable(text: str) -> bool:
    """Whether a docstring is long enough to be prose and is valid Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate written as an escape
        return False
    return len(text) > MIN_CHARACTERS


def new_records(files: list[tuple[str, Path]], seen: set[bytes]) -> list[dict]:
    """The records of one package whose text is new; adds their text hashes to `seen`."""
    records = []
    for relative, path in files:
        for name, text in read_module(relative, path):
            if not usable(text):
                continue
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                records.append({"id": name, "text": text})
    return records


def collect(stdlib: Path | None, site: Path, output: Path) -> dict:
    """Write the JSONL.gz and return a summary of it.

    Args:
        stdlib: folder of the standard library, or None to leave it out.
        site: the site-packages folder whose distributions are read.
        output: the `.jsonl.gz` to write, one `{"id", "text"}` per docstring.

    Returns:
        `documents` and `bytes` of text, `used` and `left_out`: name, version, licence per package.
    """
    packages = sorted(distributions(path=[str(site)]), key=lambda p: p.metadata["Name"].lower())
    seen: set[bytes] = set()
    used, left_out = [], []

    def add(source: dict, files: list[tuple[str, Path]]) -> None:
        records = new_records(files, seen)
        for record in records:
            lines.write((json.dumps(record) + "\n").encode())
        if records:
            size = sum(len(record["text"].encode()) for record in records)
            used.append({**source, "documents": len(records), "bytes": size})

    with output.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as lines:
        if stdlib is not None:
            version = platform.python_version()
            source = {"name": "python", "version": version, "licence": "PSF-2.0"}
            add(source, standard_library_files(stdlib))
        for package in packages:
            licence = declared_licence(package)
            source = {"name": package.metadata["Name"], "version": package.version}
            source["licence"] = licence
            if is_permissive(licence):
                add(source, package_files(package))
            else:
                left_out.append(source)
    totals = {key: sum(entry[key] for entry in used) for key in ("documents", "bytes")}
    return {**totals, "used": used, "left_out": left_out}


def main() -> None:
    """Collect from the running interpreter."""
    parser = argparse.ArgumentParser(description="Collect docstrings into a JSONL.gz.")
    parser.add_argument("--out", type=Path, required=True, help="the .jsonl.gz to write")
    parser.add_argument("--sources", type=Path, required=True, help="the JSON list of packages")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")  # invalid escapes in other people's source
    paths = sysconfig.get_paths()
    summary = collect(Path(paths["stdlib"]), Path(paths["purelib"]), arguments.out)
    arguments.sources.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"{summary['documents']} docstrings, {summary['bytes'] / 1e6:.1f} MB of text")


if __name__ == "__main__":
    main()
