"""What a step asks of the hardware: peak memory, arithmetic, and what is said where it fails."""

import contextlib
import resource
from collections.abc import Iterator

import torch
from transformers import PretrainedConfig

from s2t2_dist.config import Stage, Translate
from s2t2_dist.errors import S2T2Error
from s2t2_dist.lm.sizes import count_weights
from s2t2_dist.training.context import Context

GIB = 1 << 30
# Dense bf16 TFLOP/s of the data sheets, by a part of the device's name; the first that fits.
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989,
    "A100": 312, "L40S": 362, "RTX 4090": 165,
}  # fmt: skip
# Of torch (a GPU, a CPU), NumPy and C++.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc")


class Usage:
    """Peak memory and arithmetic of each step of a stage on this rank.

    Attributes:
        flops: floating-point operations of the model for one token, see `token_flops`.
    """

    def __init__(self, context: Context, stage: Stage):
        self.context, self.stage, self.device = context, stage, context.device
        self.flops = token_flops(context.config_of(stage), context, stage)
        bf16 = context.recipe.model.dtype == "bfloat16"
        self.peak_flops = peak_flops(self.device) if bf16 else None

    def begin(self) -> None:
        """Forget the peak of the steps before."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def values(self, tokens_per_second: float) -> dict[str, float]:
        """The step's metrics.

        peak_memory_gib: of this rank: allocated on its GPU during the step; on a CPU resident so
        far. model_tflops: the model's operations per second and rank, without the translator's and
        without what gradient checkpointing computes twice; mfu: that over the device's data-sheet
        rate, where the model is bf16 and the device is one of PEAK_TFLOPS.
        """
        rate = self.flops * tokens_per_second / self.context.comm.size
        found = {"peak_memory_gib": peak_memory(self.device) / GIB, "model_tflops": rate / 1e12}
        return found | ({"mfu": rate / self.peak_flops} if self.peak_flops else {})


def token_flops(config: PretrainedConfig, context: Context, stage: Stage) -> float:
    """Operations of the forward and backward pass for one token, as PaLM's MFU counts them.

    6 per weight of a matrix product, and 12 T per layer and width of attention. With frozen
    weights (translate) no weight gradient is made but the head's: 4 per weight. Chowdhery et al.
    2022, "PaLM", appendix B. Of a mixture of experts all weights count, not only those of a token.

    Args:
        config: of the model that the stage runs; its embedding is looked up, not multiplied.
    """
    counts, text = count_weights(config), config.get_text_config()
    layers, heads = _whole(text, "num_hidden_layers"), _whole(text, "num_attention_heads")
    size = _whole(text, "head_dim") or (counts.width // heads if heads else 0)
    attention = 12 * layers * heads * size * context.train.context
    embedding = text.vocab_size * counts.width
    if isinstance(stage, Translate):
        head = context.train.metadata["vocab_size"] * counts.width
        return 4 * counts.backbone + 6 * head + attention
    return 6 * (counts.total - (0 if counts.tied_head else embedding)) + attention


def _whole(config: PretrainedConfig, name: str) -> int:
    """A number of the config; 0 where there is none (Mamba has no heads) or one for each layer."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a GPU since the last reset; on a CPU resident since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations per second, None where they are not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * rate for part, rate in PEAK_TFLOPS.items() if part in name), None)


@contextlib.contextmanager
def explained(stage: Stage, device: torch.device) -> Iterator[None]:
    """Turn an allocation that failed into the user's error.

    Raises:
        S2T2Error: on this rank; the others may wait for it.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or any(t in str(error) for t in OUT_OF_MEMORY)):
            raise
        peak = f"{peak_memory(device) / GIB:.2f} GiB"
        if device.type == "cuda":
            peak += f" of {torch.cuda.get_device_properties(device).total_memory / GIB:.2f} GiB"
        name, rows = f"stages.{stage.name}", stage.per_device_train_batch_size
        raise S2T2Error(
            f"stage {stage.name}: out of memory on {device}, with a peak of {peak}; lower "
            f"{name}.per_device_train_batch_size ({rows}) or {name}.per_device_eval_batch_size "
            f"({stage.per_device_eval_batch_size}), set model.gradient_checkpointing=true, or take "
            "more ranks; `s2t2 plan` estimates what a rank needs"
        ) from error
