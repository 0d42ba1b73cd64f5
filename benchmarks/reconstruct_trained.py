"""Gradient error, stored bytes and step time of every policy on networks trained here (trained.py).

    python benchmarks/reconstruct_trained.py --quick
    python benchmarks/reconstruct_trained.py --measure error,bytes --json benchmarks/results/reconstruct_trained.json
    python benchmarks/reconstruct_trained.py --resume --write docs/benchmarks.md       # times, too: an idle machine

Errors are relative, Euclidean, over all parameters, against plain autograd on the same held-out batch in float32.
The unit beside them is the same error of bf16 autocast: what training in bf16 costs that network anyway.
"""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import abyssal
import report
import trained
from abyssal.models.find import resolve_blocks
from trained import Batch, Trained
from trained_policies import Config, Policies, as_policy, configs
from trained_tables import render

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console(stderr=True)
MARKER = "reconstruct-trained"
# As memory.py: keep freed memory in the heap, or whoever allocates most pays for page faults.
_KEEP_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 30)}
CASES = {
    "gpt layers": ("gpt", "layers"),
    "gpt branches": ("gpt", "branches"),
    "convnext": ("convnext", "blocks"),
    "resnet": ("resnet", "blocks"),
}
SEEDS = {"gpt layers": 3}  # others: one
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Cell = dict[str, Any]
Plan = dict[str, str]  # block to policy, as text


@dataclass(frozen=True)
class Case:
    """A trained network, what of it is taken as blocks, and where its chains begin."""

    trained: Trained
    names: list[str]
    stream: list[int]  # elements of each block's input
    starts: list[int]  # the blocks that begin a chain: where the stream's shape changes

    @classmethod
    def of(cls, name: str, seed: int, quick: bool) -> Case:
        network, granularity = CASES[name]
        loaded = trained.load(network, seed, quick)
        model, shapes = loaded.model, []
        names = list(resolve_blocks(model, loaded.granularities[granularity]))
        hooks = [
            model.get_submodule(n).register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
            for n in names
        ]
        with torch.no_grad():
            model(loaded.batches(1)[0][0])
        for hook in hooks:
            hook.remove()
        starts = [i for i, shape in enumerate(shapes) if i == 0 or shape != shapes[i - 1]]
        return cls(loaded, names, [shape.numel() for shape in shapes], starts)

    def policies(self, config: Config, plan: Plan | None = None) -> Policies:
        """What `abyssal.reconstruct` gets."""
        if config.tolerance is None:
            return config.policies(self.names, self.starts)
        assert plan is not None
        return {name: as_policy(text) for name, text in plan.items()}


def gradient(case: Case, model: nn.Module, batch: Batch) -> Tensor:
    """The gradient of all parameters. [parameters]"""
    grads = torch.autograd.grad(case.trained.loss(model, batch), list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


class _WithLoss(nn.Module):
    """A network that returns its loss, so that a plan can be verified on a batch with targets of its own."""

    def __init__(self, network: Trained):
        super().__init__()
        self.model, self._loss = network.model, network.loss_of

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return self._loss(self.model(inputs), targets)


def make_plan(case: Case, tolerance: float) -> Plan:
    """Policies by block, as text, from `abyssal.plan` on one batch of the training set, verified on another."""
    batch, check = case.trained.batches(2, held_out=False)
    whole = _WithLoss(case.trained)
    blocks = [case.trained.model.get_submodule(name) for name in case.names]
    plan = abyssal.plan(whole, batch, tolerance=tolerance, check=check, blocks=blocks)
    return {block.name.removeprefix("model."): str(block.policy) for block in plan.blocks}


@contextmanager
def reconstructed(case: Case, config: Config, model: nn.Module, plan: Plan | None = None) -> Iterator[nn.Module]:
    """The model under one configuration, or a plan; released at the end."""
    abyssal.reconstruct(model, case.policies(config, plan), blocks=case.names)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", abyssal.DriftWarning)  # the error is what is measured
            yield model
    finally:
        abyssal.release(model)


# ---------------------------------------------------------------- what is measured


def _possible(name: str, chosen: list[Config]) -> list[Config]:
    """`abyssal.plan` takes the blocks that it finds, which are whole layers."""
    return [c for c in chosen if c.tolerance is None or CASES[name][1] != "branches"]


def measure_error(name: str, quick: bool, chosen: list[Config], seeds: int, batches: int) -> Cell:
    """Gradient and worst state error: one list per configuration, over seeds and batches; and the bf16 unit's."""
    unit: list[float] = []
    cells: dict[str, Cell] = {c.name: {"error": [], "state": []} for c in chosen}
    records = []
    for seed in range(seeds):
        case = Case.of(name, seed, quick)
        model = case.trained.model
        records.append(case.trained.record)
        data = case.trained.batches(batches)
        exact = [gradient(case, model, batch) for batch in data]
        for batch, true in zip(data, exact, strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                unit.append(relative(gradient(case, model, batch), true))
        for config in track(chosen, f"{name}, seed {seed}: errors", console=console, transient=True):
            plan = None
            if config.tolerance is not None:
                plan = make_plan(case, config.tolerance)
                cells[config.name].setdefault("plans", []).append(plan)
            for batch, true in zip(data, exact, strict=True):
                error, state = _errors(case, config, model, batch, true, plan)
                cells[config.name]["error"].append(error)
                cells[config.name]["state"].append(state)
    return {"unit": unit, "records": records, "cells": cells}


def _errors(
    case: Case, config: Config, model: nn.Module, batch: Batch, exact: Tensor, plan: Plan | None
) -> tuple[float, float]:
    with reconstructed(case, config, model, plan):
        try:
            error = relative(gradient(case, model, batch), exact)
        except abyssal.NonFiniteError:
            return math.inf, math.inf
        state = abyssal.certificate(model).error
    return error, math.nan if state is None else state


def measure_bytes(name: str, quick: bool, chosen: list[Config], plans: dict[str, Plan]) -> Cell:
    """Stored bytes of the whole stream and per coded block, as ratios to checkpointing in the same dtype."""
    case = Case.of(name, 0, quick)
    batch = case.trained.batches(1)[0]
    cells: dict[str, Cell] = {c.name: {"bytes": {}} for c in chosen}
    for dtype in DTYPES:
        model = copy.deepcopy(case.trained.model).to(DTYPES[dtype])
        inputs = batch[0] if batch[0].dtype == torch.long else batch[0].to(DTYPES[dtype])
        width = DTYPES[dtype].itemsize
        whole = width * sum(case.stream)
        for config in chosen:
            with reconstructed(case, config, model, plans.get(config.name)):
                case.trained.loss(model, (inputs, batch[1]))
                certificate = abyssal.certificate(model)
            numel = dict(zip(case.names, case.stream, strict=True))
            stored = {b.name: b.stored_bytes for b in certificate.blocks}
            coded = [
                b.stored_bytes / (width * numel[b.name])
                for b in certificate.blocks
                if b.policy.startswith("Code") and b.policy.endswith(")")  # no chain's start nor its end
            ]
            cells[config.name]["bytes"][dtype] = {
                "stored": sum(stored.values()),
                "checkpointing": whole,
                "per coded block": [min(coded), max(coded)] if coded else None,
                "policies": [b.policy for b in certificate.blocks],
            }
    return {"cells": cells}


def measure_time(name: str, quick: bool, chosen: list[Config], plans: dict[str, Plan], rounds: int) -> Cell:
    """CPU seconds of this process per step; in each round all configurations run once, in random order."""
    case = Case.of(name, 0, quick)
    batch = case.trained.batches(1)[0]
    parameters = {id(p): p for p in case.trained.model.parameters()}
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    steps: dict[str, Callable[[], None]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", abyssal.DriftWarning)
        for config in [None, *chosen]:
            model = copy.deepcopy(case.trained.model, dict(parameters))  # shares the parameters
            if config is None:
                _checkpoint(model, case.names)
            else:
                abyssal.reconstruct(model, case.policies(config, plans.get(config.name)), blocks=case.names)
            steps["checkpointing" if config is None else config.name] = partial(_step, case, model, batch)
        seconds = _interleaved(steps, rounds)
    return {"cells": {key: {"seconds": values} for key, values in seconds.items()}}


def _interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for done in range(-2, rounds):  # two rounds of warming up
        for name in order.sample(list(steps), len(steps)):
            gc.collect()
            begin = time.process_time()
            steps[name]()
            if done >= 0:
                seconds[name].append(time.process_time() - begin)
    return seconds


def _step(case: Case, model: nn.Module, batch: Batch) -> None:
    with suppress(abyssal.NonFiniteError):  # costs what it cost
        case.trained.loss(model, batch).backward()


def _checkpoint(model: nn.Module, names: list[str]) -> None:
    """torch's checkpointing of each block, as people use it."""
    for name in names:
        block = model.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


# ---------------------------------------------------------------- running it


@app.command(hidden=True)
def child(name: str, quick: bool, rounds: int, given: str) -> None:
    """Time one network, in a process with malloc set up for it; prints one line of JSON."""
    torch.set_num_threads(1)
    only, plans = json.loads(given)
    print(json.dumps(measure_time(name, quick, [c for c in configs() if c.name in only], plans, rounds)))


def _time_in_child(name: str, quick: bool, chosen: list[Config], plans: dict[str, Plan], rounds: int) -> Cell:
    given = json.dumps([[c.name for c in chosen], plans])
    command = [sys.executable, __file__, "child", name, str(quick), str(rounds), given]
    done = subprocess.run(command, env=os.environ | _KEEP_HEAP, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: timing failed with exit status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _missing(results: dict[str, Any], name: str, kind: str, chosen: list[Config]) -> list[Config]:
    """Configurations that were not measured yet; of times all or none, since rounds are interleaved."""
    cells = results["networks"].get(name, {}).get("cells", {})
    keys = {"time": "seconds"}
    missing = [c for c in chosen if keys.get(kind, kind) not in cells.get(c.name, {})]
    return chosen if kind == "time" and missing else missing


def _merge(results: dict[str, Any], name: str, kind: str, found: Cell) -> None:
    into = results["networks"].setdefault(name, {"cells": {}})
    for config, cell in found.pop("cells").items():
        into["cells"].setdefault(config, {}).update(cell)
    if len(found.get("unit", [])) >= len(into.get("unit", [])):  # not from fewer batches than it was
        into |= found
    into.setdefault("machine", {})[kind] = report.machine()


@app.command()
def main(
    quick: Annotated[bool, typer.Option(help="Small networks, few batches and rounds.")] = False,
    network: Annotated[str | None, typer.Option(help=f"Comma-separated: {', '.join(CASES)}.")] = None,
    measure: Annotated[str, typer.Option(help="Comma-separated, in this order.")] = "error,bytes,time",
    only: Annotated[
        str | None, typer.Option(help="Configurations whose name contains one of these, parted by ;.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="Of each network; 0: three of the GPT by layers, else one.")] = 0,
    batches: Annotated[int, typer.Option(help="Held-out batches per seed.", min=1)] = 5,
    rounds: Annotated[int, typer.Option(help="Of the timing.", min=1)] = 11,
    path: Annotated[Path | None, typer.Option("--json", help="Where results go.")] = None,
    resume: Annotated[
        bool, typer.Option(help="Keep the results file; measure what it lacks, and --only anew.")
    ] = False,
    write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder of the plots; default: images beside --write.")] = None,
) -> None:
    """Measure, print the tables and the checks, and write them where asked."""
    torch.set_num_threads(1)
    if quick:
        seeds, batches, rounds = 1, min(batches, 2), min(rounds, 3)
    path = path or Path("benchmarks/results", f"reconstruct_trained{'_quick' if quick else ''}.json")
    results = json.loads(path.read_text()) if resume and path.exists() else {"networks": {}}
    chosen = [c for c in configs() if only is None or any(word in c.name for word in only.split(";"))]

    def plans(name: str) -> dict[str, Plan]:  # of the first seed's network, made when errors were measured
        cells = results["networks"].get(name, {}).get("cells", {})
        return {config: cell["plans"][0] for config, cell in cells.items() if "plans" in cell}

    kinds: dict[str, Callable[[str, list[Config]], Cell]] = {
        "error": lambda name, chosen: measure_error(name, quick, chosen, seeds or SEEDS.get(name, 1), batches),
        "bytes": lambda name, chosen: measure_bytes(name, quick, chosen, plans(name)),
        "time": lambda name, chosen: _time_in_child(name, quick, chosen, plans(name), rounds),
    }
    for kind in filter(None, measure.split(",")):
        for name in network.split(",") if network else CASES:
            todo = _possible(name, chosen)
            if kind != "error":
                todo = [c for c in todo if c.tolerance is None or c.name in plans(name)]
            if only is None:
                todo = _missing(results, name, kind, todo)
            if todo:
                _merge(results, name, kind, kinds[kind](name, todo))
                report.save(results, path)
    if write or plots:
        from trained_plots import plot_all  # matplotlib is slow to import

        plot_all(results, plots or write.parent / "images")
    text = render(results)
    report.publish(text, MARKER, write)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] != "child":
        sys.argv.insert(1, "main")
    app()
