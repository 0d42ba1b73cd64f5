"""Experiments run into a folder: nothing lost, nothing computed twice, failures told, one page for all."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from typer.testing import CliRunner

import abyssal.papers.experiments as registry
from abyssal.cli.app import app
from abyssal.papers.experiment import SIZES, Experiment, Finding, Work, verdict
from abyssal.papers.page import write_page
from abyssal.papers.reproduce import Settings, read_result, read_results, reproduce
from abyssal.sweep import Store, SweepError
from abyssal.util.files import read_csv, write_table
from toys.killed import finished, interruptible, wait_until


@dataclass(frozen=True)
class Count:
    """Settings of the toy: cells, where each call is noted, whether it breaks, where a run called "killed" waits."""

    cells: int
    log: str = ""
    breaks: bool = False
    waits_at: int | None = None


def square(cell):
    if cell["log"]:
        with open(cell["log"], "a") as log:  # appended whole: a line is far shorter than a page
            log.write(f"{os.environ.get('RUN', 'here')} {cell['i']}\n")
    while cell["i"] == cell["waits_at"] and os.environ.get("RUN") == "killed":
        time.sleep(0.05)
    if cell["breaks"] and cell["i"] == 1:
        raise ZeroDivisionError("cell 1 broke")
    return {"square": np.float32(cell["i"] ** 2), "root": math.sqrt(cell["i"])}


def run(settings, work):
    cells = [
        {"i": i, "log": settings.log, "breaks": settings.breaks, "waits_at": settings.waits_at}
        for i in range(settings.cells)
    ]
    found = work.cells(square, cells, phase="squares")
    return [
        {"i": cell["i"], **values, "even": cell["i"] % 2 == 0, "note": None}
        for cell, values in zip(cells, found, strict=True)
    ]


def check(rows, settings):
    biggest = max(row["square"] for row in rows)
    return [
        Finding("squares grow", f"up to {biggest:g}", np.bool_(biggest > 1)),
        Finding("there are many", f"{len(rows)}", True if len(rows) > 10 else None),
    ]


def plot(rows, settings):
    figure = Figure(figsize=(9, 3))
    figure.subplots().plot([row["i"] for row in rows], [row["square"] for row in rows])
    return figure


def toy(name: str = "toy2022/squares", **settings) -> Experiment:
    return Experiment(
        name=name,
        paper="Toy 2022",
        claim="Squares grow & <never> shrink.",
        sizes={size: Count(cells, **settings) for size, cells in zip(SIZES, (3, 12, 40), strict=True)},
        minutes=dict.fromkeys(SIZES, 0.1),
        run=run,
        check=check,
        plot=plot,
    )


def here(out: Path, size: str = "tiny", **others) -> Settings:
    return Settings(size, out, "sequential", **others)


def calls(log: Path) -> list[int]:
    return [int(line.split()[1]) for line in log.read_text().splitlines()] if log.exists() else []


def test_an_experiments_files_say_what_came_out(tmp_path):
    (result,) = reproduce([toy()], here(tmp_path, "small"))
    assert result.verdict == "holds" and result.rows == 12 and result.seconds >= 0
    folder = tmp_path / "toy2022" / "squares" / "small"
    rows = read_csv(folder / "rows.csv")
    assert rows[3] == {"i": 3, "square": 9.0, "root": math.sqrt(3), "even": False, "note": None}
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((folder / "results.json").read_text())
    assert data["verdict"] == "holds" and data["settings"]["cells"] == 12 and data["size"] == "small"
    assert data["findings"][0] == {"claim": "squares grow", "measured": "up to 121", "holds": True}
    assert "torch" in data["machine"]["Versions"] and "core" in data["machine"]["Machine"]
    read = read_result(folder)
    assert read is not None and read.findings == result.findings and read.verdict == "holds"


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([True, True], "holds"),
        ([True, np.bool_(False)], "does not hold"),
        ([None, np.False_], "does not hold"),
        ([True, None], "not decided"),
        ([], "not decided"),
    ],
)
def test_one_finding_against_a_claim_is_enough_and_an_open_one_leaves_it_open(answers, said):
    assert verdict([Finding("c", "m", answer) for answer in answers]) == said


def test_an_experiment_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"paper/what-it-is.*'Toy'"):
        toy("Toy")
    with pytest.raises(ValueError, match="minutes has to have tiny, small, paper; got small"):
        replace(toy(), minutes={"small": 1})


def test_what_is_finished_is_not_computed_again_but_judged_again(tmp_path):
    log = tmp_path / "log"
    experiment = toy(log=str(log))
    reproduce([experiment], here(tmp_path / "out"))
    strict = replace(experiment, check=lambda rows, settings: [Finding("stricter", "no", False)])
    (again,) = reproduce([strict], here(tmp_path / "out"))
    assert calls(log) == [0, 1, 2] and again.verdict == "does not hold"
    # A larger size takes over the cells that it shares.
    reproduce([experiment], here(tmp_path / "out", "small"))
    assert calls(log) == list(range(12))


def test_fresh_computes_each_cell_once_more(tmp_path):
    log = tmp_path / "log"
    experiments = [toy(log=str(log)), toy("toy2022/again", log=str(log))]
    reproduce(experiments, here(tmp_path / "out"))
    reproduce(experiments[:1], here(tmp_path / "out", fresh=True))
    assert calls(log) == [0, 1, 2] * 3
    reproduce(experiments, here(tmp_path / "out"))
    assert calls(log) == [0, 1, 2] * 3
    with Store(tmp_path / "out" / "repro.sqlite") as store:
        assert len(list(store.records("toy2022/squares/square"))) == 3


def test_a_changed_module_runs_again_from_stored_cells(tmp_path, monkeypatch):
    log, runs = tmp_path / "log", []
    experiment = toy(log=str(log))
    counted = replace(experiment, run=lambda settings, work: runs.append(1) or run(settings, work))
    reproduce([counted], here(tmp_path / "out"))
    reproduce([counted], here(tmp_path / "out"))
    assert len(runs) == 1
    monkeypatch.setattr("abyssal.papers.reproduce._source_hash", lambda experiment: "changed")
    reproduce([counted], here(tmp_path / "out"))
    assert len(runs) == 2 and calls(log) == [0, 1, 2]


def test_a_changed_function_of_cells_with_its_old_version_is_told(tmp_path):
    def work_of(store):
        return Work("toy2022/squares", store)

    def cell(cell):
        return {"x": 1}

    first = cell

    def cell(cell):
        return {"x": 2}

    with Store(tmp_path / "s.sqlite") as store:
        work_of(store).cells(first, [{"i": 1}])
        with pytest.warns(UserWarning, match="is not what stored cells were computed with.*above 1"):
            assert work_of(store).cells(cell, [{"i": 1}]) == [{"x": 1}]
        assert work_of(store).cells(cell, [{"i": 1}], version=2) == [{"x": 2}]
    with Store(tmp_path / "s.sqlite", fresh=True) as store:
        assert work_of(store).cells(cell, [{"i": 1}]) == [{"x": 2}]


def test_an_experiment_that_raises_is_failed_with_its_traceback_and_the_others_go_on(tmp_path):
    experiments = [toy("toy2022/bad", breaks=True), toy("toy2022/good")]
    bad, good = reproduce(experiments, here(tmp_path, retries=1))
    assert (bad.verdict, good.verdict) == ("failed", "not decided")
    kept = (tmp_path / "toy2022/bad/tiny/traceback.txt").read_text()
    assert "SweepError" in kept and kept.count("ZeroDivisionError: cell 1 broke") >= 2
    assert "attempt 2" in kept and "test_reproduce.py" in kept
    page = write_page(tmp_path, {e.name: e for e in experiments}, "typed").read_text()
    assert "! failed" in page and "ZeroDivisionError: cell 1 broke" in page
    # Mended, the good cells are still there, and nothing is left of the failure.
    (mended,) = reproduce([replace(experiments[0], sizes=experiments[1].sizes)], here(tmp_path))
    assert mended.status == "done" and not (tmp_path / "toy2022/bad/tiny/traceback.txt").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"check": lambda rows, settings: []}, "check returned no findings"),
        ({"run": lambda settings, work: []}, "run returned no rows"),
        ({"run": lambda settings, work: [{"x": [1, 2]}]}, "a row's x is a list"),
        ({"run": lambda settings, work: [{"x": object()}]}, "x: a object cannot be kept"),
        ({"plot": lambda rows, settings: 1 / 0}, "ZeroDivisionError"),
    ],
)
def test_what_an_experiment_may_not_return_is_told(tmp_path, change, said):
    (result,) = reproduce([replace(toy(), **change)], here(tmp_path))
    assert result.status == "failed" and said in result.traceback
    assert not (tmp_path / "toy2022/squares/tiny/figure.png").exists()


def test_experiments_run_at_different_times_share_a_page(tmp_path):
    known = {name: toy(name) for name in ("toy2022/a", "toy2022/b", "toy2022/never")}
    reproduce([known["toy2022/a"]], here(tmp_path, "small"))
    reproduce([known["toy2022/b"]], here(tmp_path))
    reproduce([known["toy2022/a"]], here(tmp_path))
    page = write_page(tmp_path, known, "abyssal reproduce & more").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)
    assert "Squares grow &amp; &lt;never&gt; shrink." in page and "reproduce &amp; more" in page
    assert "Also run at size small: ✓ holds" in page
    assert page.count("not run") == 1 and 'href="#toy2022-a"' in page and 'id="toy2022-a"' in page
    assert f"abyssal reproduce toy2022/b --size tiny --out {tmp_path}" in page
    assert "Of 2 claims 0 hold, 2 are not decided" in page  # at the tiny size both leave a finding open
    assert [result.size for result in read_results(tmp_path)["toy2022/a"]] == ["tiny", "small"]


def test_rows_become_the_same_table_in_both_formats(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"i": 1, "x": 0.1 + 0.2, "mixed": 1, "flag": True}, {"i": 2, "x": 3, "mixed": "a", "note": "é"}]
    assert [path.suffix for path in write_table(rows, tmp_path / "rows")] == [".csv", ".parquet"]
    table = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    assert table[0] == {"i": 1, "x": 0.1 + 0.2, "mixed": "1", "flag": True, "note": None}
    assert table[1] == {"i": 2, "x": 3.0, "mixed": "a", "flag": None, "note": "é"}


def test_work_without_arguments_computes_here_and_keeps_nothing():
    seen = []
    work = Work(progress=lambda *event: seen.append(event))
    assert [row["square"] for row in run(Count(3), work)] == [0, 1, 4]
    work.progress("more", 1, 2)
    assert seen[-2:] == [("test: squares", 3, 3), ("test: more", 1, 2)]
    with pytest.raises(SweepError, match=r"1 of 3 cells failed.*cell 1 broke"):
        run(Count(3, breaks=True), work)


# ---------------------------------------------------------------------- the registry


def test_every_experiment_can_be_loaded_and_says_what_it_is():
    for name, experiment in registry.experiments().items():
        assert name == experiment.name and experiment.paper and experiment.claim.rstrip(")").endswith(".")
        assert 0 < experiment.minutes["tiny"] <= experiment.minutes["small"] <= experiment.minutes["paper"], name


@pytest.fixture
def modules(tmp_path, monkeypatch) -> Iterator[Path]:
    """An empty folder in place of the package's own."""
    monkeypatch.setattr(registry, "__path__", [str(tmp_path)])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_module_that_cannot_be_loaded_names_itself_and_can_be_passed_over(modules):
    (modules / "broken.py").write_text("import no_such_package_anywhere")
    (modules / "empty.py").write_text("EXPERIMENT = 3")
    (modules / "paper2020").mkdir()
    (modules / "paper2020" / "__init__.py").write_text("")
    (modules / "paper2020" / "claim.py").write_text("")
    with pytest.raises(registry.ExperimentError, match=r"experiments\.broken cannot be imported: ModuleNotFoundError"):
        registry.experiments()
    faults: dict[str, str] = {}
    assert registry.experiments(broken=faults) == {}
    assert set(faults) == {"broken", "empty", "paper2020.claim"} and "has no EXPERIMENT" in faults["empty"]


def test_names_globs_and_all_select_in_order_and_once():
    known = ["a2020/x", "b2021/x", "b2021/y"]
    assert registry.select(["b2021/*", "b2021/y", "a2020/x"], known) == known
    assert registry.select(["all"], known) == known and registry.select(["*/y"], known) == ["b2021/y"]
    with pytest.raises(registry.ExperimentError, match=r"called 'c2022/\*'. There are: a2020/x"):
        registry.select(["b2021/*", "c2022/*"], known)


# ---------------------------------------------------------------------- the command


@pytest.fixture
def toys(monkeypatch):
    """Two experiments in place of the papers', one of which raises."""
    known = {e.name: e for e in (toy("toy2022/bad", breaks=True), toy("toy2022/good"))}
    monkeypatch.setattr(registry, "experiments", lambda broken=None: known)
    return known


def test_the_command_lists_experiments_with_the_status_of_their_last_run(toys, tmp_path):
    ran = CliRunner().invoke(
        app, ["reproduce", "*/good", "--size", "tiny", "--out", str(tmp_path / "o"), "--jobs", "1"]
    )
    assert ran.exit_code == 0, ran.output
    assert "toy2022/good: ? not decided" in ran.output and "✓ squares grow: up to 4" in ran.output
    listed = CliRunner().invoke(app, ["reproduce", "--out", str(tmp_path / "o")])
    assert listed.exit_code == 0
    assert "not run" in listed.output and "? not decided" in listed.output and "0.1 / 0.1" in listed.output
    assert not (tmp_path / "repro").exists()


def test_the_commands_exit_code_says_that_an_experiment_raised(toys, tmp_path):
    ran = CliRunner().invoke(app, ["reproduce", "all", "--size", "tiny", "--out", str(tmp_path), "--jobs", "1"])
    assert ran.exit_code == 1
    assert "toy2022/bad: failed: " in ran.output and "2 experiments: 1 failed, 1 not decided." in ran.output
    assert "! failed" in (tmp_path / "index.html").read_text()


def test_a_module_that_cannot_be_imported_does_not_stop_the_others_but_shows_in_the_exit_code(
    toys, tmp_path, monkeypatch
):
    def with_fault(broken=None):
        broken["bad_module"] = "bad_module cannot be imported: SyntaxError"
        return toys

    monkeypatch.setattr(registry, "experiments", with_fault)
    ran = CliRunner().invoke(app, ["reproduce", "*/good", "--size", "tiny", "--out", str(tmp_path), "--jobs", "1"])
    assert ran.exit_code == 1 and "bad_module cannot be imported" in ran.output
    assert (tmp_path / "toy2022/good/tiny/results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none/such"], "No experiment is called 'none/such'"),
        (["all", "--size", "huge"], "no size 'huge'"),
        (["all", "--engine", "slurm"], "no engine"),
        (["all", "--jobs", "0"], "jobs has to be"),
        (["all", "--retries", "-1"], "retries has to be"),
    ],
)
def test_bad_input_is_refused_before_a_folder_is_made(toys, tmp_path, arguments, said):
    out = tmp_path / "repro"
    ran = CliRunner().invoke(app, ["reproduce", "--out", str(out), *arguments])
    assert ran.exit_code == 2 and not out.exists()
    assert said in ran.output and len(ran.output.strip().splitlines()) == 1


# ---------------------------------------------------------------------- killed

KILLED = """
import sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from test_reproduce import toy
from abyssal.papers.reproduce import Settings, reproduce

log = sys.argv[2]
experiments = [toy("toy2022/first", log=log), toy("toy2022/second", log=log, waits_at=30)]
if __name__ == "__main__":
    for result in reproduce(experiments, Settings("paper", Path(sys.argv[1]), "local", 2)):
        print(result.verdict)
"""


def start(run_name: str, tmp_path: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"RUN": run_name, "OMP_NUM_THREADS": "1"}
    folders = Path(__file__).parents[:2]  # this file's, and that of `toys`
    command = [sys.executable, "-c", KILLED, *map(str, (tmp_path / "out", tmp_path / "log", *folders))]
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=interruptible,
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_was_killed_or_interrupted_goes_on_and_computes_nothing_twice(tmp_path, how):
    first = start("killed", tmp_path)
    store = tmp_path / "out" / "repro.sqlite"
    wait_until(lambda: len(finished(store, "toy2022/second/%")) >= 15, first)
    os.killpg(first.pid, how) if how == signal.SIGINT else first.send_signal(how)
    first.communicate()
    runs = read_results(tmp_path / "out")
    assert runs["toy2022/first"][0].status == "done" and runs["toy2022/second"][0].status == "stopped"
    with Store(store) as opened:
        kept = {record.parameters["i"] for record in opened.records("toy2022/second/square")}
    assert 0 < len(kept) < 40

    second = start("second", tmp_path)
    said, trouble = second.communicate()
    assert second.returncode == 0, trouble
    assert said.split() == ["holds", "holds"]
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    again = sorted(int(i) for name, i in lines if name == "second")
    assert again == sorted(set(range(40)) - kept)
