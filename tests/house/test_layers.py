"""The order of the package: arrows between rooms only go down, and no files stand in a circle.

Held by reading the imports of every module: those within functions and under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import abyssal

PACKAGE = Path(abyssal.__file__).parent

# From the top. Rooms of one line do not import one another.
LAYERS = (
    {"__main__"},
    {"cli"},
    {"papers"},
    {"inspection", "integrations", "demo"},
    {"planning", "forecasting", "testing"},
    {"scaling", "limits", "tangent", "tiling"},
    {"engine", "weights"},
    {"certify", "nn", "profiling"},
    {"models", "sweep"},
    {"report", "codec"},
    {"util"},
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
MOST_FILES = 16  # of a folder

# What is still to be mended; a line that holds no longer is to be taken out.
KNOWN_UPWARD: set[str] = set()
KNOWN_CIRCLES: set[str] = set()
KNOWN_FULL: set[str] = set()


def modules_of(package: Path) -> dict[str, Path]:
    """Every module by its name without the package's: "" is the package itself."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(source: str, module: str, is_package: bool, known: Mapping[str, Path]) -> Iterator[str]:
    """Every module of the package that a source imports; `from abyssal.a import b` is `a.b` where that is a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name[8:] for alias in node.names if alias.name.split(".")[0] == "abyssal")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                own = ["abyssal", *module.split(".")] if module else ["abyssal"]
                above = own[: len(own) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            if base.split(".")[0] == "abyssal":
                for alias in node.names:
                    inner = f"{base}.{alias.name}"[8:]
                    # A room is named by `from abyssal import models`, too.
                    yield inner if inner in known or base == "abyssal" else base[8:]


def arrows_of(package: Path) -> dict[str, set[str]]:
    """What each module imports of the package, but for the package's face, which may show anything."""
    known = modules_of(package)
    return {
        module: set(imports_of(path.read_text(), module, path.name == "__init__.py", known)) - {module}
        for module, path in known.items()
        if module
    }


def upward(arrows: Mapping[str, set[str]]) -> set[str]:
    """Arrows to a room above or beside: the module, and the room."""
    faults = set()
    for module, targets in arrows.items():
        room = module.split(".")[0]
        for target in targets:
            other = target.split(".")[0]
            if other != room and LEVEL[room] >= LEVEL.get(other, -1):
                faults.add(f"{module} -> {other}")
    return faults


def circles(arrows: Mapping[str, set[str]]) -> set[str]:
    """Groups of modules each of which reaches each other one."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in arrows.get(waiting.pop(), ()):
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
        return seen

    reach = {module: reached(module) for module in arrows}
    return {
        ", ".join(sorted(other for other in reach[module] if module in reach.get(other, ())))
        for module in arrows
        if module in reach[module]
    }


def told_by_name(source: str) -> list[str]:
    """Names of this package's modules that a source compares with something: an arrow that no import shows."""
    compared: list[ast.expr] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            compared += [node.left, *node.comparators]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith"):
            compared += node.args
    inner = [part for outer in compared for part in ast.walk(outer)]
    texts = [part.value for part in inner if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return [text for text in texts if text.startswith("abyssal.")]


def test_every_module_belongs_to_a_room() -> None:
    rooms = {module.split(".")[0] for module in modules_of(PACKAGE)} - {""}
    assert rooms <= set(LEVEL), f"no layer is given in this test for {sorted(rooms - set(LEVEL))}"


def test_no_room_imports_one_above_or_beside_it() -> None:
    assert upward(arrows_of(PACKAGE)) == KNOWN_UPWARD


def test_no_files_stand_in_a_circle() -> None:
    assert circles(arrows_of(PACKAGE)) == KNOWN_CIRCLES


def test_nobody_is_told_by_the_name_of_a_module() -> None:
    assert {
        name: found for name, path in modules_of(PACKAGE).items() if (found := told_by_name(path.read_text()))
    } == {}
    assert told_by_name('type(f).__module__.startswith("abyssal.engine")') == ["abyssal.engine"]
    assert told_by_name('own in ("abyssal.nn", "torch")') == ["abyssal.nn"]


def test_no_room_has_the_name_of_a_public_function() -> None:
    functions = {name for name in abyssal.__all__ if callable(getattr(abyssal, name))}
    assert functions.isdisjoint(LEVEL)


def test_no_folder_is_too_full() -> None:
    folders: dict[str, int] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.parent.relative_to(PACKAGE).as_posix()
        folders[name] = folders.get(name, 0) + 1
    assert {name for name, files in folders.items() if files > MOST_FILES} == KNOWN_FULL


def _package(folder: Path, files: Mapping[str, str]) -> Path:
    for name, source in files.items():
        path = folder / "abyssal" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder / "abyssal"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("models/find.py", "from abyssal.engine import api"),
        ("models/find.py", "import abyssal.nn.stack"),
        ("models/find.py", "from abyssal import profiling"),
        ("models/find.py", "from abyssal import find_blocks"),
        ("nn/stack.py", "def f():\n    from ..engine.policy import Keep"),
        ("engine/api.py", "from abyssal.weights import init"),
        ("engine/api.py", "from abyssal.scaling.rules import known"),
        ("engine/__init__.py", "from ..testing import check_block"),
        (
            "tangent/subject.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from abyssal.papers import data",
        ),
        ("report/page.py", "from abyssal.sweep import run"),
        ("util/text.py", "import abyssal"),
    ],
)
def test_an_upward_import_is_noticed(tmp_path: Path, file: str, source: str) -> None:
    assert len(upward(arrows_of(_package(tmp_path, {file: source})))) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("__init__.py", "from abyssal.cli import app"),
        ("cli/app.py", "from abyssal import nn, engine"),
        ("sweep/page.py", "from abyssal.report import page"),
        ("testing/kit.py", "from abyssal.engine.api import reconstruct"),
        ("engine/api.py", "from abyssal.models.find import resolve_blocks\nfrom .policy import Keep"),
        ("scaling/rules/known.py", "from ...nn.stack import ResidualStack\nimport torch.nn"),
    ],
)
def test_a_downward_import_is_not(tmp_path: Path, file: str, source: str) -> None:
    assert upward(arrows_of(_package(tmp_path, {file: source}))) == set()


def test_a_circle_is_noticed_however_it_is_closed(tmp_path: Path) -> None:
    files = {
        "nn/a.py": "from abyssal.nn import b",
        "nn/b.py": "def f():\n    from abyssal.nn.c import x",
        "nn/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import y",
        "nn/d.py": "from abyssal.nn.a import y",
    }
    assert circles(arrows_of(_package(tmp_path, files))) == {"nn.a, nn.b, nn.c"}
