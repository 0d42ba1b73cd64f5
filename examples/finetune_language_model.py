"""Fine-tuning a trained language model with LoRA: plainly, with gradient checkpointing, and with abyssal.

    .venv/bin/python examples/finetune_language_model.py            # two to four minutes on 2 cores
    .venv/bin/python examples/finetune_language_model.py --quick    # half a minute; the default where CI=true

A small Llama over bytes learns to continue one half of Python's standard library. Then it is fine-tuned on modules
that it has not seen, three times from the same weights on the same batches. LoRA leaves the embedding frozen, so
that the first layer's input needs no gradient, and the layers are unscaled and trained: nothing here was made for
abyssal. The losses agree, and the certificate says what was kept and how well the layers' inputs were restored.
"""

from __future__ import annotations

import os
import sysconfig
import time
import warnings
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import abyssal
from abyssal.models.torchvision import import_torchvision
from abyssal.profiling.track import track

with suppress(ImportError):
    import_torchvision()  # only where PyPI's torchvision stands beside a CPU build of torch: its import fails there
import transformers

READ = "argparse ast calendar codecs configparser copy csv datetime decimal difflib dis doctest enum ftplib functools"
UNSEEN = "tarfile threading traceback turtle uuid zipfile"
console = Console(width=100, highlight=False)
progress = Console(stderr=True)


@dataclass(frozen=True)
class Settings:
    """Sizes of everything."""

    layers: int = 16
    width: int = 128
    context: int = 128  # bytes of text
    batch: int = 8
    steps: int = 120  # of training
    more_steps: int = 30  # of fine-tuning, each way
    learning_rate: float = 1e-3
    lora_learning_rate: float = 2e-3


QUICK = Settings(layers=10, width=64, context=64, steps=40, more_steps=10, learning_rate=3e-3)


@dataclass(frozen=True)
class Run:
    """One way to fine-tune.

    Attributes:
        losses: per step, in nats per byte.
        held_out: loss on bytes that neither training saw, before and after.
        peak: of one more step's live tensor bytes, gradients allocated before.
        stored: bytes that abyssal kept for the stream; None elsewhere.
        seconds: per step.
        certificate: of the last step; None elsewhere.
    """

    losses: list[float]
    held_out: tuple[float, float]
    peak: int
    stored: int | None
    seconds: float
    certificate: abyssal.Certificate | None


def text(modules: str) -> Tensor:
    """The sources of modules of the standard library. [bytes]"""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return torch.tensor(list(b"\n".join((folder / f"{name}.py").read_bytes() for name in modules.split())))


def batch_of(source: Tensor, settings: Settings, seed: int) -> Tensor:
    """Random places of the text. [batch, context]"""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(source) - settings.context, (settings.batch,), generator=generator)
    return torch.stack([source[start : start + settings.context] for start in starts])


def language_model(settings: Settings) -> nn.Module:
    """A Llama over bytes, with fresh weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=settings.layers,
        hidden_size=settings.width,
        intermediate_size=3 * settings.width,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=settings.context,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=False,  # no key-value cache while training
    )
    return transformers.LlamaForCausalLM(config)


def with_adapters(model: nn.Module) -> tuple[nn.Module, str]:
    """LoRA on all projections if peft is installed, else the model itself, all of which is then trained."""
    try:
        import peft
    except ImportError:
        return model, "all weights (peft is not installed)"
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    return adapted, "LoRA of rank 8"


def train(
    model: nn.Module, source: Tensor, settings: Settings, steps: int, learning_rate: float, tick: Any
) -> list[float]:
    """AdamW on the same batches every time; return the losses."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate)
    losses = []
    for step in range(steps):
        ids = batch_of(source, settings, step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tick()
    return losses


@torch.no_grad()
def loss_on(model: nn.Module, source: Tensor, settings: Settings, batches: int = 8) -> float:
    """Mean loss over a few fixed batches."""
    ids = torch.cat([batch_of(source, settings, seed) for seed in range(batches)])
    return model(input_ids=ids, labels=ids).loss.item()


def peak_of_a_step(model: nn.Module, source: Tensor, settings: Settings) -> int:
    """Peak of the live tensor bytes of one step above what is there before it; gradients are there before it."""
    ids = batch_of(source, settings, 0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with track() as memory:
        model(input_ids=ids, labels=ids).loss.backward()
    return memory.peak


def fine_tune(way: str, trained: nn.Module, source: Tensor, settings: Settings, tick: Any) -> Run:
    """Fine-tune a copy of `trained` in one of the three ways."""
    model, _ = with_adapters(deepcopy(trained))
    if way == "gradient checkpointing":
        model.gradient_checkpointing_enable()
    if way == "abyssal":
        abyssal.reconstruct(model)  # this line is all; the layers are found by themselves
    seen, held_out = source[: len(source) * 9 // 10], source[len(source) * 9 // 10 :]
    before = loss_on(model, held_out, settings)
    began = time.perf_counter()
    losses = train(model, seen, settings, settings.more_steps, settings.lora_learning_rate, tick)
    seconds = (time.perf_counter() - began) / settings.more_steps
    after = loss_on(model, held_out, settings)
    peak = peak_of_a_step(model, seen, settings)
    certificate = abyssal.certificate(model) if way == "abyssal" else None
    return Run(losses, (before, after), peak, certificate.stored_bytes if certificate else None, seconds, certificate)


def study(settings: Settings) -> tuple[list[float], dict[str, Run]]:
    """Train once, fine-tune three times; return the losses of the training and the runs by their way."""
    ways = ("plain PyTorch", "gradient checkpointing", "abyssal")
    with Progress(console=progress, transient=True) as bar:
        task = bar.add_task("training", total=settings.steps + len(ways) * settings.more_steps)
        model = language_model(settings)
        tick = lambda: bar.advance(task)  # noqa: E731
        losses = train(model, text(READ), settings, settings.steps, settings.learning_rate, tick)
        runs = {}
        for way in ways:
            bar.update(task, description=f"fine-tuning, {way}")
            runs[way] = fine_tune(way, model, text(UNSEEN), settings, tick)
    return losses, runs


def kept_inputs(settings: Settings) -> int:
    """Bytes of all layers' inputs, which checkpointing each layer keeps."""
    return settings.layers * settings.batch * settings.context * settings.width * 4


def show(settings: Settings, trained: list[float], runs: dict[str, Run]) -> None:
    """Print the loss curves, the certificate and the summary."""
    _, what = with_adapters(language_model(settings))
    console.print(
        f"A Llama of {settings.layers} layers, {settings.width} wide, trained for {settings.steps} steps on the "
        f"standard library ({trained[0]:.2f} to {trained[-1]:.2f} nats per byte), then fine-tuned on modules it has "
        f"not seen: {what}, {settings.more_steps} steps, {settings.batch} x {settings.context} bytes each."
    )
    curves = Table(box=SIMPLE_HEAD, header_style="bold", title="Loss while fine-tuning", title_justify="left")
    curves.add_column("step", justify="right")
    for way in runs:
        curves.add_column(way, justify="right")
    last = settings.more_steps - 1
    for step in sorted({*range(0, last, max(1, last // 5)), last}):
        curves.add_row(str(step), *[f"{run.losses[step]:.5f}" for run in runs.values()])
    console.print(curves)
    console.print(str(runs["abyssal"].certificate), markup=False)
    table = Table(box=SIMPLE_HEAD, header_style="bold", title="One step", title_justify="left")
    for column in ("", "held-out loss", "curves apart", "peak", "layers' inputs", "time"):
        table.add_column(column, justify="left" if column == "" else "right")
    plain = runs["plain PyTorch"]
    for way, run in runs.items():
        apart = max(abs(a - b) for a, b in zip(run.losses, plain.losses, strict=True))
        stored = {"plain PyTorch": "-", "gradient checkpointing": f"{kept_inputs(settings) / 1e6:.2f} MB"}.get(way)
        stored = stored or f"{(run.stored or 0) / 1e6:.2f} MB"
        table.add_row(
            way,
            f"{run.held_out[0]:.4f} to {run.held_out[1]:.4f}",
            "-" if run is plain else f"{apart:.1e}",
            f"{run.peak / 1e6:.1f} MB",
            stored,
            f"{run.seconds * 1e3:.0f} ms",
        )
    console.print(table)
    console.print(
        "Curves apart: largest difference from plain PyTorch's loss in any step. Peak: a step's live tensors."
    )


def main(
    quick: Annotated[bool, typer.Option("--quick/--full", help="Small sizes.")] = os.environ.get("CI") == "true",
) -> None:
    """Train a small language model, then fine-tune it with and without abyssal."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # names that change in its next
    transformers.logging.set_verbosity_error()
    settings = QUICK if quick else Settings()
    show(settings, *study(settings))


if __name__ == "__main__":
    torch.set_num_threads(1)  # for tensors as small as these, threads cost more than they give
    typer.run(main)
