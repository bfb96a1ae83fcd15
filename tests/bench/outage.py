"""Take a run's MLflow server away for a while: python -m tests.bench.outage --seconds 60 --work DIR

A small finetuning run on one rank logs to a real `mlflow server`, which is killed and later started
again. Compares the time of a step before, during and after the outage, and the server's metrics
with `metrics.jsonl`.
"""

import argparse
import json
import os
import signal
import statistics
import time
from pathlib import Path

from mlflow import MlflowClient

from tests.conftest import make_small_inputs
from tests.jobs import launching
from tests.run.mlflow_server import BadNetwork, MLflowServer

STAGE = {"kind": "finetune", "init": "truncate", "max_steps": 10**6, **launching.STAGE}


def measure(work: Path, seconds: float, quiet: float, fails: str = "nothing") -> dict:
    """Run with an outage of `seconds`, and `quiet` seconds before and after it.

    Args:
        fails: what becomes of every second call all the time, see `BadNetwork`.

    Returns:
        `seconds`, the number of `points` compared, and `steps`: number and quartiles of the step
        times (seconds) before, during and after the outage.

    Raises:
        AssertionError: the server does not have every point of `metrics.jsonl`, in order, once.
    """
    work.mkdir(parents=True, exist_ok=True)
    model, data = make_small_inputs(work / "inputs")
    with MLflowServer(work) as server, BadNetwork(server.port) as network:
        network.fails = fails
        stages = [{**STAGE, "eval_steps": 500, "save_steps": 500}]
        tracking = {"enabled": True, "uri": network.uri}
        recipe = launching.write_recipe(work, model, data, stages=stages, tracking=tracking)
        run_dir = work / "run"
        process = launching.start(recipe, 0)
        try:
            launching.wait_for_line(run_dir, "finetune", 1, process)
            _wait_for_mlflow(run_dir)
            times = [time.time()]
            time.sleep(quiet)
            times.append(time.time())
            server.kill()
            time.sleep(seconds)
            times.append(time.time())
            server.start()
            times.append(time.time())
            time.sleep(quiet)
            process.send_signal(signal.SIGTERM)
            assert process.wait(180) == 3, launching.output(recipe)
        finally:
            launching.kill(process)
        lines = launching.metrics(run_dir)
        points = compare(run_dir, lines, server.uri)
    steps = [line for line in lines if line["step"] and "eval_loss" not in line]
    windows = {"before": times[:2], "during": times[1:3], "after": [times[3], steps[-1]["time"]]}
    found = {}
    for name, (start, end) in windows.items():
        inside = [line["step_seconds"] for line in steps if start < line["time"] <= end]
        q1, median, q3 = statistics.quantiles(inside, n=4)
        found[name] = {"steps": len(inside), "q1": q1, "median": median, "q3": q3}
    return {"seconds": seconds, "points": points, "steps": found}


def compare(run_dir: Path, lines: list[dict], uri: str) -> int:
    """Check steps, values and times of every metric on the server; return the number of points."""
    client = MlflowClient(tracking_uri=uri)
    run_id = json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    total = 0
    for key in sorted(
        {key for line in lines for key in line} - {"stage", "stage_index", "step", "time"}
    ):
        written = [(x["step"], x[key], int(x["time"] * 1000)) for x in lines if key in x]
        history = client.get_metric_history(run_id, f"finetune/{key}")
        assert [(point.step, point.value, point.timestamp) for point in history] == written, key
        total += len(written)
    return total


def _wait_for_mlflow(run_dir: Path) -> None:
    deadline = time.monotonic() + 60
    while not (run_dir / "mlflow.json").exists():
        assert time.monotonic() < deadline, "nothing was sent to MLflow"
        time.sleep(0.1)
    time.sleep(3)  # the import of mlflow is over


def report(found: dict) -> str:
    """The results page."""
    rows = [
        f"| {name} | {part['steps']} | {1e3 * part['median']:.1f} | "
        f"{1e3 * part['q1']:.1f} to {1e3 * part['q3']:.1f} |"
        for name, part in found["steps"].items()
    ]
    return f"""# An MLflow outage of {found["seconds"]:.0f} s

`python -m tests.bench.outage --seconds {found["seconds"]:.0f} --work DIR`, one CPU rank.

| relative to the outage | steps | median ms per step | quartiles |
|---|---:|---:|---:|
{chr(10).join(rows)}

At the end the server had all {found["points"]:,} points of `metrics.jsonl` with their times, in
order, once each.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=60, help="length of the outage")
    parser.add_argument("--quiet", type=float, default=15, help="seconds before and after it")
    parser.add_argument(
        "--fails", default="nothing", choices=("nothing", "refusal", "cut"), help="every 2nd call"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the run")
    parser.add_argument("--report", type=Path, help="Markdown page to write")
    options = parser.parse_args()
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    page = report(measure(options.work.resolve(), options.seconds, options.quiet, options.fails))
    print(page)
    if options.report:
        options.report.write_text(page)


if __name__ == "__main__":
    main()
