"""Load a causal LM into ZeRO-3 partitions; no rank reads or holds the whole model for it.

With `from_pretrained` under ZeRO-3, rank 0 reads every weight and broadcasts it. Here each rank
reads only its own part of each weight, so reads and memory per rank shrink with more ranks.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig

from s2t2_dist.config import ModelConfig
from s2t2_dist.errors import ArtifactError
from s2t2_dist.lm.engine import gathered_rows
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
        lm = AutoModelForCausalLM.from_config(weights.config, dtype=dtype, trust_remote_code=False)
        fill_partitions(lm, weights)
    else:
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
    del keep
    if model.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm.train()


def _partitions_in_memory(zero: dict) -> bool:
    """Whether ZeRO partitions the weights and keeps them in memory, unquantized."""
    quantized = any(value for key, value in zero.items() if key.startswith("zero_quantized"))
    on_disk = (zero.get("offload_param") or {}).get("device") == "nvme"
    return zero.get("stage") == 3 and not quantized and not on_disk


class TokenRows(NamedTuple):
    """What a model holds of some tokens, float32.

    Attributes:
        embed_RD, head_RD: rows of E and L; one tensor if they are tied.
        bias_R: the LM head's, or None if it has none.
    """

    embed_RD: torch.Tensor
    head_RD: torch.Tensor
    bias_R: torch.Tensor | None

    def to(self, device: torch.device) -> "TokenRows":
        return TokenRows(*(part if part is None else part.to(device) for part in self))

    def side_by_side(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Two matrices of one width: a bias is one more column of L, and of E a column of zeros."""
        if self.bias_R is None:
            embed_RD = self.embed_RD.to(device)
            tied = self.head_RD is self.embed_RD
            return embed_RD, embed_RD if tied else self.head_RD.to(device)
        bias_R1 = self.bias_R[:, None]
        embed_RK = torch.cat((self.embed_RD, torch.zeros_like(bias_R1)), 1)
        return embed_RK.to(device), torch.cat((self.head_RD, bias_R1), 1).to(device)


def token_rows(lm: torch.nn.Module, weights: WeightFiles, token_ids_R: torch.Tensor) -> TokenRows:
    """Read what the model holds of some tokens. A collective; each rank asks for its own.

    From the files, or from the partitions where transformers converts the files.

    Args:
        lm: from `load_lm`.
    """
    vocabulary = weights.vocabulary
    modules = {vocabulary.embed: lm.get_input_embeddings().weight}
    head = lm.get_output_embeddings()
    modules |= {vocabulary.head: head.weight, **dict.fromkeys(vocabulary.biases, head.bias)}

    def rows(name: str) -> torch.Tensor:
        if weights.as_stored:
            return weights.rows(name, token_ids_R)
        return gathered_rows(modules[name], token_ids_R)

    embed_RD = rows(vocabulary.embed)
    head_RD = embed_RD if vocabulary.tied else rows(vocabulary.head)
    return TokenRows(embed_RD, head_RD, rows(vocabulary.biases[0]) if vocabulary.biases else None)


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
