"""Arrows between the rooms only go down; held by reading the imports of every module of the package."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import abyssal

PACKAGE = Path(abyssal.__file__).parent

# From the top. Rooms side by side in a layer do not import one another, but for the pairs below.
LAYERS = (
    {"__main__"},
    {"cli"},
    {"cli_inspect", "cli_forecast", "cli_scaling", "cli_depth_check", "cli_reproduce", "cli_sweep", "cli_tangent"},
    {"cli_common"},
    {"study", "report", "integrations"},
    {"testing"},
    {"reconstruct", "scaling", "limits", "tangent"},
    {"sweep"},
    {"loading"},
    {"nn", "chain", "memory", "_torchvision"},
    {"_anatomy", "_loss"},
)
SIDEWAYS = {("study", "report"), ("limits", "scaling")}
# `reconstruct` has to work on any model, so it knows neither our own networks nor the theory of them.
FORBIDDEN = {("reconstruct", "nn")}
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}


def is_allowed(importer: str, imported: str) -> bool:
    if importer == imported:
        return True
    if (importer, imported) in FORBIDDEN:
        return False
    return LEVEL[importer] < LEVEL[imported] or (importer, imported) in SIDEWAYS


def room_of(module: str) -> str:
    """`reconstruct` for `abyssal.reconstruct.engine`, "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def module_names(package: Path) -> dict[str, Path]:
    names = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imported_modules(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Every abyssal module that a source imports anywhere: in functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            # `from abyssal import chain` names a room where `from abyssal.chain import find_blocks` does.
            targets = [f"{base}.{alias.name}" for alias in node.names] if base == "abyssal" else [base]
        else:
            continue
        yield from (target for target in targets if target.split(".")[0] == "abyssal")


def upward_imports(package: Path) -> list[str]:
    faults = []
    for module, path in module_names(package).items():
        room = room_of(module)
        if room not in LEVEL:  # the public face may show anything; unknown rooms have a test of their own
            continue
        for target in imported_modules(path.read_text(), module, path.name == "__init__.py"):
            if target == "abyssal.__version__":
                continue
            imported = room_of(target)
            if imported not in LEVEL:
                faults.append(f"{module} imports {target}: take it from the room that defines it")
            elif not is_allowed(room, imported):
                faults.append(f"{module} imports {target}")
    return faults


def test_every_module_belongs_to_a_room() -> None:
    rooms = {room_of(module) for module in module_names(PACKAGE)} - {""}
    assert rooms <= set(LEVEL), f"no layer is given in this test for {sorted(rooms - set(LEVEL))}"


def test_no_room_imports_one_above_or_beside_it() -> None:
    assert upward_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("chain.py", "from abyssal.reconstruct import engine"),
        ("chain.py", "import abyssal.nn.stack"),
        ("chain.py", "from abyssal import memory"),
        ("chain.py", "from abyssal import find_blocks"),
        ("nn/stack.py", "def f():\n    from ..reconstruct.policy import Keep"),
        ("reconstruct/engine.py", "from abyssal.nn import Euler"),
        ("reconstruct/engine.py", "from abyssal.scaling import rules"),
        ("reconstruct/__init__.py", "from ..testing import check_block"),
        (
            "tangent/empirical.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from abyssal.study import Sweep",
        ),
        ("report/page.py", "from abyssal.study import Sweep"),
        ("study/sweep.py", "from abyssal.cli import app"),
    ],
)
def test_an_upward_import_is_noticed(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / "abyssal" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert len(upward_imports(tmp_path / "abyssal")) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("__init__.py", "from abyssal.cli import app"),
        ("cli.py", "from abyssal import nn, reconstruct"),
        ("study/sweep.py", "from abyssal.report import page"),
        ("testing/conformance.py", "from abyssal.reconstruct.engine import reconstruct"),
        ("reconstruct/engine.py", "from abyssal.chain import resolve_blocks\nfrom .policy import Keep"),
        ("scaling/init.py", "from ..nn.stack import ResidualStack\nimport torch.nn"),
    ],
)
def test_a_downward_import_is_not(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / "abyssal" / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert upward_imports(tmp_path / "abyssal") == []
