"""The package's architecture, read from its sources: imports point one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module may import from the lines above its own, and from its own line.
LAYERS = [
    ["errors", "overrides", "config", "comm", "artifacts", "compiled"],
    [
        "ot",
        "shards",
        "data",
        "tracking",
        "schedule",
        "progress",
        "stopping",
        "leftovers",
        "heartbeat",
    ],
    ["model", "loading", "evaluate", "translation", "marginals", "plan_state"],
    ["engine", "checkpoint", "universal", "export", "rundir", "dryrun"],
    ["stage", "translate", "inputs", "preflight", "stages", "soundness", "trainer", "plan"],
    [
        "finished",
        "replay",
        "release",
        "score",
        "verify",
        "card",
        "figure",
        "translation_report",
        "compare",
        "plan_report",
    ],
    ["cli"],
    ["train"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ONE_HOME = {
    "deepspeed": "s2t2_dist/engine.py",
    "mlflow": "s2t2_dist/tracking.py",
    "torch.distributed": "s2t2_dist/comm.py",
}
FILES = sorted((ROOT / "s2t2_dist").rglob("*.py")) + sorted((ROOT / "data_prep").rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_modules(path: Path) -> set[str]:
    """First-level modules of s2t2_dist that a file imports."""
    parts = (name.split(".") for name in imported(path))
    return {part[1] for part in parts if part[0] == "s2t2_dist" and len(part) > 1} & RANK.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "data_prep":
        assert own_modules(path) <= {"errors", "config", "artifacts", "compiled", "data", "shards"}
        return
    module = parts[1]
    if module == "__init__":
        return
    assert module in RANK, f"{module} has no layer: add it to LAYERS"
    back = {name for name in own_modules(path) if RANK[name] > RANK[module]}
    assert not back, f"{module} imports from above: {back}"
    assert module == "cli" or not any(name.startswith("data_prep") for name in imported(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_framework_has_one_home(path):
    for library, home in ONE_HOME.items():
        uses = {n for n in imported(path) if n == library or n.startswith(f"{library}.")}
        assert not uses or str(path.relative_to(ROOT)) == home


def test_the_check_sees_a_back_edge(tmp_path):
    """The check itself can fail."""
    path = tmp_path / "errors.py"
    path.write_text(
        "def late():\n    from s2t2_dist.trainer import run\n    import deepspeed.comm\n"
    )
    assert own_modules(path) == {"trainer"}
    assert "deepspeed.comm" in imported(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") < 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
