"""Depth transfer: does the best learning rate of a small GPT stay where it is as the GPT grows deeper?

    python benchmarks/depth_transfer.py                            # about 17 minutes of one core; resumes
    python benchmarks/depth_transfer.py --write docs/scaling.md    # and puts the tables between their markers there
    python benchmarks/depth_transfer.py --quick                    # a minute: two depths, three rates, 12 steps

A pre-norm GPT (width 32, 2 heads, 8 x 32 bytes of Python's standard library, AdamW, 100 steps with warm-up and linear
decay to 0) is trained at depths 4 to 64 and learning rates a factor of 2 apart, four seeds, under each rule, from two
kinds of fresh weights. Base depth is 4: there all rules agree. What is compared is the loss on held-out text.

- `small`: every matrix from 0.02, as GPT-2 but without its factor on the branches' ends. Embedding and head have to
  grow first, which takes a large learning rate at any depth.
- `unit`: tokens from 1, positions from 0.5, matrices from 1 / sqrt(fan-in), logits multiplied by 4 and the head from a
  quarter of that: embedding and head need not grow, and more of the loss is up to the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn
from torch.nn import functional as F

from abyssal.models.batches import Example
from abyssal.scaling.transfer.check import depth_check
from abyssal.scaling.transfer.check_result import DepthCheck
from abyssal.scaling.transfer.learning_rate import Transfer, learning_rate_transfer, plot_transfers
from abyssal.scaling.transfer.sizes import JUDGED
from abyssal.sweep import Store
from report import header, machine, publish, save, table
from trained import GPT, HELD_OUT, cache_folder, text_batch

HERE = Path(__file__).parent
WIDTH, HEADS, CONTEXT, BATCH, STEPS, BASE = 32, 2, 32, 8, 100, 4
NAME = f"gpt-width-{WIDTH}-context-{CONTEXT}-batch-{BATCH}-steps-{STEPS}"  # what the store's cells stand for
WARM_UP = 10
HEADINGS = (  # of the quantities judged, and of the one that is not
    "stream, at init",
    "output, at init",
    "output's change, blocks' first step",
    "output's change",
    "stream's change",
    "increments' change",
)
CHECKED = "none,gpt2,1/sqrt(L),depth-mup,completep"


class Times(nn.Module):
    """A module's output times a constant."""

    def __init__(self, factor: float, module: nn.Module):
        super().__init__()
        self.factor, self.module = factor, module

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.module(x)


def build(depth: int) -> nn.Module:
    """A GPT whose matrices all begin with standard deviation 0.02: without GPT-2's factor."""
    model = GPT(depth, WIDTH, HEADS, CONTEXT)
    for name, p in model.named_parameters():
        if name.endswith("out.weight"):
            nn.init.normal_(p, std=0.02)
    return model


def build_unit(depth: int) -> nn.Module:
    """A GPT whose stream, branches and logits are of order 1 when fresh."""
    model = GPT(depth, WIDTH, HEADS, CONTEXT)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std={"token": 1.0, "position": 0.5}.get(name.split(".")[0], p.shape[1] ** -0.5))
    nn.init.normal_(model.head.weight, std=0.25 * WIDTH**-0.5)
    model.head = Times(4.0, model.head)
    return model


@dataclass(frozen=True)
class Setup:
    """A kind of fresh weights, and the grid it is trained on."""

    name: str
    words: str
    build: Callable[[int], nn.Module]
    depths: tuple[int, ...]
    powers: range  # of 2: the learning rates
    cells: str  # what its trainings are kept under


SETUPS = {
    setup.name: setup
    for setup in (
        Setup("small", "every matrix from 0.02", build, (4, 8, 16, 32, 64), range(-9, -5), NAME),
        Setup("unit", "matrices from 1 / sqrt(fan-in)", build_unit, (4, 16, 64), range(-8, -3), NAME + "-unit"),
    )
}


def loss_on(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Cross-entropy in nats per byte."""
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def train(model: nn.Module, groups: list[dict[str, Any]], seed: int, steps: int = STEPS) -> float:
    """Train, and return the loss on held-out text; infinite where it diverged."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    full = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        part = min(1.0, (step + 1) / WARM_UP) * min(1.0, (steps - step) / (steps - WARM_UP))
        for group, rate in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = rate * part
        loss = loss_on(model, text_batch(100_000 * seed + step, False, BATCH, CONTEXT))
        if not math.isfinite(loss.item()):
            return math.inf
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return loss_on(model, text_batch(HELD_OUT, True, 256, CONTEXT)).item()


def train_briefly(model: nn.Module, groups: list[dict[str, Any]], seed: int) -> float:
    """The same in 12 steps."""
    return train(model, groups, seed, 12)


def measure(setup: Setup, rules: Sequence[str], seeds: int, store: Store, quick: bool) -> list[Transfer]:
    """Train what the store does not hold yet."""
    found = []
    depths, powers = (setup.depths[:2], range(-9, -6)) if quick else (setup.depths, setup.powers)
    with Progress(console=Console(stderr=True)) as bar:
        for name in rules:
            task = bar.add_task(f"{setup.name}: {name}", total=None)
            found.append(
                learning_rate_transfer(
                    setup.build,
                    depths,
                    [2.0**power for power in powers],
                    rule=name,
                    train=train_briefly if quick else train,
                    batch=text_batch(0, False, 2, CONTEXT)[0],
                    seeds=1 if quick else seeds,
                    base_depth=BASE,
                    name=setup.cells + ("-quick" if quick else ""),
                    store=store,
                    jobs=1,
                    progress=lambda _, done, total, task=task: bar.update(task, completed=done, total=total),
                )
            )
    return found


def text_example(step: int) -> Example:
    """The batch of a step, with its loss."""
    inputs, targets = text_batch(step, False, BATCH, CONTEXT)
    return Example(inputs, lambda output: F.cross_entropy(output.flatten(0, 1), targets.flatten()), "")


def check(rules: Sequence[str], depths: Sequence[int], seeds: int) -> list[DepthCheck]:
    """The depth check of every rule, with the `small` weights: 4 steps at a rate of 1e-4."""
    with Progress(console=Console(stderr=True)) as bar:
        return [
            depth_check(build, depths, rule, text_example, lr=1e-4, seeds=seeds, base_depth=BASE)
            for rule in bar.track(rules, description="depth check")
        ]


def checks_as_markdown(checks: Sequence[DepthCheck]) -> str:
    """The powers of the depth by rule."""
    names = (*JUDGED, "branch_change")
    rows = []
    for found in checks:
        states = {finding.quantity: finding.state for finding in found.findings}
        cells = []
        for name in names:
            slope, mark = found.slopes[name], "**" if states.get(name) == "unstable" else ""
            cells.append(f"{mark}{slope.value:+.2f}{mark} ({slope.low:+.2f} to {slope.high:+.2f})")
        rows.append([f"`{found.rule}`", *cells, "yes" if found.passed else "no"])
    first = checks[0]
    depths = ", ".join(map(str, first.depths))
    return "\n\n".join(
        [
            f"**Depth check, weights `small`.** Powers of the depth over L = {depths}, {first.steps} steps of AdamW at "
            f"a base rate of {first.lr:g}, {len(first.seeds)} seeds (95 %). Bold: not stable; the threshold is "
            f"{first.threshold:.2f}.",
            table(["rule", *HEADINGS, "passed"], rows),
        ]
    )


def as_markdown(setup: Setup, transfers: Sequence[Transfer]) -> str:
    """The tables of one setup, and what they say."""
    depths = transfers[0].depths
    rows, lost = [], []
    for t in transfers:
        best = {o.depth: o for o in t.optima}
        cells = [_rate(best.get(depth)) for depth in depths]
        error = "" if math.isnan(t.shift_error) else f" ± {t.shift_error:.2f}"
        said = {True: "yes", False: "no", None: "not decided"}[t.transfers]
        rows.append([f"`{t.rule}`", *cells, f"{t.shift:+.2f}{error}", f"{t.span:.2f}", said])
        lost.append([f"`{t.rule}`", *[_loss(t, depth) for depth in depths]])
    first, last = depths[0], depths[-1]
    parts = [
        f"**Fresh weights `{setup.name}`: {setup.words}.**",
        f"Best base learning rate x 1000 by depth (interval of 95 % over {len(transfers[0].seeds)} seeds, spread "
        f"pooled over depths); how far it moves from depth {first} to {last}, and between any two, in factors of 2:",
        table(["rule", *[f"depth {d}" for d in depths], "moves by", "at most", "less than one?"], rows),
        "Loss on held-out text at the best rate, and how much is lost (+) by training at the rate that is best at "
        f"depth {first}:",
        table(["rule", *[f"depth {d}" for d in depths]], lost),
        "\n".join(f"- {t.verdict()}" for t in transfers),
    ]
    return "\n\n".join(parts)


def _rate(best: Any) -> str:
    if best is None:
        return "diverged"
    interval = "" if math.isnan(best.low) or best.at_edge else f" ({best.low * 1e3:.2f} to {best.high * 1e3:.2f})"
    return f"{best.rate * 1e3:.2f}{interval}" + (" or beyond" if best.at_edge else "")


def _loss(transfer: Transfer, depth: int) -> str:
    row = transfer.mean_losses[transfer.depths.index(depth)]
    regret = transfer.regret(depth)
    return f"{row.min():.3f} (+{regret:.3f})" if math.isfinite(regret) else f"{row.min():.3f} (diverges)"


def main(
    rules: Annotated[str, typer.Option(help="Comma-separated.")] = "none,depth-mup,completep",
    setups: Annotated[str, typer.Option(help="Kinds of fresh weights, comma-separated.")] = "small",
    seeds: Annotated[int, typer.Option(min=1)] = 4,
    checks: Annotated[str, typer.Option(help="Rules for the depth check, comma-separated.")] = CHECKED,
    quick: Annotated[bool, typer.Option(help="Two depths, three rates, one seed, 12 steps.")] = False,
    write: Annotated[Path | None, typer.Option(help="Markdown file for the tables.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results (benchmarks/results).")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for the plots, such as docs/images.")] = None,
    store: Annotated[Path | None, typer.Option(help="File of finished trainings (in the user's cache).")] = None,
) -> None:
    """Train, say what came out, write it down."""
    torch.set_num_threads(1)
    unknown = set(setups.split(",")) - set(SETUPS)
    if unknown:
        raise SystemExit(f"no setup {', '.join(sorted(unknown))}; there are {', '.join(SETUPS)}")
    for folder in (out, plots):
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    facts, results, texts = machine(), {}, []
    found_checks = check(checks.split(","), (2, 4, 8) if quick else (8, 16, 32, 64), 1 if quick else 3)
    texts.append(checks_as_markdown(found_checks))
    if plots is not None:
        for one in found_checks:
            if one.rule in ("none", "completep"):
                one.plot(plots / f"depth-check-{one.rule}.png")
    with Store(store or cache_folder() / "depth-transfer.sqlite") as cells:
        for name in setups.split(","):
            found = measure(SETUPS[name], rules.split(","), seeds, cells, quick)
            results[name] = found
            texts.append(as_markdown(SETUPS[name], found))
            if plots is not None:
                plot_transfers(plots / f"depth-transfer-{name}.png", *found)
    minutes = sum(t.seconds for found in results.values() for t in found) / 60
    text = "\n\n".join([header(facts | {"CPU time": f"{minutes:.1f} minutes"}), *texts])
    if out is not None or not quick:
        slopes = {one.rule: {k: v for k, v in one.to_dict().items() if k != "runs"} for one in found_checks}
        plain = {name: [t.to_dict() for t in found] for name, found in results.items()}
        target = (out or HERE / "results") / "depth_transfer.json"
        save({"machine": facts, "cpu_minutes": minutes, "checks": slopes, "setups": plain}, target)
    publish(text, "depth-transfer", write)


if __name__ == "__main__":
    typer.run(main)
