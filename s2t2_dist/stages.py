"""What each kind of stage does in one step, in a checkpoint and at its end.

`WeightStage` trains every weight (pretrain, finetune) and `TranslateStage` learns the transport
plan through the frozen LM. The loop in `trainer` treats both alike.

Shapes: B rows of a micro-batch, T tokens, V and U source and target vocabulary, D width, R source
rows of this rank.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from s2t2_dist import artifacts, engine, export, model
from s2t2_dist.comm import LocalComm
from s2t2_dist.config import Finetune, Pretrain, Recipe, Stage, Translate
from s2t2_dist.data import Batch, ShardReader
from s2t2_dist.errors import ConfigError
from s2t2_dist.evaluate import sum_of_nats


@dataclass(frozen=True)
class Context:
    """What every stage of a run shares on one rank."""

    recipe: Recipe
    run_dir: Path
    comm: LocalComm
    device: torch.device
    deepspeed: dict  # the DeepSpeed JSON
    train: ShardReader
    validation: ShardReader

    @property
    def special_ids(self) -> dict[str, int]:
        return export.special_ids(self.train.metadata)


class StageRunner(Protocol):
    """One stage on one rank. Every method but `logits` is a collective."""

    def train_step(
        self, batches: list[Batch], predicted: int, learning_rate: float
    ) -> dict[str, float]:
        """One optimizer step.

        Args:
            batches: this rank's micro-batches.
            predicted: predicted tokens of the whole step, over all ranks.

        Returns:
            `nats` (summed over this rank's tokens) and metrics that are the same on every rank.
        """

    def evaluation_mode(self, on: bool) -> None: ...

    def logits(self, input_ids_BT: torch.Tensor) -> torch.Tensor: ...

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> None: ...

    def finish(self, record: dict) -> None:
        """Write the stage's result, with `record` in its manifest."""

    def close(self) -> None: ...


def make_stage(context: Context, stage: Stage, previous: Stage | None) -> StageRunner:
    """Load the model and build the runner of a stage. A collective."""
    if isinstance(stage, Translate):
        from s2t2_dist.translate import TranslateStage

        return TranslateStage(context, stage)
    return WeightStage(context, stage, starting_model(context, stage, previous))


def starting_model(context: Context, stage: Stage, previous: Stage | None) -> Path:
    """The folder that a weight stage starts from; rank 0 makes it where it must be made."""
    recipe = context.recipe
    if isinstance(stage, Finetune) and stage.init == "source":
        folder = model.local_folder(recipe.model)
        source_vocab = model.WeightFiles(folder).vocab_size
        if context.train.metadata["vocab_size"] > source_vocab:
            raise ConfigError(
                f"stages.{stage.name}: init is source, but the data's tokenizer has "
                f"{context.train.metadata['vocab_size']} tokens and the model {source_vocab} rows"
            )
        return folder
    folder = context.run_dir / f"start-{stage.name}"
    if context.comm.rank == 0 and not artifacts.is_complete(folder):
        shutil.rmtree(folder, ignore_errors=True)
        record = {"kind": "model", "stage": stage.name}
        with artifacts.sealed_directory(folder, record) as temporary:
            _make_starting_model(context, stage, temporary)
    context.comm.barrier()
    return folder


def _make_starting_model(context: Context, stage: Stage, target: Path) -> None:
    recipe = context.recipe
    if isinstance(stage, Pretrain):
        torch.manual_seed(recipe.seed)
        vocabulary = {"vocab_size": context.train.metadata["vocab_size"]}
        model.save_random_lm(recipe.model, vocabulary | context.special_ids, target)
        return
    assert isinstance(stage, Finetune)
    source = model.local_folder(recipe.model)
    if stage.init == "truncate":
        rows = context.train.metadata["vocab_size"]
        if rows > model.WeightFiles(source).vocab_size:
            raise ConfigError(f"stages.{stage.name}: the model has fewer than {rows} rows to keep")
        model.fold(source, target, lambda weight, _: weight[:rows], context.special_ids)
        return
    from s2t2_dist.translate import fold_translation

    translation = stage.translation or context.run_dir / "translation"
    fold_translation(translation, source, target, context)


class WeightStage:
    """Every weight trained under ZeRO: pretraining and finetuning.

    Args:
        folder: the Hugging Face folder to start from.
    """

    def __init__(self, context: Context, stage: Stage, folder: Path):
        self.context = context
        self.folder = folder
        settings = engine.engine_settings(
            context.deepspeed, context.recipe.model, stage, context.comm.size
        )
        lm = model.load_lm(folder, context.recipe.model, settings)
        self.lm = engine.TrainedLM(lm, settings, stage)
        self.logits = self.lm.logits

    def evaluation_mode(self, on: bool) -> None:
        self.lm.train_mode(not on)

    def train_step(
        self, batches: list[Batch], predicted: int, learning_rate: float
    ) -> dict[str, float]:
        nats = 0.0
        for batch in batches:
            logits = self.logits(batch.input_ids.to(self.context.device))
            loss = sum_of_nats(logits, batch.labels.to(self.context.device))
            self.lm.backward(loss / predicted)
            nats += float(loss.detach())
        return {"nats": nats, "grad_norm": self.lm.step(learning_rate)}

    def save(self, directory: Path) -> None:
        self.lm.save(directory)

    def load(self, directory: Path) -> None:
        self.lm.load(directory)

    def finish(self, record: dict) -> None:
        """Write `model/`, the run's Hugging Face folder."""
        target = self.context.run_dir / export.MODEL_DIR
        if artifacts.is_complete(target):
            return
        weights = self.lm.state_dict()
        if self.context.comm.rank == 0:
            export.write_model(
                target,
                weights,
                self.folder,
                self.context.train.directory,
                self.context.special_ids,
                record,
            )
        self.context.comm.barrier()

    def close(self) -> None:
        self.lm.close()
