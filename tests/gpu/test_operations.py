"""Operations of a training step, run twice on the device: which of them repeat bit for bit.

Where a resumed run differs on a card (test_runs.py), this says by which operation.
"""

import pytest
import torch
from torch.nn import functional

B, T, U, D, HEADS = 4, 96, 512, 128, 4


def embedding(random):
    ids = torch.randint(0, U, (B, T), generator=random)
    return lambda weight: functional.embedding(ids.to(weight.device), weight), (U, D)


def attention(random):
    keys, values = torch.randn(2, B, HEADS, T, D // HEADS, generator=random).unbind()

    def run(query):
        return functional.scaled_dot_product_attention(
            query, keys.to(query), values.to(query), is_causal=True
        )

    return run, (B, HEADS, T, D // HEADS)


def loss(random):
    labels = torch.randint(0, U, (B * T,), generator=random)
    labels[::7] = -100
    return lambda x: functional.cross_entropy(x.float(), labels.to(x.device), reduction="sum"), (
        B * T,
        U,
    )


def head(random):
    weight = torch.randn(U, D, generator=random)
    return lambda hidden: hidden @ weight.to(hidden).T, (B, T, D)


def norm(random):
    return lambda hidden: functional.layer_norm(hidden, (D,)), (B, T, D)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("operation", [embedding, attention, loss, head, norm])
def test_an_operation_and_its_gradient_repeat(operation, dtype, device):
    random = torch.manual_seed(0)
    run, shape = operation(random)
    x = torch.randn(shape, generator=random).to(device, dtype).requires_grad_()
    upstream = torch.randn(run(x).shape, generator=random).to(device)
    results = []
    for _ in range(5):
        value = run(x)
        (grad,) = torch.autograd.grad(value, x, upstream.to(value.dtype))
        results.append((value.detach(), grad))
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0]) and torch.equal(grad, results[0][1])
