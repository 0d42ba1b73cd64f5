"""Blocks that say what they were run at, and the closed loop of a coded stream written out plainly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import abyssal
from abyssal.codec.quantiser import Codec, Encoded

WIDTH = 64


class Seen(nn.Module):
    """Residual block `x + scale tanh(W x)` that remembers each input it was run at, the forward pass's first."""

    def __init__(self, scale: float = 0.3, width: int = WIDTH) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(width, width), scale
        self.inputs: list[Tensor] = []

    def branch(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.linear(x))

    def forward(self, x: Tensor) -> Tensor:
        self.inputs.append(x.detach().clone())
        return x + self.branch(x)


def stack(scales: Sequence[float], dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Seen(scale) for scale in scales]).to(dtype)


def batch(rows: int = 16, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).to(dtype)


def coded(model: nn.Sequential, policy: object, **options: object) -> nn.Sequential:
    """The same model, reconstructed; told nothing about drift, which is for other tests."""
    options.setdefault("tolerance", 1e9)
    abyssal.reconstruct(model, policy, blocks=list(model), **options)  # type: ignore[arg-type]
    return model


def step(model: nn.Module, x: Tensor) -> Tensor:
    """All parameters' gradients of one step, flattened."""
    model.zero_grad()
    model(x).float().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def true_and_restored(model: nn.Sequential, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Each block's input in the forward pass, and the one that its gradient was evaluated at."""
    for block in model:
        block.inputs.clear()
    step(model, x)
    return [block.inputs[0] for block in model], [block.inputs[-1] for block in model]


def wide(x: Tensor) -> Tensor:
    return x.double() if x.dtype == torch.float64 else x.float()


def increments(states: Sequence[Tensor], bits: Sequence[int]) -> list[tuple[Tensor, tuple[Tensor, Tensor] | None]]:
    """What the encoder carries past each state, and the cell in which its code places it; slow, and written out.

    Args:
        states: the true inputs of a chain of coded blocks, the first block's to the last's.
        bits: of the code of each.

    Returns:
        For each state the residual, which is the state less what the decoder knows, and the bounds of the cell
        around what is decoded; None for the first, which has no code.
    """
    found = _encoder(states, bits)
    return [(residual, None if code is None else code[0].cell(code[1])) for residual, code in found]


def _encoder(states: Sequence[Tensor], bits: Sequence[int]) -> list[tuple[Tensor, tuple[Codec, Encoded] | None]]:
    residual = torch.zeros_like(wide(states[0])).bfloat16()
    found: list[tuple[Tensor, tuple[Codec, Encoded] | None]] = [(residual, None)]
    for before, state, b in zip(states, states[1:], bits[1:], strict=False):
        codec = Codec(b)
        distance = wide(state) - wide(before) + residual
        encoded, decoded = codec.encode(distance)
        residual = (distance - decoded).bfloat16()
        found.append((residual, (codec, encoded)))
    return found


def closed_loop(states: Sequence[Tensor], bits: Sequence[int]) -> list[Tensor]:
    """What the decoder makes of the inputs of a chain of coded blocks; the last one is exact, its residual coded."""
    found = _encoder(states, bits)
    known = wide(states[-1])
    if len(found) > 1:
        codec = Codec(8)
        known = known - codec.decode(codec.encode(found[-1][0].float())[0], known.dtype)
    restored = [states[-1]]
    for _, code in reversed(found[1:]):
        assert code is not None
        codec, encoded = code
        known = known - codec.decode(encoded, known.dtype)
        restored.append(known.to(states[0].dtype))
    return restored[::-1]


def error(found: Tensor, true: Tensor) -> float:
    """Root mean square over positions of the relative error."""
    found, true = found.double(), true.double()
    return float(((found - true).norm(dim=-1) / true.norm(dim=-1)).square().mean().sqrt())


def absolute(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true.double()).square().mean().sqrt())
