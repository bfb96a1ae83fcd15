"""The types of a recipe's values: numbers that are written as numbers, and expanded paths."""

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainSerializer, Strict, ValidationError

from s2t2_dist.errors import without_secrets

_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})")


def _written_as_number(value: Any) -> Any:
    """Neither true nor text: `true` is not 1, and "1:30" is not a number.

    A whole number may have a decimal point or an exponent: 1e3 is 1000.
    """
    if isinstance(value, bool | str | bytes):
        raise ValueError("Input should be a number")
    return value


def expanded(value: Any) -> Any:
    """A path's text with `~` and environment variables replaced.

    Raises:
        ValueError: a variable is not set, there is no such user, or it is no text.
    """
    if not isinstance(value, str | Path):
        raise ValueError("Input should be text")
    text = str(value)
    for name in (one or other for one, other in _VARIABLE.findall(text)):
        if name not in os.environ:
            raise ValueError(f"the environment variable {name} is not set")
    text = os.path.expandvars(text)
    if text.startswith("~"):
        home = os.path.expanduser(text)  # noqa: PTH111 - keeps what Path would normalise
        if home.startswith("~"):
            raise ValueError(f"there is no home directory for {text.split('/')[0]}")
        text = home
    if not text or "\0" in text:
        raise ValueError("Input should be a path")
    return text


def _expanded_uri(value: Any) -> Any:
    """As `expanded`, but a `$` that starts no known variable may be a part of a password."""
    return os.path.expandvars(value) if isinstance(value, str) else value


_Checked = BeforeValidator(_written_as_number)
Whole = Annotated[int, _Checked]
Number = Annotated[float, _Checked]
Switch = Annotated[bool, Strict()]
Positive = Annotated[Whole, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
ExpandedPath = Annotated[Path, BeforeValidator(expanded)]
# A path, or a name that is no path.
ExpandedText = Annotated[str, BeforeValidator(expanded)]
# Written without its password wherever the recipe is written.
Uri = Annotated[
    str,
    BeforeValidator(_expanded_uri),
    PlainSerializer(lambda uri: uri and without_secrets(uri), return_type=str, when_used="always"),
]


def problems(error: ValidationError) -> str:
    """The first problems of a recipe, each with its key path and what was found."""
    lines = []
    for problem in error.errors()[:3]:
        path = ".".join(str(part) for part in problem["loc"]) or "recipe"
        kind = problem["type"]
        if kind == "extra_forbidden":
            lines.append(f"unknown key {path}")
        elif kind == "missing":
            lines.append(f"missing key {path}")
        else:
            told, given = problem["msg"].removeprefix("Value error, "), problem["input"]
            found = f", found {given!r}" if isinstance(given, str | int | float) else ""
            lines.append(f"{path}: {told}{found}")
    return "; ".join(lines)
