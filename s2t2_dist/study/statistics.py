"""Numbers over seeds, and the choice of a rate that never sees what is reported."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev


@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Attributes:
        deviation: the sample's standard deviation (n - 1); None of a single value.
    """

    n: int
    mean: float
    deviation: float | None
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        deviation = stdev(values) if len(values) > 1 else None
        return cls(len(values), mean(values), deviation, min(values), max(values))


@dataclass(frozen=True)
class Cell:
    """A variant at one rate: the runs of all seeds.

    Attributes:
        seeds: those that the study asks for.
        select, report, whole: bits per byte at the end of each finished run, by seed: of the two
            halves of the validation documents, and of all of them.
        failed: seeds whose run failed.
    """

    rate: dict[str, float]
    seeds: tuple[int, ...]
    select: dict[int, float]
    report: dict[int, float]
    whole: dict[int, float]
    failed: tuple[int, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the run of every seed is finished."""
        return set(self.seeds) == self.select.keys()


def choose(cells: Sequence[Cell]) -> Cell | None:
    """The rate with the lowest mean over seeds on the half `select`; the first of equal ones.

    Only rates whose every seed is finished count: a mean over the seeds that survived would favour
    a rate at which others fail. None if there is no such rate.
    """
    candidates = [cell for cell in cells if cell.complete]
    return min(candidates, key=lambda cell: mean(cell.select.values()), default=None)
