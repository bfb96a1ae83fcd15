"""`s2t2 verify`: check that a model folder is consistent with its config and tokenizer.

Each check covers one way in which swapping a vocabulary goes wrong in practice. It reports the
problem, or what it found. Weights are read from the safetensors, one matrix at a time.

Shapes: V rows of the embedding and of the LM head, D width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError

from s2t2_dist import artifacts
from s2t2_dist.errors import ArtifactError, S2T2Error
from s2t2_dist.lm.architecture import on_meta
from s2t2_dist.lm.tokenizer import check_end_and_padding, check_round_trip
from s2t2_dist.report.contents import CheckError, ModelFolder


@dataclass(frozen=True)
class Check:
    """The outcome of one check; `found` is the problem, or what was found if it passed."""

    name: str
    passed: bool
    found: str


def verify_model(folder: Path, untrained: Iterable[int] | None = None) -> list[Check]:
    """Run every check on a Hugging Face folder.

    Args:
        untrained: ids of tokens that did not occur in training, whose rows may be equal; default:
            those of the folder's manifest, or none.

    Raises:
        ArtifactError: not a model folder (no config.json).
    """
    if not (folder / "config.json").is_file():
        raise ArtifactError(
            f"{folder} is not a Hugging Face model folder (no config.json in it); give the folder "
            "of a model"
        )
    model = ModelFolder(folder, untrained)
    return [_run(name, check, model) for name, check in CHECKS.items()]


def require_verified(folder: Path, untrained: Iterable[int] | None = None) -> None:
    """Run every check.

    Raises:
        ArtifactError: names the first check that failed.
    """
    require_passed(folder, verify_model(folder, untrained))


def require_passed(folder: Path, checks: list[Check]) -> None:
    """Raise an ArtifactError that names the first failed check, if any check failed."""
    failed = [check for check in checks if not check.passed]
    if failed:
        more = f" (and {len(failed) - 1} more checks)" if len(failed) > 1 else ""
        raise ArtifactError(f"{folder} failed {failed[0].name!r}: {failed[0].found}{more}")


def table(folder: Path, checks: list[Check]) -> Table:
    """The checks as a table for a terminal."""
    result = Table("check", "", "found", title=f"{folder}", title_justify="left")
    for check in checks:
        mark = Text("pass", "green") if check.passed else Text("FAIL", "bold red")
        result.add_row(check.name, mark, Text(check.found))
    return result


def _run(name: str, check: Callable[[ModelFolder], str], model: ModelFolder) -> Check:
    try:
        return Check(name, True, check(model))
    except (CheckError, S2T2Error, SafetensorError, OSError, ValueError, KeyError) as error:
        return Check(name, False, " ".join(str(error).split())[:300])


def _files(model: ModelFolder) -> str:
    if not (model.path / artifacts.MANIFEST).is_file():
        return "no manifest: not written by this project, or not sealed yet"
    manifest = artifacts.verify(model.path)
    return f"{len(manifest['files'])} files match their sha256"


def _parameters(model: ModelFolder) -> str:
    """The files hold all that the architecture stores, in its shape, and nothing else."""
    report = model.report
    for name in report.missing:
        raise CheckError(f"{name} is not in the files")
    for name, found, expected in report.mismatched:
        raise CheckError(f"{name} is {list(found)}, the config expects {list(expected)}")
    for name in report.unexpected:
        raise CheckError(f"{name} is in the files but not in the architecture")
    count = sum(parameter.numel() for parameter in on_meta(model.config).parameters())
    return f"{len(model.in_files)} tensors, {count:,} parameters"


def _row_counts(model: ModelFolder) -> str:
    largest, stated = model.token_ids[-1], model.text.vocab_size
    for what, name in model.matrices.items():
        if name not in model.names:
            raise CheckError(f"the {what} {name} is not in the files")
        rows = len(model.read(name))
        if rows != stated:
            raise CheckError(f"the {what} has {rows} rows, config.vocab_size is {stated}")
    if largest >= stated:
        raise CheckError(f"the largest token id is {largest}, but there are {stated} rows")
    unused = stated - len(model.token_ids)
    return f"{stated} rows, {len(model.token_ids)} tokens" + (f", {unused} unused" * (unused > 0))


def _finite(model: ModelFolder) -> str:
    """Every tensor in the files, one at a time."""
    for name in model.names:
        values = model.read(name)
        bad = ~values.isfinite()
        if not bad.any():
            continue
        what = next((what for what, matrix in model.matrices.items() if matrix == name), None)
        if what:
            ids = bad.any(dim=1).nonzero().flatten().tolist()
            raise CheckError(f"{what} rows with NaN or infinity: {model.describe(ids)}")
        raise CheckError(f"{name} holds NaN or infinity in {int(bad.sum()):,} entries")
    return f"every value of {len(model.names)} tensors is finite"


def _no_zero_rows(model: ModelFolder) -> str:
    """Padding may have a zero row: transformers initializes it to zero and never trains it."""
    pad, note = model.tokenizer.pad_token_id, ""
    for what, name in model.matrices.items():
        zero = (model.read(name)[_token_rows(model)] == 0).all(dim=1).nonzero().flatten().tolist()
        ids = [model.token_ids[i] for i in zero]
        if what == "embedding" and pad in ids:
            ids.remove(pad)
            note = f" except padding, {model.describe([pad])}, which is never read"
        if ids:
            raise CheckError(f"{what} rows that are zero: {model.describe(ids)}")
    return f"no token has a zero row{note}"


def _distinct_rows(model: ModelFolder) -> str:
    """No two tokens have equal rows, except tokens that did not occur in training."""
    notes = []
    for what, name in model.matrices.items():
        groups = _equal_rows(model.read(name), _token_rows(model))
        for ids in groups:
            if len(model.untrained.intersection(ids)) < len(ids):
                raise CheckError(f"{what} rows that are equal: {model.describe(ids)}")
        if groups:
            count = sum(map(len, groups))
            notes.append(f"{count} tokens that did not occur in training share {what} rows")
    return "; ".join(notes) or "every token has its own row"


def _token_rows(model: ModelFolder) -> torch.Tensor:
    """Ids of the rows that belong to a token; a base model may have more rows than tokens."""
    _row_counts(model)
    return torch.tensor(model.token_ids)


def _equal_rows(weight_VD: torch.Tensor, ids: torch.Tensor) -> list[list[int]]:
    """Groups of ids whose rows are equal bit for bit."""
    raw = weight_VD.contiguous().view(torch.uint8).numpy()
    groups: dict[bytes, list[int]] = {}
    for i in ids.tolist():
        groups.setdefault(raw[i].tobytes(), []).append(i)
    return [group for group in groups.values() if len(group) > 1]


def _special_ids(model: ModelFolder) -> str:
    found = []
    for kind in ("bos", "eos", "pad"):
        key = f"{kind}_token_id"
        own = getattr(model.tokenizer, key)
        if kind == "bos" and own is None and getattr(model.text, key, None) is not None:
            own = model.tokenizer.eos_token_id  # some config classes want one
        values = {
            "tokenizer": own,
            "config.json": getattr(model.text, key, None),
            "generation_config.json": getattr(model.generation, key),
        }
        if any(_as_set(value) != _as_set(values["config.json"]) for value in values.values()):
            stated = ", ".join(f"{where} {value}" for where, value in values.items())
            raise CheckError(f"{key} differs: {stated}")
        found.append(f"{kind} {values['tokenizer']}")
    return ", ".join(found)


def _as_set(value: int | list[int] | None) -> frozenset:
    return frozenset(value if isinstance(value, list) else [value])


def _tied(model: ModelFolder) -> str:
    vocabulary = model.weights.vocabulary
    name = vocabulary.heads[-1]
    if not vocabulary.tied:
        if name not in model.names:
            raise CheckError(f"the config says untied, but {name} is not in the files")
        return "untied, both matrices in the files"
    if name in model.names and not torch.equal(model.read(name), model.read(vocabulary.embed)):
        raise CheckError(f"the config says tied, but {name} differs from the embedding")
    return "tied, one matrix"


def _dtype(model: ModelFolder) -> str:
    stated = model.config.dtype
    names = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    for name, (_, dtype) in model.in_files.items():
        if names.get(dtype) != stated:
            raise CheckError(f"{name} is {dtype}, config.json says {stated}")
    return str(stated).removeprefix("torch.")


CHECKS: dict[str, Callable[[ModelFolder], str]] = {
    "files": _files,
    "parameters": _parameters,
    "row counts": _row_counts,
    "finite rows": _finite,
    "zero rows": _no_zero_rows,
    "duplicate rows": _distinct_rows,
    "special tokens": _special_ids,
    "padding": lambda model: check_end_and_padding(model.tokenizer),
    "tied or untied": _tied,
    "dtype": _dtype,
    "round trip": lambda model: check_round_trip(model.tokenizer),
}
