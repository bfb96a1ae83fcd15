"""`s2t2 track`: upload metrics that MLflow could not receive."""

from pathlib import Path

from s2t2_dist.artifacts import read_json
from s2t2_dist.config import recipe_values
from s2t2_dist.errors import ConfigError, S2T2Error
from s2t2_dist.run.directory import CONFIG, locked, read_recipe, read_state
from s2t2_dist.run.link import LINK, flatten
from s2t2_dist.run.metrics import read_metrics
from s2t2_dist.run.tracking import MLflowShipper

# State in `status.json` -> MLflow status. Any other state is KILLED: a run that is still "running"
# although no job holds its lock was killed.
STATUS = {"done": "FINISHED", "failed": "FAILED"}


def replay(run_dir: Path, seconds: float) -> str:
    """Send every line of `metrics.jsonl` that MLflow does not have; returns a line to print.

    Args:
        seconds: how long to try before giving up.

    Raises:
        ArtifactError: not a run directory.
        ConfigError: the recipe disables MLflow.
        S2T2Error: a job is running in the directory (it sends its metrics itself), or the server
            did not accept everything in time.
    """
    recipe = read_recipe(run_dir)
    lines = len(read_metrics(run_dir))
    if not recipe.tracking.enabled:
        raise ConfigError(
            f"{run_dir / CONFIG}: tracking.enabled is false; set it to true to send the metrics"
        )
    with locked(run_dir):
        status = STATUS.get(read_state(run_dir) or "", "KILLED")
        params = flatten(recipe_values(recipe))
        shipper = MLflowShipper(run_dir, recipe.tracking, params, (CONFIG,))
        if not shipper.close(status, seconds):
            if shipper.problem:
                raise S2T2Error(f"MLflow at {shipper.uri}: {shipper.problem}")
            raise S2T2Error(
                f"MLflow at {shipper.uri} did not accept everything within {seconds:.0f} s; "
                "nothing is lost: run this again when the server responds"
            )
    run_id = read_json(run_dir / LINK)["run_id"]
    return f"{lines} lines of {run_dir} are in MLflow run {run_id} at {shipper.uri}, {status}"
