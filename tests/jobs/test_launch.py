"""The scripts of launch/ and the settings they hand to DeepSpeed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from s2t2_dist.lm.engine import RECIPE_OWNED, load_settings
from tests.jobs import launching

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted(ROOT.glob("launch/**/*.sh")), *sorted(ROOT.glob("launch/*.sbatch"))]
SCRIPTS += [ROOT / "tests" / "install_cluster.sh", ROOT / ".ci" / "run"]
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
    sourced = script.name in ("common.sh", "demo_data.sh", "status.sh")
    assert sourced or "set -euo pipefail" in script.read_text()


def test_recipes_of_the_quickstart_exist():
    script = (ROOT / "launch" / "quickstart.sh").read_text()
    for name in ("quickstart", "quickstart-truncated", "quickstart-source"):
        assert re.search(rf"train \S+ {name}\b", script)
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


@pytest.mark.slow
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


def test_environment_keeps_what_the_user_set(checkout):
    show = 'use_environment; echo "$DS_ACCELERATOR $OMP_NUM_THREADS ${PATH%%:*}"'
    result = run_bash(show, checkout, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="7")
    assert result.stdout.split() == ["cpu", "7", f"{checkout}/.venv/bin"]


# Launching


def run_node(folder: Path, *arguments: str | Path, timeout: float = 60, **environment: str):
    """run_node.sh in a folder, with nobody's .deepspeed_env but the test's."""
    return subprocess.run(
        [ROOT / "launch" / "run_node.sh", *arguments],
        cwd=folder,
        env={**os.environ, "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no recipe given"),
        (["--gpus"], "--gpus needs a value"),
        (["--gpu", "2", "r.yaml"], "unknown option --gpu"),
        (["--hostfile", "nofile", "r.yaml"], "hostfile nofile does not exist"),
        (["--nodes", "2", "r.yaml"], "--nodes 2 needs --master-addr"),
        (["--nodes", "2", "--master-addr", "a", "--node-rank", "2", "r.yaml"], "--node-rank 2 is"),
        (["nowhere.yaml"], "recipe nowhere.yaml does not exist"),
        ([ROOT / "launch/recipes/quickstart.yaml", "stages.x.y=1"], "stages.x does not exist"),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_a_wrong_command_is_one_line_and_code_2(arguments, message, tmp_path):
    done = run_node(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def of_run_node(script: str) -> list[str]:
    """Lines of bash with the functions of run_node.sh, without its main."""
    source = (ROOT / "launch" / "run_node.sh").read_text().removesuffix('main "$@"\n')
    source = source.replace("${BASH_SOURCE[0]}", str(ROOT / "launch" / "run_node.sh"))
    return ["bash", "-c", f"{source}\n{script}"]


def in_run_node(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        of_run_node(script),
        cwd=folder,
        env={**os.environ, "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.slow
def test_a_dry_run_starts_every_rank_and_says_what_they_found(source_model, protein_data, tmp_path):
    recipe = launching.write_recipe(tmp_path, source_model, protein_data)
    command = (tmp_path, "--dry-run", "--gpus", "2", recipe)
    here = {name: launching.environment()[name] for name in ("DS_ACCELERATOR", "PATH")}
    done = run_node(*command, timeout=120, **here)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'run'} would start from step 0\n" in done.stdout
    assert "each of 2 ranks makes 2 passes of 2 rows per step\n" in done.stdout
    refused = run_node(*command, "stages.translate.train_batch_size=7", timeout=120, **here)
    assert refused.returncode == 2
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "train_batch_size is 7, not a multiple of the 2" in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_environment_file_holds_nothing_that_deepspeed_chokes_on(tmp_path):
    (tmp_path / ".deepspeed_env").write_text("# mine\n\nNCCL_DEBUG=INFO\n  \n")
    unset = "unset VIRTUAL_ENV TORCH_EXTENSIONS_DIR GLOO_SOCKET_IFNAME OMP_NUM_THREADS HF_HOME"
    done = in_run_node(f"{unset}; write_environment", tmp_path, DS_ACCELERATOR="cpu", PATH="/bin")
    lines = done.stdout.splitlines()
    assert set(lines) == {"NCCL_DEBUG=INFO", "PATH=/bin", "DS_ACCELERATOR=cpu"}
    for line in lines:
        key, _ = line.split("=", maxsplit=1)  # as DeepSpeed reads it
        assert key


def test_secrets_on_the_command_line_are_warned_of(tmp_path):
    secret = {"MLFLOW_TRACKING_PASSWORD": "hush", "MLFLOW_TRACKING_URI": "http://server"}
    done = in_run_node("warn_of_secrets", tmp_path, **secret)
    assert "MLFLOW_TRACKING_PASSWORD" in done.stderr and "~/.mlflow/credentials" in done.stderr
    assert "hush" not in done.stderr and "URI" not in done.stderr


def test_hosts_are_read_as_deepspeed_reads_them(tmp_path):
    (tmp_path / "hosts").write_text(
        "# all\n\nnode1 slots=8\n  node2   slots=8 # old\n#node3 slots=8\n"
    )
    assert in_run_node("HOSTFILE=hosts hosts", tmp_path).stdout.split() == ["node1", "node2"]


def test_a_second_interrupt_kills_what_the_first_did_not_stop(tmp_path):
    """What was started is in a session of its own and ignores SIGTERM."""
    ranks = """'trap "echo asked" TERM; echo up; while true; do sleep 0.1; done'"""
    main = f"""RUN_DIR=. BEFORE='' HOSTFILE='' STARTED=() STOPS=0
trap 'stop INT' INT
start bash -c {ranks}
start bash -c {ranks}
wait_for_end
echo "ended $CODE"
"""
    process = subprocess.Popen(
        of_run_node(main),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        # A job in the background ignores SIGINT, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    heard = [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGINT)
    heard += [process.stdout.readline() for _ in range(2)]
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=20)
    assert heard == ["up\n", "up\n", "asked\n", "asked\n"]
    assert rest == "ended 137\n"


@pytest.mark.parametrize(
    ("before", "now", "launcher", "expected"),
    [
        (None, "done", 0, 0),
        ("running", "done", 0, 0),
        ("running", "done", 143, 0),  # all of it was written before the launcher died
        ("done", "done", 0, 0),  # nothing to do
        ("done", "done", 2, 2),  # refused: another recipe
        ("running", "preempted", 3, 3),
        ("running", "preempted", 247, 3),
        ("preempted", "preempted", 0, 1),  # never started
        ("preempted", "preempted", 2, 2),
        (None, None, 2, 2),
        (None, None, 1, 1),
        ("failed", "failed now", 2, 2),  # a full disk
        ("failed", "failed now", 4, 1),
        ("preempted", "running", 0, 1),  # DeepSpeed's node launcher was killed
    ],
)
def test_exit_code_is_the_runs_not_the_launchers(before, now, launcher, expected, tmp_path):
    texts = {
        state: "".join(f'{{\n  "pid": {pid},\n  "state": "{state.split()[0]}"\n}}\n')
        for pid, state in enumerate(("running", "done", "preempted", "failed", "failed now"))
    }
    if now is not None:
        (tmp_path / "status.json").write_text(texts[now])
    old = texts.get(before, "").rstrip("\n")
    done = in_run_node(f"exit_code . '{old}' {launcher}", tmp_path)
    assert done.stdout == f"{expected}\n"
    assert done.stderr.startswith("error: ") == (expected == 1), done.stderr


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
