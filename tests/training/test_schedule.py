"""The learning rate against the paper's description."""

import itertools

import pytest
import torch

from s2t2_dist.training.schedule import learning_rate


def test_warms_up_over_a_fifth_and_decays_to_a_tenth():
    rates = [learning_rate(step, 2000, 1e-3) for step in range(2000)]
    assert rates[0] == pytest.approx(1e-3 / 400)
    assert max(rates) == rates[399] == 1e-3
    assert rates[-1] == pytest.approx(1e-4)
    assert all(a < b for a, b in itertools.pairwise(rates[:400]))
    assert all(a > b for a, b in itertools.pairwise(rates[399:]))


def test_the_cosine_is_torchs():
    """Independent oracle: torch's CosineAnnealingLR from the end of the warm-up."""
    steps, warmup = 100, 20
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-3)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - warmup, eta_min=3e-4)
    for step in range(warmup - 1, steps):
        expected = oracle.get_last_lr()[0]
        # torch multiplies step by step; its rounding adds up to about 80 units in the last place
        assert learning_rate(step, steps, 3e-3) == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        oracle.step()


def test_tiny_stages_do_not_divide_by_zero():
    assert learning_rate(0, 1, 1.0) == 1.0
    assert learning_rate(0, 1, 1.0, warmup_ratio=0.0) == pytest.approx(0.1)
    assert learning_rate(4, 5, 1.0, warmup_ratio=1.0) == 1.0
