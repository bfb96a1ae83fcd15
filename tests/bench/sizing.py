"""The table of docs/sizing.md, from `s2t2 plan`: `python -m tests.bench.sizing`."""

from pathlib import Path

from s2t2_dist.config import load_recipe
from s2t2_dist.sizing.report import GIB, size_recipe
from s2t2_dist.sizing.stages import Hardware, run_disk

PAGE = Path("docs/sizing.md")
MARKS = ("<!-- made by python -m tests.bench.sizing -->\n", "<!-- end -->\n")
ONE_B, SEVEN_B = "olmo-1b-uniref50", "olmo-7b-transfer"
MORE_ROWS = ["stages.finetune.train_batch_size=64"]
CASES = [
    (ONE_B, 1, "zero3.json", []),
    (ONE_B, 8, "zero3.json", []),
    (SEVEN_B, 8, "zero3.json", []),
    (SEVEN_B, 8, "zero3-offload.json", []),
    (SEVEN_B, 32, "zero3.json", MORE_ROWS),
    (SEVEN_B, 32, "zero3-hpz.json", MORE_ROWS),
]
HEAD = ("recipe", "GPUs", "JSON", "stage", "GiB per GPU", "with recomputation")
HEAD += ("host GiB per node", "GB sent per step", "GB of a checkpoint", "GB of the run")


def table() -> str:
    """Markdown lines."""
    lines = [f"| {' | '.join(HEAD)} |", "|---|---:|---|---|" + "---:|" * 6]
    for name, gpus, wanted, overrides in CASES:
        recipe = load_recipe(Path(f"launch/recipes/{name}.yaml"), overrides)
        config = Path("tests/configs") / name[:7]
        plan = size_recipe(recipe, Hardware(gpus), 80 * GIB, config, 512, 512)
        (file,) = (file for file in plan.files if file.file.name == wanted)
        for off, on in zip(file.stages[False], file.stages[True], strict=True):
            cells = [name, gpus, f"`{wanted}`", off.stage]
            cells += [f"{size / GIB:.1f}" for size in (off.peak, on.peak, off.host)]
            disk = run_disk(recipe, file.stages[False])
            sizes = (sum(off.traffic.values()), off.checkpoint, disk)
            cells += [f"{size / 1e9:.1f}" for size in sizes]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """docs/sizing.md with a new table."""
    before, rest = PAGE.read_text().split(MARKS[0])
    return before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1]


if __name__ == "__main__":
    PAGE.write_text(page())
