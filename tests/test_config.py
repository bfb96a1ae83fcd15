"""The recipe: overrides, defaults of the paper, and errors that name the key."""

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from s2t2_dist import cli
from s2t2_dist.config import (
    Finetune,
    Translate,
    load_recipe,
    recipe_schema,
    recipe_values,
    yaml12,
)
from s2t2_dist.config.overrides import changed_keys
from s2t2_dist.errors import ConfigError

RECIPES = sorted((Path(__file__).parent.parent / "launch" / "recipes").glob("*.yaml"))

MINIMAL = {
    "output_dir": "runs/x",
    "model": {"model_name_or_path": "m"},
    "data": {"path": "d"},
    "deepspeed": "ds.json",
    "stages": [{"kind": "translate", "max_steps": 10}, {"kind": "finetune", "max_steps": 5}],
}


@pytest.fixture
def write(tmp_path):
    def write_recipe(values):
        path = tmp_path / "recipe.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return path

    return write_recipe


def test_defaults_are_the_papers_training_details(write):
    translate, finetune = load_recipe(write(MINIMAL)).stages
    assert isinstance(translate, Translate) and isinstance(finetune, Finetune)
    assert (translate.learning_rate, translate.weight_decay) == (1e-3, 0.0)
    assert (finetune.learning_rate, finetune.weight_decay) == (2e-5, 0.01)
    for stage in (translate, finetune):
        assert (stage.adam_beta1, stage.adam_beta2, stage.adam_epsilon) == (0.9, 0.95, 1e-5)
        assert (stage.warmup_ratio, stage.min_lr_ratio) == (0.2, 0.1)
    assert translate.iterations == 3 and translate.entropy_weight == 0


def test_dual_has_a_tolerance_and_room_to_reach_it(write):
    """Its resolved recipe says so, and is read as it was written."""
    recipe = load_recipe(write(MINIMAL), ["stages.translate.method=dual"])
    assert (recipe.stages[0].iterations, recipe.stages[0].tolerance) == (100, 1e-3)
    values = recipe_values(recipe)
    assert recipe_values(load_recipe(write(values))) == values
    fixed = ["stages.translate.iterations=5", "stages.translate.tolerance=null"]
    stage = load_recipe(write(MINIMAL), ["stages.translate.method=dual", *fixed]).stages[0]
    assert (stage.iterations, stage.tolerance) == (5, None)
    assert load_recipe(write(MINIMAL)).stages[0].tolerance is None


def test_a_warm_start_has_a_share_and_a_recipe_without_one_has_no_new_value(write):
    """A run of an earlier version, whose config.yaml lacks the keys, resumes."""
    plain = recipe_values(load_recipe(write(MINIMAL)))["stages"]
    assert plain[0]["warm_start"] is plain[0]["warm_start_share"] is plain[1]["alignment"] is None
    warm = ["stages.translate.warm_start=focus", "stages.translate.embed_scale=convex"]
    recipe = load_recipe(write(MINIMAL), warm)
    assert recipe.stages[0].warm_start_share == 0.9
    values = recipe_values(recipe)
    assert recipe_values(load_recipe(write(values))) == values
    other = load_recipe(write(MINIMAL), [*warm, "stages.translate.warm_start_share=0.5"])
    assert other.stages[0].warm_start_share == 0.5


def schema_errors(values):
    return [error.message for error in Draft202012Validator(recipe_schema()).iter_errors(values)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_follows_the_schema(path):
    values = yaml.safe_load(path.read_text())
    assert schema_errors(values) == []
    assert schema_errors(recipe_values(load_recipe(path))) == []  # and what config.yaml holds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 1}, "'seeds' was unexpected"),
        ({"seed": "many"}, "'many' is not of type 'integer'"),
        ({"stages": []}, "should be non-empty"),
        ({"stages": [{"kind": "translate"}]}, "'max_steps' is a required property"),
        ({"stages": [{"kind": "translat", "max_steps": 1}]}, "translat"),
        ({"stages": [{"kind": "translate", "max_steps": 1, "init": "source"}]}, "'init' was unexp"),
        ({"stages": [{"kind": "translate", "max_steps": 1, "name": "a/b"}]}, "does not match"),
    ],
    ids=["unknown key", "type", "no stage", "missing key", "kind", "another kind's key", "name"],
)
def test_the_schema_refuses_what_the_reader_refuses(change, message, write):
    values = {**MINIMAL, **change}
    validator = Draft202012Validator(recipe_schema())
    found = list(validator.iter_errors(values))
    nested = [error for outer in found for error in (outer, *outer.context)]
    assert any(message in error.message for error in nested), [e.message for e in nested]
    with pytest.raises(ConfigError):
        load_recipe(write(values))


def test_the_schema_describes_every_key_and_its_defaults_follow_it():
    """An editor shows the description, and may write the default into the file."""
    schema = recipe_schema()
    for name, model in {"Recipe": schema, **schema["$defs"]}.items():
        for key, value in model["properties"].items():
            assert value.get("description"), f"{name}.{key} has no description"
            if "default" in value:
                rule = Draft202012Validator({**value, "$defs": schema["$defs"]})
                assert rule.is_valid(value["default"]), f"{name}.{key}: {value['default']!r}"


def test_the_command_prints_the_schema(capsys):
    assert cli.run(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == recipe_schema()
    Draft202012Validator.check_schema(recipe_schema())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid(path):
    recipe = load_recipe(path)
    assert recipe.deepspeed.exists(), f"{path.name} names {recipe.deepspeed}, which is not there"


def test_overrides_reach_a_stage_by_name_and_by_number(write):
    path = write(MINIMAL)
    recipe = load_recipe(path, ["stages.finetune.max_steps=7", "stages.0.learning_rate=0.5"])
    assert recipe.stages[1].max_steps == 7
    assert recipe.stages[0].learning_rate == 0.5
    assert load_recipe(path, ["tracking.enabled=false"]).tracking.enabled is False


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["seeds=3"], "unknown key seeds"),
        (["stages.translate.lr=1"], "unknown key stages.0.translate.lr"),
        (["stages.translate.max_steps=-1"], "stages.0.translate.max_steps"),
        (["stages.warmup.max_steps=3"], "stages.warmup"),
        (["model.dtype=float16"], "model.dtype"),
        (["seed"], "not key=value"),
        (["seed.x=1"], "seed"),
        (["stages=[]"], "stages"),
        (["seed=-1"], "seed: "),
        (["seed=9223372036854775808"], "seed: "),
        (["stages.translate.adam_beta1=1"], "stages.0.translate.adam_beta1"),
        (["stages.finetune.adam_beta2=1.0"], "stages.1.finetune.adam_beta2"),
        (["stages.translate.entropy_weight=.nan"], "stages.0.translate.entropy_weight"),
        (["stages.translate.tolerance=1e-3"], "tolerance is for the method dual, not dykstra"),
        (["stages.translate.tolerance=0"], "stages.0.translate.tolerance"),
        (["stages.translate.plans=two"], "stages.0.translate.plans"),
        (["stages.translate.target_marginal=d"], "stages.0.translate.target_marginal"),
        (["stages.translate.learning_rate=.inf"], "stages.0.translate.learning_rate"),
        (["stages.translate.name=a/b"], "stages.0.translate.name"),
        (["stages.translate.name=.."], "stages.0.translate.name"),
        (["stages.translate.warm_start=focus"], "warm_start needs embed_scale convex"),
        (["stages.translate.warm_start=gaussian"], "stages.0.translate.warm_start"),
        (["stages.translate.warm_start_share=1"], "stages.0.translate.warm_start_share"),
        (["stages.translate.warm_start_share=0.5"], "left out without"),
        (["stages.finetune.init=average"], "stages.1.finetune.init"),
        (["stages.finetune.init=alignment"], "init alignment needs the key alignment"),
        (["stages.finetune.alignment=a.json"], "no other init has it"),
        (["stages=[foo]", "stages.translate.max_steps=3"], "stages.translate does not exist"),
        (["stages=[foo]", "stages.foo.max_steps=3"], "holds a value"),
        (["stages=[foo]"], "stages.0"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(write, overrides, named):
    values = {**MINIMAL, "seed": 1}
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(values), overrides)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [("", "no keys"), ("a: [", "not YAML"), ("output_dir: x", "missing key")],
)
def test_a_file_that_is_no_recipe(write, text, named):
    with pytest.raises(ConfigError, match=named):
        load_recipe(write(text))


def test_a_missing_recipe_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml does not exist"):
        load_recipe(Path("nowhere.yaml"))


def test_a_directory_is_no_recipe(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read .Is a directory"):
        load_recipe(tmp_path)


@pytest.mark.parametrize("name", ["CFT-2", "stage_1"])
def test_a_stage_may_be_named(write, name):
    recipe = load_recipe(write(MINIMAL), [f"stages.translate.name={name}"])
    assert recipe.stages[0].name == name


def test_the_largest_seed_is_accepted(write):
    assert load_recipe(write(MINIMAL), ["seed=9223372036854775807"]).seed == 2**63 - 1


def test_a_run_learns_one_plan(write):
    first, last = MINIMAL["stages"]
    stages = [first, {**first, "name": "again"}, last]
    with pytest.raises(ConfigError, match="stage again is a second translate stage"):
        load_recipe(write({**MINIMAL, "stages": stages}))


def test_pretraining_needs_a_config_and_the_other_stages_a_model(write):
    with pytest.raises(ConfigError, match=r"pretrain starts from model\.config"):
        load_recipe(write({**MINIMAL, "stages": [{"kind": "pretrain", "max_steps": 1}]}))
    with pytest.raises(ConfigError, match="model_name_or_path, or config"):
        load_recipe(write({**MINIMAL, "model": {}}))


def test_a_stage_that_trains_every_weight_is_the_last(write):
    stages = [{"kind": "finetune", "max_steps": 1, "init": "source"}, MINIMAL["stages"][0]]
    with pytest.raises(ConfigError, match="must be the last"):
        load_recipe(write({**MINIMAL, "stages": stages}))


def test_changed_keys_name_the_stage(write):
    old = recipe_values(load_recipe(write(MINIMAL)))
    new = recipe_values(load_recipe(write(MINIMAL), ["stages.translate.max_steps=11", "seed=1"]))
    assert changed_keys(old, new) == ["seed: 17 -> 1", "stages.translate.max_steps: 10 -> 11"]
    assert changed_keys(old, old) == []


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),  # YAML 1.1: 8
        ("0o10", 8),
        ("1e3", 1000),
        ("1.0e+3", 1000),
        ("+7", 7),
        ("0x10", 16),
    ],
)
def test_a_number_is_what_it_looks_like(write, text, value):
    assert load_recipe(write(MINIMAL), [f"seed={text}"]).seed == value
    assert type(load_recipe(write(MINIMAL), [f"seed={text}"]).seed) is int


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=1:30", "seed: Input should be a number, found '1:30'"),  # YAML 1.1: 90
        ("seed=true", "seed: Input should be a number, found True"),
        ("seed='17'", "seed: Input should be a number, found '17'"),
        ("seed=1_000", "seed: Input should be a number, found '1_000'"),
        ("seed=1.5", "seed: "),
        ("stages.translate.learning_rate=yes", "learning_rate: Input should be a number"),
        ("stages.translate.learning_rate=true", "learning_rate: Input should be a number"),
        ("stages.finetune.max_steps=1:00", "max_steps: Input should be a number, found '1:00'"),
        ("tracking.enabled=1", "tracking.enabled: Input should be a valid boolean, found 1"),
        ("tracking.enabled=yes", "tracking.enabled: Input should be a valid boolean, found 'yes'"),
        ("model.gradient_checkpointing='false'", "valid boolean, found 'false'"),
        ("seed=", "override 'seed=' has no value; give one, or null for none"),
        ("max_hours= ", "has no value"),
        ("output_dir=''", "output_dir: Input should be a path, found ''"),
        ("output_dir=5", "output_dir: Input should be text, found 5"),
        ("model.revision=123", "model.revision: Input should be a valid string, found 123"),
        ("output_dir=$S2T2_UNSET/x", "the environment variable S2T2_UNSET is not set"),
        ("deepspeed=${S2T2_UNSET}/x", "the environment variable S2T2_UNSET is not set"),
        ("output_dir=~nobody-of-that-name/x", "no home directory for ~nobody-of-that-name"),
        ("tracking={uri: a, uri: b}", "the key uri twice"),
    ],
)
def test_a_value_that_is_not_what_it_looks_like_is_named(write, override, named):
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(MINIMAL), [override])
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("seed: 1\nseed: 2", "the key seed twice in one mapping; remove one (line 2)"),
        ("model:\n  dtype: float32\n  'dtype': bfloat16", "the key dtype twice"),
        ("stages:\n- max_steps: 1\n  kind: finetune\n  max_steps: 2", "max_steps twice"),
        ("max_hours:\nseed: 3", "no value after max_hours; give one, or null for none (line 1)"),
        ("? [a]\n: 1", "a key that is a list or a mapping (line 1)"),
        ("seed: " + "1" * 5000, "not YAML"),
        ("[" * 3000, "nested too deeply"),
        ("seed: 1\n---\nseed: 2", "not YAML"),
        ("seed: !!python/object:os.system 1", "not YAML"),
    ],
)
def test_a_file_that_yaml_would_read_in_silence_is_refused(write, text, named):
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(text))
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_a_date_is_text_and_null_is_none(write):
    recipe = load_recipe(write(MINIMAL), ["tracking.experiment=2026-11-27", "max_hours=null"])
    assert recipe.tracking.experiment == "2026-11-27" and recipe.max_hours is None


def test_paths_are_expanded_everywhere(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("SCRATCH", "/scratch")
    overrides = [
        "output_dir=~/runs/x",
        "model.model_name_or_path=$SCRATCH/model",
        "data.path=${SCRATCH}/data",
        "data.tokenizer=~/tokenizer",
        "deepspeed=$HOME/ds.json",
        "stages.translate.source_tokens=~/ids.txt",
        "stages.translate.source_marginal=$SCRATCH/source",
        "stages.finetune.translation=~/translation",
        "tracking.uri=sqlite:///$HOME/mlflow.db",
    ]
    values = recipe_values(load_recipe(write(MINIMAL), overrides))
    assert "~" not in str(values) and "$" not in str(values)
    assert values["output_dir"] == "/home/ada/runs/x"
    assert values["stages"][0]["source_marginal"] == "/scratch/source"
    assert values["tracking"]["uri"] == "sqlite:////home/ada/mlflow.db"


@pytest.mark.parametrize(
    "text", ["1e3", "010", "1:30", "0o7", "yes", "~x", "null", "2026-11-27", "", "1.", "a: b", "é"]
)
def test_what_is_written_is_read_again(text):
    """By this reader and by any of YAML 1.1."""
    written = yaml12.dump({"key": text})
    assert yaml12.parse(written) == yaml.safe_load(written) == {"key": text}


@pytest.mark.parametrize("value", [1e16, 2e-5, 1.0, 3, True, None, [1, {"a": 2.5e-300}]])
def test_values_are_read_as_they_were_written(value):
    written = yaml12.dump({"key": value})
    found = yaml12.parse(written)["key"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("uri", "written"),
    [
        ("https://ada:s3cret@host:5000/x", "https://host:5000/x"),
        ("http://s3cret@host", "http://host"),
        ("https://a:s3cret@@x@host/p@q", "https://host/p@q"),
        ("postgresql://ada:s3cret@db/mlflow", "postgresql://ada@db/mlflow"),
        ("mysql+pymysql://ada:s3cret@db/m?charset=utf8", "mysql+pymysql://ada@db/m?charset=utf8"),
        ("postgresql://db/m?user=a&password=s3cret", "postgresql://db/m?user=a&password=***"),
        ("http://host/?token=s3cret", "http://host/?token=***"),
        ("sqlite:////home/ada/mlflow.db", "sqlite:////home/ada/mlflow.db"),
        ("https://host:5000", "https://host:5000"),
    ],
)
def test_a_password_is_used_and_never_written(write, uri, written):
    recipe = load_recipe(write(MINIMAL), [f"tracking.uri={uri}"])
    assert recipe.tracking.uri == uri
    assert recipe_values(recipe)["tracking"]["uri"] == written
    assert "s3cret" not in f"{recipe!r} {recipe} {recipe.model_dump()} {recipe.model_dump_json()}"
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(MINIMAL), [f"tracking.uri={uri}", f"tracking.uri.x={uri}"])
    assert "s3cret" not in str(caught.value.lines)


def test_a_password_of_a_wrong_recipe_is_not_printed(write):
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(MINIMAL), ["tracking={uri: https://a:s3cret@h, experiment: 5}"])
    assert "s3cret" not in caught.value.lines[0]
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(MINIMAL), ["tracking.url=https://a:s3cret@h"])
    assert "s3cret" not in caught.value.lines[0]
