"""The plan of the house: what each room of the engine may import, as CONTRIBUTING.md says it.

A room is a top-level package, or a sub-package of `harness/`. Imports point down only, so that a room can be read and changed
without those above it.
"""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("harness", "leaderboards", "methods", "backbones", "tasks", "weights")
MOST_FLOORS, MOST_FILES = 8, 20
# Where an import inside a function is the rule: commands import what they need when they are called.
LAZY = ("harness/cli/", "harness/__init__.py", "harness/__main__.py")
# Elsewhere each one needs a reason.
OPTIONAL = {
    ("harness/data/image_files.py", "harness.data"): "SimpleITK takes 0.2 s and 50 MiB; most data is NIfTI",
    ("harness/sweeps/slurm.py", "submitit"): "an extra",
    ("harness/runs/export.py", "onnx"): "an extra",
    ("harness/runs/export.py", "onnxscript"): "an extra",
    ("tasks/msd.py", "monai.apps"): "it imports torch, and tasks are listed without it",
}


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] != "harness" else "/".join(parts[:2]).removesuffix(".py")


def modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names]


def file_of(module: str) -> Path | None:
    """The source file of a dotted name, or of the module that it is a name of."""
    for name in (module, module.rpartition(".")[0]):
        base = ROOT / name.replace(".", "/")
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if name and path.is_file():
                return path
    return None


@cache
def arrows() -> dict[str, set[str]]:
    """Room -> the rooms that it imports; the public names of `harness` itself are everybody's."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in sources():
        if path == ROOT / "harness" / "__init__.py":
            continue
        here = room_of(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for module in modules(node):
                    target = file_of(module)
                    if target is not None and target != ROOT / "harness" / "__init__.py" and room_of(target) != here:
                        found[here].add(room_of(target))
    return found


def allowed() -> dict[str, set[str]]:
    """The table of CONTRIBUTING.md: room -> the rooms that it may import."""
    rows = re.findall(r"^\| `([\w/]+)` \|[^|]*\|([^|]*)\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {room: set(re.findall(r"`([\w/]+)`", rooms)) for room, rooms in rows}


def test_every_room_is_in_the_plan():
    rooms = {room_of(path) for path in sources() if path.parent != ROOT / "harness"}
    assert rooms <= set(allowed())
    assert {path.parent for path in sources() if path.parent == ROOT / "harness"} == {ROOT / "harness"}
    assert {path.name for path in (ROOT / "harness").glob("*.py")} == {"__init__.py", "__main__.py"}


def test_rooms_import_what_the_plan_allows_only():
    plan = allowed()
    unplanned = {(room, other) for room, others in arrows().items() for other in others - plan.get(room, set())}
    assert not unplanned, "imports that CONTRIBUTING.md does not allow"
    stale = {(room, other) for room, others in plan.items() for other in others - arrows().get(room, set())}
    assert not stale, "CONTRIBUTING.md allows imports that nobody makes"


def test_imports_point_down_and_the_house_has_few_floors():
    plan, floors = arrows(), dict[str, int]()

    def floor(room: str, path: tuple[str, ...] = ()) -> int:
        assert room not in path, f"rooms that import each other: {' -> '.join([*path, room])}"
        if room not in floors:
            floors[room] = 1 + max((floor(other, (*path, room)) for other in plan.get(room, ())), default=0)
        return floors[room]

    assert max(map(floor, list(plan))) <= MOST_FLOORS


def test_no_folder_is_crowded():
    counts: dict[Path, int] = defaultdict(int)
    for path in sources():
        counts[path.parent] += 1
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_imports_inside_functions_have_a_reason():
    lazy = set()
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(LAZY):
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                for node in ast.walk(function):
                    if isinstance(node, ast.Import | ast.ImportFrom):
                        lazy.add((name, node.module if isinstance(node, ast.ImportFrom) else node.names[0].name))
    assert lazy == set(OPTIONAL)


@pytest.mark.parametrize("path", sources(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_public_things_have_a_docstring(path):
    bare = [
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare
