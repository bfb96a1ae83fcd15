"""Alignments of a target vocabulary with a source vocabulary that other programs made.

Two forms of JSON are read:

- TokAlign (Li et al. 2025, arXiv 2506.03523): `{"target id": source id}`, one for each target id;
- trans-tokenization (Remy et al. 2024, arXiv 2408.04303): `[[target token, [[source token,
  weight], ...]], ...]`, or the same as objects. Weights are made to sum to 1.

Shapes: V rows of the source model's embedding, U target tokens.
"""

import json
import math
from pathlib import Path

from s2t2_dist.errors import ConfigError


def read_alignment(
    path: Path, source: dict[str, int], target: dict[str, int], vocab_size: int
) -> dict[int, dict[int, float]]:
    """The weights of source ids by target id; each target's sum to 1.

    Args:
        source, target: id by token, as the tokenizers write it.
        vocab_size: V.

    Raises:
        ConfigError: no such file, another form, a token or an id of neither vocabulary, or weights
            that are negative, not finite or all zero.
    """
    try:
        pairs = _pairs(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"alignment: {path} cannot be read ({error.strerror or error})") from None
    except (ValueError, TypeError, RecursionError):
        raise ConfigError(
            f'alignment: {path} must be JSON of the form {{"target id": source id}} or '
            "[[target token, [[source token, weight]]]]"
        ) from None
    return {
        _known(path, key, target, max(target.values()) + 1, "target"): _normalised(
            path, key, value, source, vocab_size
        )
        for key, value in pairs.items()
    }


def _pairs(content: object) -> dict[int | str, dict[int | str, float]]:
    """Both forms as one: ids as numbers, tokens as text."""
    found: dict[int | str, dict[int | str, float]] = {}
    for key, value in _mapping(content).items():
        if isinstance(value, int) and not isinstance(value, bool):
            found[int(key)] = {value: 1.0}
        else:
            found[key] = {token: float(weight) for token, weight in _mapping(value).items()}
    if not found:
        raise ValueError("it is empty")
    return found


def _mapping(content: object) -> dict:
    """An object, or a list of pairs."""
    if not isinstance(content, dict | list):
        raise TypeError(f"{content!r} is neither an object nor a list")
    found = dict(content)
    if len(found) < len(content):
        raise ValueError("a key occurs twice")
    return found


def _known(path: Path, token: int | str, vocabulary: dict[str, int], size: int, side: str) -> int:
    """The id of a token, or an id that is one."""
    if isinstance(token, int):
        if 0 <= token < size:
            return token
        raise ConfigError(
            f"alignment: {path} names the {side} id {token}, but ids are below {size}; give an "
            f"alignment for this {side} tokenizer"
        )
    number = vocabulary.get(token, size)
    if number >= size:
        raise ConfigError(
            f"alignment: {path} names the {side} token {token!r}, which the {side} tokenizer does "
            f"not have; give an alignment for this {side} tokenizer"
        )
    return number


def _normalised(
    path: Path, key: int | str, weights: dict, source: dict[str, int], vocab_size: int
) -> dict[int, float]:
    total = math.fsum(weights.values())
    if not all(0 <= w < math.inf for w in weights.values()) or not 0 < total < math.inf:
        raise ConfigError(
            f"alignment: {path} gives the target token {key!r} the weights "
            f"{list(weights.values())[:3]}; they must be finite and not negative, one above 0"
        )
    return {
        _known(path, token, source, vocab_size, "source"): weight / total
        for token, weight in weights.items()
    }
