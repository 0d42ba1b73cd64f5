"""The command `phase`: files, resuming after kill -9, and what it refuses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from abyssal.cli.app import app
from toys.killed import finished, wait_until

GRID = ["--depth", "400", "--width", "24", "--betas", "0.2:1.2:11", "--hursts", "0.1:0.9:9", "--models", "6"]


def start(out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "abyssal", "phase", "--out", str(out), "--jobs", "2", *GRID]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_killed_diagram_goes_on_and_ends_in_the_same_table(tmp_path):
    out = tmp_path / "killed"
    first = start(out)
    wait_until(lambda: len(finished(out / "phase.sqlite")) >= 5, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = finished(out / "phase.sqlite")
    assert 5 <= len(before) < 54 and not (out / "phase.csv").exists()

    said, _ = start(out).communicate()
    after = finished(out / "phase.sqlite")
    assert len(after) == 54 and all(computed == 1 for computed, _ in after.values())
    assert all(after[key] == row for key, row in before.items())
    assert f"{54 - len(before)} models computed now" in said

    whole = CliRunner().invoke(app, ["phase", "--out", str(tmp_path / "whole"), "--engine", "sequential", *GRID])
    assert whole.exit_code == 0, whole.output
    assert (out / "phase.csv").read_bytes() == (tmp_path / "whole" / "phase.csv").read_bytes()


@pytest.mark.parametrize("family", [["--hursts", "0.3,0.5,0.8"], ["--init", "iid"], ["--hursts", "0.4"]])
def test_the_page_needs_nothing_from_outside_and_says_what_the_table_says(tmp_path, family):
    arguments = ["--depth", "30", "--width", "8", "--betas", "0.2:1.2:6", "--models", "3", "--engine", "sequential"]
    result = CliRunner().invoke(app, ["phase", "--out", str(tmp_path), *arguments, *family])
    assert result.exit_code == 0, result.output
    page = (tmp_path / "index.html").read_text()
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)
    assert page.count('<svg role="img"') == 2
    assert (tmp_path / "phase.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "phase.csv").read_text().splitlines()
    assert len(lines) == 1 + 6 * (3 if family[1] == "0.3,0.5,0.8" else 1)
    printed = re.findall(r": (\d\.\d{3})", result.output)
    # Rounded twice, a figure may be off by one in its second place.
    shown = {float(value) for value in re.findall(r">(\d\.\d{2})(?: \(|<)", page)}
    assert printed and all(min(abs(float(value) - other) for other in shown) < 0.0056 for value in printed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hursts", "0,0.5"], "strictly between 0 and 1"),
        (["--hursts", "1"], "strictly between 0 and 1"),
        (["--betas", "nan"], "finite number"),
        (["--betas", "low:high:3"], "FROM:TO:COUNT"),
        (["--depth", "0"], "depth has to be"),
        (["--network", "res2"], "no network"),
        (["--init", "fmb"], "no weight family"),
        (["--engine", "slurm"], "no engine"),
        (["--jobs", "0"], "jobs has to be"),
        (["--models", "0"], "models has to be"),
    ],
)
def test_bad_input_is_refused_before_a_folder_is_made(tmp_path, arguments, said):
    out = tmp_path / "phase"
    result = CliRunner().invoke(app, ["phase", "--out", str(out), *arguments])
    assert result.exit_code == 2 and not out.exists()
    assert said in result.output and "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["phase", "--out", str(tmp_path / "file" / "phase")])
    assert result.exit_code == 2 and "cannot write there" in result.output


def test_a_folder_with_another_file_in_the_stores_place_is_refused(tmp_path):
    (tmp_path / "phase.sqlite").write_text("not a database, but long enough to look like the header of one" * 20)
    result = CliRunner().invoke(app, ["phase", "--out", str(tmp_path), *GRID])
    assert result.exit_code == 2 and "is no store" in result.output
