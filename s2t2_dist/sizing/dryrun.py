"""Bytes that one forward and backward pass of a causal LM holds, without the memory for it.

The pass runs on fake tensors: PyTorch derives every operation's shapes, saved tensors and
temporaries, and computes nothing. So it holds for any architecture of transformers and for
gradient checkpointing. What an operation allocates inside itself is not seen, and attention is
the fused one, which keeps no (T, T) matrix.

Shapes: B rows, T tokens of a row, U vocabulary, D width.
"""

import functools
import json
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from s2t2_dist.data.evaluate import sum_of_nats
from s2t2_dist.lm.slots import VocabularySlots, recompute_only


@dataclass(frozen=True)
class Pass:
    """What a pass is of. `bucket` is the elements after which ZeRO-3 reduces gradients."""

    dtype: str
    rows: int
    tokens: int
    vocabulary: int
    trained: bool = True  # every weight; else only what E' and L' need
    evaluation: bool = False
    checkpointing: bool = False
    bucket: int = 0
    reduced_bytes: int = 4  # of a gradient's element on its way to its owner


def pass_bytes(config: PretrainedConfig, what: Pass) -> int:
    """Peak bytes of a pass: activations, logits, temporaries, gradients that wait for reduction.

    Weights, E' and L' are not counted, nor are the gradients that stay after it.
    """
    return _pass_bytes(json.dumps(config.to_dict(), sort_keys=True, default=str), what)


@functools.lru_cache(maxsize=64)
def _pass_bytes(config_json: str, what: Pass) -> int:
    values = json.loads(config_json)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with warnings.catch_warnings(), FakeTensorMode():
        warnings.simplefilter("ignore")
        lm = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, what.dtype))
        if what.checkpointing:
            lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train(not what.evaluation).requires_grad_(what.trained)
        ids_BT = torch.zeros(what.rows, what.tokens, dtype=torch.long)
        if what.trained:
            held, forward = [ids_BT], lambda: lm(input_ids=ids_BT, use_cache=False).logits
        else:
            held, forward = _translated_pass(lm, ids_BT, what)
        reducer = _Reducer(what)
        for tensor in (*lm.parameters(), *held):
            if tensor.requires_grad:
                tensor.register_post_accumulate_grad_hook(reducer.take)
        counter = _LiveBytes([*lm.parameters(), *lm.buffers(), *held])
        reducer.counter = counter
        with counter, torch.set_grad_enabled(not what.evaluation):
            logits_BTU = forward()
            loss = sum_of_nats(logits_BTU, ids_BT)
            if not what.evaluation:
                loss.backward()
        reducer.flush()
        return counter.peak


def _translated_pass(
    lm: torch.nn.Module, ids_BT: torch.Tensor, what: Pass
) -> tuple[list[torch.Tensor], Callable[[], torch.Tensor]]:
    """E', L' and the translate stage's logits, as `engine.FrozenLM` makes them."""
    D = lm.get_input_embeddings().weight.shape[1]
    shapes = [(what.vocabulary, D)] * 2 + [(what.vocabulary,)]
    vocabulary = [torch.zeros(*shape, requires_grad=not what.evaluation) for shape in shapes]
    slots = VocabularySlots(lm)
    recompute_only(lm, what.checkpointing and not what.evaluation)

    def forward() -> torch.Tensor:
        slots.fill(*vocabulary)
        return lm(input_ids=ids_BT, use_cache=False).logits

    return [ids_BT, *vocabulary], forward


class _Reducer:
    """Takes each weight's gradient when it is ready, as ZeRO-3 does.

    DeepSpeed copies gradients into a bucket, which the plan counts apart, and reduces it when the
    next one does not fit. That makes one more copy of what the bucket holds.
    """

    counter: "_LiveBytes"

    def __init__(self, what: Pass):
        self.what, self.elements = what, 0

    def take(self, parameter: torch.Tensor) -> None:
        if self.what.trained:
            if self.elements + parameter.numel() > self.what.bucket:
                self.flush()
            self.elements += parameter.numel()
        parameter.grad = None

    def flush(self) -> None:
        self.counter.touch(self.elements * self.what.reduced_bytes)
        self.elements = 0


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes while it lives.

    Args:
        known: tensors whose storages are not counted.
    """

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.live = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.known = known  # alive, so that no new storage gets an address of theirs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return result

    def touch(self, extra: int) -> None:
        """Take note of bytes that are there for a moment."""
        self.peak = max(self.peak, self.live + extra)

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.live += self.sizes[key]
        self.touch(0)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key)
