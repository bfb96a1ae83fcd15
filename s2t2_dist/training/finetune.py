"""Builds the runner of a stage; holds the one that trains every weight (pretrain, finetune).

The other one, which learns the transport plan, is in `translate`.
"""

from pathlib import Path

import torch

from s2t2_dist import artifacts
from s2t2_dist.comm import agree
from s2t2_dist.config import INITS, Finetune, Pretrain, Stage, Translate
from s2t2_dist.data.batches import Batch, load_batch
from s2t2_dist.data.evaluate import sum_of_nats
from s2t2_dist.lm import engine
from s2t2_dist.lm.fold import fold
from s2t2_dist.lm.folder import save_random_lm
from s2t2_dist.lm.init import starting_rows
from s2t2_dist.lm.load import load_lm
from s2t2_dist.lm.probe import plain_logits, probe_engine, probe_rows, require_written
from s2t2_dist.lm.result import MODEL_DIR, write_model
from s2t2_dist.lm.translation import TRANSLATION_DIR, fold_translation
from s2t2_dist.run import reshard
from s2t2_dist.run.checkpoint import is_intact
from s2t2_dist.training.context import Context, StageRunner, or_nan
from s2t2_dist.training.translate import TranslateStage

COMPARED = 64  # tokens of a validation row, by which a written model is compared


def make_stage(context: Context, stage: Stage) -> StageRunner:
    """Load the model and build the runner of a stage. A collective."""
    if isinstance(stage, Translate):
        return TranslateStage(context, stage)
    return WeightStage(context, stage, starting_model(context, stage))


def uses_translation_of_run(stage: Stage) -> bool:
    """Whether a stage starts from the translation that an earlier stage of its run learned."""
    finetunes = isinstance(stage, Finetune) and stage.init == "translation"
    return finetunes and stage.translation is None


def starting_model(context: Context, stage: Stage) -> Path:
    """The folder that a weight stage starts from; rank 0 makes it where it must be made."""
    if isinstance(stage, Finetune) and stage.init == "source":
        return context.base.folder
    folder = context.run_dir / f"start-{stage.name}"

    def make() -> None:
        if context.comm.rank != 0 or is_intact(folder):
            return
        record = {"kind": "model", "stage": stage.name}
        with artifacts.sealed_directory(folder, record) as temporary:
            record |= _make_starting_model(context, stage, temporary)

    agree(context.comm, make, f"writing {folder}")
    return folder


def _make_starting_model(context: Context, stage: Stage, target: Path) -> dict:
    """Write the folder; returns what else its manifest says."""
    recipe = context.recipe
    if isinstance(stage, Pretrain):
        torch.manual_seed(recipe.seed)
        vocabulary = {"vocab_size": context.train.metadata["vocab_size"]}
        save_random_lm(recipe.model, vocabulary | context.special_ids, target)
        return {}
    assert isinstance(stage, Finetune)
    source = context.base.folder
    if stage.init == "truncate":
        rows = context.train.metadata["vocab_size"]
        fold(source, target, lambda weight, _: weight[:rows], context.special_ids)
        return {}
    if stage.init in INITS:
        start = starting_rows(stage.init, context.base, context.train, recipe.seed, stage.alignment)
        fold(source, target, lambda weight, _: start(weight), context.special_ids)
        counts = ", ".join(f"{what} {count}" for what, count in start.record.items())
        print(f"stage {stage.name}: init {stage.init}, rows {counts}", flush=True)
        return {"init": {"method": stage.init, **start.record}}
    translation = stage.translation or context.run_dir / TRANSLATION_DIR
    fold_translation(translation, source, target, context.train.metadata)
    return {}


class WeightStage:
    """Every weight trained under ZeRO: pretraining and finetuning.

    Args:
        folder: the Hugging Face folder to start from.
    """

    def __init__(self, context: Context, stage: Stage, folder: Path):
        self.context, self.stage, self.folder = context, stage, folder
        settings = engine.engine_settings(
            context.deepspeed, context.recipe.model, stage, context.comm.size
        )
        lm = load_lm(folder, context.recipe.model, settings)
        self.lm = engine.TrainedLM(lm, settings, stage)
        self.logits = self.lm.logits

    def probe(self) -> None:
        """The engine says what the model in its folder says."""
        context, dtype = self.context, getattr(torch, self.context.recipe.model.dtype)
        ids_BT = probe_rows(context.train.metadata["vocab_size"], context.device)
        self.evaluation_mode(True)
        probe_engine(
            self.logits,
            ids_BT,
            lambda: plain_logits(self.folder, ids_BT, dtype),
            context.recipe.data.document_mask,
            context.comm,
            dtype,
        )
        self.evaluation_mode(False)

    def evaluation_mode(self, on: bool) -> None:
        self.lm.train_mode(not on)

    def train_step(
        self, batches: list[Batch], predicted: int, learning_rate: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        nats = torch.zeros((), dtype=torch.float64, device=self.context.device)
        for batch in batches:
            batch = batch.to(self.context.device)
            loss = sum_of_nats(self.logits(batch.input_ids, batch.position_ids), batch.labels)
            self.lm.backward(or_nan(loss / predicted))
            nats += loss.detach()
        return nats, {"grad_norm": self.lm.step(learning_rate)}

    def save(self, directory: Path) -> None:
        self.lm.save(directory)

    def load(self, directory: Path, world_size: int) -> None:
        if world_size == self.context.comm.size:
            self.lm.load(directory)
            return
        with reshard.converted(directory, self.context.comm) as copy:
            self.lm.load(copy, universal=True)

    def finish(self, record: dict) -> None:
        """Write `model/`, the run's Hugging Face folder, if it gives the trainer's logits."""
        target = self.context.run_dir / MODEL_DIR
        self.evaluation_mode(True)
        ids_BT = load_batch(self.context.validation, range(1)).input_ids[:, :COMPARED]
        ids_BT = ids_BT.to(self.context.device)
        with torch.no_grad():
            logits_BTU = self.logits(ids_BT).cpu()
        dtype = getattr(torch, self.context.recipe.model.dtype)
        weights = self.lm.state_dict()

        def write() -> None:
            if weights is not None:
                write_model(
                    target,
                    weights,
                    self.folder,
                    self.context.train.directory,
                    self.context.special_ids,
                    record,
                    lambda folder: require_written(folder, ids_BT, logits_BTU, dtype),
                )

        agree(self.context.comm, write, f"writing {target}")

    def close(self) -> None:
        self.lm.close()
