"""The inputs of a run by their role, and the files that it reads of each."""

from collections.abc import Container
from pathlib import Path

from pydantic import BaseModel, ValidationError

from s2t2_dist import artifacts
from s2t2_dist.comm import Comm, agree
from s2t2_dist.config import Finetune, Recipe, Translate
from s2t2_dist.errors import ArtifactError
from s2t2_dist.lm.folder import INDEX, local_folder
from s2t2_dist.lm.result import MODEL_DIR
from s2t2_dist.lm.translation import RECORD, TRANSLATION_DIR
from s2t2_dist.run import directory, identity
from s2t2_dist.run.identity import Input

# Of a model folder, besides its weights. No other file changes a result.
MODEL_FILES = (
    "config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
)
FILE = "file"  # name of the only file of an input that is a file


def inputs_of(recipe: Recipe, roles: Container[str] | None = None) -> dict[str, Input]:
    """The inputs of a recipe by role, but for the DeepSpeed JSON, which is known by its values.

    Args:
        roles: look for these alone; default: all.
    """

    def wanted(role: str) -> bool:
        return roles is None or role in roles

    inputs = {"data": _sealed(str(recipe.data.path))} if wanted("data") else {}
    if recipe.model.config is None and wanted("model"):
        folder = local_folder(recipe.model)
        inputs["model"] = Input(recipe.model.model_name_or_path, folder, _model_files(folder))
    for stage in recipe.stages:
        given = {}
        if isinstance(stage, Translate):
            given = {"source_tokens": stage.source_tokens, "source_marginal": stage.source_marginal}
        elif isinstance(stage, Finetune):
            paths = {"translation": stage.translation, "alignment": stage.alignment}
            given = {key: str(path) for key, path in paths.items() if path is not None}
        for key, value in given.items():
            role, path = f"stages.{stage.name}.{key}", Path(value)
            if directory.is_path(key, value) and wanted(role):
                found = _sealed(value) if path.is_dir() else Input(value, path, {FILE: path})
                inputs[role] = found
    return inputs


def identified(recipe: Recipe, run_dir: Path, deepspeed: dict, comm: Comm) -> dict:
    """The content of everything that a run reads, as `identity.write` takes it. A collective.

    Args:
        run_dir: of the run; what it knows of files that have not changed is not hashed again.
        deepspeed: the DeepSpeed JSON.
    """
    inputs = agree(comm, lambda: inputs_of(recipe), "listing the inputs")
    known = identity.known(run_dir) if comm.rank == 0 else None
    found = identity.identify(inputs, comm.broadcast_object(known), comm)
    return found | {identity.DEEPSPEED: identity.of_value(deepspeed, recipe.deepspeed)}


def _sealed(given: str) -> Input:
    """A sealed directory is known by its manifest, which has the hash of every file."""
    return Input(given, Path(given), {artifacts.MANIFEST: Path(given) / artifacts.MANIFEST})


def _model_files(folder: Path) -> dict[str, Path]:
    names = {name for name in MODEL_FILES if (folder / name).is_file()}
    if INDEX in names:
        names |= set(artifacts.read_json(folder / INDEX).get("weight_map", {}).values())
    else:
        names |= {path.name for path in folder.glob("*.safetensors")}
    return {name: folder / name for name in names}


def recorded_recipe(run_dir: Path) -> Recipe:
    """The recipe of a run, with every input where it is now.

    An input is looked for where it was at the last start, then at the same place relative to the
    run directory, then as the recipe names it, relative to the working directory.

    Raises:
        ArtifactError, ConfigError: not a run directory, or its files are damaged.
    """
    recipe = directory.read_recipe(run_dir)
    record = identity.read(run_dir)

    def moved(part: BaseModel, key: str, role: str) -> BaseModel:
        given = record["inputs"].get(role, {}).get("given")
        if given != str(getattr(part, key, None)):  # another one than at the last start
            return part
        place = _place(record, role, run_dir)
        return part.model_copy(update={key: place}) if place else part

    model = moved(recipe.model, "model_name_or_path", "model")
    changes = {
        "data": moved(recipe.data, "path", "data"),
        "model": model.model_copy(update={"model_name_or_path": _text(model.model_name_or_path)}),
        "stages": [moved(s, "translation", f"stages.{s.name}.translation") for s in recipe.stages],
    }
    return recipe.model_copy(update=changes)


def is_from_hub(run_dir: Path) -> bool:
    """Whether the run's base model was the hub's, by that name, and not a folder."""
    model = identity.read(run_dir)["inputs"].get("model", {})
    folder = Path(model.get("path") or "")
    return f"models--{(model.get('given') or '').replace('/', '--')}" in folder.parts


def _text(path: Path | str | None) -> str | None:
    return None if path is None else str(path)


def _place(record: dict, role: str, run_dir: Path) -> Path | None:
    return next((path for path in identity.places(record, role, run_dir) if path.exists()), None)


def require_unchanged(run_dir: Path, recipe: Recipe, *roles: str) -> None:
    """Inputs of a finished run still hold what it was trained with.

    Args:
        recipe: of `recorded_recipe`.

    Raises:
        ArtifactError: one does not; names its files.
    """
    old = identity.read(run_dir)["inputs"]
    inputs = inputs_of(recipe, roles)
    new = identity.identify(inputs, old, Comm())
    if changes := identity.differences(old, new):
        where = ", ".join(str(what.path) for what in inputs.values())
        raise ArtifactError(
            f"{where} changed after {run_dir} was trained ({'; '.join(changes)}); restore it"
        )


def require_recipe(run_dir: Path, recipe: Recipe) -> None:
    """The `config.yaml` of a finished run says what its result was trained with.

    The result is sealed with the recipe; a result that is not there says nothing.

    Raises:
        ArtifactError: it says something else.
    """
    model, translation = run_dir / MODEL_DIR, run_dir / TRANSLATION_DIR
    if isinstance(recipe.stages[-1], Translate):
        record = artifacts.read_json(translation / RECORD) if translation.is_dir() else {}
        record = record.get("info", {})
    else:
        record = artifacts.read_manifest(model) if model.is_dir() else {}
    if "recipe" not in record:
        return
    try:
        trained = Recipe.model_validate(record["recipe"])
    except ValidationError:  # of another version
        return
    if changes := directory.changes(trained, recipe):
        raise ArtifactError(
            f"{run_dir / directory.CONFIG} is not what the run was trained with "
            f"({'; '.join(changes)}); restore it"
        )
