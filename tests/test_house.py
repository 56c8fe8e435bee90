"""The house: rooms in layers, no circle of files, no import that runs up (docs/code.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import svdllm

ROOT = Path(svdllm.__file__).parent
# From the ground up. Rooms of one layer do not import each other, but for those that are listed beside them.
LAYERS = (
    ("common",),
    ("models", "data"),
    ("checkpoint",),
    ("compression", "evaluation", "inference"),
    ("recovery", "export", "pruning"),
    ("comparison",),
    ("cli",),
)
LAYER = {room: number for number, rooms in enumerate(LAYERS) for room in rooms}


def module_of(path: Path, root: Path) -> str:
    return ".".join(("svdllm", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__")


def imports_of(path: Path) -> Iterator[str]:
    """Full names that a file imports from the package, wherever in the file; of ``from a import b`` both readings."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "svdllm":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "svdllm")


def import_graph(root: Path) -> dict[str, set[str]]:
    """File -> files that it imports; the package's own ``__init__`` and ``__main__`` apart."""
    files = {module_of(path, root): path for path in root.rglob("*.py")}
    graph = {}
    for module, path in files.items():
        found = {name if name in files else name.rpartition(".")[0] for name in imports_of(path)}
        graph[module] = {other for other in found if other in files} - {module}
    return {module: others for module, others in graph.items() if module not in ("svdllm", "svdllm.__main__")}


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Every import that closes a circle, as ``a -> b -> ... -> a``."""
    found: list[str] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def imports_that_run_up(graph: dict[str, set[str]]) -> list[str]:
    """Every import of a room that lies higher, or beside, or of the package's root, as ``a imports b``."""
    found = []
    for module, others in sorted(graph.items()):
        room = module.split(".")[1]
        for other in sorted(others):
            up = other == "svdllm" or (other.split(".")[1] != room and LAYER[other.split(".")[1]] >= LAYER[room])
            found += [f"{module} imports {other}"] * up
    return found


def test_every_room_has_its_layer() -> None:
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(LAYER)
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_no_circle_of_files() -> None:
    assert circles(import_graph(ROOT)) == []


def test_no_import_runs_up() -> None:
    assert imports_that_run_up(import_graph(ROOT)) == []


@pytest.mark.parametrize(
    "line", ["from svdllm.checkpoint.report import read_report", "from svdllm.data import windows"]
)
def test_an_import_that_is_wrong_is_found(line: str) -> None:
    """Added to a file that everything stands on."""
    graph, base = import_graph(ROOT), "svdllm.common.errors"
    (name,) = imports_in(line)
    other = name if name in graph else name.rpartition(".")[0]
    graph[base].add(other)
    assert f"{base} imports {other}" in imports_that_run_up(graph)
    assert any(base in found.split(" -> ") and other in found.split(" -> ") for found in circles(graph))


def imports_in(line: str) -> set[str]:
    node = ast.parse(line.strip()).body[0]
    if isinstance(node, ast.ImportFrom):
        return {f"{node.module}.{alias.name}" for alias in node.names}
    raise ValueError(line)


def test_names_in_the_root() -> None:
    assert len([path for path in ROOT.iterdir() if not path.name.startswith("__")]) <= 14
