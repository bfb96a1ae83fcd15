"""The help of every command: complete, within 80 columns, with an example."""

import re
from importlib.metadata import version

import pytest
from typer.main import get_command

from s2t2_dist import cli


def leaves(command, path=()):
    """The path of every command that does something, with the command."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from leaves(inner, (*path, name))
    if not hasattr(command, "commands"):
        yield path, command


LEAVES = dict(leaves(get_command(cli.app)))
GROUPS = sorted({path[:-1] for path in LEAVES})


@pytest.fixture
def help_of(monkeypatch, capsys):
    def read(path):
        monkeypatch.setenv("COLUMNS", "80")
        assert cli.run([*path, "--help"]) == 0
        return capsys.readouterr().out

    return read


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_help_fits_and_shows_an_example(path, help_of):
    text = help_of(path)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text, "something is cut off"
    below_usage = text[text.index("Usage:") :].partition("\n")[2]
    assert f"s2t2 {' '.join(path)} " in " ".join(below_usage.split())


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_every_argument_and_option_is_described(path):
    for parameter in LEAVES[path].params:
        if parameter.name != "help" and not getattr(parameter, "hidden", False):
            assert re.match(r"[A-Za-z.]\S* .*\w", parameter.help or ""), parameter.name


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: " ".join(path) or "s2t2")
def test_each_command_takes_one_line_in_the_list(path, help_of):
    listed = help_of(path).partition("Commands")[2]
    lines = [line.strip("│ \n") for line in listed.splitlines() if line.startswith("│")]
    names = {leaf[len(path)] for leaf in LEAVES if leaf[: len(path)] == path}
    assert {line.split()[0] for line in lines} == names and len(lines) == len(names)


def test_the_version_is_printed(capsys):
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"s2t2-dist {version('s2t2-dist')}\n"


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "0", "1e400"])
@pytest.mark.parametrize(
    "command", [["plan", "r", "--gpus", "1", "--gpu-memory"], ["track", "r", "--seconds"]]
)
def test_a_number_that_is_none_is_refused(command, value, capsys):
    assert cli.run([*command, value]) == 2
    assert command[-1] in capsys.readouterr().err
