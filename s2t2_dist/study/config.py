"""The study file: a base recipe, variants of it, seeds and a small grid of rates; and its runs."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from s2t2_dist import artifacts
from s2t2_dist.config import Recipe, load_recipe, recipe_values
from s2t2_dist.config.fields import ExpandedPath, Number, Whole, problems
from s2t2_dist.config.yaml12 import read_values
from s2t2_dist.errors import ConfigError

EXAMPLE = "launch/studies/demo.yaml"
OWNED = ("seed", "output_dir")  # the study sets these keys of every recipe
RUNS = "runs"

# Names of folders: no underscore, which joins their parts.
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9.-]*$")]


def _as_list(value: Any) -> Any:
    """A mapping of dotted keys as a list of `key=value`; JSON is YAML 1.2."""
    if isinstance(value, dict):
        return [f"{key}={json.dumps(item)}" for key, item in value.items()]
    return value


def _not_owned(overrides: list[str]) -> list[str]:
    for override in overrides:
        _require_free(override.partition("=")[0])
    return overrides


def _require_free(key: str) -> None:
    if key in OWNED:
        raise ValueError(f"{key} is set by the study; leave it out")


Overrides = Annotated[list[str], BeforeValidator(_as_list)]
Rates = dict[str, Annotated[list[Number], Field(min_length=1)]]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Variant(_Strict):
    """One line of the table: a recipe, trained with every seed at every rate."""

    label: str | None = Field(None, min_length=1, description="in tables; default: its name")
    base: ExpandedPath | None = Field(None, description="recipe; default: the study's base")
    overrides: Overrides = Field([], description="key=value, or a mapping of dotted keys")
    rates: Rates | None = Field(None, description="grid of this variant; default: the study's")


class StudyFile(_Strict):
    """What a study file holds. Relative paths are relative to the working directory."""

    output_dir: ExpandedPath = Field(description="folder of the runs and of the results")
    base: ExpandedPath = Field(description="recipe that the variants change")
    overrides: Overrides = Field([], description="settings of every variant, before its own")
    seeds: list[Annotated[Whole, Field(ge=0, lt=2**63)]] = Field(
        min_length=1, description="seeds with which each variant is trained at each rate"
    )
    rates: Rates = Field(
        {},
        description="dotted key -> values to try; several keys step together, so have equally many",
    )
    variants: Annotated[dict[Name, Variant], Field(min_length=1)] = Field(
        description="name -> what it changes; the name is part of the run directories' names"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "StudyFile":
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: one is there twice, found {self.seeds}; give each once")
        _not_owned(self.overrides)
        points(self.rates)
        for variant in self.variants.values():
            _not_owned(variant.overrides)
            points(variant.rates or {})
        return self


def points(rates: Rates) -> list[dict[str, float]]:
    """The points of a grid, each a value for every key; one empty point without a grid.

    Raises:
        ValueError: lists of different length, a point that is there twice, or a key of the study.
    """
    for key in rates:
        _require_free(key)
    lengths = {key: len(values) for key, values in rates.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"rates: keys step together, but have {lengths} values; give equally many")
    found = [dict(zip(rates, values, strict=True)) for values in zip(*rates.values(), strict=True)]
    for number, point in enumerate(found):
        if point in found[:number]:
            raise ValueError(f"rates: {point} is there twice; give each once")
    return found or [{}]


@dataclass(frozen=True)
class StudyRun:
    """One run: a variant at a rate with a seed, in a run directory of its own.

    Attributes:
        name: of its directory below `runs/`.
        rate: value of each key of the grid.
    """

    name: str
    variant: str
    rate: dict[str, float]
    seed: int
    recipe: Recipe

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(stage.max_steps for stage in self.recipe.stages)

    @property
    def recipe_sha256(self) -> str:
        """Of the recipe without what this study chose: its directory."""
        return _identity(self.recipe)


@dataclass(frozen=True)
class Study:
    """A study file that was read.

    Attributes:
        sha256: of the file.
        runs: every run, in the order in which they are started: each seed of all variants first,
            so that a study that is stopped early has whole lines.
    """

    path: Path
    sha256: str
    file: StudyFile
    runs: list[StudyRun]

    @property
    def output_dir(self) -> Path:
        return self.file.output_dir.resolve()

    def label(self, variant: str) -> str:
        """Of a variant, in tables."""
        return self.file.variants[variant].label or variant

    def rates(self, variant: str) -> list[dict[str, float]]:
        """The points that are tried of a variant."""
        own = self.file.variants[variant].rates
        return points(self.file.rates if own is None else own)


def rate_text(rate: dict[str, float]) -> str:
    """The values of a point; empty without a grid."""
    return "+".join(repr(value) for value in rate.values())


def load_study(path: Path) -> Study:
    """Read a study file and make every recipe of it.

    Raises:
        ConfigError: not YAML, an unknown or missing key, a recipe that is wrong, or two runs that
            are the same; the message names the key path or the variant.
    """
    values = read_values(path, "study", EXAMPLE)
    try:
        file = StudyFile.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"study {path}: {problems(error)}") from None
    study = Study(path, artifacts.sha256_file(path), file, [])
    for seed, name in itertools.product(file.seeds, file.variants):
        study.runs.extend(_runs_of(study, name, seed))
    seen: dict[str, str] = {}
    for run in study.runs:
        other = seen.setdefault(run.recipe_sha256, run.name)
        if other != run.name:
            raise ConfigError(f"study {path}: {other} and {run.name} are the same; remove one")
    return study


def _runs_of(study: Study, name: str, seed: int) -> list[StudyRun]:
    file, variant = study.file, study.file.variants[name]
    runs = []
    for rate in study.rates(name):
        middle = f"_rate-{rate_text(rate)}" if rate else ""
        run_name = f"{name}{middle}_seed-{seed}"
        overrides = [*file.overrides, *variant.overrides]
        overrides += [f"{key}={value!r}" for key, value in rate.items()]
        overrides += [
            f"seed={seed}",
            f"output_dir={json.dumps(str(study.output_dir / RUNS / run_name))}",
        ]
        try:
            recipe = load_recipe(variant.base or file.base, overrides)
        except ConfigError as error:
            raise ConfigError(f"study {study.path}: variant {name}: {error}") from None
        runs.append(StudyRun(run_name, name, rate, seed, recipe))
    return runs


def _identity(recipe: Recipe) -> str:
    values = {key: value for key, value in recipe_values(recipe).items() if key != "output_dir"}
    return artifacts.sha256_json(values)
