"""Small networks that plans are made for: a GPT trained here, a convolutional one with BatchNorm, and awkward ones."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Layer(nn.Module):
    """Pre-norm attention and MLP, as GPT-2's."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.out(mixed))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    """Over bytes; called and answering as Hugging Face models are: `model(input_ids=..., labels=...).loss`."""

    def __init__(self, layers: int = 6, width: int = 64, context: int = 32, dropout: float = 0.0) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(context, width)
        self.layers = nn.ModuleList(Layer(width, 4, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if writes else 0.02)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        x = self.token(input_ids) + self.position.weight[: input_ids.shape[1]]
        for layer in self.layers:
            x = layer(hidden_states=x)
        logits = self.head(self.norm(x))
        loss = None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


@functools.cache
def text() -> Tensor:
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = b"".join((folder / f"{name}.py").read_bytes() for name in ("argparse", "ast", "inspect", "typing"))
    return torch.frombuffer(bytearray(sources), dtype=torch.uint8).long()


def lines(seed: int, rows: int = 8, context: int = 32) -> dict[str, Tensor]:
    """A batch of text, drawn from `seed`. [rows, context]"""
    starts = torch.randint(len(text()) - context - 1, (rows, 1), generator=torch.Generator().manual_seed(seed))
    found = text()[starts + torch.arange(context + 1)]
    return {"input_ids": found[:, :-1], "labels": found[:, 1:]}


def trained_gpt(steps: int = 120) -> GPT:
    torch.manual_seed(0)
    model = GPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        optimizer.zero_grad()
        model(**lines(step)).loss.backward()
        optimizer.step()
    return model


class Convolution(nn.Module):
    """Pre-activation residual block with BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.norm2(self.first(F.relu(self.norm1(x))))))


class ConvNet(nn.Module):
    """Two stages with a pooling between them: two chains."""

    def __init__(self, blocks: int = 3, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.stage1 = nn.ModuleList(Convolution(channels) for _ in range(blocks))
        self.stage2 = nn.ModuleList(Convolution(channels) for _ in range(blocks))
        self.head = nn.Linear(channels, 10)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.stage1:
            x = block(x)
        x = F.avg_pool2d(x, 2)
        for block in self.stage2:
            x = block(x)
        return F.cross_entropy(self.head(x.mean((2, 3))), labels)


def images(seed: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    """Ten kinds of noisy stripes. [rows, 3, 16, 16], [rows]"""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (rows,), generator=generator)
    phase = torch.arange(16.0) * (labels + 1)[:, None] * 0.3
    clean = torch.sin(phase)[:, None, None, :].expand(rows, 3, 16, 16)
    return clean + 0.5 * torch.randn(rows, 3, 16, 16, generator=generator), labels


def trained_convnet(steps: int = 60) -> ConvNet:
    torch.manual_seed(0)
    model = ConvNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        model(*images(step)).backward()
        optimizer.step()
    return model


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([torch.zeros(0) if g is None else g.flatten() for g in found])
