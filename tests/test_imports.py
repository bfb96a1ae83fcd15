"""The house: rooms on floors, read from the sources. Imports go down only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Of s2t2_dist. A room imports from the floors below and from itself.
FLOORS = [
    {"errors", "artifacts", "compiled", "comm", "config"},
    {"ot", "data", "run"},
    {"lm"},
    {"training", "report", "sizing"},
    {"study"},
    {"cli"},
    {"train"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# What a room may use of the ground floor, where that is less than all of it.
GROUND = {"ot": {"comm", "compiled"}}
DATA_PREP = {"errors", "artifacts", "compiled", "data"}
ONE_HOME = {
    "deepspeed": "s2t2_dist/lm/engine.py",
    "mlflow": "s2t2_dist/run/tracking.py",
    "torch.distributed": "s2t2_dist/comm.py",
}
FILES = sorted((ROOT / "s2t2_dist").rglob("*.py")) + sorted((ROOT / "data_prep").rglob("*.py"))
# One module's imports of another on the ground floor, from left to right.
GROUND_ORDER = ("errors", "artifacts", "compiled", "comm", "config")


def imported(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms(path: Path) -> set[str]:
    """Rooms and ground-floor modules of s2t2_dist that a file imports."""
    parts = (name.split(".") for name in imported(path))
    return {part[1] for part in parts if part[0] == "s2t2_dist" and len(part) > 1} & FLOOR.keys()


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[1]


def test_every_module_has_a_room():
    found = {room_of(path) for path in FILES if path.is_relative_to(ROOT / "s2t2_dist")}
    assert found - {"__init__"} == FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    if path.is_relative_to(ROOT / "data_prep"):
        assert rooms(path) <= DATA_PREP
        return
    room = room_of(path)
    if room == "__init__":
        return
    if FLOOR[room] == 0:
        allowed = {room, *GROUND_ORDER[: GROUND_ORDER.index(room)]}
    else:
        allowed = {room} | {r for r, floor in FLOOR.items() if 0 < floor < FLOOR[room]}
        allowed |= GROUND.get(room, FLOORS[0])
    assert rooms(path) <= allowed
    assert room == "cli" or not any(name.startswith("data_prep") for name in imported(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_framework_has_one_home(path):
    for library, home in ONE_HOME.items():
        uses = {n for n in imported(path) if n == library or n.startswith(f"{library}.")}
        assert not uses or str(path.relative_to(ROOT)) == home


def test_the_check_sees_a_way_up(tmp_path):
    """The check itself can fail."""
    path = tmp_path / "errors.py"
    path.write_text(
        "def late():\n    from s2t2_dist.training.loop import run\n    import deepspeed.comm\n"
    )
    assert rooms(path) == {"training"}
    assert "deepspeed.comm" in imported(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") < 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
