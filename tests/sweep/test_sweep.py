"""Sweeps: every cell computed once, on any engine, and nothing lost when the process is killed."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch

from abyssal.sweep import Store, SweepError, canonical, key_of, run, seed_of
from abyssal.sweep.engine import check_engine
from abyssal.sweep.store import StoreError
from toys.killed import finished, wait_until

CELLS = [{"i": i, "beta": i / 7} for i in range(12)]


def square(cell):
    generator = torch.Generator().manual_seed(seed_of(cell))
    return {"square": cell["i"] ** 2, "draw": torch.randn(5, generator=generator).numpy()}


def test_a_store_gives_back_what_it_was_given_bit_for_bit(tmp_path):
    values = {
        "array": np.array([[1.0, math.nan], [-math.inf, 1e-320]]),
        "whole": np.arange(3, dtype=np.int8),
        "number": 0.1 + 0.2,
        "far": math.inf,
        "text": "é",
        "nested": {"list": [1, None, True]},
    }
    with Store(tmp_path / "s.sqlite") as store:
        store.put("study", 1, {"a": 1}, values, seconds=2.5)
    with Store(tmp_path / "s.sqlite") as store:
        record = store.get("study", 1, {"a": 1})
    assert record is not None and record.seconds == 2.5 and record.parameters == {"a": 1}
    assert record.values["array"].tobytes() == values["array"].tobytes()
    assert record.values["whole"].dtype == np.int8
    for name in ("number", "far", "text", "nested"):
        assert record.values[name] == values[name]


def test_study_version_and_every_parameter_are_part_of_the_key(tmp_path):
    with Store(tmp_path / "s.sqlite") as store:
        store.put("study", 1, {"a": 1, "b": 2.0}, {"x": 1})
        assert store.has("study", 1, {"b": 2.0, "a": 1})
        assert not store.has("other", 1, {"a": 1, "b": 2.0})
        assert not store.has("study", 2, {"a": 1, "b": 2.0})
        assert not store.has("study", 1, {"a": 1, "b": math.nextafter(2.0, 3)})


def test_canonical_parameters_do_not_depend_on_order_or_on_numpy():
    plain = {"b": [1, 2.5], "a": {"y": True, "x": None}}
    same = {
        "a": {"x": None, "y": np.bool_(True)},
        "b": [np.int64(1), np.float64(2.5)],
    }
    assert canonical(plain) == canonical(same)
    assert key_of("s", 1, plain) == key_of("s", 1, same)


@pytest.mark.parametrize(
    ("bad", "error", "said"),
    [
        ({"beta": math.nan}, ValueError, r"parameters\['beta'\]: nan"),
        ({"f": square}, TypeError, r"parameters\['f'\]: a function"),
        ({1: 2}, TypeError, "names have to be texts"),
    ],
)
def test_what_cannot_name_a_cell_is_refused(bad, error, said):
    with pytest.raises(error, match=said):
        canonical(bad)


def test_a_file_that_is_no_store_is_refused_and_left_as_it_was(tmp_path):
    file = tmp_path / "text.sqlite"
    file.write_text("no database, but a text that is long enough to be read as the header of one" * 20)
    before = file.read_bytes()
    with pytest.raises(StoreError, match=r"text\.sqlite: is no store"):
        Store(file)
    assert file.read_bytes() == before
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(tmp_path / "no such folder" / "s.sqlite")


def test_two_writers_lose_nothing(tmp_path):
    path, errors = tmp_path / "s.sqlite", []

    def write(who):
        try:
            with Store(path) as store:
                for i in range(40):
                    store.put("study", 1, {"i": i, "who": who}, {"x": np.full(100, i)})
                    store.put("study", 1, {"shared": i}, {"x": who})
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(who,)) for who in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    with Store(path) as store:
        records = list(store.records("study"))
    assert len(records) == 3 * 40
    # Of what both wrote, the first one stays, and the second is counted.
    assert Counter(record.computed for record in records) == {1: 80, 2: 40}


def test_a_sweep_computes_only_what_is_missing_and_answers_in_order(tmp_path):
    seen = []
    with Store(tmp_path / "s.sqlite") as store:
        run(CELLS[3:7], square, study="s", store=store, engine="sequential")
        outcomes = run(
            CELLS, square, study="s", store=store, engine="sequential", progress=lambda *event: seen.append(event)
        )
    assert [outcome.values["square"] for outcome in outcomes] == [i**2 for i in range(12)]
    assert [outcome.stored for outcome in outcomes] == [3 <= i < 7 for i in range(12)]
    assert seen == [("s", done, 12) for done in range(4, 13)]


def test_equal_cells_are_computed_once():
    calls = []
    outcomes = run([{"i": 1}, {"i": 1}], lambda c: calls.append(c) or {"x": 1}, study="s", engine="sequential")
    assert len(calls) == 1 and len(outcomes) == 2


def test_a_failing_cell_is_recorded_and_the_others_go_on(tmp_path):
    def fragile(cell):
        if cell["i"] in (2, 5):
            raise ZeroDivisionError(f"cell {cell['i']} broke")
        return {"x": cell["i"]}

    with Store(tmp_path / "s.sqlite") as store:
        with pytest.raises(SweepError, match=r"2 of 12 cells failed: .*cell 2 broke") as caught:
            run(CELLS, fragile, study="s", store=store, engine="sequential")
        assert [failure.parameters["i"] for failure in caught.value.failures] == [2, 5]
        assert sum(store.has("s", 1, cell) for cell in CELLS) == 10
        assert all("ZeroDivisionError" in trace for _, trace in store.failures("s"))
        assert len(store.failures("s")) == 2
        # Mended, only those two are computed, and no failure is left.
        outcomes = run(CELLS, square, study="s", store=store, engine="sequential")
        assert [outcome.stored for outcome in outcomes] == [i not in (2, 5) for i in range(12)]
        assert store.failures("s") == []


def changes_its_cell(cell):
    cell["nested"]["calls"].append(1)
    return {"lr": cell.pop("lr"), "calls": len(cell["nested"]["calls"])}


@pytest.mark.parametrize(("engine", "jobs"), [("sequential", None), ("local", 1)])
def test_a_function_may_change_its_cell_and_the_result_stays_the_cells_own(tmp_path, engine, jobs):
    shared = {"calls": []}
    cells = [{"lr": lr, "nested": shared} for lr in (1, 2, 3)]
    with Store(tmp_path / "s.sqlite") as store:
        found = run(cells, changes_its_cell, study="s", store=store, engine=engine, jobs=jobs)
        assert cells == [{"lr": lr, "nested": {"calls": []}} for lr in (1, 2, 3)]
        assert [outcome.values for outcome in found] == [{"lr": lr, "calls": 1} for lr in (1, 2, 3)]
        assert [outcome.parameters for outcome in found] == cells
        assert all(store.get("s", 1, cell).values["lr"] == cell["lr"] for cell in cells)
        assert all(outcome.stored for outcome in run(cells, changes_its_cell, study="s", store=store))


def test_a_cell_may_be_a_mapping_that_cannot_be_copied():
    cells = [MappingProxyType({"lr": lr, "nested": MappingProxyType({"calls": [lr]})}) for lr in (1, 2)]
    found = run(cells, lambda cell: {"calls": cell["nested"]["calls"].pop()}, study="s", engine="sequential")
    assert [outcome.values["calls"] for outcome in found] == [1, 2] and cells[0]["nested"]["calls"] == [1]


def test_an_array_that_a_function_uses_again_is_kept_as_it_was():
    memory = np.zeros(2)

    def fill(cell):
        memory[:] = cell["i"]
        return {"array": memory, "tensor": torch.from_numpy(memory)}

    found = run([{"i": 1}, {"i": 2}], fill, study="s", engine="sequential")
    assert [outcome.values[name][0] for outcome in found for name in ("array", "tensor")] == [1, 1, 2, 2]


def leaves(cell):
    if cell["i"] % 2:
        sys.exit(0)
    return {"i": cell["i"]}


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cell_that_ends_the_process_has_failed_and_the_others_go_on(jobs):
    with pytest.raises(SweepError, match=r"2 of 4 cells failed: .*SystemExit: 0") as caught:
        run([{"i": i} for i in range(4)], leaves, study="s", jobs=jobs)
    assert [outcome.values for outcome in caught.value.outcomes] == [{"i": 0}, {}, {"i": 2}, {}]


def test_a_failure_is_told_by_type_and_the_whole_message():
    def fails(cell):
        try:
            raise KeyError("first")
        except KeyError as error:
            if cell["how"] == "group":
                raise ExceptionGroup("several", [ValueError("a"), ValueError("b")]) from error
            inner = "\nTraceback (most recent call last):\n  File\nOSError: far" if cell["how"] == "remote" else ""
            raise ValueError(f"one\n  two{inner}") from (error if cell["how"] == "cause" else None)

    with pytest.raises(SweepError) as caught:
        hows = ("plain", "cause", "remote", "group")
        run([{"how": how} for how in hows], fails, study="s", engine="sequential")
    plainly, cause, remote, group = (outcome.error for outcome in caught.value.outcomes)
    assert plainly == cause == "ValueError: one / two"
    assert remote == "ValueError: one / two / Traceback (most recent call last): / File / OSError: far"
    assert group == "ExceptionGroup: several (2 sub-exceptions)"


def test_an_interrupted_sweep_goes_on_where_it_was(tmp_path):
    def interrupted(cell):
        if cell["i"] == 6:
            raise KeyboardInterrupt
        return square(cell)

    with Store(tmp_path / "s.sqlite") as store:
        with pytest.raises(KeyboardInterrupt):
            run(CELLS, interrupted, study="s", store=store, engine="sequential")
        outcomes = run(CELLS, square, study="s", store=store, engine="sequential")
    assert sum(outcome.stored for outcome in outcomes) == 6


def test_seeds_depend_on_the_cell_alone():
    assert seed_of({"a": 1, "b": 2}) == seed_of({"b": 2, "a": 1})
    seeds = {seed_of({"seed": seed, "model": model}, role=role) for seed in (0, 1) for model in (0, 1) for role in "ab"}
    assert len(seeds) == 8 and all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.slow
def test_processes_give_the_same_bits_as_one_process_in_another_order():
    alone = run(CELLS, square, study="s", engine="sequential")
    spread = run(CELLS[::-1], square, study="s", engine="local", jobs=2)[::-1]
    for one, other in zip(alone, spread, strict=True):
        assert one.values["square"] == other.values["square"]
        assert one.values["draw"].tobytes() == other.values["draw"].tobytes()


@pytest.mark.parametrize("engine", ["ray", "dask"])
def test_a_missing_cluster_package_is_named(engine, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"engine '{engine}' needs {engine}.*pip install"):
        run(CELLS, square, study="s", engine=engine)


@pytest.mark.parametrize("package", ["ray", "distributed"])
def test_a_cluster_gives_the_same_results(package):
    pytest.importorskip(package)
    engine = "ray" if package == "ray" else "dask"
    outcomes = run(CELLS, square, study="s", engine=engine, jobs=2)
    assert [outcome.values["square"] for outcome in outcomes] == [i**2 for i in range(12)]


def test_an_unknown_engine_or_number_of_jobs_is_refused():
    with pytest.raises(ValueError, match="no engine 'slurm'"):
        check_engine("slurm")
    for jobs in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="jobs has to be"):
            check_engine("local", jobs)


KILLED = """
import os, sys, time
from abyssal.sweep import Store, run

def work(cell):
    with open(cell["log"], "a") as log:  # appended whole: a line is far shorter than a page
        log.write(f"{os.environ['RUN']} {cell['i']} {os.getpid()}\\n")
    while os.environ["RUN"] == "killed" and cell["i"] >= 40:  # until it is
        time.sleep(0.05)
    return {"x": (cell["i"] + 1) ** 0.5}

cells = [{"i": i, "log": sys.argv[2]} for i in range(60)]
with Store(sys.argv[1]) as store:
    for outcome in run(cells, work, study="killed", store=store, jobs=2):
        print(outcome.values["x"].hex())
"""


def start(script: str, run_name: str, *args: str) -> subprocess.Popen[str]:
    environment = os.environ | {"RUN": run_name, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", script, *args], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_kill_9_loses_no_finished_cell_and_none_is_computed_twice(tmp_path):
    path, log = tmp_path / "s.sqlite", tmp_path / "log"
    first = start(KILLED, "killed", str(path), str(log))
    wait_until(lambda: len(finished(path)) >= 20, first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    with Store(path) as store:
        kept = {record.parameters["i"]: record.values["x"] for record in store.records("killed")}
    assert 0 < len(kept) < 60

    second = start(KILLED, "second", str(path), str(log))
    printed, _ = second.communicate()
    assert second.returncode == 0
    assert printed.split() == [((i + 1) ** 0.5).hex() for i in range(60)]
    again = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("second")]
    # Of the cells that were finished none is computed again; of the others each once.
    assert sorted(again) == sorted(set(range(60)) - set(kept))
    with Store(path) as store:
        records = {record.parameters["i"]: record for record in store.records("killed")}
    assert all(record.computed == 1 for record in records.values()) and len(records) == 60
    assert all(records[i].values["x"] == x for i, x in kept.items())


def is_running(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"  # a zombie only waits to be counted


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_workers_of_a_killed_sweep_leave(tmp_path):
    log = tmp_path / "log"
    sweep = start(KILLED, "killed", str(tmp_path / "s.sqlite"), str(log))
    wait_until(lambda: log.exists() and len(log.read_text().splitlines()) >= 10, sweep)
    workers = {int(line.split()[2]) for line in log.read_text().splitlines()}
    assert workers and all(is_running(worker) for worker in workers)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    while any(is_running(worker) for worker in workers):  # they look for their parent once a second
        time.sleep(0.1)


def test_a_store_survives_a_log_that_was_cut_off(tmp_path):
    path = tmp_path / "s.sqlite"
    store = Store(path)
    for i in range(5):
        store.put("s", 1, {"i": i}, {"x": i})
    # As a power failure leaves it: the last transaction half in the log.
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in tmp_path.glob("s.sqlite*"):
        data = file.read_bytes()
        cut = -2000 if file.name.endswith("-wal") else len(data)
        (folder / file.name).write_bytes(data[:cut])
    store.close()
    (folder / Path("s.sqlite-shm")).unlink(missing_ok=True)
    with Store(folder / "s.sqlite") as copy:
        assert [record.values["x"] for record in copy.records("s")] == list(range(4))
