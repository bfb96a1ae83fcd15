"""Errors for mistakes of users. `cli` prints the message as one line and exits with code 2.

A message says what was found, what was expected and what to do. `assert` is for bugs.
"""


class S2T2Error(Exception):
    """Base of every error that is not a bug in this package.

    Attributes:
        collective: every rank raises the error, so only one of them needs to print it.
    """

    collective = False

    @property
    def lines(self) -> list[str]:
        """What to print: one line per problem."""
        return [" ".join(str(self).split())]


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
        return self.problems
