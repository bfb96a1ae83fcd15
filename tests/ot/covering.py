"""Few cases out of many: every pair of values of two factors, not every combination of all."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence


def pairwise(*factors: Sequence) -> list[tuple]:
    """Combinations in which every two values of two factors meet; greedy, always the same ones."""

    def pairs(case):
        return set(itertools.combinations(enumerate(case), 2))

    cases = list(itertools.product(*(range(len(factor)) for factor in factors)))
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return [tuple(factor[i] for factor, i in zip(factors, case, strict=True)) for case in chosen]


@contextlib.contextmanager
def noted(*case: object) -> Iterator[None]:
    """An assertion that fails inside says in which case."""
    try:
        yield
    except AssertionError as error:
        error.add_note(f"in the case {case}")
        raise
