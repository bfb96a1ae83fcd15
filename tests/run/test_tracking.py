"""Metrics on disk and in a real MLflow store, across a resume."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from s2t2_dist.cli import run
from s2t2_dist.config import TrackingConfig
from s2t2_dist.errors import ArtifactError
from s2t2_dist.run import store
from s2t2_dist.run.directory import locked
from s2t2_dist.run.link import flatten, is_shipped, open_link
from s2t2_dist.run.metrics import MetricsFile, read_metrics
from s2t2_dist.run.tracking import MLflowShipper, attach
from tests.report.runs import TRANSLATE, make_recipe, write_run
from tests.run.mlflow_server import BadNetwork, MLflowServer


@pytest.fixture(autouse=True)
def no_server_from_outside(monkeypatch):
    for name in ("TRACKING_URI", "EXPERIMENT_NAME", "RUN_ID", "EXPERIMENT_ID"):
        monkeypatch.delenv(f"MLFLOW_{name}", raising=False)


def test_metrics_survive_a_cut_line(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.append("translate", 0, 1, {"loss": 0.1 + 0.2})
    metrics.append("translate", 0, 2, {"loss": 2.0})
    length = metrics.sync()
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("ab") as f:
        f.write(b'{"stage": "transl')  # killed in mid-write
    lines = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] == 0.1 + 0.2  # to the last bit
    resumed = MetricsFile(tmp_path)
    resumed.truncate(length)
    resumed.append("translate", 0, 3, {"loss": 3.0})
    resumed.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_metrics_shorter_than_at_the_checkpoint_are_refused(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.append("translate", 0, 1, {"loss": 1.0})
    length = metrics.sync()
    with pytest.raises(ArtifactError, match=f"has {length} bytes, but had {length + 9} when"):
        metrics.truncate(length + 9)
    metrics.close()
    assert len(read_metrics(tmp_path)) == 1


def _history(uri: str, run_dir, key: str) -> list[tuple[int, float]]:
    run_id = json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    points = MlflowClient(tracking_uri=uri).get_metric_history(run_id, key)
    return [(point.step, point.value) for point in points]


@pytest.mark.slow
def test_samples_of_text_are_an_artifact_at_the_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a local store keeps artifacts
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    shipper = MLflowShipper(run_dir, TrackingConfig(uri=uri), {"seed": "17"})
    (run_dir / "samples.jsonl").write_text("{}\n")
    (run_dir / "metrics.jsonl").touch()
    assert shipper.close("FINISHED")
    run_id = json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    artifacts = MlflowClient(tracking_uri=uri).list_artifacts(run_id)
    assert [artifact.path for artifact in artifacts] == ["samples.jsonl"]


@pytest.mark.slow
def test_a_resumed_run_goes_on_in_the_same_mlflow_run(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking = TrackingConfig(uri=uri, experiment="proteins")
    run_dir = tmp_path / "run"
    run_dir.mkdir()

    metrics = MetricsFile(run_dir)
    shipper = MLflowShipper(run_dir, tracking, {"seed": "17", "long": "x" * 7000})
    for step in range(1, 5):
        metrics.append("translate", 0, step, {"loss": 1.0 / step, "entropy": float(step)})
    shipper.close("KILLED")
    first = json.loads((run_dir / "mlflow.json").read_text())
    assert first["shipped"] == [0, 4]
    assert MlflowClient(tracking_uri=uri).get_run(first["run_id"]).info.status == "KILLED"

    # The checkpoint was at step 2: steps 3 and 4 are written again, and not shipped again.
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    metrics.truncate(sum(len(line) for line in lines[:2]))
    shipper = MLflowShipper(run_dir, tracking, {"seed": "17"})
    for step in range(3, 7):
        metrics.append("translate", 0, step, {"loss": 1.0 / step, "entropy": float(step)})
    metrics.append("finetune", 1, 0, {"eval_loss": 0.5})
    shipper.close("FINISHED")
    metrics.close()

    assert json.loads((run_dir / "mlflow.json").read_text())["run_id"] == first["run_id"]
    expected = [(step, 1.0 / step) for step in range(1, 7)]
    assert _history(uri, run_dir, "translate/loss") == expected
    assert _history(uri, run_dir, "finetune/eval_loss") == [(0, 0.5)]
    run = MlflowClient(tracking_uri=uri).get_run(first["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["seed"] == "17" and len(run.data.params["long"]) == 6000


def _wait_until(reached, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[MLflowServer]:
    with MLflowServer(tmp_path_factory.mktemp("mlflow")) as started:
        yield started


def _link(run_dir: Path) -> dict:
    path = run_dir / "mlflow.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _append(run_dir: Path, *steps: int) -> None:
    metrics = MetricsFile(run_dir)
    for step in steps:
        metrics.append("translate", 0, step, {"loss": 1.0 / step, "entropy": float(step)})
    metrics.close()


def _require_each_once(uri: str, run_dir: Path, steps: range) -> None:
    """In order, and with the times of `metrics.jsonl` where no step was run twice."""
    assert _history(uri, run_dir, "translate/loss") == [(step, 1.0 / step) for step in steps]
    assert _history(uri, run_dir, "translate/entropy") == [(step, step) for step in steps]


@pytest.mark.slow
def test_a_hung_and_a_dead_server_lose_nothing(server, tmp_path, monkeypatch, caplog):
    """SIGSTOP: a request is accepted, unanswered, and sent again; then SIGKILL and a restart."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    _append(tmp_path, 1)
    shipper = MLflowShipper(tmp_path, TrackingConfig(uri=server.uri), {})
    _wait_until(lambda: _link(tmp_path).get("shipped") == [0, 1], "first line")
    server.signal(signal.SIGSTOP)
    _append(tmp_path, 2, 3)
    _wait_until(lambda: len(_failures(caplog)) == 1, "a call without an answer")
    _append(tmp_path, 4)
    time.sleep(3)  # at least one more attempt
    server.signal(signal.SIGCONT)
    _wait_until(lambda: _link(tmp_path).get("shipped") == [0, 4], "lines after the hang")
    server.kill()
    _append(tmp_path, 5)
    _wait_until(lambda: len(_failures(caplog)) == 2, "a refused call")
    assert not shipper.close("FINISHED", seconds=1) and not is_shipped(tmp_path)
    _wait_until(lambda: not shipper.alive, "the shipper gives up")
    server.start()
    assert MLflowShipper(tmp_path, TrackingConfig(uri=server.uri), {}).close("FINISHED")
    assert is_shipped(tmp_path)
    _require_each_once(server.uri, tmp_path, range(1, 6))


def _failures(caplog) -> list[str]:
    """One line for each outage."""
    ours = [record.message for record in caplog.records if record.name == "s2t2_dist.run.tracking"]
    return [message for message in ours if message.endswith("metrics are in metrics.jsonl")]


SHIP = """
import sys, time
from pathlib import Path
from s2t2_dist.config import TrackingConfig
from s2t2_dist.run.tracking import MLflowShipper
MLflowShipper(Path(sys.argv[1]), TrackingConfig(uri=sys.argv[2]), {})
time.sleep(120)
"""


@pytest.mark.slow
@pytest.mark.parametrize("loses", ["request", "answer"])
def test_a_kill_between_request_and_answer(loses, server, tmp_path):
    """The job is killed when it waits for the answer to a request that ran, or did not.

    The resumed job writes the steps after its checkpoint again, at other times.
    """
    _append(tmp_path, 1)
    with BadNetwork(server.port) as network:
        with subprocess.Popen([sys.executable, "-c", SHIP, tmp_path, network.uri]) as job:
            _wait_until(lambda: _link(tmp_path).get("shipped") == [0, 1], "first line")
            length = (tmp_path / "metrics.jsonl").stat().st_size
            network.loses = loses
            _append(tmp_path, 2, 3)
            assert network.lost.wait(60)
            job.kill()
        ran = [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
        expected = ran if loses == "answer" else ran[:1]
        assert _history(server.uri, tmp_path, "translate/loss") == expected
        assert [line["step"] for line in _link(tmp_path)["sending"]] == [2, 3]
        metrics = MetricsFile(tmp_path)
        metrics.truncate(length)
        metrics.close()
        _append(tmp_path, 2, 3, 4)
        network.loses = "nothing"
        assert MLflowShipper(tmp_path, TrackingConfig(uri=network.uri), {}).close("FINISHED")
    _require_each_once(server.uri, tmp_path, range(1, 5))


@pytest.mark.slow
def test_a_run_that_was_made_without_an_answer_is_found_again(server, tmp_path):
    """Killed between making the MLflow run and writing its id down: there is one run, not two."""
    _append(tmp_path, 1)
    tracking = TrackingConfig(uri=server.uri, experiment="made-twice")
    MLflowShipper(tmp_path, tracking, {}).close("KILLED")
    link = _link(tmp_path)
    run_id = link.pop("run_id")
    (tmp_path / "mlflow.json").write_text(json.dumps({**link, "shipped": [-1, -1]}))
    MLflowShipper(tmp_path, tracking, {}).close("FINISHED")
    assert _link(tmp_path)["run_id"] == run_id
    client = MlflowClient(tracking_uri=server.uri)
    experiment = client.get_experiment_by_name("made-twice")
    assert len(client.search_runs([experiment.experiment_id])) == 1
    _require_each_once(server.uri, tmp_path, range(1, 2))


@pytest.mark.slow
def test_track_sends_what_is_left(server, source_model, protein_data, tmp_path, capsys):
    run_dir = tmp_path / "run"
    recipe = make_recipe(run_dir, source_model, protein_data, [TRANSLATE])
    recipe = recipe.model_copy(update={"tracking": TrackingConfig(uri=server.uri)})
    write_run(recipe, [], state="failed")
    _append(run_dir, *range(1, 300))
    assert run(["track", str(run_dir)]) == 0
    assert "299 lines" in capsys.readouterr().out
    _require_each_once(server.uri, run_dir, range(1, 300))
    client = MlflowClient(tracking_uri=server.uri)
    assert client.get_run(_link(run_dir)["run_id"]).info.status == "FAILED"
    with locked(run_dir):
        assert run(["track", str(run_dir)]) == 2
    assert "is in use by process" in capsys.readouterr().err
    assert run(["track", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "htp://server:5000", "./mlruns"])
def test_a_store_that_takes_nothing_does_not_stop_a_run(uri, tmp_path, caplog):
    """No server on the port, or no URI of MLflow's; closing is bounded, training never held up."""
    tracking = TrackingConfig(uri=uri)
    shipper = MLflowShipper(tmp_path, tracking, {})
    metrics = MetricsFile(tmp_path)
    began = time.monotonic()
    metrics.append("translate", 0, 1, {"loss": 1.0})
    assert time.monotonic() - began < 1.0
    metrics.close()
    shipper.close("FINISHED", seconds=3)
    assert time.monotonic() - began < 10
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0]
    (line,) = _failures(caplog)
    assert line.startswith(f"MLflow at {uri}: ")


@pytest.mark.slow
@pytest.mark.parametrize("fails", ["refusal", "cut"])
def test_a_server_that_fails_every_second_call_gets_every_point(fails, server, tmp_path):
    """1,636 points, each once: within seconds, but this machine may be busy."""
    _append(tmp_path, *range(1, 819))
    params = {f"key{i}": "x" for i in range(250)}
    with BadNetwork(server.port) as network:
        network.fails = fails
        tracking = TrackingConfig(uri=network.uri, experiment=f"every-second-{fails}")
        assert MLflowShipper(tmp_path, tracking, params).close("FINISHED", seconds=150)
    _require_each_once(server.uri, tmp_path, range(1, 819))
    client = MlflowClient(tracking_uri=server.uri)
    run = client.get_run(_link(tmp_path)["run_id"])
    assert len(run.data.params) == 250 and run.info.status == "FINISHED"
    assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.mark.slow
def test_a_rate_limit_is_waited_for(server, tmp_path):
    _append(tmp_path, *range(1, 100))
    with BadNetwork(server.port) as network:
        network.waits = 1
        tracking = TrackingConfig(uri=network.uri, experiment="rate-limit")
        assert MLflowShipper(tmp_path, tracking, {"seed": "1"}).close("FINISHED", seconds=150)
        assert network.early <= network.calls / 2, "it came back before its time"
    _require_each_once(server.uri, tmp_path, range(1, 100))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "named"), [(401, "MLFLOW_TRACKING_USERNAME and"), (403, "may not write to the exp")]
)
def test_a_refusal_is_final_and_says_what_to_do(status, named, server, tmp_path, caplog):
    _append(tmp_path, 1)
    with BadNetwork(server.port) as network:
        network.status = status
        shipper = MLflowShipper(tmp_path, TrackingConfig(uri=network.uri), {})
        began = time.monotonic()
        assert not shipper.close("FINISHED", seconds=60)
        assert time.monotonic() - began < 30
        (line,) = _failures(caplog)
        assert named in line and f"then `s2t2 track {tmp_path}`" in line and str(status) in line
        network.status = None
        assert MLflowShipper(tmp_path, TrackingConfig(uri=network.uri), {}).close("FINISHED")
    _require_each_once(server.uri, tmp_path, range(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["run", "experiment"])
def test_what_was_deleted_is_named_and_goes_on_when_it_is_restored(what, tmp_path, caplog):
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="e")
    _append(tmp_path, 1)
    assert MLflowShipper(tmp_path, tracking, {}).close("KILLED")
    client, link = MlflowClient(tracking_uri=tracking.uri), _link(tmp_path)
    ids = {"run": link["run_id"], "experiment": link["experiment_id"]}
    getattr(client, f"delete_{what}")(ids[what])
    _append(tmp_path, 2)
    shipper = MLflowShipper(tmp_path, tracking, {})
    assert not shipper.close("FINISHED", seconds=60)
    assert "deleted" in shipper.problem and "restore" in shipper.problem
    assert ids["run"] in shipper.problem or ids[what] in shipper.problem
    getattr(client, f"restore_{what}")(ids[what])
    if what == "experiment" and client.get_run(ids["run"]).info.lifecycle_stage == "deleted":
        client.restore_run(ids["run"])
    assert MLflowShipper(tmp_path, tracking, {}).close("FINISHED")
    _require_each_once(tracking.uri, tmp_path, range(1, 3))


@pytest.mark.slow
def test_a_new_run_in_a_deleted_experiment_is_named(tmp_path):
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="e")
    client = MlflowClient(tracking_uri=tracking.uri)
    client.delete_experiment(client.create_experiment("e"))
    _append(tmp_path, 1)
    shipper = MLflowShipper(tmp_path, tracking, {})
    assert not shipper.close("FINISHED", seconds=60)
    assert "mlflow experiments restore -x" in shipper.problem


@pytest.mark.slow
def test_three_starts_on_a_new_database_do_not_destroy_it(tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for name in "abc":
        (tmp_path / name).mkdir()
        _append(tmp_path / name, 1)
    words = [sys.executable, "-c", ONCE]
    jobs = [subprocess.Popen([*words, tmp_path / name, uri]) for name in "abc"]
    assert [job.wait(120) for job in jobs] == [0, 0, 0]
    for name in "abc":
        _require_each_once(uri, tmp_path / name, range(1, 2))


ONCE = """
import sys
from pathlib import Path
from s2t2_dist.config import TrackingConfig
from s2t2_dist.run.tracking import MLflowShipper
shipper = MLflowShipper(Path(sys.argv[1]), TrackingConfig(uri=sys.argv[2]), {})
sys.exit(not shipper.close("FINISHED", 100))
"""


@pytest.mark.slow
def test_one_run_however_its_store_is_spelled(server, tmp_path, monkeypatch):
    """With and without a slash, by name; in between another store, whose run is kept too."""
    other = f"sqlite:///{tmp_path}/other.db"
    port = server.port
    spellings = [
        f"http://127.0.0.1:{port}",
        f"http://127.0.0.1:{port}/",
        f"http://localhost:{port}",
    ]
    for step, uri in enumerate([*spellings[:2], other, spellings[2], other], 1):
        _append(tmp_path, step)
        tracking = TrackingConfig(uri=uri, experiment="spelled")
        assert MLflowShipper(tmp_path, tracking, {}).close("FINISHED")
    for uri in (server.uri, other):
        client = MlflowClient(tracking_uri=uri)
        experiment = client.get_experiment_by_name("spelled")
        (run,) = client.search_runs([experiment.experiment_id])
        steps = [p.step for p in client.get_metric_history(run.info.run_id, "translate/loss")]
        assert steps == ([1, 2, 3, 4] if uri != other else [1, 2, 3, 4, 5])


@pytest.mark.slow
def test_a_run_is_found_from_another_folder(tmp_path, monkeypatch):
    """The default store and one that is relative are those of the first start."""
    for uri in (None, "sqlite:///own.db"):
        run_dir = tmp_path / f"run-{uri is None}"
        run_dir.mkdir()
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        for step, folder in enumerate((tmp_path, tmp_path / "elsewhere"), 1):
            monkeypatch.chdir(folder)
            _append(run_dir, step)
            assert MLflowShipper(run_dir, TrackingConfig(uri=uri), {}).close("FINISHED")
        _require_each_once(_link(run_dir)["uri"], run_dir, range(1, 3))
        assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.slow
def test_users_find_what_they_expect(tmp_path, monkeypatch, caplog):
    """Who ran it, from which commit; the recipe as an artifact; their experiment's name."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    monkeypatch.setenv("MLFLOW_RUN_ID", "abc")
    monkeypatch.setenv("LOGNAME", "ada")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("seed: 1\n")
    (run_dir / "figure.png").write_bytes(b"png")
    _append(run_dir, 1)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracking = TrackingConfig(uri=uri, experiment="theirs")
    assert MLflowShipper(run_dir, tracking, {}, ("config.yaml",)).close("FINISHED")
    attach(run_dir, [run_dir / "figure.png"])
    client = MlflowClient(tracking_uri=uri)
    run = client.get_run(_link(run_dir)["run_id"])
    assert client.get_experiment(run.info.experiment_id).name == "mine"
    assert {"mlflow.user", "mlflow.source.name", "mlflow.source.type"} <= run.data.tags.keys()
    assert sorted(a.path for a in client.list_artifacts(run.info.run_id)) == [
        "config.yaml",
        "figure.png",
    ]
    assert "MLFLOW_RUN_ID is ignored" in caplog.text


@pytest.mark.parametrize("text", ["{}", "[]", "", "7", '{"uri": 1}', "\0", '{"uri": "x"}'])
def test_a_damaged_link_is_kept_aside_and_said(text, tmp_path, caplog):
    (tmp_path / "mlflow.json").write_text(text)
    assert not is_shipped(tmp_path)
    place = store.choose(f"sqlite:///{tmp_path}/mlflow.db", None)
    link = open_link(tmp_path, place)
    assert link["shipped"] == [-1, -1] and "run_id" not in link
    assert "MLflow gets a new run" in caplog.text
    assert (tmp_path / ".damaged-mlflow.json").read_text() == text


def test_flat_parameters_name_the_stage():
    values = {"seed": 1, "stages": [{"name": "translate", "max_steps": 5}], "data": {"path": "d"}}
    flat = flatten(values)
    expected = {"seed": "1", "stages.translate.max_steps": "5", "data.path": "d"}
    assert flat == expected | {"stages.translate.name": "translate"}
