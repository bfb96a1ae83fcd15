"""Where MLflow keeps a run: its URI, however it is spelled, its credentials, and what ends it."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from s2t2_dist.errors import without_secrets

SQLITE = "sqlite:///"
_LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
_PORTS = {"http": 80, "https": 443}
# MLflow's own retries would block the thread for minutes, and the thread retries itself. One is
# left to it, because it alone sees how long a server that is busy asks to wait (Retry-After).
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
HTTP = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    RETRIES: "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # for which it asks once more at the end
}
NOT_FOUND = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")


@dataclass(frozen=True)
class Store:
    """A tracking server or database.

    Attributes:
        given: how the recipe or the environment spells it, without a password; None: the default.
        uri: without a password, independent of the working directory.
        secret_uri: what MLflow is called with; differs only for a database with a password.
    """

    given: str | None
    uri: str
    secret_uri: str

    @property
    def file(self) -> Path | None:
        """The file of a SQLite database."""
        path = self.uri.removeprefix(SQLITE)
        return Path(path) if path != self.uri else None


def choose(recipe_uri: str | None, link: dict | None) -> Store:
    """The store of a run: MLFLOW_TRACKING_URI, else the recipe's, else the one it had before.

    The credentials of a URL move into the environment, from which MLflow takes them. A relative
    path means the one that it meant at the first start.

    Args:
        link: what `mlflow.json` says of it.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI") or recipe_uri
    clean = given and without_secrets(given)
    if link and (given is None or (clean == link.get("given") and _is_relative(clean))):
        return Store(clean, link["uri"], link["uri"])
    if given is None:
        return Store(None, default_uri(), default_uri())
    if _is_relative(given):
        place = f"{SQLITE}{Path(given.removeprefix(SQLITE)).resolve()}"
        return Store(given, place, place)
    if clean.startswith("http") and _take_credentials(given):
        given = clean
    return Store(clean, clean, given)


def default_uri() -> str:
    """The local SQLite store of the working directory."""
    return f"{SQLITE}{Path('mlflow.db').resolve()}"


def _is_relative(uri: str) -> bool:
    return uri.startswith(SQLITE) and not uri.removeprefix(SQLITE).startswith("/")


def _take_credentials(uri: str) -> bool:
    """Whether a URL has a user and a password, which are put into the environment."""
    parts = urlsplit(uri)
    if not (parts.username and parts.password):
        return False
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
    return True


def same(one: str, other: str) -> bool:
    """Whether two URIs without passwords lead to the same store."""
    return _normalised(one) == _normalised(other)


def _normalised(uri: str) -> tuple | str:
    parts = urlsplit(uri)
    if parts.scheme not in _PORTS:
        return without_secrets(uri)
    host = (parts.hostname or "").lower()
    try:
        port = parts.port or _PORTS[parts.scheme]
    except ValueError:
        return uri
    return (parts.scheme, _LOOPBACK[1] if host in _LOOPBACK else host, port, parts.path.rstrip("/"))


def one_line(error: Exception) -> str:
    """An error's whole text in one line, without any password."""
    return without_secrets(" ".join(str(error).split())) or type(error).__name__


def not_executed(error: Exception) -> bool:
    """Whether a request surely did nothing: it was refused as one too many, or nobody was there."""
    text = str(error)
    status = getattr(error, "get_http_status_code", lambda: None)()
    told = ("too many 429", "too many 503", "error code 429", "error code 503", "refused")
    return status in (429, 503) or any(words in text for words in told)


def final(error: Exception, link: dict, experiment: str) -> str | None:
    """What to do about an error that does not go away by itself; None for any other error.

    Args:
        error: of MLflow, which has the HTTP status, or of a server that answers in plain text.
    """
    text, code = str(error), getattr(error, "error_code", None)
    status = getattr(error, "get_http_status_code", lambda: None)()
    if status == 401 or "error code 401" in text:
        return (
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD or MLFLOW_TRACKING_TOKEN, "
            "or write ~/.mlflow/credentials"
        )
    if status == 403 or "error code 403" in text:
        return f"this user may not write to the experiment {experiment}: ask for permission"
    run_id, lost = link.get("run_id"), "must be in the 'active' state" in text
    if "experiment" in text.lower() and lost and "the run " not in text.lower():
        return (
            f"restore the experiment (mlflow experiments restore -x {link.get('experiment_id')}), "
            "or choose another tracking.experiment"
        )
    if run_id and (lost or code in NOT_FOUND):
        return (
            f"the run {run_id} was deleted: restore it (mlflow runs restore --run-id {run_id}), or "
            "remove mlflow.json to make a new one"
        )
    return None


def limit_requests() -> None:
    """Set what is not set of the limits of MLflow's requests; its retries are not logged."""
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    os.environ.update({key: os.environ.get(key, value) for key, value in HTTP.items()})


@contextlib.contextmanager
def first_use(file: Path | None) -> Iterator[None]:
    """Hold a lock on the folder of a SQLite database: two processes that make it destroy it."""
    held = None
    with contextlib.suppress(OSError):  # no such folder, or a disk without locks
        if file is not None:
            held = os.open(file.parent, os.O_RDONLY)
            fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if held is not None:
            os.close(held)


@contextlib.contextmanager
def without_retries() -> Iterator[None]:
    """Each request once, even if it gets no answer."""
    before = os.environ.get(RETRIES, HTTP[RETRIES])
    os.environ[RETRIES] = "0"
    try:
        yield
    finally:
        os.environ[RETRIES] = before
