"""The floors of the house: who may import whom, and what must never be imported, read from the source itself."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    "megallama": 0,  # the package's face
    "megallama.config": 0,
    "megallama.files": -1,  # the cellar: anyone writes files
    "megallama.alignment": 0,
    "megallama.checks": 0,
    "megallama.options": 0,
    "megallama.presets": 0,
    "megallama.pipeline": 0,
    "megallama.data": 0,
    "megallama.plan": 1,
    "megallama.runtime": 1,
    "megallama.parallel": 2,
    "megallama.pipeline.engine": 3,  # hands gradients over to parallel
    "megallama.model": 3,
    "megallama.optim": 3,
    "megallama.checkpoint": 4,
    "megallama.train": 5,
    "megallama.inference": 6,
    "megallama.rlhf": 7,
    "megallama.evaluation": 7,
    "megallama.cli": 8,
    "megallama.__main__": 8,
}
"""Floor of a file, or of every file of a room that is not named itself."""

SAME_FLOOR = {
    "megallama.config": {"megallama.alignment", "megallama.checks", "megallama.options", "megallama.presets"},
    "megallama.__main__": {"megallama.cli"},
}
NEVERS = {
    "megallama.parallel": {"megallama.config"},
    "megallama.model": {"megallama.pipeline", "megallama.optim", "megallama.train"},
    "megallama.data": {"megallama.config", "megallama.pipeline"},
}
TORCH_FREE = (
    "config",
    "alignment",
    "checks",
    "options",
    "presets",
    "plan",
    "cli",
    "pipeline.program",
    "pipeline.schedules",
)
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "megallama").rglob("*.py"))
}


@functools.cache
def imported(module: str) -> set[str]:
    """Modules of the package that `module` imports, at any depth of its code; not what only a type checker reads."""

    def visit(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = origin_of(node, module)
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                yield whole if whole in SOURCES else origin
        for child in ast.iter_child_nodes(node):
            yield from visit(child)

    return {name for name in visit(ast.parse(SOURCES[module].read_text())) if name in SOURCES} - {module}


def origin_of(node: ast.ImportFrom, module: str) -> str:
    """The absolute name of the module that a `from ... import` in `module` reads."""
    if not node.level:
        return str(node.module)
    parts = [*module.split("."), *(["__init__"] if SOURCES[module].stem == "__init__" else [])]
    return ".".join([*parts[: -node.level], *([node.module] if node.module else [])])


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def floor(module: str) -> int:
    return FLOORS[module if module in FLOORS else room(module)]


@pytest.mark.parametrize("module", SOURCES)
def test_imports_go_down(module: str) -> None:
    for other in imported(module):
        same_room = room(module) == room(other) and floor(module) >= floor(other)
        allowed = other == "megallama" or same_room or other in SAME_FLOOR.get(module, ())
        assert allowed or floor(other) < floor(module), f"{module} (floor {floor(module)}) imports {other}"
        assert room(other) not in NEVERS.get(room(module), ()), f"{module} must never import {other}"


def test_no_import_cycles() -> None:
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"import cycle: {' -> '.join([*path, module])}"
        if module not in done:
            for other in imported(module):
                # A room's files may import each other while their face, which imports them all, is still loading.
                if other != room(module):
                    walk(other, (*path, module))
            done.add(module)

    for module in SOURCES:
        walk(module, ())


@pytest.mark.parametrize("module", TORCH_FREE)
def test_torch_stays_out(module: str) -> None:
    code = f"import sys, megallama.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize("module", SOURCES)
def test_files_are_named_and_sized_for_readers(module: str) -> None:
    assert SOURCES[module].stem not in {"utils", "helpers", "common", "misc"}
    lines = SOURCES[module].read_text().splitlines()
    assert len(lines) <= 450, f"{module} has {len(lines)} lines: split it"


def test_command_line_tools_are_no_package() -> None:
    """Tools and tests front the package; nothing in it may lean on them."""
    for module, path in SOURCES.items():
        roots = {n.split(".")[0] for node in ast.walk(ast.parse(path.read_text())) for n in _roots(node)}
        assert not roots & {"tools", "tests", "distributed"}, module


def _roots(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [str(node.module)] if isinstance(node, ast.ImportFrom) else []
