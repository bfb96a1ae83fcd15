"""YAML as version 1.2's core schema reads it, and nothing read as something it does not look like.

PyYAML reads YAML 1.1, where `1:30` is 90, `010` is 8, `1e3` is text and the second of two equal
keys wins. Source: https://yaml.org/spec/1.2.2/, section 10.3.2 (Core Schema).
"""

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

from s2t2_dist.errors import ConfigError

_PREFIX = "tag:yaml.org,2002:"
# Tag -> what such a plain scalar looks like, and the characters it may start with.
_CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|"
        r"\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    "merge": (r"<<", ["<"]),  # YAML 1.1's, which many recipes with anchors need
}


class _Loader(yaml.SafeLoader):
    """Reads the core schema."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _error("a key that is a list or a mapping", key_node)
            if key_node.value in seen:
                raise _error(f"the key {key_node.value} twice in one mapping; remove one", key_node)
            seen.add(key_node.value)
        for key_node, value_node in node.value:
            if value_node.tag == f"{_PREFIX}null" and not value_node.value:
                what = f"no value after {key_node.value}; give one, or null for none"
                raise _error(what, key_node)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""


def _error(what: str, node: yaml.Node) -> ConfigError:
    return ConfigError(f"{what} (line {node.start_mark.line + 1})")


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = node.value
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    return int(text, base)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(node.value.lower().replace(".inf", "inf").replace(".nan", "nan"))


for _tag, (_pattern, _first) in _CORE.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_PREFIX}{_tag}", re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor(f"{_PREFIX}int", _integer)
_Loader.add_constructor(f"{_PREFIX}float", _number)


def parse(text: str) -> Any:
    """One YAML document as plain values; dates are text.

    Raises:
        ConfigError: not YAML, a key twice in one mapping, or a key without a value.
    """
    try:
        return yaml.load(text, _Loader)
    except ConfigError as error:
        raise ConfigError(f"found {error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError("not YAML: nested too deeply") from None


def dump(values: Any) -> str:
    """Plain values as YAML that `parse` and YAML 1.1 read alike, keys in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_values(path: Path, what: str, example: str) -> dict:
    """The keys of a YAML 1.2 file of settings.

    Args:
        what: the file holds, for messages: "recipe".
        example: a file of the kind that is shipped.

    Raises:
        ConfigError: there is no such file, it is not YAML, or it holds no keys.
    """
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{what} {path} does not exist") from None
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{what} {path} cannot be read ({reason}); give a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{what} {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{what} {path} holds no keys; see {example}")
    return values
