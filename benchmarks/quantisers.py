"""Which quantiser codes the increments of a stream best: rate and distortion on trained networks, and with outliers.

    python benchmarks/quantisers.py --quick
    python benchmarks/quantisers.py --write docs/codes.md

The closed loop runs over the true states of networks trained here (`trained.py`), in a simulation of its own: the
quantisers are tables of levels, most of which the package does not have; its own codec runs beside them. What is
in results/quantisers.json already is not measured again. About fifteen minutes on one core for everything.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.utils.benchmark import Timer

import report
import trained
from abyssal.codec.quantiser import Codec
from quantiser_variants import CHOSEN, Packaged, Quantiser

console = Console(stderr=True)
MARKER = "quantisers"
BITS = (1, 2, 3, 4, 6, 8)
RESULTS = Path(__file__).parent / "results" / "quantisers.json"


# ---------------------------------------------------------------- what is compared


def candidates(quick: bool) -> list[Quantiser | Packaged]:
    """What is compared: all at groups of 64, then other groups, then stochastic rounding."""
    kinds = [("max", "even"), ("max", "odd"), ("signed", "zero"), ("fit", "even")]
    kinds += [(s, d) for d in ("gauss", "laplace") for s in ("rms", "max", "signed")]
    chosen: list[Quantiser | Packaged] = []
    for bits in (2, 4) if quick else BITS:
        usual = [Quantiser(bits, *kind) for kind in kinds if bits > 1 or kind[1] != "odd"]
        usual += [Quantiser(1, "mean", "even")] if bits == 1 else []
        if bits == 8:  # 256 levels: no more to gain from their places
            usual = [q for q in usual if q.levels in ("even", "odd", "zero")]
        if bits >= 6:  # and none from clipping
            usual = [q for q in usual if q.scale != "fit"]
        chosen += [Packaged(bits), *usual]
        chosen += [Quantiser(bits, *kind, rotate=True) for kind in [("max", "even"), ("rms", "gauss")] if bits < 8]
        chosen += [
            replace(q, stochastic=True) for q in usual if (q.scale, q.levels) in [("max", "even"), ("max", "odd")]
        ]
        if not quick:
            for group in (16, 32, 128, 256):
                chosen.append(Packaged(bits, group))
    return chosen


# ---------------------------------------------------------------- the closed loop


@dataclass
class Coded:
    """A chain of states as the decoder restores them, and the cells that the code knows them to be in."""

    states: list[Tensor]
    low: list[Tensor | None]
    high: list[Tensor | None]


def exact_states(states: list[Tensor]) -> int:
    """How many of a chain's first states to keep exactly: those entered by an increment of over half their size.

    A code saves little there (the increment is as large as the state), and its error would hide all others. At
    most half of a chain is kept, though.
    """
    ratios = [((x - before).norm() / x.norm()).item() for before, x in pairwise(states)]
    large = next((n for n, ratio in enumerate(ratios) if ratio <= 0.5), len(ratios))
    return min(1 + large, len(states) // 2)


def closed_loop(states: list[Tensor], quantise: Quantiser | Packaged, exact: int = 1) -> Coded:
    """Code a chain's states as the package does: the residual in bfloat16, decoded from the end."""
    kept, states = states[: exact - 1], states[exact - 1 :]
    generator = torch.Generator().manual_seed(0)
    residual, codes = torch.zeros_like(states[0]), []
    for before, x in pairwise(states):
        d = (x - before) + residual
        codes.append(quantise(d, generator))
        residual = (d - codes[-1][0]).bfloat16().float()
    restored = [states[-1] - residual]
    for decoded, *_ in reversed(codes):
        restored.append(restored[-1] - decoded)
    no_cells = [None] * exact
    return Coded(kept + restored[::-1], no_cells + [c[1] for c in codes], no_cells + [c[2] for c in codes])


def refined(coded: Coded, blocks: list[nn.Module], end: Tensor) -> Coded:
    """One fixed-point step for each state, from the block's true output downwards, clamped to the code's cell."""
    above, states = end, []
    for block, x, low, high in reversed(list(zip(blocks, coded.states, coded.low, coded.high, strict=True))):
        if low is not None:  # the others are exact
            with torch.no_grad():
                s = x + above - block(x)
            x = torch.minimum(torch.maximum(s, x + low), x + high)
        states.append(x)
        above = x
    return Coded(states[::-1], coded.low, coded.high)


# ---------------------------------------------------------------- trained networks


@dataclass
class Case:
    """A trained network, one held-out batch, and the true states and gradient on it."""

    net: trained.Trained
    batch: trained.Batch
    chains: list[list[nn.Module]]
    states: list[list[Tensor]]  # per chain, its blocks' inputs
    ends: list[Tensor]  # per chain, its output
    gradient: Tensor

    @classmethod
    def measure(cls, name: str, seed: int, quick: bool) -> Case:
        """Record one network."""
        net = trained.load(name, seed, quick)
        globs = next(iter(net.granularities.values()))
        chains = [list(net.model.get_submodule(glob.removesuffix(".*")).children()) for glob in globs]
        batch = net.batches(1)[0]
        inputs, outputs = {}, {}

        def note(block: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            inputs[block], outputs[block] = args[0].detach().contiguous(), output.detach()

        hooks = [block.register_forward_hook(note) for chain in chains for block in chain]
        gradient = gradient_of(net, batch)
        for hook in hooks:
            hook.remove()
        states = [[inputs[block] for block in chain] for chain in chains]
        return cls(net, batch, chains, states, [outputs[chain[-1]] for chain in chains], gradient)

    def gradient_error(self, coded: list[Coded]) -> float:
        """Relative error of the whole gradient where each block is differentiated at its coded state."""
        with contextmanager(_differentiated_at)(self.chains, coded):
            return _relative(gradient_of(self.net, self.batch), self.gradient)

    def autocast_error(self) -> float:
        """The same of bf16 autocast: the network's own arithmetic."""
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.net.loss(self.net.model, self.batch)
        grads = torch.autograd.grad(loss, list(self.net.model.parameters()))
        return _relative(torch.cat([g.flatten() for g in grads]), self.gradient)


def gradient_of(net: trained.Trained, batch: trained.Batch) -> Tensor:
    """The gradient of all parameters, as one vector."""
    grads = torch.autograd.grad(net.loss(net.model, batch), list(net.model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def _differentiated_at(chains: list[list[nn.Module]], coded: list[Coded]) -> Iterator[None]:
    """Let each block compute its true output, and its derivatives at the coded state."""
    pairs = [(b, s) for chain, code in zip(chains, coded, strict=True) for b, s in zip(chain, code.states, strict=True)]

    def forward(block: nn.Module, state: Tensor, x: Tensor) -> Tensor:
        plain = type(block).forward
        with torch.no_grad():
            value = plain(block, x)
        y = plain(block, state + (x - x.detach()))
        return value + (y - y.detach())

    for block, state in pairs:
        block.forward = lambda x, block=block, state=state: forward(block, state, x)
    try:
        yield
    finally:
        for block, _ in pairs:
            del block.forward


def _relative(estimate: Tensor, truth: Tensor) -> float:
    return ((estimate - truth).norm() / truth.norm()).item()


def on_trained(case: Case, quantise: Quantiser | Packaged, with_refined: bool) -> dict[str, float]:
    """State and gradient errors of one quantiser on one network."""
    coded = [closed_loop(states, quantise, exact_states(states)) for states in case.states]
    per_block, worst = [], 0.0
    for code, states in zip(coded, case.states, strict=True):
        for restored, x in list(zip(code.states, states, strict=True))[exact_states(states) :]:
            wrong = restored - x
            per_block.append((wrong.norm() / x.norm()).item())
            axis = 1 if x.ndim == 4 else -1  # a position is a vector of channels
            worst = max(worst, (wrong.norm(dim=axis) / x.norm(dim=axis).clamp_min(1e-6)).max().item())
    found = {"median": statistics.median(per_block), "max": max(per_block), "position": worst}
    found["gradient"] = case.gradient_error(coded)
    if with_refined and not quantise.rotate:
        again = [refined(c, b, e) for c, b, e in zip(coded, case.chains, case.ends, strict=True)]
        found["refined"] = case.gradient_error(again)
    return found


# ---------------------------------------------------------------- outliers


@cache
def streams() -> dict[str, list[Tensor]]:
    """Synthetic streams: 17 states, [256, 128], increments of 0.1; with a channel of 500 times that, and a spike."""
    generator = torch.Generator().manual_seed(1)
    steps = 0.1 * torch.randn(17, 256, 128, generator=generator)
    channel, spike = steps.clone(), steps.clone()
    channel[:, :, 7] *= 500
    spike[1, :, 7] += 50  # at the first block only
    return {name: list(s.cumsum(0)) for name, s in [("plain", steps), ("channel", channel), ("spike", spike)]}


def with_outliers(quantise: Quantiser | Packaged) -> dict[str, float]:
    """Errors in units of the ordinary increment, 0.1."""
    found, usual = {}, torch.arange(128) != 7
    wrong = {
        name: [a - b for a, b in zip(closed_loop(s, quantise).states, s, strict=True)] for name, s in streams().items()
    }
    found["plain"] = wrong["plain"][16].square().mean().sqrt().item() / 0.1
    found["channel"] = max(w[:, usual].square().mean().sqrt().item() for w in wrong["channel"][1:]) / 0.1
    for n in (1, 4, 16):
        found[f"spike {n}"] = wrong["spike"][n].abs().max().item() / 0.1
    found["spike rms 4"] = wrong["spike"][4].square().mean().sqrt().item() / 0.1
    return found


# ---------------------------------------------------------------- the tables

TRAINED = ("median", "max", "position", "gradient", "refined")


def measure(quick: bool, seeds: int, before: list[dict]) -> dict:
    """Everything, as it goes into the JSON file; rows that are among those from `before` are taken from there."""
    wanted = [(name, seed) for name in trained.RECIPES for seed in range(1 if quick else seeds)]
    cases = [Case.measure(name, seed, quick) for name, seed in track(wanted, "recording", console=console)]
    rows = []
    for quantise in track(candidates(quick), "quantisers", console=console):
        row = {"bits": quantise.bits, "name": quantise.name, "group": quantise.group, "rate": quantise.rate}
        known = [r for r in before if all(r[k] == v for k, v in row.items())]
        if known:
            rows.append(known[0])
            continue
        row["outliers"] = with_outliers(quantise)
        row["trained"] = {name: [] for name in trained.RECIPES}
        for (name, _), case in zip(wanted, cases, strict=True):
            row["trained"][name].append(on_trained(case, quantise, with_refined=name == "gpt"))
        rows.append(row)
    autocast = {
        name: [c.autocast_error() for (n, _), c in zip(wanted, cases, strict=True) if n == name]
        for name in trained.RECIPES
    }
    kept = {name: [exact_states(s) for s in case.states] for (name, _), case in zip(wanted, cases, strict=True)}
    return {"machine": report.machine(), "seeds": seeds, "kept": kept, "autocast": autocast, "rows": rows}


def speeds() -> dict[str, dict[str, list[float]]]:
    """Milliseconds to encode (which also decodes) and to decode, on one thread: the best of many, for busy machines."""
    found: dict[str, dict[str, list[float]]] = {}
    for bits in BITS:
        codec, found[str(bits)] = Codec(bits), {}
        for numel in (2**17, 2**21):
            d = torch.randn(numel)
            scope = {"codec": codec, "d": d, "encoded": codec.encode(d)[0]}
            found[str(bits)][str(numel)] = [
                min(Timer(statement, globals=scope).timeit(1).median for _ in range(2**26 // numel)) * 1e3
                for statement in ("codec.encode(d)", "codec.decode(encoded)")
            ]
    return found


def middle(row: dict, network: str, figure: str) -> float:
    """Geometric mean over the seeds."""
    found = [one[figure] for one in row["trained"][network] if figure in one]
    return statistics.geometric_mean(found) if found else math.nan


def show(figure: float) -> str:
    """Two digits."""
    return "-" if math.isnan(figure) else f"{figure:.1e}" if figure < 0.1 else f"{figure:.2g}"


def tables(results: dict) -> str:
    """The results as Markdown."""
    figures: list[tuple[str, Callable[[dict], float]]] = [
        ("GPT: state", lambda row: middle(row, "gpt", "median")),
        ("worst block", lambda row: middle(row, "gpt", "max")),
        ("worst position", lambda row: middle(row, "gpt", "position")),
        ("gradient", lambda row: middle(row, "gpt", "gradient")),
        ("refined once", lambda row: middle(row, "gpt", "refined")),
        ("ConvNeXt: gradient", lambda row: middle(row, "convnext", "gradient")),
        ("ResNet: gradient", lambda row: middle(row, "resnet", "gradient")),
        ("500x channel", lambda row: row["outliers"]["channel"]),
        ("spike, 1", lambda row: row["outliers"]["spike 1"]),
        ("4", lambda row: row["outliers"]["spike 4"]),
        ("16", lambda row: row["outliers"]["spike 16"]),
    ]
    parts = []
    for bits in sorted({row["bits"] for row in results["rows"]}):
        rows = [row for row in results["rows"] if row["bits"] == bits and row["group"] == 64]
        body = [[row["name"], *(show(get(row)) for _, get in figures)] for row in rows]
        title = f"**{bits} bit{'s' if bits > 1 else ''}**, groups of 64: {rows[0]['rate']:.4g} bits per element"
        parts.append(f"{title}\n\n" + report.table(["quantiser", *(name for name, _ in figures)], body))
    own = [row for row in results["rows"] if row["name"] == CHOSEN]
    body = [[str(r["bits"]), str(r["group"]), f"{r['rate']:.4g}", *(show(get(r)) for _, get in figures)] for r in own]
    head = ["bits", "group", "bits per element", *(name for name, _ in figures)]
    parts.append("**abyssal's quantisers, by group size**\n\n" + report.table(head, body))
    autocast = ", ".join(
        f"{name} {statistics.geometric_mean(found):.1e}" for name, found in results["autocast"].items()
    )
    kept = ", ".join(f"{name} {' and '.join(map(str, counts))}" for name, counts in results["kept"].items())
    facts = f"The networks' own bf16-autocast gradient error: {autocast}. First states of each chain kept: {kept}."
    return "\n\n".join([report.header(results["machine"]), facts, *parts])


def speed_table(results: dict) -> str:
    """The speeds as Markdown."""
    head = ["bits", *(f"{n:,} elements: {what}" for n in (2**17, 2**21) for what in ("encode", "decode"))]
    body = [[bits, *(f"{ms:.2f} ms" for pair in by.values() for ms in pair)] for bits, by in results["speeds"].items()]
    return report.header(results["machine"]) + "\n\n" + report.table(head, body)


def main(
    quick: Annotated[bool, typer.Option(help="Small networks, one seed, 2 and 4 bits: a minute.")] = False,
    speed: Annotated[bool, typer.Option(help="Time the package's codec instead: half a minute.")] = False,
    again: Annotated[bool, typer.Option(help="Measure anew what is in the results already.")] = False,
    seeds: Annotated[int, typer.Option(help="Trained networks of each kind.", min=1)] = 3,
    write: Annotated[Path | None, typer.Option(help="Put the tables into this page.")] = None,
) -> None:
    """Compare quantisers of the increments."""
    torch.set_num_threads(1)
    if speed:
        results = {"machine": report.machine(), "speeds": speeds()}
        body, path = speed_table(results), RESULTS.with_name("quantisers-speed.json")
    else:
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() and not (again or quick) else {}
        rows = before["rows"] if before.get("seeds") == seeds else []
        results = measure(quick, seeds, rows)
        body, path = tables(results), RESULTS
    if not quick:
        report.save(results, path)
    report.publish(body, MARKER + "-speed" * speed, write)


if __name__ == "__main__":
    typer.run(main)
