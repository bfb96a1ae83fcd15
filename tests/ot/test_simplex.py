import math

import ot
import pytest
import torch
from entmax import sparsemax
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from s2t2_dist.ot import project_simplex
from s2t2_dist.ot.simplex import NewtonSearch
from tests.ot.oracles import sort_threshold

# float64: sums of up to 512 terms of size 10 round by about 1e-13; float32: 2^29 times that,
# but the support's sums are kept in float64, so the threshold's own rounding (5e-7 at 8) rules.
EXACT = {"rtol": 0, "atol": 1e-12}
SINGLE = {"rtol": 0, "atol": 3e-6}

matrices = hnp.arrays(
    "float64",
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-100, 100) | st.sampled_from([0.0, 1.0, -1.0]),
)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (1, 9), (64, 512)])
def test_equals_pot_and_sort(shape, spread):
    z = torch.randn(shape, dtype=torch.float64, generator=torch.manual_seed(0)) * spread
    threshold, projection = project_simplex(z, 1.0, 1)
    expected = torch.stack([torch.from_numpy(ot.utils.proj_simplex(row.numpy())) for row in z])
    torch.testing.assert_close(projection, expected, **EXACT)
    torch.testing.assert_close(threshold, sort_threshold(z, 1.0), **EXACT)


def test_equals_entmax_value_and_gradient():
    z = torch.randn(32, 100, dtype=torch.float64, generator=torch.manual_seed(1))
    z.requires_grad_()
    weights = torch.randn(32, 100, dtype=torch.float64)
    _, projection = project_simplex(z, 1.0, -1)
    reference = sparsemax(z, dim=-1)
    torch.testing.assert_close(projection, reference, **EXACT)
    ours, theirs = (
        torch.autograd.grad((out * weights).sum(), z)[0] for out in (projection, reference)
    )
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_gradients_of_both_outputs_in_both_arguments():
    z = torch.randn(4, 5, dtype=torch.float64, generator=torch.manual_seed(2), requires_grad=True)
    scale = torch.tensor([0.5, 1.0, 2.0, 9.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: project_simplex(a, b, 1), (z, scale))


def test_any_dimension_and_broadcast_scale():
    z = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.manual_seed(3))
    scale = torch.rand(3, 1, dtype=torch.float64) + 0.1
    threshold, projection = project_simplex(z, scale, 1)
    assert threshold.shape == (3, 5)
    torch.testing.assert_close(projection.sum(1), scale.expand(3, 5), **EXACT)
    torch.testing.assert_close(projection, torch.relu(z - threshold[:, None]), **EXACT)


def test_a_tie_is_the_full_support():
    z = torch.full((1, 6), 0.3, requires_grad=True)
    _, projection = project_simplex(z, 1.0, 1)
    torch.testing.assert_close(projection, torch.full((1, 6), 1 / 6), **SINGLE)
    (grad,) = torch.autograd.grad(projection[0, 0], z)
    expected = torch.full((1, 6), -1 / 6)
    expected[0, 0] += 1
    torch.testing.assert_close(grad, expected, **SINGLE)


def test_an_entry_at_the_threshold_is_off_the_support():
    z = torch.tensor([[1.0, 0.0, -2.0]], requires_grad=True)  # threshold exactly 0
    threshold, projection = project_simplex(z, 1.0, 1)
    (grad,) = torch.autograd.grad(projection.sum() + projection[0, 1], z)
    assert (threshold.item(), projection.tolist()) == (0.0, [[1.0, 0.0, 0.0]])
    assert grad.tolist() == [[0.0, 0.0, 0.0]]


@given(matrices, st.floats(0.01, 50))
@settings(deadline=None, max_examples=100)
def test_optimality_conditions(values, scale):
    z = torch.from_numpy(values)
    threshold, projection = project_simplex(z, scale, 1)
    assert (projection >= 0).all()
    torch.testing.assert_close(projection.sum(1), torch.full_like(threshold, scale), **EXACT)
    torch.testing.assert_close(projection, torch.relu(z - threshold[:, None]), **EXACT)


@given(matrices, st.floats(0.01, 50), st.floats(-200, 200))
@settings(deadline=None, max_examples=100)
def test_any_starting_guess_gives_the_same_threshold(values, scale, guess):
    z = torch.from_numpy(values)
    scales, guesses = (torch.full((len(z),), x, dtype=torch.float64) for x in (scale, guess))
    search = NewtonSearch(z.amax(1), scales, guesses)
    for _ in range(z.shape[1] + 3):  # from its second step on, each one loses an entry
        over = torch.relu(z - search.threshold[:, None])[search.moving]
        if not len(search.update((over > 0).sum(1).double(), over.sum(1))):
            break
    assert not len(search.moving)
    assert torch.equal(search.count, (z > search.threshold[:, None]).sum(1).double())
    threshold = search.threshold
    torch.testing.assert_close(threshold, sort_threshold(z, scale), **EXACT)


@pytest.mark.parametrize("spread", [1e-4, 1.0])
def test_float32_sums_to_its_scale(spread):
    z = 8 + torch.randn(64, 4096, generator=torch.manual_seed(4)) * spread
    _, projection = project_simplex(z, 1.0, 1)
    reference = project_simplex(z.double(), 1.0, 1)[1]
    torch.testing.assert_close(projection.double(), reference, **SINGLE)
    support = (projection > 0).sum(1)
    rounding = support * torch.finfo(torch.float32).eps * 8
    assert ((projection.sum(1, dtype=torch.float64) - 1).abs() <= rounding).all()


def test_a_scale_below_float_resolution_keeps_one_entry():
    _, projection = project_simplex(torch.tensor([[1e6, 0.0]]), 1e-6, 1)
    assert projection[0, 0] > 0 and projection[0, 1] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_refuses_entries_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        project_simplex(torch.tensor([[0.0, bad]]), 1.0, 1)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_refuses_a_scale_that_is_not_positive(scale):
    with pytest.raises(ValueError, match="positive"):
        project_simplex(torch.zeros(2, 2), scale, 1)


def test_refuses_other_types_and_empty_slices():
    with pytest.raises(ValueError, match="bfloat16"):
        project_simplex(torch.zeros(2, 2, dtype=torch.bfloat16), 1.0, 1)
    with pytest.raises(ValueError, match="no entry"):
        project_simplex(torch.zeros(2, 0), 1.0, 1)
