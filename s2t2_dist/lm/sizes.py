"""Counts of the weights that a stage trains, and their bytes: for preflight and `s2t2 plan`.

Shapes: V source rows of P, U target vocabulary, W ranks, N weights of the model.
"""

from dataclasses import dataclass
from math import ceil

from transformers import PretrainedConfig

from s2t2_dist.config import Finetune, Pretrain, Stage, Translate
from s2t2_dist.lm.architecture import on_meta, with_vocabulary

SINGLE = 4  # bytes of a float32
BYTES = {"bfloat16": 2, "float32": 4, "bf16": 2, "fp32": 4, "fp16": 2}
# Bytes on disk for each trained weight: its float32 value and two moments. For a bfloat16 model
# DeepSpeed saves the float32 master weights, not the bfloat16 weights.
CHECKPOINT_BYTES = 3 * SINGLE


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of elements in a model's weights.

    Attributes:
        total: of all weights; a tied head counts once.
        tied_head: of the head if it is tied, else 0.
        largest: of the largest weight.
        backbone: of all weights without the embedding and the LM head.
        width: D, the length of an embedding.
    """

    total: int
    tied_head: int
    largest: int
    backbone: int
    width: int


def count_weights(config: PretrainedConfig) -> WeightCounts:
    """Count on the meta device: nothing is allocated."""
    lm = on_meta(config)
    sizes = [parameter.numel() for parameter in lm.parameters()]
    embed, head = lm.get_input_embeddings().weight, lm.get_output_embeddings()
    tied = head.weight is embed
    vocabulary = {id(p): p.numel() for p in (embed, *head.parameters(recurse=False))}
    return WeightCounts(
        total=sum(sizes),
        tied_head=embed.numel() if tied else 0,
        largest=max(sizes),
        backbone=sum(sizes) - sum(vocabulary.values()),
        width=embed.shape[1],
    )


def trained_config(config: PretrainedConfig, stage: Stage, vocab_size: int) -> PretrainedConfig:
    """The config of the model that a stage trains; a folded model is untied and has U rows.

    Args:
        config: of the source model, or of the model to pretrain.
    """
    if isinstance(stage, Finetune) and stage.init == "source":
        return config
    return with_vocabulary(config, vocab_size, untied=not isinstance(stage, Pretrain))


def weight_states(elements: int, ranks: int, dtype: str, accumulated: str) -> dict[str, int]:
    """Bytes per rank, by name, to train N weights with AdamW under ZeRO-3.

    Args:
        elements: N.
        dtype: of the weights; with bfloat16 there are float32 master weights.
        accumulated: dtype in which gradients are accumulated.
    """
    share = ceil(elements / ranks)
    return {
        "weights": BYTES[dtype] * share,
        "gradients": BYTES[accumulated] * share,
        "AdamW moments": 2 * SINGLE * share,
        "master weights": 0 if BYTES[dtype] == SINGLE else SINGLE * share,
    }


def plan_count(stage: Translate) -> int:
    """Number of plans that a translate stage learns: 2 if E and L have separate plans, else 1."""
    return 2 if stage.plans == "separate" else 1


def accumulation_dtype(deepspeed: dict, dtype: str) -> str:
    """The dtype in which DeepSpeed accumulates gradients; default: that of the weights."""
    return deepspeed.get("data_types", {}).get("grad_accum_dtype") or dtype
