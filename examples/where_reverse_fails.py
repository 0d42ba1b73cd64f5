"""Where reversing a residual network fails, how the certificate says so, and what repairs it.

    .venv/bin/python examples/where_reverse_fails.py            # two to four minutes on 2 cores
    .venv/bin/python examples/where_reverse_fails.py --quick    # seconds; the default where CI=true

A small pre-norm GPT over bytes, *unscaled* (no factor on its branches that falls with depth) and initialised
as GPT-2 is, learns to continue the sources of Python's standard library. Then the gradient of one batch is
taken with the layers' inputs restored instead of kept, and compared with plain autograd's, before and after
training; the certificate is set against it; and training goes on in four ways. docs/where-reverse-fails.md
explains what comes out.
"""

from __future__ import annotations

import math
import os
import sysconfig
import time
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import abyssal
from abyssal import Keep, PaperAdjoint, Policy, Reverse
from abyssal.util.environment import environment

MODULES = (
    "argparse ast bdb calendar codecs configparser copy csv datetime decimal difflib dis doctest enum "
    "fractions ftplib functools gettext heapq inspect ipaddress locale mailbox optparse os pdb pickle pickletools "
    "platform pprint pydoc random shutil smtplib socket ssl statistics subprocess tarfile textwrap threading trace "
    "traceback turtle typing uuid warnings weakref zipfile"
)
Policies = Policy | Mapping[str, Policy]
console = Console(width=110, highlight=False)
progress = Console(stderr=True)


@dataclass(frozen=True)
class Settings:
    """Sizes of everything."""

    layers: int = 12
    width: int = 128
    heads: int = 4
    context: int = 64  # bytes of text
    batch: int = 16
    steps: int = 300  # of the first training
    more_steps: int = 60  # of each way to go on
    learning_rate: float = 1e-3
    embedding_std: float = 0.02
    repeats: int = 2  # batches on which state and gradient errors are set side by side
    seed: int = 0


QUICK = Settings(batch=8, steps=60, more_steps=8, learning_rate=2e-3, repeats=1)
FIXED_BATCH = 1_000_000  # seeds of batches that training does not draw
HELD_OUT = 2_000_000


# ------------------------------------------------------------------------------------- the text and the network


class Text:
    """Python's own sources as bytes; the last tenth is held out."""

    def __init__(self, settings: Settings) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = [path for name in MODULES.split() if (path := folder / f"{name}.py").exists()]
        data = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)
        self.size = len(data)
        self._train, self._held_out = data.split([len(data) * 9 // 10, len(data) - len(data) * 9 // 10])
        self._shape = settings.batch, settings.context

    def batch(self, seed: int, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Return bytes and the bytes that follow them, drawn from `seed`. [batch, context] each."""
        data = self._held_out if held_out else self._train
        count, context = self._shape
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(data) - context - 1, (count, 1), generator=generator)
        rows = data[starts + torch.arange(context + 1)].long()
        return rows[:, :-1], rows[:, 1:]


class Layer(nn.Module):
    """`x + attention(norm(x))`, then `x + mlp(norm(x))`: the layer of GPT-2, one block for abyssal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attention(self, x: Tensor) -> Tensor:
        """The attention branch, causal. [batch, context, width] to the same."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A pre-norm GPT over bytes, initialised as GPT-2 is: N(0, 0.02^2), less for what writes to the stream."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(settings.context, width)
        self.layers = nn.ModuleList(Layer(width, settings.heads) for _ in range(settings.layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for name, parameter in self.named_parameters():
            if name.startswith(("token", "position")):
                nn.init.normal_(parameter, std=settings.embedding_std)
            elif parameter.ndim == 2:
                writes = name.endswith(("out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * settings.layers) if writes else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, bytes_in: Tensor) -> Tensor:
        x = self.token(bytes_in) + self.position.weight
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy in nats per byte."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


class Trainer:
    """AdamW with a short warm-up, continued where it was left."""

    def __init__(self, model: GPT, settings: Settings) -> None:
        self.model, self.text, self.rate = model, Text(settings), settings.learning_rate
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=self.rate, betas=(0.9, 0.95))
        self.steps = 0

    def step(self) -> float:
        """Take one step; the batch depends on the step's number only. Returns the loss before it."""
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, self.steps / 20)
        loss = loss_of(self.model, self.text.batch(self.steps))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def held_out_loss(self, batches: int = 16) -> float:
        """Loss on text that was not trained on."""
        losses = [loss_of(self.model, self.text.batch(HELD_OUT + i, held_out=True)) for i in range(batches)]
        return torch.stack(losses).mean().item()


# ------------------------------------------------------------------------------------- what is measured


def keeping(first: int, policy: Policy) -> Policies:
    """`policy` on all layers but the `first` ones, which are kept."""
    return {"layers.*": policy, **{f"layers.{n}": Keep() for n in range(first)}} if first else policy


def policies() -> dict[str, Policies]:
    """What the main table compares."""
    counts = {1: "first layer kept", 2: "first two kept", 3: "first three kept"}
    return {
        "PaperAdjoint() on all layers": PaperAdjoint(),
        **{f"Reverse({k}) on all layers": Reverse(k) for k in range(4)},
        **{f"Reverse({k}), {words}": keeping(n, Reverse(k)) for k in range(4) for n, words in counts.items()},
        "Keep() on all layers": Keep(),
    }


@dataclass(frozen=True)
class Measured:
    """One gradient under one choice of policies."""

    gradient_error: float  # relative, of the whole parameter vector; not a number where it was refused
    state_error: float  # the worst block's, as the certificate has it
    stored_bytes: int
    certificate: abyssal.Certificate


def gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient with respect to all parameters. [parameters]"""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model, batch), list(model.parameters()))])


def relative(found: Tensor, exact: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return ((found - exact).norm() / exact.norm()).item()


def measure(model: GPT, batch: tuple[Tensor, Tensor], policy: Policies, exact: Tensor) -> Measured:
    """Compare the gradient that `policy` gives with the exact one. The model is released afterwards."""
    abyssal.reconstruct(model, policy)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", abyssal.DriftWarning)  # the error is what we measure
            error = relative(gradient(model, batch), exact)
    except abyssal.NonFiniteError:
        error = math.nan
    certificate = abyssal.certificate(model)
    abyssal.release(model)
    worst = math.nan if certificate.error is None else certificate.error
    return Measured(error, worst, certificate.stored_bytes, certificate)


@dataclass(frozen=True)
class Anatomy:
    """One layer on one batch: how large its branch is, and how well its input can be solved for."""

    size: float  # |f(x)| / |x| of the whole layer
    attention: float  # the same of the attention branch
    mlp: float  # the same of the MLP branch
    left: tuple[float, float]  # |s - x| / |x| after 1 and 8 refinements from the exact output


@torch.no_grad()
def anatomy(model: GPT, batch: tuple[Tensor, Tensor]) -> list[Anatomy]:
    """Walk forward through the layers and look at each one by itself."""
    x = model.token(batch[0]) + model.position.weight
    found = []
    for layer in model.layers:
        middle = x + layer.attention(x)
        y = layer(x)
        s, left = y, []
        for _ in range(8):
            s = y - (layer(s) - s)
            left.append(relative(s, x))
        found.append(Anatomy(relative(y, x), relative(middle, x), relative(y, middle), (left[0], left[7])))
        x = y
    return found


@dataclass(frozen=True)
class Network:
    """All that is measured of the network at one time."""

    errors: dict[str, Measured]
    bf16: float  # gradient error of bf16 autocast on the same batch
    other_batch: float  # distance to another minibatch's gradient
    layers: list[Anatomy]
    pairs: list[tuple[float, float]]  # state and gradient error of many choices, all batches
    worst_bf16: float  # over the same batches


def study_network(model: GPT, settings: Settings, when: str) -> Network:
    """Measure gradients under every policy, on one fixed batch; state against gradient errors on several."""
    text = Text(settings)
    batches = [text.batch(FIXED_BATCH + n) for n in range(settings.repeats + 1)]
    exact = [gradient(model, batch) for batch in batches]
    bf16 = []
    for batch, true in zip(batches[:-1], exact, strict=False):
        with torch.autocast("cpu", torch.bfloat16):
            bf16.append(relative(gradient(model, batch), true))
    chosen = policies()
    errors = {
        name: measure(model, batches[0], chosen[name], exact[0])
        for name in track(chosen, f"gradients {when}", console=progress, transient=True)
    }
    grid = [keeping(n, Reverse(k)) for k in range(4) for n in (0, 1, 2, 3, 4, 6, 8)]
    if settings.repeats == 1:
        several = list(errors.values())
    else:
        several = [
            measure(model, batches[n], policy, exact[n])
            for policy in track(grid, "state and gradient errors", console=progress, transient=True)
            for n in range(settings.repeats)
        ]
    pairs = [(m.state_error, m.gradient_error) for m in several if m.state_error > 0]
    return Network(errors, bf16[0], relative(exact[-1], exact[0]), anatomy(model, batches[0]), pairs, max(bf16))


@dataclass
class Run:
    """Training that went on in one way."""

    losses: list[float] = field(default_factory=list)
    held_out: float = math.nan
    stored_bytes: int | None = None  # for the stream, in the last step; None under plain autograd
    kept: dict[str, int] = field(default_factory=dict)  # block: number of steps before it was kept
    warning: str = ""  # the first one, if any
    refused: int = 0  # steps skipped since a restored state was not finite
    gradient_error: float = 0.0  # after the last step, on the fixed batch, as the blocks then are


def go_on(trainer: Trainer, settings: Settings, patch: Callable[[GPT], object] | None, title: str) -> Run:
    """Train a copy of the network further, in one way, on the same batches as the other ways."""
    trainer, run = deepcopy(trainer), Run()
    model = trainer.model
    if patch is not None:
        patch(model)
    batch = trainer.text.batch(FIXED_BATCH)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", abyssal.DriftWarning)
        for step in track(range(settings.more_steps), title, console=progress, transient=True):
            try:
                run.losses.append(trainer.step())
            except abyssal.NonFiniteError:
                run.refused += 1
            if patch is None:
                continue
            certificate = abyssal.certificate(model)
            run.stored_bytes = certificate.stored_bytes
            for block in certificate.blocks:
                if block.policy == "Keep()":
                    run.kept.setdefault(block.name, step)
        if patch is not None:
            with abyssal.paused(model):
                exact = gradient(model, batch)
            run.gradient_error = relative(gradient(model, batch), exact)
    run.warning = next((str(w.message) for w in caught if w.category is abyssal.DriftWarning), "")
    abyssal.release(model)
    run.held_out = trainer.held_out_loss()
    return run


@dataclass
class Findings:
    """Everything the example found."""

    settings: Settings
    text_bytes: int
    parameters: int
    before: Network
    after: Network
    losses: list[float]  # of the first training
    held_out: float  # after it
    seconds: float  # that it took
    runs: dict[str, Run]


def study(settings: Settings) -> Findings:
    """Measure, train, measure, and train on in four ways."""
    torch.manual_seed(settings.seed)
    model = GPT(settings)
    before = study_network(model, settings, "before training")
    trainer, began = Trainer(model, settings), time.perf_counter()
    losses = [trainer.step() for _ in track(range(settings.steps), "training", console=progress, transient=True)]
    seconds = time.perf_counter() - began
    after = study_network(model, settings, "after training")
    ways: dict[str, Callable[[GPT], object] | None] = {
        "exact (plain autograd)": None,
        'Reverse(1), on_drift="warn"': lambda m: abyssal.reconstruct(m, Reverse(1)),
        'Reverse(1), on_drift="keep"': lambda m: abyssal.reconstruct(m, Reverse(1), on_drift="keep"),
        "Reverse(1), first two kept": lambda m: abyssal.reconstruct(m, keeping(2, Reverse(1))),
    }
    runs = {name: go_on(trainer, settings, patch, name) for name, patch in ways.items()}
    parameters = sum(p.numel() for p in model.parameters())
    size = trainer.text.size
    held_out = trainer.held_out_loss()
    return Findings(settings, size, parameters, before, after, losses, held_out, seconds, runs)


# ------------------------------------------------------------------------------------- what is shown


def number(value: float, small: bool = True) -> str:
    """A figure as the tables have it."""
    return "refused" if math.isnan(value) else "0" if value == 0 else f"{value:.1e}" if small else f"{value:.2f}"


def times(value: float) -> str:
    """A multiple as the tables have it."""
    return number(value) if math.isnan(value) else f"{value:,.0f}x" if value >= 10 else f"{value:.2g}x"


def table(title: str, first: str, *columns: str) -> Table:
    """An empty table: names to the left, figures to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    made.add_column(first, no_wrap=True)
    for column in columns:
        made.add_column(column, justify="right")
    return made


def show_errors(found: Findings) -> None:
    """The main table."""
    shown = table(
        "Relative error of the gradient (all parameters), one batch",
        "inputs of the layers",
        "before training",
        "after training",
        "in bf16's error",
        "worst state error after",
        "stream kept [KiB]",
    )
    for name, after in found.after.errors.items():
        before = found.before.errors[name].gradient_error
        ratio = times(after.gradient_error / found.after.bf16)
        cells = number(before), number(after.gradient_error), ratio, number(after.state_error)
        shown.add_row(name, *cells, f"{after.stored_bytes / 1024:,.0f}")
    shown.add_section()
    shown.add_row("bf16 autocast, for scale", number(found.before.bf16), number(found.after.bf16), "1x")
    other = found.after.other_batch
    ratio = times(other / found.after.bf16)
    shown.add_row("another minibatch, for scale", number(found.before.other_batch), number(other), ratio)
    console.print(shown)


def show_anatomy(found: Findings) -> None:
    """Why: the branches' sizes, and what refining leaves of the error, layer by layer."""
    shown = table(
        "Why: each layer's size |f(x)|/|x|, and the error left in x when solved for",
        "layer",
        "size before",
        "after",
        "attention",
        "MLP",
        "1 step leaves",
        "8 steps leave",
    )
    for n, (before, after) in enumerate(zip(found.before.layers, found.after.layers, strict=True)):
        sizes = [number(v, small=False) for v in (before.size, after.size, after.attention, after.mlp)]
        shown.add_row(f"layers.{n}", *sizes, *map(number, after.left))
    console.print(shown)


def show_pairs(found: Findings) -> None:
    """The certificate's state error against the gradient error."""
    shown = table(
        "State error (the certificate's worst block) and gradient error, over policies and batches",
        "network, state error",
        "cases",
        "gradient error, median",
        "largest",
        "in bf16's error",
        "gradient/state, median",
        "largest",
    )
    bounds = [0.0, 1e-3, 1e-2, 1e-1, math.inf]
    for when, network in (("before", found.before), ("after", found.after)):
        for low, high in pairwise(bounds):
            pairs = [(s, g) for s, g in network.pairs if low < s <= high and not math.isnan(g)]
            if not pairs:
                continue
            gradients, ratios = sorted(g for _, g in pairs), sorted(g / s for s, g in pairs)
            label = f"{when}, {low:g} to {high:g}" if high < math.inf else f"{when}, above {low:g}"
            middle = len(pairs) // 2
            errors = number(gradients[middle]), number(gradients[-1]), times(gradients[-1] / network.worst_bf16)
            shown.add_row(label, str(len(pairs)), *errors, f"{ratios[middle]:.2g}", f"{ratios[-1]:.2g}")
        shown.add_section()
    console.print(shown)


def show_runs(found: Findings) -> None:
    """Training that went on in four ways."""
    settings, full = found.settings, found.after.errors["Keep() on all layers"].stored_bytes
    tail = min(20, settings.more_steps)
    shown = table(
        f"{settings.more_steps} further steps from the trained weights, same batches",
        "layers",
        f"loss, last {tail}",
        "held-out loss",
        "gradient error at the end",
        "stream kept",
    )
    for name, run in found.runs.items():
        mean = sum(run.losses[-tail:]) / max(1, len(run.losses[-tail:]))
        kept = "-" if run.stored_bytes is None else f"{run.stored_bytes / full:.0%}"
        shown.add_row(name, f"{mean:.3f}", f"{run.held_out:.3f}", number(run.gradient_error), kept)
    console.print(shown)
    for name, run in found.runs.items():
        by_step: dict[int, list[str]] = {}
        for block, step in run.kept.items():
            by_step.setdefault(step, []).append(block.removeprefix("layers."))
        told = "; ".join(
            f"{', '.join(blocks)} from the start" if step == 0 else f"{', '.join(blocks)} after step {step}"
            for step, blocks in sorted(by_step.items())
        )
        if told:
            console.print(f"{name}: kept layers {told}.")
        if run.refused:
            console.print(f"{name}: {run.refused} step(s) refused, a restored state was not finite.")
    console.print(f"Before these steps the held-out loss was {found.held_out:.3f} (nats per byte).")


def show(found: Findings) -> None:
    """Print everything."""
    s = found.settings
    console.print(
        f"A GPT of {s.layers} layers, width {s.width}, {found.parameters:,} parameters, float32; batches of "
        f"{s.batch} x {s.context} bytes of {found.text_bytes:,} (Python's standard library); embeddings of "
        f"standard deviation {s.embedding_std:g}. {s.steps} steps of AdamW in {found.seconds:.0f} s: training loss "
        f"{found.losses[0]:.2f} to {sum(found.losses[-10:]) / len(found.losses[-10:]):.2f}."
    )
    console.print("; ".join(f"{k}: {v}" for k, v in environment().facts().items()), style="dim")
    console.print()
    show_errors(found)
    show_anatomy(found)
    console.print("The certificate of Reverse(1) on all layers, after training:", style="bold")
    console.print(str(found.after.errors["Reverse(1) on all layers"].certificate), markup=False)
    console.print()
    show_pairs(found)
    show_runs(found)
    console.print("What the first drifted step said:", style="bold")
    console.print(found.runs['Reverse(1), on_drift="keep"'].warning or "nothing: no block drifted", markup=False)


def main(
    quick: Annotated[
        bool, typer.Option("--quick/--full", help="Less of everything. Default: full, quick where CI=true.")
    ] = os.environ.get("CI", "").lower() in ("1", "true"),
    steps: Annotated[int | None, typer.Option(help="Of the first training.", min=1)] = None,
    embedding_std: Annotated[float | None, typer.Option(help="1 is nn.Embedding's default.")] = None,
    seed: Annotated[int, typer.Option(help="Of the initial weights.")] = 0,
) -> None:
    """Show where Reverse fails on a trained transformer, and what repairs it."""
    settings = replace(QUICK if quick else Settings(), seed=seed)
    if quick:
        torch.set_num_threads(1)  # on its small batches a second thread costs more than it gives
    if steps is not None:
        settings = replace(settings, steps=steps)
    if embedding_std is not None:
        settings = replace(settings, embedding_std=embedding_std)
    show(study(settings))


if __name__ == "__main__":
    typer.run(main)
