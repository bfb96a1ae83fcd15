"""Finished runs read from disk: recipe, data, metrics and plans, for tables and figures."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from s2t2_dist import artifacts
from s2t2_dist.config import Finetune, Recipe, Stage, Translate
from s2t2_dist.errors import ArtifactError, DataError
from s2t2_dist.lm.inputs import recorded_recipe, require_recipe, require_unchanged
from s2t2_dist.lm.translation import TRANSLATION_DIR, Translation, load_translation
from s2t2_dist.run.metrics import METRICS, read_metrics, require_unaltered

EVALUATION = {"eval_loss", "eval_perplexity", "eval_bits_per_byte"}
AMINO_ACIDS = frozenset("ACDEFGHIKLMNPQRSTVWY")
RARE_AMINO_ACIDS = frozenset("BJOUXZ")


@dataclass(frozen=True)
class FinishedRun:
    """A run that is done.

    Attributes:
        data: manifest of its data folder.
        metrics: lines of its `metrics.jsonl`.
        name: of its directory, or more of its path.
    """

    path: Path
    recipe: Recipe
    data: dict
    metrics: list[dict]
    name: str

    def lines(self, index: int) -> list[dict]:
        """The metrics of one stage, in the order of its steps."""
        return [line for line in self.metrics if line["stage_index"] == index]

    def evaluations(self, index: int) -> dict[int, dict]:
        """Step of the stage -> the line with the evaluation at this step."""
        return {line["step"]: line for line in self.lines(index) if line.keys() >= EVALUATION}

    def first_step(self, index: int) -> int:
        """Total optimizer steps of the stages before this one."""
        return sum(stage.max_steps for stage in self.recipe.stages[:index])

    def bytes_per_token(self, split: str) -> float:
        """Bytes of text per token of a split; end tokens count, with zero bytes."""
        held = self.data["splits"][split]
        return held["bytes"] / held["tokens"]

    def training_bits(self, line: dict) -> float:
        """A line's training loss in bits per byte, at the mean token length of the train split."""
        return line["loss"] / math.log(2) / self.bytes_per_token("train")

    def translation_of(self, stage: Stage) -> Translation | None:
        """The plan that a translate stage learned, or that a finetune stage took from elsewhere."""
        if isinstance(stage, Translate):
            return self._learned
        if isinstance(stage, Finetune) and stage.translation is not None:
            return load_translation(stage.translation)
        return None

    @cached_property
    def _learned(self) -> Translation:
        return load_translation(self.path / TRANSLATION_DIR)


def read_run(path: Path) -> FinishedRun:
    """Read a run directory.

    Raises:
        ArtifactError: not a run directory, or the run is not done.
        ConfigError: its config.yaml is not a recipe.
    """
    recipe = recorded_recipe(path)
    status = artifacts.read_json(path / "status.json")
    if status.get("state") != "done":
        reason = f" ({status['reason']})" if "reason" in status else ""
        raise ArtifactError(
            f"{path} is {status.get('state') or 'in no known state'}{reason}, not done; "
            f"s2t2 train {path / 'config.yaml'} resumes it"
        )
    sha256 = status.get("metrics_sha256")
    require_unaltered(path / METRICS, None, sha256 if isinstance(sha256, str) else None)
    require_recipe(path, recipe)
    translations = (f"stages.{stage.name}.translation" for stage in recipe.stages)
    require_unchanged(path, recipe, "data", *translations)
    data, name = artifacts.read_manifest(recipe.data.path), path.resolve().name
    run = FinishedRun(path, recipe, data, read_metrics(path), name)
    for index, stage in enumerate(recipe.stages):
        if not {0, stage.max_steps} <= run.evaluations(index).keys():
            raise ArtifactError(
                f"{path / METRICS} lacks the first or last evaluation of stage {stage.name}; "
                "restore the file or repeat the run in a new output_dir"
            )
    return run


def read_runs(paths: list[Path]) -> list[FinishedRun]:
    """Read runs that can be compared.

    Raises:
        DataError: two runs have different text in the train or validation split.
    """
    runs = [read_run(path) for path in paths]
    for run in runs[1:]:
        if text_of(run.data) != text_of(runs[0].data):
            raise DataError(
                f"{run.path} and {runs[0].path} have different text in train or validation; "
                "compare runs whose data were built from the same files and fraction"
            )
    return runs


def text_of(data: dict) -> dict[str, dict[str, int]]:
    """Counts of each byte value in each split; independent of the tokenizer."""
    return {split: held["byte_counts"] for split, held in data["splits"].items()}


def uniform_bits(data: dict) -> tuple[float, str]:
    """Bits per byte of a uniform guess, and a description of its alphabet.

    The alphabet of proteins is the 20 standard letters; the few rare letters are left out. For
    other text it is every byte value that occurs in the train split.
    """
    counts = data["splits"]["train"]["byte_counts"]
    if AMINO_ACIDS <= counts.keys() <= AMINO_ACIDS | RARE_AMINO_ACIDS:
        return math.log2(len(AMINO_ACIDS)), "the 20 amino acids"
    return math.log2(len(counts)), f"the {len(counts)} byte values of the train split"


def unigram_bits(data: dict) -> float:
    """Bits per byte of the validation split under the train split's byte frequencies.

    Frequencies are smoothed by adding one to each of the 256 byte values.
    """
    train, validation = (data["splits"][s]["byte_counts"] for s in ("train", "validation"))
    total = sum(train.values()) + 256
    bits = sum(
        -count * math.log2((train.get(byte, 0) + 1) / total) for byte, count in validation.items()
    )
    return bits / sum(validation.values())
