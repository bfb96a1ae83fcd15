"""The Containerfile against the tested install: the same packages in the same order."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "Containerfile").read_text().splitlines()
PIP = "python -m pip install"


def steps(keyword: str) -> list[str]:
    """The arguments of every such instruction; each is on one line."""
    return [line.removeprefix(f"{keyword} ") for line in LINES if line.startswith(f"{keyword} ")]


def packages(command: str) -> list[str]:
    """The words behind `pip install` that are no options: the constraints file comes first."""
    return [word for word in command.split()[4:] if not word.startswith("-")]


def test_what_is_copied_exists_and_is_all_that_an_install_reads():
    copied = [word for step in steps("COPY") for word in step.split()[:-1]]
    assert [name for name in copied if not (ROOT / name).exists()] == []
    assert {"s2t2_dist", "data_prep", "setup.cfg", "pyproject.toml", "README.md"} <= set(copied)


def test_pip_steps_are_those_of_the_script():
    script = (ROOT / "launch" / "common.sh").read_text()
    first, second = (step for step in steps("RUN") if step.startswith(PIP))
    build_tools = re.search(r'"\$\{pip\[@\]\}" (torch .*)$', script, re.MULTILINE)[1]
    assert packages(first) == ["constraints.txt", *build_tools.split()]
    assert "--no-build-isolation" in second and packages(second) == ["constraints.txt", "."]
    assert '"${pip[@]}" --no-build-isolation -e "$ROOT' in script


def test_it_says_that_nobody_built_it():
    assert LINES[0].startswith("# UNTESTED")


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_the_python_steps_install_a_working_command(tmp_path):
    environment = tmp_path / "opt"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    folder = tmp_path / "src"
    folder.mkdir()
    for step in steps("COPY"):
        *names, _ = step.split()
        subprocess.run(["cp", "-r", *(ROOT / name for name in names), folder], check=True)
    path = {"PATH": f"{environment / 'bin'}:/usr/bin:/bin"}
    for step in (step for step in steps("RUN") if step.startswith(PIP)):
        subprocess.run(["bash", "-c", step], cwd=folder, env=path, check=True)
    shown = subprocess.run(
        ["s2t2", "--help"], cwd=tmp_path, env=path, capture_output=True, text=True, check=True
    )
    assert "translation" in shown.stdout
