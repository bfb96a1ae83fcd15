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
from s2t2_dist.config.names import DECAY, DUAL_DEFAULTS, INITS, METHODS, PEAK_RATE, WARM_DEFAULTS
from s2t2_dist.config.overrides import apply_override
from s2t2_dist.errors import ConfigError


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
    warm_start: Literal["subtoken_mean", "character_mean", "focus"] | None = Field(
        None,
        description="C begins at this start of docs/init.md; default: at the uniform plan",
    )
    warm_start_share: Annotated[Number, Field(gt=0, lt=1)] | None = Field(
        None,
        description="share of nu that warm_start places, 0.9 by default; mu spreads the rest, and "
        "becomes the row sums of both",
    )
    entropy_weight: Number = Field(0.0, description="alpha of alpha * H(P), H in nats")

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        dual = DUAL_DEFAULTS if values.get("method") == "dual" else {}
        return {**dual, **(WARM_DEFAULTS if values.get("warm_start") else {}), **values}

    @model_validator(mode="after")
    def _options_fit(self) -> "Translate":
        if self.tolerance is not None and self.method != "dual":
            raise ValueError(f"tolerance is for the method dual, not {self.method}: leave it out")
        if self.warm_start is not None and self.embed_scale != "convex":
            raise ValueError("warm_start needs embed_scale convex, for E' to begin as its rows")
        if (self.warm_start is None) != (self.warm_start_share is None):
            raise ValueError("warm_start_share is a number with warm_start, and left out without")
        return self


class Finetune(Stage):
    """Train every weight on the target domain."""

    kind: Literal["finetune"] = Field(description="train every weight")
    learning_rate: NotNegative = Field(2e-5, description=PEAK_RATE)
    weight_decay: NotNegative = Field(0.01, description=DECAY)
    init: Literal[("translation", "truncate", "source", *INITS)] = Field(
        "translation",
        description="translation: fold E', L' into the model; truncate: keep the first U rows of "
        "E and L; source: change nothing (data in source tokens); the others make the new rows of "
        "E and L from the source's without training, see docs/init.md: mean of all rows; gaussian: "
        "drawn from their mean and covariance; subtoken_mean and character_mean: of the source "
        "tokens that write a token's text, whole or character by character; focus: of similar "
        "tokens that both vocabularies have; alignment: as a file says",
    )
    translation: ExpandedPath | None = Field(
        None, description="translation to fold; default: the one that this run learns"
    )
    alignment: ExpandedPath | None = Field(
        None,
        description="init alignment only: JSON of TokAlign (target id: source id) or of "
        "trans-tokenization (target token, source tokens with weights)",
    )

    @model_validator(mode="after")
    def _alignment_fits(self) -> "Finetune":
        if (self.init == "alignment") != (self.alignment is not None):
            raise ValueError("init alignment needs the key alignment, a file; no other init has it")
        return self


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


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply `key=value` overrides (values are YAML 1.2).

    Raises:
        ConfigError: not YAML, an unknown or missing key, or a value out of range; the message
            names the key path.
    """
    values = yaml12.read_values(path, "recipe", "launch/recipes/quickstart.yaml")
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
