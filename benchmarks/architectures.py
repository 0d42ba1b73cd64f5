"""Every architecture of transformers, timm and torchvision, small: does it train as it does without this package?

Of each: the blocks that are found; whether a step with `Keep()` leaves the very gradients, buffers and loss of a plain
one; the default's gradient error beside that of the model's own bfloat16 autocast; which blocks were coded, kept or
stored, and what the certificate says. Each model has a process of its own. What is measured already is skipped.

Takes about 45 minutes of one core for all. Another run is compared with an earlier one:

    python benchmarks/architectures.py /tmp/new.jsonl --compare benchmarks/results/architectures.jsonl
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}

import torch
import typer
from torch import nn

import abyssal
import report

MACHINE = "machine"  # name of the line that says where and with what the others were measured
MEMORY = 4 << 30  # bytes that a model's process may take beyond what it starts with
Row = dict[str, Any]
app = typer.Typer(add_completion=False)


# ---------------------------------------------------------------------- one model


def measured(name: str, recipe: dict[str, Any] | None, report_part: Callable[[Row], None]) -> None:
    """Make the model and measure it."""
    from zoo import find, measure

    try:
        subject = find.find(name, recipe)
    except Exception as error:
        report_part({"not_built": f"{type(error).__name__}: {str(error)[:600]}"})
        return
    measure.measure(subject, report_part)


def in_a_process(name: str, recipe: dict[str, Any] | None, limit: int) -> Row:
    """Measure in a fork of this process; what it knew when it was cut off is kept."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w", buffering=1) as pipe:
            _child(name, recipe, limit, pipe.write)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        parts = [json.loads(line) for line in pipe.read().split("\n") if line.endswith("}")]
    _, status, used = os.wait4(child, 0)
    row: Row = {"name": name, **(parts[-1] if parts else {})}
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        late = number in (signal.SIGXCPU, signal.SIGALRM)
        row["ended"] = f"over {limit} s" if late else signal.Signals(number).name
    return row | {"seconds": round(used.ru_utime + used.ru_stime, 1)}


def _child(name: str, recipe: dict[str, Any] | None, limit: int, write: Callable[[str], object]) -> None:
    # What these signals do by default ends the process, whatever it is at.
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    signal.alarm(10 * limit)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages is not None:
        most = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    try:
        measured(name, recipe, lambda row: write(json.dumps(row) + "\n"))
    except BaseException:
        write(json.dumps({"harness": traceback.format_exc()[-1000:]}) + "\n")


def warm_up() -> None:
    """Import and do once what every model's process would have to otherwise."""
    from zoo import find  # noqa: F401

    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
    model = abyssal.reconstruct(nn.Sequential(nn.Linear(8, 8), blocks), blocks="1")
    for _ in range(2):
        model(torch.ones(2, 8)).sum().backward()
    str(abyssal.certificate(model))
    gc.collect()
    gc.freeze()  # the forks share what is there now


# ---------------------------------------------------------------------- all of them


def read(path: Path) -> dict[str, Row]:
    """Rows by name; the line about the machine is one of them."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


@app.command()
def main(
    results: Annotated[Path, typer.Argument(help="JSON lines, one a model; what stands there is not measured again.")],
    only: Annotated[str, typer.Option(help='Names with wildcards, separated by commas: "timm/*,*/vit"')] = "*",
    compare: Annotated[Path | None, typer.Option(help="An earlier run: print what differs.")] = None,
    recipes: Annotated[
        Path | None, typer.Option(help="A run whose configurations are taken; else `--compare`'s.")
    ] = None,
    limit: Annotated[int, typer.Option(help="CPU seconds that a model may take.")] = 60,
    write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None,
) -> None:
    """Measure what is not measured yet, and print the totals."""
    from zoo import find

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    done, known = read(results), read(recipes or compare or results)
    todo = [n for n in find.names() if n not in done and any(fnmatch(n, pattern) for pattern in only.split(","))]
    results.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: report.installed(name) for name in ("transformers", "timm", "torchvision")}
    with results.open("a") as file:
        if MACHINE not in done:
            file.write(json.dumps({"name": MACHINE} | report.machine() | versions) + "\n")
        if todo:
            warm_up()
        for name in todo:
            before = known.get(name, {})
            if "not_built" in before and all(known.get(MACHINE, {}).get(n) == v for n, v in versions.items()):
                row = before
            else:
                row = in_a_process(name, before.get("recipe"), limit)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{row['name']}: {row['seconds']} s", file=sys.stderr)
    show(read(results), read(compare) if compare else None, write)


def show(rows: dict[str, Row], earlier: dict[str, Row] | None, page: Path | None) -> None:
    """Print the totals, the failures, and what differs from an earlier run."""
    from zoo import tables

    machine = rows.pop(MACHINE, {})
    machine |= {"models": len(rows), "CPU": f"{sum(row['seconds'] for row in rows.values()) / 60:.0f} min"}
    header = report.header({name: str(fact) for name, fact in machine.items() if name != "name"})
    report.publish(f"{header}\n\n{tables.totals(rows)}\n\n{tables.failures(rows)}", "architectures", page)
    if earlier is not None:
        earlier.pop(MACHINE, None)
        print("\n## Against the earlier run\n\n" + tables.comparison(earlier, rows))


if __name__ == "__main__":
    app()
