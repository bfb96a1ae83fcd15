"""Settings of a recipe as dotted keys: `key=value` overrides, and what differs between two."""

from typing import Any

from s2t2_dist.config import yaml12
from s2t2_dist.errors import ConfigError


def apply_override(values: dict, override: str) -> None:
    """Set one key of a recipe, in place.

    Args:
        values: the recipe as read from YAML.
        override: `key=value`; the parts of the key select mapping keys, and list items by name,
            kind or number.

    Raises:
        ConfigError: not `key=value`, the value is not YAML, or the key does not lead to a setting.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not key=value; write it like seed=17")
    *parents, last = key.split(".")
    node: Any = values
    for i, part in enumerate(parents):
        if isinstance(node, list):
            node = _list_item(node, part, ".".join(parents[: i + 1]))
        else:
            node = node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise ConfigError(
                f"override {override!r}: {part!r} holds a value, not keys; end the key there"
            )
    if isinstance(node, list):
        raise ConfigError(
            f"override {override!r} replaces an item of {parents[-1]}; set a key of the item"
        )
    if not text.strip():
        raise ConfigError(f"override {override!r} has no value; give one, or null for none")
    try:
        node[last] = yaml12.parse(text)
    except ConfigError as error:
        hint = "; the value is not YAML; quote it" if str(error).startswith("not YAML") else ""
        raise ConfigError(f"override {override!r}: {error}{hint}") from None


def _list_item(items: list, part: str, path: str) -> Any:
    names = [
        item.get("name") or item.get("kind") if isinstance(item, dict) else item for item in items
    ]
    if part in names:
        return items[names.index(part)]
    if part.isdecimal() and int(part) < len(items):
        return items[int(part)]
    raise ConfigError(f"override: {path} does not exist, found {names}; name one of them")


def changed_keys(old: dict, new: dict, prefix: str = "") -> list[str]:
    """`key: old -> new` for every leaf in which two resolved recipes differ."""
    changes = []
    for key in sorted({*old, *new}):
        path = f"{prefix}{key}"
        a, b = _as_mapping(old.get(key)), _as_mapping(new.get(key))
        if isinstance(a, dict) and isinstance(b, dict):
            changes += changed_keys(a, b, f"{path}.")
        elif a != b:
            changes.append(f"{path}: {a} -> {b}")
    return changes


def _as_mapping(value: object) -> object:
    """A list of stages as a mapping from stage name, anything else as it is."""
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return {item.get("name") or item.get("kind", str(i)): item for i, item in enumerate(value)}
    return value
