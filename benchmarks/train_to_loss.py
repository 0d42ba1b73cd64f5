"""Training to the same loss: a GPT from scratch and LoRA fine-tuning of a Llama, under several policies.

    python benchmarks/train_to_loss.py --quick
    python benchmarks/train_to_loss.py                               # about half an hour on one core
    python benchmarks/train_to_loss.py --only lora --write docs/benchmarks.md

Runs are paired: with one seed all policies start from the same weights and see the same batches in the same order,
so that they differ by the error of the gradient alone. Each finished run is one line of the results file, and a run
that is there is not made again.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

import abyssal
import report
import trained
from abyssal import Keep

MARKER = "train-to-loss"
LAST = 100  # steps whose loss is compared
TARGET = 0.005  # of the loss
REFERENCE = "Keep()"
console = Console(stderr=True)


def _policies() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {REFERENCE: Keep, "default": lambda: None}
    if hasattr(abyssal, "Code"):
        found |= {"Code(2)": lambda: abyssal.Code(2), "Code(1)": lambda: abyssal.Code(1)}
    return found


# ---------------------------------------------------------------- the two tasks


class Llama(nn.Module):
    """A transformers Llama over bytes that returns its logits. [batch, tokens] to [batch, tokens, 256]"""

    def __init__(self, layers: int, width: int, heads: int, context: int):
        super().__init__()
        from abyssal.models.torchvision import import_torchvision

        import_torchvision()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            max_position_embeddings=context,
            use_cache=False,
        )
        self.model = LlamaForCausalLM(config)

    def forward(self, text: Tensor) -> Tensor:
        return self.model(input_ids=text).logits


PROSE_CONTEXT = 64


def prose_batch(seed: int, held_out: bool, size: int) -> trained.Batch:
    """Bytes of Python's reference in prose (pydoc's topics), to fine-tune on; its last tenth is held out."""
    import pydoc_data.topics

    data = torch.frombuffer(bytearray("\n".join(pydoc_data.topics.topics.values()).encode()), dtype=torch.uint8)
    cut = len(data) * 9 // 10
    data = data[cut:] if held_out else data[:cut]
    starts = torch.randint(len(data) - PROSE_CONTEXT - 1, (size, 1), generator=torch.Generator().manual_seed(seed))
    rows = data[starts + torch.arange(PROSE_CONTEXT + 1)].long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@dataclass(frozen=True)
class Task:
    """What is trained, on what, for how long; AdamW, warm-up, cosine to a twentieth, gradients clipped at norm 1."""

    name: str
    title: str
    build: Callable[[int, Mapping[str, Any]], nn.Module]  # from seed and sizes
    sizes: Mapping[str, Any]
    draw: Callable[[int, bool, int], trained.Batch]
    steps: int
    batch: int
    rate: float
    warm_up: int = 20

    def settings(self) -> str:
        """What a run has to share with another to be compared with it."""
        return f"{dict(self.sizes)} {self.steps} steps, batch {self.batch}, rate {self.rate}, torch {torch.__version__}"


def _scratch(seed: int, sizes: Mapping[str, Any]) -> nn.Module:
    torch.manual_seed(seed)
    return trained.GPT(**sizes)


def _lora(seed: int, sizes: Mapping[str, Any]) -> nn.Module:
    """A Llama trained on Python's sources, with adapters on all its linear layers and everything else frozen."""
    sizes = dict(sizes)
    steps = sizes.pop("base_steps")
    base = trained.Recipe(
        "llama",
        "Llama, trained on Python's sources",
        Llama,
        sizes,
        (Llama,),
        trained.text_batch,
        {"layers": ("model.model.layers.*",)},
        steps=steps,
        batch=16,
        rate=2e-3,
    )
    loaded = trained.load_recipe(base, seed)
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    loaded.model.model = get_peft_model(
        loaded.model.model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    return loaded.model


TASKS = {
    t.name: t
    for t in [
        Task(
            "scratch",
            "GPT from scratch",
            _scratch,
            {"layers": 12, "width": 64, "heads": 4, "context": 64},
            trained.text_batch,
            steps=1000,
            batch=8,
            rate=2e-3,
        ),
        Task(
            "lora",
            "LoRA fine-tuning of a Llama",
            _lora,
            {"layers": 8, "width": 64, "heads": 4, "context": 64, "base_steps": 400},
            prose_batch,
            steps=500,
            batch=8,
            rate=2e-3,
        ),
    ]
}
QUICK_SIZES = {
    "scratch": {"layers": 4, "width": 32, "heads": 2, "context": 64},
    "lora": {"layers": 3, "width": 32, "heads": 2, "context": 64, "base_steps": 20},
}


# ---------------------------------------------------------------- one run


def run(task: Task, seed: int, name: str, quiet: bool = False) -> dict[str, Any]:
    """Train once; returns everything that is kept of it."""
    model = task.build(seed, task.sizes)
    parameters = [p for p in model.parameters() if p.requires_grad]
    abyssal.reconstruct(model, _policies()[name]())
    optimizer = torch.optim.AdamW(parameters, lr=task.rate, betas=(0.9, 0.95), weight_decay=0.01)
    losses, states, seconds = [], [], 0.0
    stored: list[int] = []
    title = f"{task.name}, seed {seed}, {name}"
    for step in track(range(task.steps), title, console=console, transient=True, disable=quiet):
        decay = 0.525 + 0.475 * math.cos(math.pi * step / task.steps)
        optimizer.param_groups[0]["lr"] = task.rate * decay * min(1.0, (step + 1) / task.warm_up)
        inputs, targets = task.draw(trained.HELD_OUT // 10 * (seed + 1) + step, False, task.batch)
        begin = time.process_time()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        seconds += time.process_time() - begin
        losses.append(round(loss.item(), 5))
        certificate = abyssal.certificate(model)
        states.append(certificate.error)
        stored.append(certificate.stored_bytes)
    policies = [block.policy for block in certificate.blocks]
    model.eval()
    with torch.no_grad():
        held_out = [_held_out(task, model, i) for i in range(16)]
    return {
        "task": task.name,
        "seed": seed,
        "policy": name,
        "settings": task.settings(),
        "policies": policies,
        "stored_bytes": statistics.median(stored),
        "state_error": max((s for s in states if s is not None), default=None),
        "held_out": sum(held_out) / len(held_out),
        "seconds": round(seconds, 1),
        "machine": report.machine(),
        "losses": losses,
    }


def _held_out(task: Task, model: nn.Module, i: int) -> float:
    inputs, targets = task.draw(trained.HELD_OUT + i, True, 32)
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()).item()


def gradient_check(task: Task, name: str) -> tuple[float, list[str]]:
    """Relative error of the first gradient under a policy, and the policies that the blocks then had."""
    model = task.build(0, task.sizes)
    inputs, targets = task.draw(0, False, task.batch)

    def gradient(of: nn.Module) -> Tensor:
        parameters = [p for p in of.parameters() if p.requires_grad]
        loss = F.cross_entropy(of(inputs).flatten(0, 1), targets.flatten())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])

    exact = gradient(copy.deepcopy(model))
    found = gradient(abyssal.reconstruct(model, _policies()[name]()))
    policies = [block.policy for block in abyssal.certificate(model).blocks]
    return ((found - exact).norm() / exact.norm()).item(), policies


# ---------------------------------------------------------------- what comes out


def load_runs(path: Path) -> list[dict[str, Any]]:
    """All runs of a results file; a last line that was cut off is left out."""
    runs = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            console.print(f"[yellow]{path}: a line that was cut off is ignored[/yellow]")
    return runs


def mean_and_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t over the values."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def block_bootstrap(differences: np.ndarray, block: int = 10, resamples: int = 4000) -> tuple[float, float]:
    """95 % interval of the mean of paired per-step differences, resampling seeds, and blocks of steps within them.

    Args:
        differences: one row per seed. [seeds, steps]
        block: length of the blocks of successive steps, which are alike.
        resamples: how many.
    """
    generator = np.random.default_rng(0)
    seeds, steps = differences.shape
    count = -(-steps // block)
    rows = generator.integers(seeds, size=(resamples, seeds, 1, 1))
    starts = generator.integers(max(1, steps - block + 1), size=(resamples, seeds, count, 1))
    means = differences[rows, np.minimum(starts + np.arange(block), steps - 1)].mean((1, 2, 3))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def compare(runs: list[dict[str, Any]], task: str, policy: str) -> dict[str, Any] | None:
    """The difference of the last steps' loss to the reference, in units of its loss, paired by seed."""
    by_seed = {r["seed"]: r for r in runs if r["task"] == task and r["policy"] == policy}
    base = {r["seed"]: r for r in runs if r["task"] == task and r["policy"] == REFERENCE}
    seeds = sorted(by_seed.keys() & base.keys())
    if not seeds:
        return None
    own, other = (np.array([of[s]["losses"][-LAST:] for s in seeds]) for of in (by_seed, base))
    scale = float(other.mean())
    differences = (own - other) / scale
    mean, low, high = mean_and_interval([float(d) for d in differences.mean(1)])
    stored = statistics.mean(by_seed[s]["stored_bytes"] / base[s]["stored_bytes"] for s in seeds)
    return {
        "seeds": len(seeds),
        "loss": float(own.mean()),
        "held_out": statistics.mean(by_seed[s]["held_out"] for s in seeds),
        "difference": mean,
        "interval": (low, high),
        "bootstrap": block_bootstrap(differences),
        "stored": stored,
        "state_error": max(by_seed[s]["state_error"] or 0.0 for s in seeds),
        "policies": by_seed[seeds[0]]["policies"],
    }


def _percent(low: float, high: float) -> str:
    return "" if math.isnan(low) else f"{100 * low:+.2f} to {100 * high:+.2f} %"


def render(runs: list[dict[str, Any]], tasks: list[Task]) -> str:
    """The tables as Markdown."""
    parts = ["## Training to the same loss"]
    if runs:
        parts.append(report.header(runs[-1]["machine"]))
    parts.append(_ABOUT)
    for task in tasks:
        rows = []
        for policy in _policies():
            c = compare(runs, task.name, policy)
            if c is None:
                continue
            told = [f"{c['loss']:.4f}", f"{c['held_out']:.4f}"]
            if policy == REFERENCE:
                rows.append([policy, *told, "", "", "", "", "1", "0", str(c["seeds"])])
                continue
            met = "yes" if abs(c["difference"]) <= TARGET else "**no**"
            told += [f"{100 * c['difference']:+.2f} %", _percent(*c["interval"]), _percent(*c["bootstrap"]), met]
            rows.append([policy, *told, f"{c['stored']:.2f}", f"{c['state_error']:.1e}", str(c["seeds"])])
        if rows:
            sizes = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in task.sizes.items())
            about = f"{sizes}; {task.steps} steps, batch {task.batch}, rate {task.rate}, torch {torch.__version__}."
            parts += [f"### {task.title}", about, report.table(_HEAD, rows)]
            if default := compare(runs, task.name, "default"):
                parts.append("Default policy at the last step: " + ", ".join(default["policies"]) + ".")
    return "\n\n".join(parts)


_HEAD = [
    "policy",
    f"loss, last {LAST}",
    "held out",
    "difference",
    "95 % (t over seeds)",
    "95 % (bootstrap)",
    "at most 0.5 %",
    "stream",
    "state error, worst",
    "seeds",
]
_ABOUT = (
    f"Mean loss of the last {LAST} steps against exact gradients (`Keep()`, activation checkpointing), paired by seed: "
    "same weights at the start, same batches in the same order. The difference is in per cent of the loss, with its "
    "95 % interval by Student's t over the seeds, and by resampling seeds and blocks of ten steps. Stream: stored "
    "bytes against `Keep()`; state error: the worst block's in any step, by the certificate."
)


def main(
    only: Annotated[str | None, typer.Option(help="Comma-separated words that a task, seedN or policy has.")] = None,
    quick: Annotated[bool, typer.Option(help="Tiny networks, 12 steps, two seeds: seconds.")] = False,
    steps: Annotated[int, typer.Option(help="Of each run; 0: the tasks' own.")] = 0,
    seeds: Annotated[int, typer.Option(help="Pairs.", min=1)] = 3,
    path: Annotated[Path | None, typer.Option("--json", help="Results, one line a run; resumed from.")] = None,
    check: Annotated[bool, typer.Option(help="Only print the first gradient's error under each policy.")] = False,
    write: Annotated[Path | None, typer.Option(help="Markdown file whose section is replaced.")] = None,
) -> None:
    """Train under every policy, and compare."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", abyssal.DriftWarning)  # its cost is what is measured
    tasks = list(TASKS.values())
    if quick:
        seeds = min(seeds, 2)
        tasks = [replace(t, sizes=QUICK_SIZES[t.name], steps=12, batch=4) for t in tasks]
    if steps:
        tasks = [replace(t, steps=steps) for t in tasks]
    if check:
        for task in tasks:
            for name in _policies():
                error, policies = gradient_check(task, name)
                print(f"{task.name} {name}: {error:.2e} {policies}")
        return
    path = path or Path("benchmarks/results", f"train_to_loss{'_quick' if quick else ''}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    words = only.split(",") if only else []
    for task in tasks:
        for seed in range(seeds):
            for name in _policies():
                if any(word not in (task.name, f"seed{seed}", name) for word in words):
                    continue
                same = [r for r in load_runs(path) if (r["task"], r["seed"], r["policy"]) == (task.name, seed, name)]
                if not any(r["settings"] == task.settings() for r in same):
                    done = run(task, seed, name)
                    with path.open("a") as file:
                        file.write(json.dumps(done) + "\n")
    kept = [r for r in load_runs(path) if any(r["settings"] == t.settings() for t in tasks)]
    text = render(kept, tasks)
    report.publish(text, MARKER, write)


if __name__ == "__main__":
    typer.run(main)
