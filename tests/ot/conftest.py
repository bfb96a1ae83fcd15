import functools
from collections.abc import Callable, Iterator

import pytest
import torch

from s2t2_dist.ot import tiles


@pytest.fixture
def compile_by(monkeypatch) -> Iterator[Callable[[str], None]]:
    """Have the passes compiled by one of torch.compile's backends, from nothing."""

    def choose(backend: str) -> None:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))

    tiles._compiled.cache_clear()
    yield choose
    tiles._compiled.cache_clear()
