"""What a study keeps of a finished run: `records/RUN.json`, made once and known by its hash."""

import contextlib
import logging
import math
import platform
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from s2t2_dist import artifacts
from s2t2_dist.config import Translate
from s2t2_dist.data.evaluate import Evaluation
from s2t2_dist.data.shards import ShardReader
from s2t2_dist.errors import ArtifactError
from s2t2_dist.lm.folder import local_folder
from s2t2_dist.lm.result import MODEL_DIR
from s2t2_dist.lm.translation import TRANSLATION_DIR, fold_translation
from s2t2_dist.report.export import TOLERANCE
from s2t2_dist.report.runs import FinishedRun, read_run
from s2t2_dist.run.metrics import METRICS
from s2t2_dist.study.config import StudyRun
from s2t2_dist.study.cost import cost_of
from s2t2_dist.study.halves import HALVES, RULE, Halves, evaluate_halves

RECORDS = "records"
PACKAGES = ("s2t2-dist", "torch", "deepspeed", "transformers", "safetensors", "numpy", "pyarrow")
_log = logging.getLogger(__name__)


def record_path(study_dir: Path, run: StudyRun) -> Path:
    return study_dir / RECORDS / f"{run.name}.json"


def read_record(study_dir: Path, run: StudyRun) -> dict | None:
    """The record of a run; None if there is none, or it is not of the run as it is now.

    One that was altered is measured again, and a line says so.
    """
    path = record_path(study_dir, run)
    if not path.exists():
        return None
    try:
        record = artifacts.read_json(path)
    except ArtifactError as error:
        record, problem = {}, str(error)
    else:
        problem = f"{path} was altered after it was written"
    stated = record.pop("sha256", None)
    if stated != artifacts.sha256_json(record):
        _log.warning("%s; %s is measured again", problem, run.name)
        return None
    metrics = run.recipe.output_dir / METRICS
    same = (
        record["recipe_sha256"] == run.recipe_sha256
        and record["rule"] == RULE
        and metrics.is_file()
        and record["metrics_sha256"] == artifacts.sha256_file(metrics)
    )
    return record if same else None


def measure(run: StudyRun, study_dir: Path, device: torch.device) -> dict:
    """Evaluate a finished run's model on both halves, count its cost, and write its record.

    Raises:
        ArtifactError: the run is not done, its files were altered, or its model does not give the
            validation loss that the run recorded.
        DataError: the validation documents cannot be halved.
    """
    found = read_run(run.recipe.output_dir)
    last, stage = len(found.recipe.stages) - 1, found.recipe.stages[-1]
    halves = Halves.of(ShardReader(found.recipe.data.path, "validation"))
    rows, mask = stage.per_device_eval_batch_size, found.recipe.data.document_mask
    with _model_folder(found) as folder:
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
        lm = lm.to(device).eval()
        parts = evaluate_halves(
            lambda ids, positions=None: (
                lm(input_ids=ids, position_ids=positions, use_cache=False).logits
            ),
            halves,
            rows,
            device,
            mask,
        )
    stated = found.evaluations(last)[stage.max_steps]
    _require_loss(found, parts, stated["eval_loss"])
    record = {
        "run": run.name,
        "recipe_sha256": run.recipe_sha256,
        "metrics_sha256": artifacts.sha256_file(found.path / METRICS),
        "rule": RULE,
        "bits_per_byte": stated["eval_bits_per_byte"],
        "halves": {
            name: {**asdict(part), "bits_per_byte": part.bits_per_byte, "documents": count}
            for name, part, count in zip(HALVES, parts, halves.counts, strict=True)
        },
        "documents_sha256": halves.text_sha256,
        "steps": {stage.name: stage.max_steps for stage in found.recipe.stages},
        "cost": asdict(cost_of(found)),
        "made_by": made_by(device),
    }
    path = record_path(study_dir, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(path, {**record, "sha256": artifacts.sha256_json(record)})
    return record


@contextlib.contextmanager
def _model_folder(run: FinishedRun) -> Iterator[Path]:
    """The folder of a run's model, verified; of a run that ends with a translation, folded."""
    model = run.path / MODEL_DIR
    if not isinstance(run.recipe.stages[-1], Translate):
        artifacts.verify(model)
        yield model
        return
    with artifacts.scratch_directory(model, "fold") as folder:
        data = artifacts.read_manifest(run.recipe.data.path)
        fold_translation(run.path / TRANSLATION_DIR, local_folder(run.recipe.model), folder, data)
        yield folder


def _require_loss(run: FinishedRun, parts: list[Evaluation], stated: float) -> None:
    """Both halves together give the loss that the trainer measured.

    Raises:
        ArtifactError: another one.
    """
    loss = sum(part.nats for part in parts) / sum(part.tokens for part in parts)
    if not math.isfinite(loss) or abs(loss - stated) > TOLERANCE[run.recipe.model.dtype] * stated:
        raise ArtifactError(
            f"the model of {run.path} has a validation loss of {loss:.6f}, but the run recorded "
            f"{stated:.6f}: a file has changed since"
        )


def made_by(device: torch.device) -> dict:
    """Versions, source and hardware with which a number was made."""
    on_gpu = device.type == "cuda"
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The git commit of this package's sources, `-dirty` if they were changed; None without git."""
    answers, tracked = [], ["ls-files", "--error-unmatch", __file__]
    for words in (tracked, ["rev-parse", "HEAD"], ["status", "-s"]):
        where = ["git", "-C", str(Path(__file__).parent)]
        try:
            done = subprocess.run([*where, *words], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        answers.append(done.stdout.strip())
    return answers[1] + ("-dirty" if answers[2] else "")
