"""`key=value` settings behind a recipe: dotted keys into plain values, as read from YAML."""

from typing import Any

import yaml

from s2t2_dist.errors import ConfigError


def apply_override(values: dict, override: str) -> None:
    """Set one key of the plain values of a recipe, in place.

    Raises:
        ConfigError: not `key=value`, a value that is not YAML, or a path that is not there.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not key=value")
    *parents, last = key.split(".")
    node: Any = values
    for i, part in enumerate(parents):
        if isinstance(node, list):
            node = _list_item(node, part, ".".join(parents[: i + 1]))
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(f"override {override!r}: {part!r} holds a value, not keys")
    if isinstance(node, list):
        raise ConfigError(f"override {override!r}: name a key of one item of {parents[-1]}")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML") from None


def _list_item(items: list, part: str, path: str) -> Any:
    names = [
        item.get("name") or item.get("kind") if isinstance(item, dict) else item for item in items
    ]
    if part in names:
        return items[names.index(part)]
    if part.isdecimal() and int(part) < len(items):
        return items[int(part)]
    raise ConfigError(f"override: {path} is not there, found {names}")
