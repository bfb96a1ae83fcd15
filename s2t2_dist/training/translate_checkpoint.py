"""What a checkpoint holds of the plans that learn: C, its AdamW moments and the thresholds.

Each rank that has rows writes `cost-START-STOP.safetensors`, named by its source rows, so that
any number of ranks can cut them anew. The tensors of each plan NAME ("plan", or "embed" and
"head") are NAME.cost and its moments, (rows, U); and from the first step on NAME.row_thresholds
(rows, n) and NAME.col_thresholds (n, U), from which the next solve searches.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from s2t2_dist.errors import ArtifactError
from s2t2_dist.ot import Thresholds, Translator

MOMENTS = ("exp_avg", "exp_avg_sq")
ROW_THRESHOLDS, COL_THRESHOLDS = "row_thresholds", "col_thresholds"
Tensors = dict[str, torch.Tensor]


def save_plans(
    directory: Path,
    rows: tuple[int, int],
    translator: Translator,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write this rank's rows [start, stop); no rows, no file."""
    start, stop = rows
    if start == stop:  # more ranks than rows
        return
    tensors = {}
    for name, plan in translator.plans.items():
        cost = plan.cost
        state = optimizer.state[cost]
        tensors[f"{name}.cost"] = cost.detach()
        for key in MOMENTS:  # none before the first step
            tensors[f"{name}.{key}"] = state[key] if state else torch.zeros_like(cost)
        tensors["step"] = torch.as_tensor(state.get("step", 0), dtype=torch.float32)
        if plan.start is not None:
            tensors[f"{name}.{ROW_THRESHOLDS}"] = plan.start.row_threshold.T
            tensors[f"{name}.{COL_THRESHOLDS}"] = plan.start.col_threshold
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / f"cost-{start:08d}-{stop:08d}.safetensors")


def load_plans(
    directory: Path,
    rows: tuple[int, int],
    translator: Translator,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Restore this rank's rows [start, stop), whichever ranks wrote them.

    Raises:
        ArtifactError: the checkpoint does not hold every row.
    """
    wanted, whole = _read(directory, *rows)
    for name, plan in translator.plans.items():
        cost = plan.cost
        found = {key: tensor.to(cost.device) for key, tensor in wanted.items()}
        with torch.no_grad():
            cost.copy_(found[f"{name}.cost"])
        moments = {key: found[f"{name}.{key}"] for key in MOMENTS}
        # A count of its own, since AdamW counts in place; on C's device, for the fused kernel.
        optimizer.state[cost] = {"step": whole["step"].clone().to(cost.device), **moments}
        if f"{name}.{COL_THRESHOLDS}" in whole:
            row_nR = found[f"{name}.{ROW_THRESHOLDS}"].T.contiguous()
            col_nU = whole[f"{name}.{COL_THRESHOLDS}"].to(cost.device)
            plan.start = Thresholds(row_nR, col_nU)


def _read(directory: Path, start: int, stop: int) -> tuple[Tensors, Tensors]:
    """Tensors cut to the rows [start, stop), and those that every file holds whole."""
    parts: dict[str, list[torch.Tensor]] = {}
    whole: Tensors = {}
    held = 0
    for path in sorted(directory.glob("cost-*.safetensors")):
        first, last = (int(part) for part in path.stem.split("-")[1:])
        low = min(max(first, start), last)
        high = max(min(last, stop), low)
        held += high - low
        with safe_open(path, "pt") as f:
            for name in f.keys():  # noqa: SIM118 - safe_open is no mapping
                if name == "step" or name.endswith(COL_THRESHOLDS):
                    whole[name] = f.get_tensor(name)
                else:
                    part = f.get_slice(name)[low - first : high - first]
                    parts.setdefault(name, []).append(part)
    if held != stop - start or not parts:
        raise ArtifactError(f"{directory} holds {held} of rows {start} to {stop} of C")
    return {name: torch.cat(found) for name, found in parts.items()}, whole
