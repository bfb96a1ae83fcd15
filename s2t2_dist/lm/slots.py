"""A causal LM whose vocabulary is given from outside, and which runs its own forward with it.

So whatever an architecture does to embeddings and logits (scales, projections, caps) it does to
translated ones.

Shapes: U target vocabulary, D width.
"""

import torch


class VocabularySlots:
    """The places of E, L and the head's bias in a model, empty at first.

    Args:
        lm: loses its own matrices; what is needed of them must have been read.
    """

    def __init__(self, lm: torch.nn.Module):
        self.dtype = lm.dtype
        self.embed, self.head = lm.get_input_embeddings(), lm.get_output_embeddings()
        self.embed.padding_idx = None  # an id of the source vocabulary
        self.has_bias = getattr(self.head, "bias", None) is not None
        for module, name in ((self.embed, "weight"), (self.head, "weight"), (self.head, "bias")):
            if name in module._parameters:
                delattr(module, name)
                setattr(module, name, None)  # no parameter any more: any tensor may stand here

    def fill(
        self,
        embed_UD: torch.Tensor,
        head_UD: torch.Tensor,
        bias_U: torch.Tensor | None = None,
    ) -> None:
        """Use E', L' and b' from now on, in the model's dtype; gradients flow back to them."""
        self.embed.weight, self.head.weight = embed_UD.to(self.dtype), head_UD.to(self.dtype)
        if self.has_bias:
            self.head.bias = bias_U.to(self.dtype)

    def clear(self) -> None:
        """Let go of E', L', b' and the graph that made them."""
        self.embed.weight = self.head.weight = None
        if self.has_bias:
            self.head.bias = None


def recompute_only(lm: torch.nn.Module, on: bool) -> None:
    """Evaluation mode (no dropout) in which layers recompute their activations where that is on.

    Layers look at their own `training` to find out whether they recompute.
    """
    lm.eval()
    for module in lm.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = on
