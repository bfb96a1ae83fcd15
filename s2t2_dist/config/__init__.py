"""The recipe: what a run does, as frozen, validated models read from YAML.

A recipe is defaults, then a YAML file, then `key=value` overrides with dotted keys. A list of
stages is addressed by stage name or by number: `stages.translate.max_steps=50`. Relative paths
are relative to the working directory. Unknown keys are errors that name the key path.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from s2t2_dist.config import yaml12
from s2t2_dist.config.fields import (
    Beta,
    ExpandedPath,
    ExpandedText,
    Fraction,
    NotNegative,
    Number,
    Positive,
    Switch,
    Uri,
    Whole,
    problems,
)
from s2t2_dist.config.overrides import apply_override
from s2t2_dist.errors import ConfigError

# The ways to learn P, those of `ot.make_solver`, and what tables and model cards call them.
METHODS = {
    "dykstra": "S2T2",
    "dual": "S2T2 (dual)",
    "dense": "Sinkhorn P (dense)",
    "plain": "Plain P",
}
DUAL_DEFAULTS = {"iterations": 100, "tolerance": 1e-3}
PEAK_RATE = "peak learning rate"
DECAY = "AdamW's weight decay, as a share of the learning rate"


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelConfig(_Strict):
    """The language model."""

    model_name_or_path: ExpandedText | None = Field(
        None, description="Hugging Face folder or hub name; left out only to pretrain"
    )
    revision: str | None = Field(None, description="hub revision (branch, tag or commit)")
    config: dict[str, Any] | None = Field(
        None, description="arguments of the architecture's config class, to pretrain"
    )
    model_type: str = Field("olmo", description="transformers model type of config")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="dtype of weights and activations; master weights are float32"
    )
    gradient_checkpointing: Switch = Field(
        False, description="recompute activations in the backward pass: less memory, more time"
    )

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if (self.model_name_or_path is None) == (self.config is None):
            raise ValueError("give model_name_or_path, or config to start from random weights")
        return self


class DataConfig(_Strict):
    """The shards, as `s2t2 data build` made them."""

    path: ExpandedPath = Field(description="directory with train/, validation/ and manifest.json")
    tokenizer: ExpandedPath | None = Field(
        None, description="if given, the shards must have been made with this tokenizer"
    )
    verify: Literal["size", "full"] = Field(
        "size", description="check of the shards at start: sizes only, or every sha256"
    )
    document_mask: Switch = Field(
        False,
        description="keep the documents of a row apart: no attention and no loss across their "
        "boundaries",
    )


class TrackingConfig(_Strict):
    """MLflow. `MLFLOW_TRACKING_URI`, where set, wins over `uri`."""

    enabled: Switch = Field(True, description="whether MLflow gets the metrics of metrics.jsonl")
    uri: Uri | None = Field(
        None,
        repr=False,
        description="server or database; default sqlite:///<cwd>/mlflow.db; a password is not kept",
    )
    experiment: str = Field("s2t2", description="name of the MLflow experiment")


class Stage(_Strict):
    """What every stage has. Defaults are the paper's (section 3, training details)."""

    name: str = Field(
        "",
        pattern=r"^[A-Za-z0-9_-]+$",
        description="name of the checkpoint folders and metrics; default: the kind",
        json_schema_extra=lambda schema: schema.pop("default"),  # empty stands for the kind
    )
    max_steps: Annotated[Whole, Field(ge=0)] = Field(description="optimizer steps")
    train_batch_size: Positive = Field(
        16, description="rows per optimizer step over all ranks; the same at any world size"
    )
    per_device_train_batch_size: Positive = Field(
        16, description="most rows of a rank's forward pass; gradients accumulate over passes"
    )
    per_device_eval_batch_size: Positive = Field(16, description="rows per evaluation pass")
    learning_rate: NotNegative = Field(description=PEAK_RATE)
    weight_decay: NotNegative = Field(0.0, description=DECAY)
    warmup_ratio: Fraction = Field(0.2, description="share of max_steps with a rising rate")
    min_lr_ratio: Fraction = Field(0.1, description="final rate as a share of the peak")
    adam_beta1: Beta = Field(0.9, description="AdamW's decay of the first moment")
    adam_beta2: Beta = Field(0.95, description="AdamW's decay of the second moment")
    adam_epsilon: NotNegative = Field(1e-5, description="AdamW's term against division by zero")
    max_grad_norm: NotNegative = Field(
        1.0, description="global gradient norm above which gradients are clipped; 0: never"
    )
    eval_steps: Positive | None = Field(
        None, description="steps between evaluations; a stage's start and end are always evaluated"
    )
    save_steps: Positive = Field(500, description="steps between checkpoints")
    samples: Annotated[Whole, Field(ge=0)] = Field(
        0, description="validation rows whose start the model continues at each evaluation"
    )

    @model_validator(mode="before")
    @classmethod
    def _name_it(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("name"):
            values = {**values, "name": values.get("kind", "")}
        return values


class Pretrain(Stage):
    """Train every weight of a model on the source domain, from a config."""

    kind: Literal["pretrain"] = Field(description="train every weight, from a config")
    learning_rate: NotNegative = Field(3e-4, description=PEAK_RATE)
    weight_decay: NotNegative = Field(0.1, description=DECAY)


class Translate(Stage):
    """Learn the transport plan P through the frozen LM (paper, section 2)."""

    kind: Literal["translate"] = Field(description="learn P through the frozen LM")
    learning_rate: NotNegative = Field(
        1e-3,
        description=f"{PEAK_RATE}, in the units of C: a share of a row's mass under row_mass",
    )
    method: Literal[tuple(METHODS)] = Field(
        "dykstra",
        description="dykstra: S2T2 in n iterations; dual: S2T2 to a tolerance; dense: entropic "
        "Sinkhorn (softmax); plain: no constraint",
    )
    iterations: Positive = Field(
        3, description="Sinkhorn iterations n; for dual the limit of a solve, 100 by default"
    )
    tolerance: Annotated[Number, Field(gt=0)] | None = Field(
        None,
        description="dual only: a solve ends when no row sum is off by a larger share, 1e-3 by "
        "default; null takes every iteration",
    )
    plans: Literal["shared", "separate"] = Field(
        "shared", description="one P, or one for E and one for L at twice the memory and time"
    )
    units: Literal["row_mass", "literal"] = Field(
        "row_mass", description="unit of C: a row's mass, or literal probability as in the paper"
    )
    embed_scale: Literal["paper", "convex"] = Field(
        "paper", description="E' = (P^T * 1/mu) E as in the paper, or convex: 1/nu instead"
    )
    source_tokens: ExpandedText = Field(
        "all", description="rows of P: all, bytes (single characters), or a file of token ids"
    )
    source_marginal: ExpandedText = Field(
        "uniform",
        description="mu: uniform, or a directory of `s2t2 data build` in the source tokenizer, "
        "whose token frequencies it takes (over at most 32,768 rows of the train split); a token "
        "that does not occur there gets no row of P",
    )
    target_marginal: Literal["uniform", "frequency"] = Field(
        "uniform",
        description="nu: uniform, or the counts of the target tokens in the training rows (at most "
        "32,768 of them) plus 1 each, so that no token is left without mass; with frequency take "
        "embed_scale convex, since the paper's makes rare tokens' rows of E' short",
    )
    entropy_weight: Number = Field(0.0, description="alpha of alpha * H(P), H in nats")

    @model_validator(mode="before")
    @classmethod
    def _dual_defaults(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("method") == "dual":
            return {**DUAL_DEFAULTS, **values}
        return values

    @model_validator(mode="after")
    def _tolerance_fits(self) -> "Translate":
        if self.tolerance is not None and self.method != "dual":
            raise ValueError(f"tolerance is for the method dual, not {self.method}: leave it out")
        return self


class Finetune(Stage):
    """Train every weight on the target domain."""

    kind: Literal["finetune"] = Field(description="train every weight")
    learning_rate: NotNegative = Field(2e-5, description=PEAK_RATE)
    weight_decay: NotNegative = Field(0.01, description=DECAY)
    init: Literal["translation", "truncate", "source"] = Field(
        "translation",
        description="translation: fold E', L' into the model; truncate: keep the first U rows of "
        "E and L; source: change nothing (data in source tokens)",
    )
    translation: ExpandedPath | None = Field(
        None, description="translation to fold; default: the one that this run learns"
    )


AnyStage = Annotated[Pretrain | Translate | Finetune, Field(discriminator="kind")]


class Recipe(_Strict):
    """One run: a model, its data and the stages it goes through."""

    output_dir: ExpandedPath = Field(
        description="run directory; resumed if it holds a run of this recipe"
    )
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = Field(
        17, description="seed of the data order and of initial weights"
    )
    model: ModelConfig = Field(description="language model to start from")
    data: DataConfig = Field(description="shards, as `s2t2 data build` made them")
    deepspeed: ExpandedPath = Field(description="DeepSpeed JSON; see ds_configs/README.md")
    stages: Annotated[list[AnyStage], Field(min_length=1)] = Field(
        description="what the run does, in this order"
    )
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow, to which metrics go")
    save_total_limit: Positive = Field(2, description="number of newest checkpoints to keep")
    keep_steps: Positive | None = Field(
        None, description="checkpoints at multiples of so many steps of a stage stay for good"
    )
    max_hours: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="time limit of one job, which saves and exits with code 3 before it"
    )
    max_bad_steps: Positive = Field(
        5, description="non-finite gradients in a row after which the run ends"
    )
    collective_timeout: Positive = Field(
        1800,
        description="seconds that a collective waits for the slowest rank, which may fold a model",
    )
    heartbeat_timeout: Positive = Field(
        20, description="seconds without a heartbeat after which a rank counts as lost"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names must differ, found {names}")
        translated = False
        for stage in self.stages:
            if not isinstance(stage, Translate) and stage is not self.stages[-1]:
                raise ValueError(f"stage {stage.name} trains every weight, so it must be the last")
            if isinstance(stage, Translate) and translated:
                raise ValueError(
                    f"stage {stage.name} is a second translate stage, but a run learns one plan: "
                    "give each a run of its own"
                )
            if isinstance(stage, Pretrain) != (self.model.config is not None):
                raise ValueError(
                    f"stage {stage.name}: pretrain starts from model.config, "
                    "every other stage from model.model_name_or_path"
                )
            needs_plan = isinstance(stage, Finetune) and stage.init == "translation"
            if needs_plan and stage.translation is None and not translated:
                raise ValueError(f"stage {stage.name} has no translate stage before it: give one")
            translated = translated or isinstance(stage, Translate)
        return self


def read_values(path: Path, what: str, example: str) -> dict:
    """The keys of a YAML 1.2 file of settings.

    Args:
        what: the file holds, for messages: "recipe".
        example: a file of the kind that is shipped.

    Raises:
        ConfigError: there is no such file, it is not YAML, or it holds no keys.
    """
    try:
        values = yaml12.parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{what} {path} does not exist") from None
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"{what} {path} cannot be read ({reason}); give a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} {path} is not YAML: {error}") from None
    except ConfigError as error:
        raise ConfigError(f"{what} {path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{what} {path} holds no keys; see {example}")
    return values


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `key=value` overrides (values are YAML 1.2).

    Raises:
        ConfigError: not YAML, an unknown or missing key, or a value out of range; the message
            names the key path.
    """
    values = read_values(path, "recipe", "launch/recipes/quickstart.yaml")
    for override in overrides or []:
        apply_override(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"recipe {path}: {problems(error)}") from None


def recipe_schema() -> dict:
    """The JSON schema (2020-12) of a recipe file, by which editors complete and check one."""
    schema = Recipe.model_json_schema()
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, **schema, "title": "s2t2-dist recipe"}


def recipe_values(recipe: Recipe) -> dict:
    """The resolved recipe as plain values (paths as text), as `config.yaml` holds it."""
    return recipe.model_dump(mode="json")
