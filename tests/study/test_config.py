"""The study file: its runs, and every mistake in one line."""

from pathlib import Path

import pytest

from s2t2_dist import cli
from s2t2_dist.config import load_recipe
from s2t2_dist.errors import ConfigError
from s2t2_dist.study.config import load_study, points, rate_text
from tests.study.conftest import RATE

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "launch" / "studies").glob("*.yaml"))


def test_every_variant_seed_and_rate_is_a_run(write, tmp_path):
    study = load_study(write())
    assert [run.name for run in study.runs] == [
        "s2t2_rate-0.001_seed-17",
        "s2t2_rate-0.003_seed-17",
        "truncated_rate-0.001_seed-17",
        "truncated_rate-0.003_seed-17",
        "s2t2_rate-0.001_seed-18",
        "s2t2_rate-0.003_seed-18",
        "truncated_rate-0.001_seed-18",
        "truncated_rate-0.003_seed-18",
    ]
    run = study.runs[5]
    assert run.recipe.output_dir == tmp_path / "out" / "runs" / run.name
    assert (run.recipe.seed, run.seed, run.rate) == (18, 18, {RATE: 0.003})
    assert [stage.max_steps for stage in run.recipe.stages] == [8, 2]
    assert run.recipe.stages[1].learning_rate == 0.003
    assert study.runs[3].recipe.stages[0].init == "truncate"
    assert (run.steps, study.label("s2t2"), study.label("truncated")) == (10, "S2T2", "truncated")
    assert len({run.recipe_sha256 for run in study.runs}) == len(study.runs)


def test_the_same_run_by_hand_has_the_same_recipe(write, tmp_path):
    """A list of key=value and a mapping say the same, and so does `s2t2 train`."""
    overrides = ["stages.translate.max_steps=8", "model.dtype=float32", f"{RATE}=0.5"]
    variants = {"a": {"overrides": overrides, "rates": {}}}
    run = load_study(write(variants=variants, overrides={"save_total_limit": 1})).runs[0]
    assert run.name == "a_seed-17" and rate_text(run.rate) == ""
    alone = [*overrides, "save_total_limit=1", "seed=17", f"output_dir={run.recipe.output_dir}"]
    assert run.recipe == load_recipe(tmp_path / "recipe.yaml", alone)


def test_a_variants_overrides_come_after_the_studys(write):
    variants = {"a": {"overrides": ["save_total_limit=3"]}, "b": {}}
    study = load_study(write(variants=variants, overrides=["save_total_limit=1"], rates=None))
    assert [run.recipe.save_total_limit for run in study.runs] == [3, 1, 3, 1]


def test_keys_of_a_grid_step_together(write):
    grid = {RATE: [1e-3, 3e-3], "stages.translate.learning_rate": [1e-2, 3e-2]}
    variants = {"a": {"rates": grid}}
    runs = load_study(write(variants=variants, seeds=[5])).runs
    assert [run.name for run in runs] == ["a_rate-0.001+0.01_seed-5", "a_rate-0.003+0.03_seed-5"]
    assert [tuple(s.learning_rate for s in run.recipe.stages) for run in runs] == [
        (1e-2, 1e-3),
        (3e-2, 3e-3),
    ]
    assert points({}) == [{}]


BAD = {
    "no variants": ({"variants": {}}, "variants: Dictionary should have at least 1 item"),
    "no seeds": ({"seeds": []}, "seeds: List should have at least 1 item"),
    "a seed twice": ({"seeds": [1, 2, 1]}, "seeds: one is there twice, found [1, 2, 1]"),
    "a seed that is text": ({"seeds": ["x"]}, "seeds.0: Input should be a number, found 'x'"),
    "a negative seed": ({"seeds": [-1]}, "seeds.0: Input should be greater than or equal to 0"),
    "an unknown key": ({"seed": 3}, "unknown key seed"),
    "no output_dir": ({"output_dir": None}, "missing key output_dir"),
    "an unknown key of a variant": (
        {"variants": {"a": {"lable": "A"}}},
        "unknown key variants.a.lable",
    ),
    "a name with a slash": ({"variants": {"a/b": {}}}, "variants.a/b"),
    "a name with an underscore": ({"variants": {"a_b": {}}}, "variants.a_b"),
    "no values": ({"rates": {RATE: []}}, f"rates.{RATE}: List should have at least 1 item"),
    "a value twice": ({"rates": {RATE: [1e-3, 0.001]}}, "is there twice; give each once"),
    "values that are text": (
        {"rates": {RATE: ["high"]}},
        f"rates.{RATE}.0: Input should be a number, found 'high'",
    ),
    "lists of other lengths": (
        {"rates": {RATE: [1.0, 2.0], "save_steps": [1.0]}},
        "keys step together, but have",
    ),
    "the seed as a rate": ({"rates": {"seed": [1, 2]}}, "seed is set by the study; leave it out"),
    "a directory of its own": (
        {"variants": {"a": {"overrides": ["output_dir=x"]}}},
        "output_dir is set by the study; leave it out",
    ),
    "no such recipe": (
        {"variants": {"a": {"base": "nowhere.yaml"}}},
        "variant a: recipe nowhere.yaml does not exist",
    ),
    "a wrong override": (
        {"variants": {"a": {"overrides": {"stages.translate.steps": 3}}}},
        "unknown key stages.0.translate.steps",
    ),
    "a stage that is not there": (
        {"variants": {"a": {"overrides": ["stages.pretrain.max_steps=3"]}}},
        "variant a: override: stages.pretrain does not exist",
    ),
    "an override without a value": (
        {"variants": {"a": {"overrides": ["max_hours"]}}},
        "override 'max_hours' is not key=value",
    ),
    "two variants that are the same": (
        {"variants": {"a": {}, "b": {"label": "another"}}},
        "a_rate-0.001_seed-17 and b_rate-0.001_seed-17 are the same; remove one",
    ),
}


@pytest.mark.parametrize(("changes", "told"), BAD.values(), ids=BAD)
def test_a_mistake_is_one_line(changes, told, write, capsys):
    path = write(**changes)
    assert cli.run(["study", str(path), "--dry-run"]) == cli.USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: study {path}: ") and told in line


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_studies_are_fair(path, monkeypatch):
    """The same number of tried rates, and the same steps of the same batch."""
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    assert len({len(study.rates(name)) for name in study.file.variants}) == 1
    for run in study.runs:
        assert {stage.train_batch_size for stage in run.recipe.stages} == {48}
        assert {str(run.recipe.model.model_name_or_path)} == {"launch/assets/tiny"}
        assert run.steps == {"demo.yaml": 135, "tiny.yaml": 8}[path.name]
    if path.name == "demo.yaml":
        assert len(study.file.seeds) == 3 and len(study.runs) == 66


def test_a_file_that_is_none(tmp_path):
    for name, content, told in (
        ("missing", None, "study .*missing does not exist"),
        ("list", "- 1\n", "holds no keys; see launch/studies/demo.yaml"),
        ("twice", "seeds: [1]\nseeds: [2]\n", "the key seeds twice"),
        ("open", "a: [", "not YAML"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=told):
            load_study(tmp_path / name)
