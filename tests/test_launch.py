"""The scripts of launch/ and the settings they hand to DeepSpeed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from s2t2_dist.engine import RECIPE_OWNED, load_settings

ROOT = Path(__file__).parent.parent
SCRIPTS = [*sorted(ROOT.glob("launch/**/*.sh")), ROOT / ".ci" / "run"]
SETTINGS = sorted(ROOT.glob("ds_configs/*.json"))
INSTALL_FILES = ("setup.cfg", "pyproject.toml", "constraints.txt", "launch/common.sh")


def run_bash(script: str, root: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run lines of bash after sourcing a checkout's common.sh."""
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; source launch/common.sh; {script}"],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The files that an installation depends on, in a folder of their own."""
    root = tmp_path / "checkout"
    for name in INSTALL_FILES:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    return root


@pytest.fixture
def installed(checkout) -> Path:
    """A checkout with a real, empty virtual environment that is marked as finished for a run."""
    venv = checkout / ".venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    run_bash('install_hash > "$VENV/.installed-run"', checkout).check_returncode()
    return checkout


# Scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script):
    result = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_stops_at_the_first_failure(script):
    sourced = script.name == "common.sh"
    assert sourced or "set -euo pipefail" in script.read_text()


def test_recipes_of_the_quickstart_exist():
    for name in ("quickstart", "quickstart-truncated", "quickstart-source"):
        assert f"train {name}\n" in (ROOT / "launch" / "quickstart.sh").read_text()
        assert (ROOT / "launch" / "recipes" / f"{name}.yaml").is_file()


# Installation


def test_finished_install_is_reused(installed):
    assert run_bash("is_installed run", installed).returncode == 0


def test_install_without_the_tests_packages_does_not_serve_the_tests(installed):
    assert run_bash("is_installed test", installed).returncode != 0


@pytest.mark.parametrize("name", INSTALL_FILES)
def test_change_of_a_dependency_asks_for_a_new_install(installed, name):
    with (installed / name).open("a") as f:
        f.write("\n# changed\n")
    assert run_bash("is_installed run", installed).returncode != 0


def test_interrupted_install_is_not_reused(installed):
    (installed / ".venv" / ".unfinished").touch()
    assert run_bash("is_installed run", installed).returncode != 0


def test_moved_checkout_is_not_reused(installed):
    moved = installed.rename(installed.with_name("moved"))
    assert run_bash("is_installed run", moved).returncode != 0


def test_interrupted_install_starts_over_and_a_failing_one_says_where_the_log_is(installed):
    """Without an index pip cannot find torch: the environment is made anew, then pip fails."""
    (installed / ".venv" / ".unfinished").touch()
    (installed / ".venv" / "half-written").touch()
    nowhere = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    result = run_bash("ensure_installed run", installed, **nowhere)
    assert result.returncode == 2
    assert "interrupted" in result.stdout
    assert not (installed / ".venv" / "half-written").exists()
    assert "torch" in result.stderr  # the end of pip's own words
    assert result.stderr.endswith(f"is in {installed}/.venv/install.log\n")
    assert run_bash("is_installed run", installed).returncode != 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PYTHON": "python-that-is-not-there"}, "python-that-is-not-there not found"),
        ({"CXX": "compiler-that-is-not-there"}, "no C++ compiler"),
    ],
)
def test_missing_tool_is_one_clear_line(checkout, environment, message):
    result = run_bash("ensure_installed run", checkout, **environment)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (checkout / ".venv").exists()


def test_lock_of_a_killed_run_is_removed(installed):
    operation = installed / ".venv" / "torch_extensions" / "deepspeed_shm_comm"
    operation.mkdir(parents=True)
    (operation / "lock").touch()
    run_bash("ensure_installed run", installed).check_returncode()
    assert not (operation / "lock").exists()


def test_environment_keeps_what_the_user_set(checkout):
    show = 'use_environment; echo "$DS_ACCELERATOR $OMP_NUM_THREADS ${PATH%%:*}"'
    result = run_bash(show, checkout, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="7")
    assert result.stdout.split() == ["cpu", "7", f"{checkout}/.venv/bin"]


# DeepSpeed settings


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.name)
def test_settings_load_and_leave_the_recipes_keys_to_the_recipe(path):
    settings = load_settings(path)
    assert not set(settings) & set(RECIPE_OWNED)
    assert settings["zero_optimization"]["stage"] == 3


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.name)
def test_zero_settings_are_known_to_deepspeed(path):
    """DeepSpeed's own schema, by name and by alias: it would accept a misspelt key in silence."""
    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(field.alias for field in fields.values())}
    assert set(json.loads(path.read_text())["zero_optimization"]) <= known


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.name)
def test_readme_says_when_to_take_each_file(path):
    assert f"| `{path.name}` | " in (ROOT / "ds_configs" / "README.md").read_text()


@pytest.mark.parametrize("key", RECIPE_OWNED)
def test_readme_names_each_key_that_the_recipe_owns(key):
    assert f"`{key}`" in (ROOT / "ds_configs" / "README.md").read_text()
