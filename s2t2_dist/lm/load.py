"""Load a causal LM into ZeRO-3 partitions; no rank reads or holds the whole model.

With `from_pretrained` under ZeRO-3, rank 0 reads every weight and broadcasts it. Here each rank
reads only its own part of each weight, so reads and memory per rank shrink with more ranks.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from s2t2_dist.config import ModelConfig
from s2t2_dist.errors import ArtifactError
from s2t2_dist.lm.folder import WeightFiles


def load_lm(folder: Path, model: ModelConfig, settings: dict) -> torch.nn.Module:
    """Load a causal LM in the recipe's dtype, partitioned over the ranks under ZeRO-3.

    The model is returned in training mode. Peak memory of a rank: its partition and one whole
    weight, which DeepSpeed allocates before it partitions it. A collective.

    Args:
        settings: DeepSpeed settings of the stage, from `engine.engine_settings`.

    Raises:
        ArtifactError: on this rank, if the files do not match the config.
    """
    weights = WeightFiles(folder)
    dtype = getattr(torch, model.dtype)
    keep = HfDeepSpeedConfig(settings)  # transformers uses it while this reference exists
    if weights.as_stored and _partitions_in_memory(settings["zero_optimization"]):
        lm = AutoModelForCausalLM.from_config(weights.config, dtype=dtype)
        fill_partitions(lm, weights)
    else:
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    del keep
    if model.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm.train()


def _partitions_in_memory(zero: dict) -> bool:
    """Whether ZeRO partitions the weights and keeps them in memory, unquantized."""
    quantized = any(value for key, value in zero.items() if key.startswith("zero_quantized"))
    on_disk = (zero.get("offload_param") or {}).get("device") == "nvme"
    return zero.get("stage") == 3 and not quantized and not on_disk


@torch.no_grad()
def fill_partitions(lm: torch.nn.Module, weights: WeightFiles) -> None:
    """Read this rank's partition of every weight, and every buffer that the files hold.

    Args:
        lm: partitioned by DeepSpeed's `zero.Init`. A tied weight is one parameter, read once.
    """
    for name, parameter in lm.named_parameters():
        partition = parameter.ds_tensor
        start = parameter.ds_zero_partition_rank * partition.ds_numel
        part = read_flat(weights, name, parameter.ds_shape, start, start + partition.ds_numel)
        partition[: len(part)].copy_(part)
        partition[len(part) :].zero_()
        # hpZ's copy within the node still holds the old values; the next gather recreates it.
        parameter.ds_secondary_tensor = None
    for name, buffer in lm.named_buffers():
        if name in weights.file_of:
            buffer.copy_(read_flat(weights, name, buffer.shape, 0, buffer.numel()).view_as(buffer))


def read_flat(
    weights: WeightFiles, name: str, shape: torch.Size, start: int, stop: int
) -> torch.Tensor:
    """Elements [start, stop) of a weight in row-major order; fewer if it ends before `stop`.

    Reads only the rows that contain them.

    Raises:
        ArtifactError: the tensor in the file has another shape.
    """
    path = weights.folder / weights.file_of[name]
    with safe_open(path, "pt") as f:
        view = f.get_slice(name)
        if tuple(view.get_shape()) != tuple(shape):
            raise ArtifactError(
                f"{path}: {name} has shape {tuple(view.get_shape())}, but the config makes it "
                f"{tuple(shape)}; use config.json and weights of the same model"
            )
        stop = min(stop, shape.numel())
        if not shape or start >= stop:
            return f.get_tensor(name).reshape(-1)[start:stop]
        width = shape.numel() // shape[0]
        first, last = start // width, -(-stop // width)
        rows = view[first:last].reshape(-1)
        return rows[start - first * width : stop - first * width]
