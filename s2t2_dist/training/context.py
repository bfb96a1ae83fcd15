"""What the stages of a run share: their context and the interface that the loop drives.

Shapes: B rows of a micro-batch, T tokens of a row.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from transformers import PretrainedConfig

from s2t2_dist.comm import Comm
from s2t2_dist.config import Recipe, Stage, Translate
from s2t2_dist.data.batches import Batch
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.lm.architecture import random_lm_config
from s2t2_dist.lm.folder import WeightFiles, local_folder
from s2t2_dist.lm.result import special_ids
from s2t2_dist.lm.sizes import trained_config


@dataclass(frozen=True)
class Context:
    """What every stage of a run shares on one rank."""

    recipe: Recipe
    run_dir: Path
    comm: Comm
    device: torch.device
    deepspeed: dict  # the DeepSpeed JSON
    train: ShardReader
    validation: ShardReader

    @property
    def special_ids(self) -> dict[str, int]:
        return special_ids(self.train.metadata)

    @cached_property
    def base(self) -> WeightFiles:
        """The folder of the model that the run starts from; there is none to pretrain."""
        return WeightFiles(local_folder(self.recipe.model))

    def config_of(self, stage: Stage) -> PretrainedConfig:
        """Of the model that a stage runs; of the folded one, without special ids."""
        vocab_size = self.train.metadata["vocab_size"]
        if self.recipe.model.config is not None:
            vocabulary = {"vocab_size": vocab_size, **self.special_ids}
            return random_lm_config(self.recipe.model, vocabulary)
        if isinstance(stage, Translate):
            return self.base.config
        return trained_config(self.base.config, stage, vocab_size)


def or_nan(loss: torch.Tensor) -> torch.Tensor:
    """The loss; if it is not finite, one whose gradients are all NaN.

    The norm of the summed gradient then shows it on every rank.
    """
    return loss * torch.where(loss.isfinite(), 1.0, torch.nan)


class StageRunner(Protocol):
    """One stage on one rank. Every method but `logits` is a collective."""

    def train_step(
        self, batches: list[Batch], predicted: int, learning_rate: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """One optimizer step. If the metric `grad_norm` is not finite, no rank changes a weight.

        Args:
            batches: this rank's micro-batches.
            predicted: predicted tokens of the whole step, over all ranks.

        Returns:
            nats summed over this rank's tokens (a float64 scalar on the device), and metrics that
            are the same on every rank.
        """

    def probe(self) -> None:
        """Check, before anything is trained, that the engine computes what the model does.

        Raises:
            ConfigError: on every rank.
        """

    def evaluation_mode(self, on: bool) -> None: ...

    def logits(
        self, input_ids_BT: torch.Tensor, position_ids_BT: torch.Tensor | None = None
    ) -> torch.Tensor: ...

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path, world_size: int) -> None:
        """Restore what `world_size` ranks saved, from a checkpoint that was checked."""

    def finish(self, record: dict) -> None:
        """Write the stage's result, with `record` in its manifest."""

    def close(self) -> None: ...
