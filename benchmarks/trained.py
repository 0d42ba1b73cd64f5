"""Networks trained here, for benchmarks that need trained ones: a GPT on text, a ConvNeXt and a ResNet on digits.

    python benchmarks/trained.py                 # train all that are missing (about 15 minutes), and list them

They are small, trained on one core in a few minutes, and unscaled as people build them: no factor on the branches
that falls with depth. Weights are kept in ~/.cache/abyssal-benchmarks under a hash of the settings, the network's
code, the data and torch's version, so that each is trained once.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
console = Console(stderr=True)
HELD_OUT = 1_000_000  # seeds of held-out batches start here, those of training at 0


# ---------------------------------------------------------------- the networks


class AttentionBlock(nn.Module):
    """`x + attention(norm(x))`, causal. [batch, tokens, width] to the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.queries_keys_values, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.queries_keys_values(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class FeedForwardBlock(nn.Module):
    """`x + mlp(norm(x))`. [batch, tokens, width] to the same."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner, self.out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.gelu(self.inner(self.norm(x))))


class Layer(nn.Module):
    """A pre-norm layer: one block, or two with its branches taken as blocks."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention, self.feed_forward = AttentionBlock(width, heads), FeedForwardBlock(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(self.attention(x))


class GPT(nn.Module):
    """A pre-norm GPT over bytes, initialised as GPT-2 is."""

    def __init__(self, layers: int = 12, width: int = 128, heads: int = 4, context: int = 64):
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # what writes to the stream is smaller, by the number of times that it is written to
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * layers) if name.endswith("out.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, text: Tensor) -> Tensor:
        x = self.token(text) + self.position.weight[: text.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class ConvNeXtBlock(nn.Module):
    """`x + scale * mlp(norm(depthwise 5x5(x)))`, layer scale from 0.1. [batch, channels, height, width] to the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.inner, self.out = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        f = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        f = self.scale * self.out(F.gelu(self.inner(f)))
        return x + f.permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """Two stages of ConvNeXt blocks behind a patch stem, for 16x16 images."""

    def __init__(self, depths: tuple[int, ...] = (6, 6), channels: tuple[int, ...] = (48, 96)):
        super().__init__()
        self.stem = nn.Conv2d(1, channels[0], 2, stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(*[ConvNeXtBlock(c) for _ in range(n)]) for n, c in zip(depths, channels, strict=True)
        )
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(channels))
        self.norm, self.head = nn.LayerNorm(channels[-1]), nn.Linear(channels[-1], 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stages[0](self.stem(image))
        for down, stage in zip(self.downs, self.stages[1:], strict=True):
            x = stage(down(x))
        return self.head(self.norm(x.mean((2, 3))))


class PreActBlock(nn.Module):
    """`x + conv(relu(norm(conv(relu(norm(x))))))` with BatchNorm. [batch, channels, height, width] to the same."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class ResNet(nn.Module):
    """A pre-activation ResNet of two stages with BatchNorm, for 16x16 images."""

    def __init__(self, depths: tuple[int, ...] = (6, 6), channels: tuple[int, ...] = (16, 32)):
        super().__init__()
        self.stem = nn.Conv2d(1, channels[0], 3, padding=1, bias=False)
        self.stages = nn.ModuleList(
            nn.Sequential(*[PreActBlock(c) for _ in range(n)]) for n, c in zip(depths, channels, strict=True)
        )
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False) for a, b in pairwise(channels))
        self.norm, self.head = nn.BatchNorm2d(channels[-1]), nn.Linear(channels[-1], 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stages[0](self.stem(image))
        for down, stage in zip(self.downs, self.stages[1:], strict=True):
            x = stage(down(x))
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


# ---------------------------------------------------------------- the data

MODULES = (
    "argparse ast calendar codecs configparser copy csv datetime decimal difflib dis doctest enum fractions ftplib "
    "functools gettext heapq inspect ipaddress locale mailbox optparse os pdb pickle pickletools platform pprint pydoc "
    "random shutil smtplib socket ssl statistics subprocess tarfile textwrap threading traceback turtle typing uuid "
    "warnings weakref zipfile"
)


@cache
def text(held_out: bool) -> Tensor:
    """Sources of Python's standard library as bytes; the last tenth of each file is held out. [bytes]"""
    parts = []
    for name in MODULES.split():
        path = Path(sysconfig.get_paths()["stdlib"], f"{name}.py")
        if path.exists():
            content = path.read_bytes()
            cut = len(content) * 9 // 10
            parts.append(content[cut:] if held_out else content[:cut])
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def text_batch(seed: int, held_out: bool, size: int, context: int = 64) -> Batch:
    """Bytes, and the bytes that follow them. [size, context] each."""
    data = text(held_out)
    starts = torch.randint(len(data) - context - 1, (size, 1), generator=torch.Generator().manual_seed(seed))
    rows = data[starts + torch.arange(context + 1)].long()
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@cache
def digits(held_out: bool) -> Batch:
    """scikit-learn's digits, 8x8 pixels enlarged to 16x16, values within -1 and 1; every fifth is held out."""
    from sklearn.datasets import load_digits

    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    images = F.interpolate(images.float().view(-1, 1, 8, 8) / 8 - 1, scale_factor=2, mode="bilinear")
    chosen = (torch.arange(len(labels)) % 5 == 0) == held_out
    return images[chosen], labels[chosen].long()


def digit_batch(seed: int, held_out: bool, size: int) -> Batch:
    """Images, each moved by up to two pixels, and their labels. [size, 1, 16, 16], [size]"""
    images, labels = digits(held_out)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(labels), (size,), generator=generator)
    down, right = torch.randint(5, (2, size, 1), generator=generator)
    rows, columns = down + torch.arange(16), right + torch.arange(16)
    padded = F.pad(images[chosen, 0], (2, 2, 2, 2), value=-1.0)
    return padded[torch.arange(size)[:, None, None], rows[:, :, None], columns[:, None, :]][:, None], labels[chosen]


# ---------------------------------------------------------------- recipes


@dataclass(frozen=True)
class Recipe:
    """A network and how it is trained: AdamW, linear warm-up, cosine to a tenth, gradients clipped at norm 1."""

    name: str
    title: str
    build: Callable[..., nn.Module]
    sizes: dict[str, Any]
    code: tuple[type[nn.Module], ...]  # whose source is part of the cache's key
    draw: Callable[[int, bool, int], Batch]
    blocks: dict[str, tuple[str, ...]]  # granularity: globs of the block names
    steps: int
    batch: int
    rate: float
    smoothing: float = 0.0  # of labels; a fitted network's gradients would otherwise be those of a few images
    warm_up: int = 20
    weight_decay: float = 0.01

    def key(self, seed: int) -> str:
        """Hash of all that the weights follow from."""
        settings = {k: v for k, v in vars(self).items() if k not in ("title", "build", "code", "draw", "blocks")}
        facts = [repr(sorted(settings.items())), str(seed), torch.__version__]
        facts += [inspect.getsource(c) for c in self.code] + [inspect.getsource(self.draw)]
        whole = hashlib.sha256("\n".join(facts).encode())
        data = digits(False)[0] if self.draw is digit_batch else text(False)
        return hashlib.sha256(whole.digest() + data.numpy().tobytes()).hexdigest()[:16]

    def loss_of(self, output: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy, in nats. [..., classes], [...]"""
        return F.cross_entropy(output.flatten(0, -2), targets.flatten(), label_smoothing=self.smoothing)


_LAYERS = {"layers": ("layers.*",), "branches": ("layers.*.attention", "layers.*.feed_forward")}
_STAGES = {"blocks": ("stages.0.*", "stages.1.*")}
RECIPES = {
    r.name: r
    for r in [
        Recipe(
            "gpt",
            "pre-norm GPT, 12 layers, width 128, 4 heads, 16 x 64 bytes of Python's standard library",
            GPT,
            {"layers": 12, "width": 128, "heads": 4, "context": 64},
            (GPT, Layer, AttentionBlock, FeedForwardBlock),
            text_batch,
            _LAYERS,
            steps=500,
            batch=16,
            rate=1.5e-3,
        ),
        Recipe(
            "convnext",
            "ConvNeXt, 6 blocks of 48 channels at 8x8, 6 of 96 at 4x4, layer scale from 0.1, 64 digits",
            ConvNeXt,
            {"depths": (6, 6), "channels": (48, 96)},
            (ConvNeXt, ConvNeXtBlock),
            digit_batch,
            _STAGES,
            steps=400,
            batch=64,
            rate=2e-3,
            smoothing=0.1,
        ),
        Recipe(
            "resnet",
            "pre-activation ResNet with BatchNorm, 6 blocks of 16 channels at 16x16, 6 of 32 at 8x8, 64 digits",
            ResNet,
            {"depths": (6, 6), "channels": (16, 32)},
            (ResNet, PreActBlock),
            digit_batch,
            _STAGES,
            steps=400,
            batch=64,
            rate=2e-3,
            smoothing=0.1,
        ),
    ]
}
_QUICK = {
    "gpt": {"sizes": {"layers": 4, "width": 64, "heads": 4, "context": 64}, "steps": 60, "rate": 3e-3},
    "convnext": {"sizes": {"depths": (2, 2), "channels": (16, 32)}, "steps": 60},
    "resnet": {"sizes": {"depths": (2, 2), "channels": (8, 16)}, "steps": 60},
}


def recipe(name: str, quick: bool = False) -> Recipe:
    """The recipe of that name; `quick` gives a smaller network that trains in seconds.

    Raises:
        SystemExit: for an unknown name.
    """
    if name not in RECIPES:
        raise SystemExit(f"no network {name!r}; there are {', '.join(RECIPES)}")
    return replace(RECIPES[name], **_QUICK[name]) if quick else RECIPES[name]


# ---------------------------------------------------------------- trained networks


@dataclass
class Trained:
    """One trained network, in training mode, and what it was trained on."""

    recipe: Recipe
    seed: int
    model: nn.Module
    record: dict[str, float] = field(default_factory=dict)  # first, last and held-out loss, accuracy, seconds

    @property
    def granularities(self) -> dict[str, tuple[str, ...]]:
        """What may be taken as blocks, as `abyssal.reconstruct(blocks=...)` wants it; the first is the usual one."""
        return self.recipe.blocks

    def batches(self, n: int, held_out: bool = True, size: int | None = None) -> list[Batch]:
        """`n` batches of inputs and targets, the same at each call."""
        first = HELD_OUT if held_out else 0
        return [self.recipe.draw(first + i, held_out, size or self.recipe.batch) for i in range(n)]

    def loss_of(self, output: Tensor, targets: Tensor) -> Tensor:
        """The loss that it was trained with, from the model's output."""
        return self.recipe.loss_of(output, targets)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The same from a batch; `model` may be a copy of `self.model`."""
        return self.loss_of(model(batch[0]), batch[1])


def load(name: str, seed: int = 0, quick: bool = False) -> Trained:
    """A trained network from the cache, trained now if it is not there.

    Args:
        name: of `RECIPES`: "gpt", "convnext", "resnet".
        seed: of its initial weights and of the order of its batches.
        quick: a smaller network, trained in seconds.
    """
    return load_recipe(recipe(name, quick), seed)


def load_recipe(chosen: Recipe, seed: int = 0) -> Trained:
    """The same for a recipe that is not in `RECIPES`."""
    path = cache_folder() / f"{chosen.name}-{seed}-{chosen.key(seed)}.pt"
    if not path.exists():
        _train(chosen, seed, path)
    kept = torch.load(path, weights_only=True)
    with torch.random.fork_rng(devices=[]):
        model = chosen.build(**chosen.sizes)
    model.load_state_dict(kept["weights"])
    return Trained(chosen, seed, model.train(), kept["record"])


def cache_folder() -> Path:
    """Where weights are kept."""
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "abyssal-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _train(chosen: Recipe, seed: int, path: Path) -> None:
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        model, begin = chosen.build(**chosen.sizes), time.perf_counter()
        losses = train(chosen, model, first_batch=HELD_OUT // 10 * seed)
        record = {"seconds": time.perf_counter() - begin, **_assess(chosen, model)}
    tail = losses[-20:]
    record |= {"first": losses[0], "last": sum(tail) / len(tail)}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        whole = Path(folder, path.name)
        torch.save({"weights": model.state_dict(), "record": record}, whole)
        os.replace(whole, path)  # whole, or not there


def train(chosen: Recipe, model: nn.Module, first_batch: int = 0) -> list[float]:
    """Train in place; returns the loss at each step."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=chosen.rate, betas=(0.9, 0.95), weight_decay=chosen.weight_decay
    )
    losses = []
    for step in track(range(chosen.steps), f"training {chosen.name}", console=console, transient=True):
        decay = 0.55 + 0.45 * math.cos(math.pi * step / chosen.steps)
        optimizer.param_groups[0]["lr"] = chosen.rate * decay * min(1.0, (step + 1) / chosen.warm_up)
        inputs, targets = chosen.draw(first_batch + step, False, chosen.batch)
        loss = chosen.loss_of(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def _assess(chosen: Recipe, model: nn.Module, batches: int = 16) -> dict[str, float]:
    """Held-out loss (as trained, with smoothed labels) and accuracy."""
    model.eval()
    losses, right, count = [], 0, 0
    for i in range(batches):
        inputs, targets = chosen.draw(HELD_OUT + 1000 + i, True, chosen.batch)
        output = model(inputs)
        losses.append(chosen.loss_of(output, targets).item())
        right += int((output.argmax(-1) == targets).sum())
        count += targets.numel()
    model.train()
    return {"held_out": sum(losses) / batches, "accuracy": right / count}


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main(
    only: Annotated[str | None, typer.Option(help="Comma-separated: gpt,convnext,resnet.")] = None,
    seeds: Annotated[int, typer.Option(help="Of each network.", min=1)] = 3,
    quick: Annotated[bool, typer.Option(help="Smaller networks, trained in seconds.")] = False,
) -> None:
    """Train the networks that are not in the cache, and list all."""
    shown = Table("network", "seed", "loss: first", "last 20", "held out", "accuracy", "seconds", title="Trained here")
    for seed in range(seeds):  # so that there is one of each early
        for name in only.split(",") if only else RECIPES:
            r = load(name, seed, quick).record
            losses = [f"{r[k]:.3f}" for k in ("first", "last", "held_out")]
            shown.add_row(name, str(seed), *losses, f"{r['accuracy']:.1%}", f"{r['seconds']:.0f}")
    Console().print(shown)


if __name__ == "__main__":
    typer.run(main)
