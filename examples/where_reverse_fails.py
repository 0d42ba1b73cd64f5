"""Where reversing a residual network fails, how the certificate says so, and what repairs it.

    .venv/bin/python examples/where_reverse_fails.py            # two to four minutes on 2 cores
    .venv/bin/python examples/where_reverse_fails.py --quick    # seconds; the default where CI is set

A small pre-norm GPT, byte-level and *unscaled* (no 1/depth anywhere), is trained on the sources of Python's
standard library. Then the gradient of one batch is taken with its layers' inputs restored instead of kept,
and compared with plain autograd's, before and after training; and training goes on in four ways.
"""

from __future__ import annotations

import math
import os
import platform
import sysconfig
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import abyssal
from abyssal import Keep, PaperAdjoint, Policy, Reverse

MODULES = """argparse ast bdb calendar cmd codecs configparser copy csv datetime decimal difflib dis doctest
    enum fractions ftplib functools gettext heapq inspect ipaddress locale mailbox nturl2path optparse os pdb
    pickle pickletools platform pprint pydoc random shutil smtplib socket ssl statistics subprocess tarfile
    textwrap threading trace traceback turtle typing uuid warnings weakref zipfile""".split()
console = Console()


@dataclass(frozen=True)
class Settings:
    """Sizes of everything; lengths in bytes of text."""

    layers: int = 12
    width: int = 128
    heads: int = 4
    context: int = 64
    batch: int = 16
    steps: int = 300  # of the first training
    more_steps: int = 60  # of each way to go on
    batches: int = 4  # on which gradient errors are measured
    seed: int = 0


QUICK = Settings(batch=8, steps=60, more_steps=8, batches=1)


# ------------------------------------------------------------------------------------- the text and the network


class Text:
    """Python's own sources as bytes; the last tenth is held out."""

    def __init__(self, settings: Settings) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        files = [path for name in MODULES if (path := folder / f"{name}.py").exists()]
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
    """A pre-norm GPT over bytes, initialised as GPT-2 is: all matrices and embeddings N(0, 0.02^2)."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        width = settings.width
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(settings.context, width)
        self.layers = nn.ModuleList(Layer(width, settings.heads) for _ in range(settings.layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # GPT-2 also divides what writes to the stream by sqrt(2 layers)
                last = name.endswith(("out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * settings.layers) if last else 0.02)
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


