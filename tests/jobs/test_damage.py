"""Every file of a run directory damaged in every way: one line, or the right result.

A damaged file may cost steps that are run again, or be refused in one line; it may never give a
traceback or another number.
"""

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from s2t2_dist import cli
from tests.jobs import launching as runs

pytestmark = pytest.mark.slow
STAGE = {"train_batch_size": 8, "per_device_train_batch_size": 4, "eval_steps": 3, "save_steps": 2}
JSON_VALUES = ("[]", "{}", "null", "7", '"text"', "[{}]", '{"files": []}', "true", '{"a": {}}')


@dataclass(frozen=True)
class Reference:
    """A run that nothing damaged.

    Attributes:
        stopped: the same run as it was after step 4, killed before its end.
        exported: the tensors of its export.
    """

    recipe: Path
    done: Path
    stopped: Path
    exported: dict
    table: dict


@pytest.fixture(scope="module")
def reference(source_model, protein_data, tmp_path_factory) -> Reference:
    room = tmp_path_factory.mktemp("damage")
    stages = [{"kind": "translate", "max_steps": 6, "learning_rate": 0.01, **STAGE}]
    options = {"stages": stages, "save_total_limit": 9}
    recipe = runs.write_recipe(room / "reference", source_model, protein_data, **options)
    assert runs.train(recipe, 0) == 0, runs.output(recipe)
    done = recipe.parent / "run"
    stopped = shutil.copytree(done, room / "stopped")
    shutil.rmtree(stopped / "translation")
    shutil.rmtree(stopped / "checkpoints/translate-000006")
    status = json.loads((stopped / "status.json").read_text())
    (stopped / "status.json").write_text(json.dumps({**status, "state": "running"}))
    for name in ("export", "report"):
        command = [*READERS[name], "--out", str(room / name)]
        command[1] = str(done)
        assert cli.run(command) == 0
    table = json.loads((room / "report/table.json").read_text())
    exported = load_file(room / "export/model.safetensors")
    return Reference(recipe, done, stopped, exported, table)


READERS = {
    "export": ["export", "RUN", "--no-evaluate"],
    "report": ["compare", "RUN"],
    "show": ["translation", "show", "RUN/translation"],
    "track": ["track", "RUN"],
}


def damage(folder: Path, rng: random.Random) -> str:
    """Damage one file; returns what was done to which."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    content = path.read_bytes()
    kinds = ["cut", "emptied", "bytes", "a bit", "json", "removed", "folder", "link", "longer"]
    kind = rng.choice(kinds)
    if kind == "json":
        path.write_text(rng.choice(JSON_VALUES))
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "bytes":
        path.write_bytes(rng.randbytes(len(content)))
    elif kind == "longer":
        path.write_bytes(content + rng.randbytes(9) + b"\n")
    elif kind == "a bit" and content:
        at = rng.randrange(len(content))
        path.write_bytes(
            content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
        )
    elif kind in ("removed", "folder", "link"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        if kind == "link":
            path.symlink_to(folder / "nowhere")
    return f"{kind}: {path.relative_to(folder)}"


def check_resume(reference: Reference, room: Path, case: int) -> str:
    """Damage the stopped run and start it again; returns "done" or "refused"."""
    recipe = room / "recipe.yaml"
    room.mkdir()
    text = reference.recipe.read_text().replace(str(reference.done), str(room / "run"))
    recipe.write_text(text)
    shutil.copytree(reference.stopped, room / "run")
    what = f"case {case}, {damage(room / 'run', random.Random(case))}"
    code = runs.train(recipe, 0)
    told = runs.output(recipe)
    assert "Traceback" not in told, f"{what}\n{told}"
    errors = [line for line in told.splitlines() if line.startswith("error:")]
    if code == 2:
        assert len(errors) == 1, f"{what}\n{told}"
        return "refused"
    assert code == 0 and not errors, f"{what}: code {code}\n{told}"
    assert runs.losses(room / "run") == runs.losses(reference.done), what
    for path in (reference.done / "translation").glob("*.safetensors"):
        assert (room / "run/translation" / path.name).read_bytes() == path.read_bytes(), what
    return "done"


def check_readers(reference: Reference, room: Path, case: int, capsys) -> str:
    """Damage the run that is done and read it by every command."""
    room.mkdir()
    run_dir = shutil.copytree(reference.done, room / "run")
    what = f"case {case}, {damage(run_dir, random.Random(case))}"
    codes = set()
    for name, words in READERS.items():
        command = [word.replace("RUN", str(run_dir)) for word in words]
        if name in ("export", "report"):
            command += ["--out", str(room / name)]
        code = cli.run(command)
        if name != "track":  # the recipe disables it, which is one line
            codes.add(code)
        told = capsys.readouterr().err
        assert code in (0, 2), f"{what}, {name}: {told}"
        assert code == 0 or told.count("error: ") == told.count("\n") == 1, f"{what}: {told}"
    if (room / "export").exists():
        found = load_file(room / "export/model.safetensors")
        assert found.keys() == reference.exported.keys(), what
        assert all(found[key].equal(value) for key, value in reference.exported.items()), what
    if (room / "report").exists():
        table = json.loads((room / "report/table.json").read_text())
        assert _numbers(table) == _numbers(reference.table), what
    return "done" if codes == {0} else "refused"


def _numbers(table: dict) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "run"} for row in table["rows"]]


@pytest.mark.parametrize("case", range(8))
def test_a_damaged_run_resumes_rightly_or_says_why_not(case, reference, tmp_path):
    check_resume(reference, tmp_path / "case", case)


@pytest.mark.parametrize("case", range(24))
def test_a_damaged_run_is_read_rightly_or_refused(case, reference, tmp_path, capsys):
    check_readers(reference, tmp_path / "case", case, capsys)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_500_damaged_runs(reference, tmp_path, capsys):
    """From another first case with S2T2_FIRST_CASE."""
    first, found = int(os.environ.get("S2T2_FIRST_CASE", "1000")), []
    for case in range(first, first + 250):
        found.append(check_resume(reference, tmp_path / "case", case))
        shutil.rmtree(tmp_path / "case")
        found.append(check_readers(reference, tmp_path / "case", case, capsys))
        shutil.rmtree(tmp_path / "case")
    assert {"done", "refused"} == set(found)
    with capsys.disabled():
        print(f"{found.count('done')} done, {found.count('refused')} refused")
