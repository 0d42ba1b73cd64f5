"""What a user installs and is told to type exists, and says the same version everywhere."""

from __future__ import annotations

import re
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import pytest

import abyssal

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirement_name(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0].lower()


def pins() -> dict[str, str]:
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#")
    return dict(line.split("==") for line in lines)


def test_versions_agree() -> None:
    assert abyssal.__version__ == PROJECT["version"]
    assert metadata.version("abyssal") == PROJECT["version"]


def test_the_changelog_tells_of_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", PROJECT["version"])


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(abyssal.__file__).parent / "py.typed").is_file()


def test_everything_the_public_face_lists_is_there() -> None:
    assert len(set(abyssal.__all__)) == len(abyssal.__all__)
    assert [name for name in abyssal.__all__ if not hasattr(abyssal, name)] == []


def test_the_readmes_make_commands_are_in_the_makefile() -> None:
    commands = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(code_of((ROOT / "README.md").read_text()))))
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= commands <= targets


def test_files_the_readme_points_to_exist() -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", (ROOT / "README.md").read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_direct_dependency_but_the_documentations_is_pinned() -> None:
    extras = PROJECT["optional-dependencies"]
    direct = [
        *PROJECT["dependencies"],
        *(r for name, extra in extras.items() if name != "docs" for r in extra),
    ]
    assert sorted({requirement_name(r) for r in direct} - set(pins())) == []


def test_pinned_versions_are_those_the_tests_run_with() -> None:
    installed = {name: metadata.version(name).split("+")[0] for name in pins() if is_installed(name)}
    assert {name: pins()[name] for name in installed} == installed


@pytest.mark.slow
def test_wheel_and_source_archive_hold_the_package_and_nothing_else(tmp_path: Path) -> None:
    hatchling = pytest.importorskip("hatchling.build")
    with working_directory(ROOT):
        wheel = tmp_path / hatchling.build_wheel(str(tmp_path))
        source = tmp_path / hatchling.build_sdist(str(tmp_path))
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "abyssal").rglob("*.py")}
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    info = f"abyssal-{PROJECT['version']}.dist-info/"
    assert modules | {"abyssal/py.typed"} <= packed
    assert all(name.startswith(("abyssal/", info)) for name in packed)
    assert f"{info}licenses/LICENSE" in packed
    with tarfile.open(source) as archive:
        unpacked = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"src/{module}" for module in modules} <= unpacked
    assert {"README.md", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml"} <= unpacked
    assert not any(name.startswith(".venv") or name.endswith(".pyc") for name in unpacked)


def code_of(markdown: str) -> Iterator[str]:
    """Code blocks and code in the text; "make sure" in a sentence is no command."""
    for fenced, inline in re.findall(r"```[a-z]*\n(.*?)```|`([^`\n]+)`", markdown, re.DOTALL):
        yield fenced or inline


def is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


@contextmanager
def working_directory(path: Path) -> Iterator[None]:
    """Build backends read the project that is the current directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield
