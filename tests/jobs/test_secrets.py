"""A password in a recipe is used and left nowhere: in no file, log, parameter, table or export."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.jobs import launching as runs
from tests.run.mlflow_server import MLflowServer

pytestmark = pytest.mark.slow
SECRET = "s3cr3t-Planted"


def holders(folder: Path) -> list[str]:
    """Files below a folder that hold the secret, but for the recipe in which it was planted."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "recipe.yaml"]
    assert len(paths) > 10
    return [str(path.relative_to(folder)) for path in paths if SECRET.encode() in path.read_bytes()]


def s2t2(folder: Path, *words: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [runs.BIN / "s2t2", *map(str, words)],
        cwd=folder,
        env=runs.environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.soak
def test_a_planted_password_is_nowhere(source_model, protein_data, tmp_path):
    stages = [{"kind": "translate", "max_steps": 4, "learning_rate": 0.01, **runs.STAGE}]
    (tmp_path / "server").mkdir()
    with MLflowServer(tmp_path / "server") as server:
        uri = f"http://ada:{SECRET}@127.0.0.1:{server.port}"
        tracking = {"enabled": True, "uri": uri, "experiment": "secret"}
        options = {"stages": stages, "tracking": tracking}
        recipe = runs.write_recipe(tmp_path / "job", source_model, protein_data, **options)
        assert runs.train(recipe, 2) == 0, runs.output(recipe)
        run_dir = recipe.parent / "run"
        link = json.loads((run_dir / "mlflow.json").read_text())
        assert link["status"] == "FINISHED" and link["uri"] == server.uri
        told = [
            s2t2(tmp_path, "train", recipe, "seed=4"),  # refused
            s2t2(tmp_path, "train", recipe, f"tracking.uri.x=http://a:{SECRET}@h"),
            s2t2(tmp_path, "train", recipe, f"tracking.url=http://a:{SECRET}@h"),
            s2t2(tmp_path, "export", run_dir, "--out", "out"),
            s2t2(tmp_path, "compare", run_dir, "--out", "report"),
            s2t2(tmp_path, "track", run_dir),
        ]
    told.append(s2t2(tmp_path, "track", run_dir, "--seconds", "3"))  # the server is gone
    assert [done.returncode for done in told] == [2, 2, 2, 0, 0, 0, 2], told
    assert "Traceback" not in str(told)
    assert SECRET not in "".join(done.stdout + done.stderr for done in told)
    assert SECRET not in runs.output(recipe)
    assert holders(tmp_path) == []
