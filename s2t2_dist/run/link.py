"""`mlflow.json`: the MLflow run of a run directory, and what its store has received.

It holds:

- `uri`, `given`: the store, and how the recipe spells it; `experiment_id` and `run_id`;
- `shipped`: the last (stage index, step) that the store acknowledged;
- `sending`: lines whose response is missing;
- `status`: the status last set in MLflow;
- `others`: the same of stores that the run had before, by their URI.
"""

import logging
import uuid
from pathlib import Path

from s2t2_dist.artifacts import read_json, write_json
from s2t2_dist.errors import ArtifactError, without_secrets
from s2t2_dist.run.metrics import is_line
from s2t2_dist.run.store import Store, same

LINK = "mlflow.json"
_log = logging.getLogger(__name__)


def read(run_dir: Path) -> dict | None:
    """The contents of `mlflow.json`; None if there is no such file.

    Raises:
        ArtifactError: it is not what a run wrote.
    """
    path = run_dir / LINK
    if not path.exists():
        return None
    link = read_json(path)
    if not _is_link(link) or not all(map(_is_link, _others(link).values())):
        raise ArtifactError(f"{path} is not what a run wrote")
    link["uri"] = without_secrets(link["uri"])
    return link


def _others(link: dict) -> dict:
    others = link.get("others", {})
    return others if isinstance(others, dict) else {"": others}


def _is_link(link: object) -> bool:
    if not isinstance(link, dict):
        return False
    shipped, sending = link.get("shipped"), link.get("sending", [])
    texts = (link.get("uri"), link.get("run_key"), link.get("run_id", ""), link.get("status", ""))
    return (
        all(isinstance(text, str) for text in texts)
        and isinstance(shipped, list)
        and len(shipped) == 2
        and all(type(number) is int for number in shipped)
        and isinstance(sending, list)
        and all(map(is_line, sending))
    )


def open_link(run_dir: Path, place: Store) -> dict:
    """What `mlflow.json` says of a store; of a store that the run never had, a beginning.

    A file that is damaged is kept under another name, and the run begins anew in MLflow.
    """
    try:
        link = read(run_dir)
    except ArtifactError as error:
        path = run_dir / LINK
        path.replace(path.with_name(f".damaged-{LINK}"))
        _log.warning("%s; kept as .damaged-%s; MLflow gets a new run", error, LINK)
        link = None
    if link is not None and same(link["uri"], place.uri):
        return link | {"given": place.given}
    others = {} if link is None else link.pop("others", {})
    if link is not None:
        others[link["uri"]] = link
    known = next((uri for uri in others if same(uri, place.uri)), None)
    fresh = {"uri": place.uri, "run_key": uuid.uuid4().hex, "shipped": [-1, -1]}
    link = fresh if known is None else others.pop(known)
    return link | {"given": place.given, **({"others": others} if others else {})}


def save(run_dir: Path, link: dict) -> None:
    """Replace `mlflow.json`."""
    write_json(run_dir / LINK, link)


def is_shipped(run_dir: Path) -> bool:
    """Whether MLflow acknowledged the end of a finished run, and so every line before it."""
    try:
        link = read(run_dir)
    except ArtifactError:
        return False
    return link is not None and link.get("status") == "FINISHED"


def flatten(values: dict, prefix: str = "") -> dict[str, str]:
    """A nested recipe as MLflow parameters: dotted key to text."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
            value = {item.get("name", str(i)): item for i, item in enumerate(value)}
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = str(value)
    return flat
