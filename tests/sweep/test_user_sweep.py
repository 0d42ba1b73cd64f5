"""Sweeps of a user's own function: any grid, any engine, retried, resumed, told when the file has changed."""

from __future__ import annotations

import csv
import io
import math
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from abyssal.cli.app import app
from abyssal.sweep import FunctionError, GridError, Outcome, Store, SweepError, file_function, grid_of, read_grid, run
from abyssal.sweep.page import save
from abyssal.sweep.picture import draw
from abyssal.sweep.result import SweepResult, sweep
from abyssal.sweep.store import plain
from abyssal.util.environment import environment
from toys.killed import finished, interruptible, wait_until

TRAIN = """
import random
from dataclasses import dataclass

import numpy as np
import torch

from beside import SCALE


@dataclass
class Setting:
    lr: float


def train(lr, depth, seed=0):
    noise = torch.randn(3).sum() + np.random.randn() + random.random()  # seeded by the sweep
    return {"loss": lr * depth * SCALE, "noise": noise, "setting": Setting(lr).lr, "curve": torch.arange(2.0)}


def number(lr):
    return 2 * lr


def nothing(lr):
    pass


def fragile(lr, depth):
    if depth == 2:
        raise RuntimeError(f"no depth {depth}")
    return {"loss": lr}
"""
GRID = """
[grid]
lr = { logspace = [0.01, 1.0, 3] }
depth = [1, 2]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with `train.py`, what it imports, and `grid.toml`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "beside.py").write_text("SCALE = 10")
    (tmp_path / "grid.toml").write_text(GRID)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    return tmp_path


def command(*arguments: str, grid: str = "grid.toml"):
    return CliRunner().invoke(app, ["sweep", *arguments, "--grid", grid, "--out", "out", "--jobs", "1"])


def table(path: Path = Path("out/results.csv")) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------------- the grid


def test_a_grid_crosses_its_axes_and_adds_explicit_cells_to_what_is_fixed(tmp_path):
    file = tmp_path / "grid.toml"
    file.write_text(
        "[fixed]\nepochs = 5\n[grid]\nlr = { logspace = [1e-4, 1.0, 5] }\nh = { linspace = [0.1, 0.5, 3] }\n"
        'seed = { range = 2 }\n[[cells]]\nlr = 1e-4\nh = 0.1\nseed = 0\n[[cells]]\nname = "other"\nepochs = 7\n'
    )
    grid = read_grid(file)
    assert grid.axes["lr"] == (1e-4, 1e-3, 1e-2, 0.1, 1.0)  # exactly: rounded to 12 digits
    assert grid.axes["h"] == (0.1, 0.3, 0.5) and grid.axes["seed"] == (0, 1)
    assert len(grid.cells) == 5 * 3 * 2 + 1  # the first explicit cell is one of the grid's
    assert grid.cells[1] == {"epochs": 5, "lr": 1e-4, "h": 0.1, "seed": 1}
    assert grid.cells[-1] == {"epochs": 7, "name": "other"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "there are no cells"),
        ("[fixed]\na = 1", "there are no cells"),
        ("[gird]\na = [1]", "gird is unknown here"),
        ("[grid]\na = 3", r"\[grid\] a = 3: expected a list"),
        ("[grid]\na = []", "a is empty"),
        ("[grid]\na = { linspace = [0, 1] }", r"expected \[first, last, count\]"),
        ("[grid]\na = { logspace = [0, 1, 3] }", "have to be positive"),
        ("[grid]\na = { linspace = [0, 1, 1] }", "whole number from 2"),
        ("[grid]\na = { range = 0 }", "expected a count"),
        ("[grid]\na = { steps = 3 }", "expected a list"),
        ("[fixed]\na = 1\n[grid]\na = [1]", r"a is in \[fixed\] and in \[grid\]"),
        ("[grid]\na = [nan]", r"\['a'\]: nan is no finite number"),
        ("[grid]\na = [1979-05-27]", "a date cannot be part"),
        ("[cells]\na = 1", "with two brackets"),
        ("grid = 3", "write .grid."),
        ("a = [", "is no TOML"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused_with_its_file_and_entry(tmp_path, text, said):
    file = tmp_path / "grid.toml"
    file.write_text(text)
    with pytest.raises(GridError, match=said) as caught:
        read_grid(file)
    assert str(file) in str(caught.value)


# ---------------------------------------------------------------------- the function


def test_a_function_of_a_file_travels_with_its_text(folder):
    function = file_function("train.py:train")
    sent = pickle.dumps(function)
    (folder / "train.py").write_text("def train(lr, depth): return -1")
    arrived = pickle.loads(sent)
    assert arrived({"lr": 1.0, "depth": 2})["loss"] == 20 and arrived.version == function.version
    changed = file_function("train.py:train")
    assert changed.version != function.version and changed({"lr": 1.0, "depth": 2}) == {"result": -1}


def test_a_function_that_seeds_nothing_gives_the_same_for_the_same_cell_and_no_other(folder):
    function = file_function("train.py:train")
    cells = [{"lr": 0.1, "depth": 1, "seed": seed} for seed in (0, 1)]
    (first, other), again = ([float(function(cell)["noise"]) for cell in cells], float(function(cells[0])["noise"]))
    assert first == again != other


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("train.py", "expected a file and a function"),
        ("train:train", "expected a file and a function"),
        ("no.py:train", "no.py: cannot be read"),
        ("train.py:trian", "no function 'trian'. It has train, number, nothing, fragile"),
        ("bad.py:f", "bad.py failed when run: ZeroDivisionError"),
    ],
)
def test_a_function_that_is_not_there_is_refused(folder, spec, said):
    (folder / "bad.py").write_text("1 / 0")
    with pytest.raises(FunctionError, match=re.escape(said)):
        file_function(spec)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.tensor(0.5), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        ((1, (2.0, np.float64(3))), [1, [2.0, 3.0]]),
        ({"a": torch.tensor(3)}, {"a": 3}),
    ],
)
def test_what_a_cell_returns_has_the_types_that_the_store_gives_back(tmp_path, given, kept):
    fresh = plain({"x": given})["x"]
    with Store(tmp_path / "s.sqlite") as store:
        store.put("s", 1, {}, {"x": fresh})
        record = store.get("s", 1, {})
    assert record is not None and fresh == kept == record.values["x"]
    assert type(fresh) is type(kept) is type(record.values["x"])


def test_tensors_are_kept_as_arrays_and_what_cannot_be_kept_is_named():
    curve = torch.arange(3.0, requires_grad=True)
    assert plain({"x": curve})["x"].tolist() == [0, 1, 2]
    for bad, said in (
        ({"m": torch.nn.Linear(1, 1)}, "m: a Linear cannot be kept"),
        ({"a": [np.zeros(2)]}, r"a\[0\]: a ndarray cannot be kept"),
        ({"b": torch.zeros(2, dtype=torch.bfloat16)}, "b: numpy has no bfloat16"),
        ({3: 1}, "named by texts; got the name 3"),
        (0.5, "has to return its results by name"),
    ):
        with pytest.raises(TypeError, match=said):
            plain(bad)


# ---------------------------------------------------------------------- retries


def test_a_cell_that_failed_is_tried_again_and_every_traceback_is_kept(tmp_path):
    tries = []

    def flaky(cell):
        tries.append(cell["i"])
        if cell["i"] == 1 and tries.count(1) < 3:
            raise OSError(f"attempt {tries.count(1)}")
        return {"x": cell["i"]}

    seen = []
    with Store(tmp_path / "s.sqlite") as store:
        outcomes = run(
            [{"i": i} for i in range(3)], flaky, study="s", store=store, engine="sequential", retries=2,
            progress=lambda phase, done, total: seen.append(done),
        )  # fmt: skip
        assert tries == [0, 1, 2, 1, 1]
        assert [len(outcome.tracebacks) for outcome in outcomes] == [0, 2, 0] and outcomes[1].traceback == ""
        assert seen == [0, 1, 2, 3]
        assert store.failures("s") == []
        kept = [trace for _, trace in store.attempts("s")]
    assert "OSError: attempt 1" in kept[0] and "OSError: attempt 2" in kept[1] and len(kept) == 2


def test_a_cell_that_always_fails_says_how_each_time():
    with pytest.raises(SweepError) as caught:
        run([{"i": 1}], lambda cell: 1 / 0, study="s", engine="sequential", retries=2)
    assert len(caught.value.failures[0].tracebacks) == 3
    with pytest.raises(ValueError, match="retries has to be a whole number"):
        run([{"i": 1}], lambda cell: 1 / 0, study="s", engine="sequential", retries=-1)


# ---------------------------------------------------------------------- the command


@pytest.mark.slow
def test_the_command_ends_in_a_table_a_heat_map_and_a_page(folder):
    ran = command("train.py:train")
    assert ran.exit_code == 0, ran.output
    assert "6 cells: 6 computed now, 0 stored, 0 failed." in ran.output
    rows = table()
    assert [(row["lr"], row["depth"]) for row in rows][:3] == [("0.01", "1"), ("0.01", "2"), ("0.1", "1")]
    assert float(rows[1]["loss"]) == 0.01 * 2 * 10 and "curve" not in rows[0]
    page = (folder / "out" / "index.html").read_text()
    assert "6 cells of train.py:train" in page and "data:image/png" in page and "Arrays, in" in page
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)
    assert (folder / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    again = command("train.py:train")
    assert "6 cells: 0 computed now, 6 stored, 0 failed." in again.output
    assert table() == rows


@pytest.mark.slow
def test_a_larger_grid_computes_only_what_is_new(folder):
    command("train.py:train")
    (folder / "grid.toml").write_text(GRID.replace("[1, 2]", "[1, 2, 3]"))
    assert "9 cells: 3 computed now, 6 stored" in command("train.py:train").output


@pytest.mark.slow
def test_a_changed_file_is_told_and_computed_again_unless_kept(folder):
    command("train.py:train")
    (folder / "train.py").write_text(TRAIN.replace("lr * depth", "-lr * depth"))
    kept = command("train.py:train", "--keep")
    assert "train.py has changed since 6 cells were computed: their results are kept" in kept.output
    assert "6 cells: 0 computed now, 6 stored" in kept.output and float(table()[0]["loss"]) > 0
    assert "6 cells come from an earlier text" in (folder / "out" / "index.html").read_text()
    fresh = command("train.py:train")
    assert "has changed since 6 cells were computed: they are computed again (--keep takes" in fresh.output
    assert "6 cells: 6 computed now" in fresh.output and float(table()[0]["loss"]) < 0
    assert "changed" not in command("train.py:train").output


def test_failed_cells_are_in_table_page_and_exit_code_and_the_others_are_not_lost(folder):
    ran = command("train.py:fragile", "--retries", "1")
    assert ran.exit_code == 1 and "3 computed now, 0 stored, 3 failed" in ran.output
    assert [row["error"] for row in table()] == ["", "RuntimeError: no depth 2"] * 3
    page = (folder / "out" / "index.html").read_text()
    assert "Failed: lr = 0.01, depth = 2" in page and "2 attempts." in page and "RuntimeError: no depth 2" in page


def test_a_function_may_change_what_is_fixed_for_all_cells(folder):
    (folder / "train.py").write_text("def train(lr, opt):\n    opt['betas'].append(lr)\n    return len(opt['betas'])\n")
    (folder / "grid.toml").write_text("[fixed]\nopt = { betas = [0.9] }\n[grid]\nlr = [0.1, 0.2, 0.3]\n")
    for computed in (3, 0):  # the second time all are found by what they were called with
        shown = command("train.py:train")
        assert shown.exit_code == 0 and f"3 cells: {computed} computed now" in shown.stdout
        assert [row["result"] for row in table()] == ["2", "2", "2"]
        assert {row["opt"] for row in table()} == {'{"betas": [0.9]}'}


def test_leaving_by_sys_exit_fails_a_cell_and_refuses_a_file(folder):
    (folder / "train.py").write_text(
        "import sys\ndef train(lr, depth):\n    return lr if depth == 1 else sys.exit(0)\n"
    )
    shown = command("train.py:train")
    assert shown.exit_code == 1 and "3 failed" in shown.stdout
    assert [row["error"] for row in table()] == ["", "SystemExit: 0"] * 3
    (folder / "train.py").write_text("import sys\ndef train(lr, depth):\n    return lr\nsys.exit()\n")
    shown = command("train.py:train")
    assert shown.exit_code == 2 and "ends with sys.exit() when run" in shown.output


@pytest.mark.parametrize("over", [("lr",), ("lr", "depth")])
def test_whole_numbers_beyond_all_floats_are_kept_and_not_drawn(over, tmp_path):
    cells = [{"lr": 1, "depth": 1}, {"lr": 10**400, "depth": 1}, {"lr": 2, "depth": 2 if len(over) == 2 else 1}]
    values = [{"r": 1.5}, {"r": 10**400}, {"r": -(10**400)}]
    result = SweepResult("s", tuple(Outcome(cell, value) for cell, value in zip(cells, values, strict=True)))
    page = save(result, tmp_path, "abyssal sweep", environment())[-1].read_text()
    assert "1.000e+400" in page and "-1.000e+400" in page and str(10**400) not in page
    assert str(10**400) in (tmp_path / "results.csv").read_text()
    with pytest.raises(TypeError, match="r: a whole number of 33,220 bits cannot be kept"):
        plain({"r": 10**10000})


def test_a_single_number_is_a_result_too_and_one_parameter_makes_a_curve(folder):
    (folder / "grid.toml").write_text("[grid]\nlr = [1, 2, 3]")
    assert command("train.py:number").exit_code == 0
    assert [row["result"] for row in table()] == ["2", "4", "6"]
    assert "Over lr." in (folder / "out" / "index.html").read_text()


def test_a_function_that_returns_nothing_is_told_so(folder):
    (folder / "grid.toml").write_text("[grid]\nlr = [1]")
    ran = command("train.py:nothing")
    assert ran.exit_code == 1 and "nothing returned None; expected a number" in ran.output


@pytest.mark.parametrize(
    ("arguments", "grid", "said"),
    [
        (["train.py:train"], "none.toml", "none.toml: there is no such file"),
        (["train.py:trian"], "grid.toml", "no function 'trian'"),
        (["train.py:number"], "grid.toml", "number(lr) cannot be called with the cell {'lr': 0.01, 'depth': 1}"),
        (["train.py:train", "--engine", "slurm"], "grid.toml", "no engine"),
        (["train.py:train", "--retries", "-1"], "grid.toml", "retries has to be"),
        (["train.py:train"], "beside.py", "SCALE is unknown here"),
    ],
)
def test_bad_input_is_refused_before_a_folder_is_made(folder, arguments, grid, said):
    ran = command(*arguments, grid=grid)
    assert ran.exit_code == 2 and not (folder / "out").exists()
    assert said in ran.output and len(ran.output.strip().splitlines()) == 1


def test_a_result_called_like_a_parameter_keeps_a_column_of_its_own():
    outcomes = tuple(Outcome({"lr": lr}, {"lr": lr / 2, "cpu_seconds": 7}) for lr in (1.0, 2.0))
    rows = SweepResult("f.py:f", outcomes).rows
    assert [(row["lr"], row["result_lr"], row["result_cpu_seconds"]) for row in rows] == [(1, 0.5, 7), (2, 1, 7)]


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        ([{"a": i, "b": j, "seed": s} for i in (1, 10, 100) for j in "xy" for s in (0, 1)], "Over a and b. Mean over"),
        ([{"a": i, "seed": s} for i in (1, 10, 1000) for s in (0, 1)], "Over a. Mean over seeds. Dots are cells."),
        ([{"seed": s} for s in range(4)], "Over seed."),
        ([{"a": [1, 2], "b": True}, {"a": [3], "b": False}], "Over a and b."),
        ([{"a": 1}], None),
        ([{"a": i, "b": i, "c": i} for i in range(3)], None),
    ],
)
def test_a_picture_is_drawn_over_one_or_two_parameters_and_else_its_absence_explained(cells, said):
    values = [{"y": float(10**i), "bad": math.nan, "word": "w"} for i, _ in enumerate(cells)]
    outcomes = tuple(Outcome(cell, value) for cell, value in zip(cells, values, strict=True))
    figure, caption = draw(SweepResult("f.py:f", outcomes))
    if said is None:
        assert figure is None and "one or two parameters" in caption
    else:
        assert figure is not None and caption.startswith(said)
        figure.savefig(io.BytesIO(), format="png")


# ---------------------------------------------------------------------- engines


@pytest.mark.slow
@pytest.mark.parametrize(("package", "engine"), [("ray", "ray"), ("distributed", "dask")])
def test_two_workers_of_a_cluster_and_the_local_engine_give_the_same_bits(folder, package, engine):
    pytest.importorskip(package)
    function, cells = file_function("train.py:train"), read_grid("grid.toml").cells
    found = {}
    for name in ("local", "sequential", engine):
        with Store(folder / f"{name}.sqlite") as store:
            outcomes = sweep(function, cells, store, engine=name, jobs=2).outcomes
        found[name] = [
            (values["loss"].hex(), values["noise"].hex(), values["curve"].tobytes())
            for values in (outcome.values for outcome in outcomes)
        ]
    assert found["local"] == found["sequential"] == found[engine]


SLOW = """
import os, time

def work(i):
    with open("log", "a") as log:  # appended whole: a line is far shorter than a page
        log.write(f"{os.environ['RUN']} {i}\\n")
    while os.environ["RUN"] == "killed" and i >= 40:  # until it is
        time.sleep(0.05)
    return i ** 0.5
"""


def start(run_name: str, folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"RUN": run_name, "OMP_NUM_THREADS": "1"}
    arguments = ["sweep", "slow.py:work", "--grid", "slow.toml", "--out", "out", "--jobs", "2"]
    return subprocess.Popen(
        [sys.executable, "-m", "abyssal", *arguments], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, preexec_fn=interruptible,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_sweep_that_was_killed_or_interrupted_goes_on_and_computes_nothing_twice(folder, how):
    (folder / "slow.py").write_text(SLOW)
    (folder / "slow.toml").write_text("[grid]\ni = { range = 60 }")
    log = folder / "log"
    first = start("killed", folder)
    wait_until(lambda: len(finished(folder / "out" / "sweep.sqlite", "slow.py:work")) >= 20, first)
    os.killpg(first.pid, how) if how == signal.SIGINT else first.send_signal(how)
    _, trouble = first.communicate()
    if how == signal.SIGINT:
        assert first.returncode == 130 and "the same command goes on" in trouble
    with Store(folder / "out" / "sweep.sqlite") as store:
        kept = {record.parameters["i"] for record in store.records("slow.py:work")}
    assert 0 < len(kept) < 60

    second = start("second", folder)
    said, trouble = second.communicate()
    assert second.returncode == 0, trouble
    assert f"60 cells: {60 - len(kept)} computed now, {len(kept)} stored" in said
    again = sorted(int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("second"))
    assert again == sorted(set(range(60)) - kept)
    assert [float(row["result"]) for row in table()] == [i**0.5 for i in range(60)]


def test_cells_given_as_a_mapping_are_the_files_cells():
    assert grid_of({"grid": {"a": [1, 2]}, "fixed": {"b": 3}}).cells == ({"b": 3, "a": 1}, {"b": 3, "a": 2})


@pytest.mark.slow
def test_the_documentations_example_works_as_typed(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text()
    blocks = re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", text, flags=re.DOTALL)
    assert [name for name, _ in blocks] == ["train.py", "grid.toml"]
    for name, source in blocks:
        (tmp_path / name).write_text(source)
    (typed,) = re.findall(r"^abyssal (sweep train.py:train .*)$", text, flags=re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    ran = CliRunner().invoke(app, [*typed.split(), "--jobs", "1"])
    assert ran.exit_code == 0, ran.output
    assert "25 cells: 25 computed now" in ran.output
    rows = table(tmp_path / "sweep" / "results.csv")
    assert len(rows) == 25 and {row["steps"] for row in rows} == {"40"}
    assert (tmp_path / "sweep" / "figure.png").exists()
