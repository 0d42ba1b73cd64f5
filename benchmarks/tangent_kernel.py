"""Tangent kernels by layer-wise Gram products against torch.func's Jacobians: CPU time, memory, agreement.

    python benchmarks/tangent_kernel.py --quick
    python benchmarks/tangent_kernel.py --write docs/tangent.md

The rival is what torch's own tutorial on neural tangent kernels does: `vmap(jacrev(functional_call))`, then a
contraction of the Jacobians. Both on one thread, in turns in one process; each memory figure in a fresh process,
its peak less that after the imports.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import report
from abyssal.profiling.track import rss_peak
from abyssal.tangent.empirical.ntk import forecast_ntk, ntk

MARKER = "tangent-kernel"
console = Console(stderr=True)
Row = dict[str, Any]


class ResidualMLP(nn.Module):
    def __init__(self, width: int, depth: int, outputs: int, features: int = 32) -> None:
        super().__init__()
        self.inner = nn.Linear(features, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outer = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        for block in self.blocks:
            h = h + torch.tanh(block(h)) / len(self.blocks)
        return self.outer(h)


class ConvBlock(nn.Module):
    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * torch.relu(self.conv(x))


def conv_resnet(channels: int, depth: int, outputs: int) -> nn.Module:
    blocks = [ConvBlock(channels, depth**-0.5) for _ in range(depth)]
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs))
    return nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), *blocks, *head)


def gpt(layers: int, width: int, tokens: int) -> nn.Module:
    from abyssal.models.torchvision import import_torchvision

    import_torchvision()
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": layers, "n_embd": width, "n_head": 4, "vocab_size": 256, "n_positions": tokens}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


@dataclass(frozen=True)
class Case:
    """One row of the table: a model, samples, and which kernel.

    Attributes:
        title: as the table has it.
        model: makes it.
        samples: makes them.
        outputs: see ntk.
        output: see ntk.
        rival: whether torch.func is run beside it.
    """

    title: str
    model: Callable[[], nn.Module]
    samples: Callable[[], Any]
    outputs: str | int = "trace"
    output: Callable[[Any], Tensor] | None = None
    rival: bool = True


def first_logits(found: Any) -> Tensor:
    return found.logits[:, -1, :10]


def cases(quick: bool) -> dict[str, Case]:
    def mlp(width: int, depth: int, n: int, k: int, outputs: str, rival: bool = True) -> Case:
        title = f"residual MLP, width {width}, L = {depth}, n = {n}, {k} output{'s' * (k > 1)}, {outputs}"
        return Case(title, lambda: ResidualMLP(width, depth, k), lambda: torch.randn(n, 32), outputs, rival=rival)

    def conv(depth: int, n: int, outputs: str) -> Case:
        title = f"conv ResNet, 32 channels, 16x16, L = {depth}, n = {n}, 10 outputs, {outputs}"
        return Case(title, lambda: conv_resnet(32, depth, 10), lambda: torch.randn(n, 3, 16, 16), outputs)

    layers, n, tokens = (2, 8, 16) if quick else (6, 64, 64)
    text = Case(
        f"GPT-2, {layers} layers, d = 128, n = {n} sequences of {tokens} tokens, 10 logits of the last, trace",
        lambda: gpt(layers, 128, tokens),
        lambda: {"input_ids": torch.randint(0, 256, (n, tokens))},
        output=first_logits,
    )
    if quick:
        return {
            "mlp": mlp(128, 8, 32, 1, "trace"),
            "deep": mlp(128, 32, 64, 1, "trace", rival=False),
            "outputs": mlp(128, 4, 16, 10, "full"),
            "conv": conv(2, 8, "full"),
            "conv trace": conv(2, 8, "trace"),
            "gpt": text,
        }
    return {
        "mlp": mlp(512, 32, 128, 1, "trace"),
        "deep": mlp(512, 128, 512, 1, "trace", rival=False),
        "outputs": mlp(512, 8, 32, 10, "full"),
        "conv": conv(16, 64, "full"),
        "conv trace": conv(16, 64, "trace"),
        "gpt": text,
    }


def ours(case: Case, model: nn.Module, x: Any) -> Tensor:
    return ntk(model, x, outputs=case.outputs, output=case.output)


def theirs(case: Case, model: nn.Module, x: Any) -> Tensor:
    """Whole Jacobians by torch.func, contracted one parameter after the other."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def one(values: dict[str, Tensor], sample: Any) -> Tensor:
        if isinstance(sample, dict):
            found = functional_call(model, values, (), {name: v[None] for name, v in sample.items()})
        else:
            found = functional_call(model, values, (sample[None],))
        return (found if case.output is None else case.output(found))[0]

    jacobians = vmap(jacrev(one), in_dims=(None, 0))(values, x)
    formula = "Naf,Mbf->NMab" if case.outputs == "full" else "Naf,Maf->NM"
    products = (torch.einsum(formula, j.flatten(2), j.flatten(2)) for j in jacobians.values())
    return sum(products, torch.zeros(()))


def made(case: Case) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return case.model(), case.samples()


def timed(case: Case, repeats: int) -> Row:
    """CPU seconds in turns, after one untimed turn; the ratio of each turn."""
    model, x = made(case)
    row: Row = {"title": case.title, "ours": [], "theirs": []}
    for turn in range(repeats + 1):
        found: dict[str, Tensor] = {}
        for name, compute in (("ours", ours), ("theirs", theirs)) if case.rival else (("ours", ours),):
            start = time.process_time()
            try:
                found[name] = compute(case, model, x)
            except RuntimeError as error:  # vmap does not know some operation of the model
                row["failure"] = str(error).splitlines()[0][:80]
                continue
            if turn:
                row[name].append(time.process_time() - start)
        if len(found) == 2 and not turn:
            difference = (found["ours"] - found["theirs"]).abs().max() / found["theirs"].abs().max()
            row["difference"] = difference.item()
    forecast = forecast_ntk(model, x, outputs=case.outputs, output=case.output)
    row |= {"parameters": forecast.parameters, "operations": list(forecast.operations), "shape": list(forecast.shape)}
    row["forecast"] = forecast.working_bytes
    samples = forecast.samples[0]
    row["jacobian"] = samples * forecast.outputs * forecast.parameters * 4
    return row


def peak(case: Case, who: str) -> int:
    """Bytes that the process's peak rose by, while one kernel was computed. In a fresh process."""
    model, x = made(case)
    before = rss_peak()
    (ours if who == "ours" else theirs)(case, model, x)
    after = rss_peak()
    if before is None or after is None:  # getrusage will not do: a child's peak begins at its parent's
        raise typer.Exit(1)
    return after - before


def fresh_peak(key: str, who: str, quick: bool) -> int | None:
    command = [sys.executable, __file__, "--one", key, "--who", who, *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(done.stdout.split()[-1]) if done.returncode == 0 else None


def speed() -> float:
    """Operations per CPU second of a matrix product in float32 on one thread."""
    a, best = torch.randn(1024, 1024), 0.0
    for _ in range(5):
        start = time.process_time()
        torch.mm(a, a)
        best = max(best, 2 * 1024**3 / (time.process_time() - start))
    return best


def render(facts: dict[str, str], rows: dict[str, Row], rate: float) -> str:
    """The table as Markdown."""
    head = ["kernel", "ours", "torch.func", "faster by", "ours, memory", "torch.func, memory", "floor", "difference"]
    lines = []
    for row in rows.values():
        own, other = row["ours"], row["theirs"]
        ratios = [b / a for a, b in zip(own, other, strict=False)]
        if other:
            rival = f"{statistics.median(other):.2f} s"
            spread = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        else:
            rival = row.get("failure") or f"not run: Jacobians of {row['jacobian'] / 1e9:.0f} GB"
            spread = "-"
        memory = [f"{b / 1e9:.2f} GB" if (b := row[f"{who} bytes"]) is not None else "-" for who in ("ours", "theirs")]
        difference = f"{row['difference']:.0e}" if "difference" in row else "-"
        floor = f"{sum(row['operations']) / rate:.2f} s"
        lines.append([row["title"], f"{statistics.median(own):.3f} s", rival, spread, *memory, floor, difference])
    about = (
        "CPU seconds on one thread in float32, medians of turns (smallest and largest ratio in brackets); peak memory "
        f"beside model and imports; *floor*: operations counted, at the {rate / 1e9:.0f} GFlop/s of this machine's "
        "matrix product; largest difference between the two kernels, relative to the largest entry."
    )
    return "\n\n".join(["### Kernels against whole Jacobians", report.header(facts), about, report.table(head, lines)])


def main(
    quick: Annotated[bool, typer.Option(help="Small models: a few seconds.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed turns.", min=1)] = 5,
    only: Annotated[str | None, typer.Option(help="One row: mlp, deep, outputs, conv, conv trace, gpt.")] = None,
    results: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/tangent_kernel.json"),
    write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None,
    one: Annotated[str | None, typer.Option(hidden=True)] = None,
    who: Annotated[str, typer.Option(hidden=True)] = "ours",
) -> None:
    """Measure, print the table, and write it where asked."""
    torch.set_num_threads(1)
    chosen = cases(quick)
    if one is not None:
        print(peak(chosen[one], who))
        return
    facts = report.machine()
    rows: dict[str, Row] = {}
    for key, case in chosen.items():
        if only is not None and key != only:
            continue
        console.print(case.title)
        row = timed(case, 2 if quick else repeats)
        weighed = not quick or key == "mlp"  # a fresh process takes longer than a small kernel
        row["ours bytes"] = fresh_peak(key, "ours", quick) if weighed else None
        row["theirs bytes"] = fresh_peak(key, "theirs", quick) if weighed and row["theirs"] else None
        rows[key] = row
    rate = speed()
    report.save({"machine": facts, "speed": rate, "rows": rows}, results)
    text = render(facts, rows, rate)
    report.publish(text, MARKER, write)


if __name__ == "__main__":
    typer.run(main)
