"""Errors for mistakes of users. `cli` prints the message as one line and exits with code 2.

A message says what was found, what was expected and what to do. `assert` is for bugs.
"""

import re

# The user and password of a URL, and parameters of its query that look like a secret.
_CREDENTIALS = re.compile(r"(\b[a-zA-Z][\w+.-]*://)[^/\s'\"]*@")
_SECRETS = re.compile(
    r"([?&][^=&\s]*(?:passw|pwd|token|secret|key)[^=&\s]*=)[^&\s'\"]*", re.IGNORECASE
)


def without_secrets(text: str) -> str:
    """A text with the credentials of every URL in it taken out: https://host, not https://u:p@host.

    Of a database's URL the user stays, without which it means another one.
    """
    text = _CREDENTIALS.sub(_without_password, text)
    return _SECRETS.sub(r"\1***", text)


def _without_password(found: re.Match) -> str:
    scheme = found[1]
    if scheme.startswith("http"):
        return scheme
    return f"{scheme}{found[0].removeprefix(scheme).partition(':')[0].removesuffix('@')}@"


class S2T2Error(Exception):
    """Base of every error that is not a bug in this package.

    Attributes:
        collective: every rank raises the error, so only one of them needs to print it.
    """

    collective = False

    @property
    def lines(self) -> list[str]:
        """What to print: one line per problem, without any password."""
        return [without_secrets(" ".join(str(self).split()))]


class ConfigError(S2T2Error):
    """A recipe, an override or a DeepSpeed JSON is wrong; the message names the key path."""


class DataError(S2T2Error):
    """An input file, a tokenizer or a shard directory is wrong; the message names the file."""


class ArtifactError(S2T2Error):
    """A checkpoint, translation or model folder is incomplete, altered or of another kind."""


def collective(error: S2T2Error) -> S2T2Error:
    """The same error, marked as one that every rank raises."""
    error.collective = True
    return error


class InUseError(S2T2Error):
    """Another job runs in a run directory."""


class PreflightError(S2T2Error):
    """Some ranks cannot take part in a job; every rank raises it.

    Args:
        problems: one line per problem, which names the rank's host.
    """

    collective = True

    def __init__(self, problems: list[str]):
        super().__init__("; ".join(problems))
        self.problems = problems

    @property
    def lines(self) -> list[str]:
        return [without_secrets(" ".join(problem.split())) for problem in self.problems]
