"""Models made to break assumptions, and whether a policy is silently wrong on one."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import abyssal

WIDTH, TOKENS, ROWS, DEPTH = 64, 16, 8, 8
# A restored state within the tolerance may move the gradient by some times as much; more than ten times is wrong.
TOO_WRONG = 10


@dataclass(frozen=True)
class Outcome:
    """One training step under a policy beside plain autograd's.

    Attributes:
        error: of the whole gradient, relative; infinite where it is not finite and plain autograd's is.
        state_error: what the certificate says of the states.
        told: warned, raised, or named in the certificate as drifted or not certified.
        tolerance: of the certificate.
    """

    error: float
    state_error: float | None
    told: str
    tolerance: float

    @property
    def silently_wrong(self) -> bool:
        return self.error > TOO_WRONG * self.tolerance and not self.told


def gradient(model: nn.Module, batch: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """All parameters' gradients of one step with fixed draws, flattened, in float64."""
    model.zero_grad()
    torch.manual_seed(7)
    loss(model(batch)).backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def outcome(
    model: nn.Module,
    batch: Tensor,
    policy: abyssal.Policy | None,
    loss: Callable[[Tensor], Tensor] | None = None,
    **options: object,
) -> Outcome:
    """Take one step of a copy of `model` under `policy`, and one plainly."""
    loss = loss or (lambda y: y.float().square().mean())
    plain = gradient(copy.deepcopy(model), batch, loss)
    ours = abyssal.reconstruct(copy.deepcopy(model), policy, **options)  # type: ignore[arg-type]
    told = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = gradient(ours, batch, loss)
        except (abyssal.DriftError, RuntimeError) as error:
            found, told = torch.full_like(plain, math.nan), f"{type(error).__name__}: {error}"
    relevant = [
        str(w.message) for w in caught if issubclass(w.category, abyssal.DriftWarning) or "abyssal" in w.filename
    ]
    certificate = abyssal.certificate(ours)
    told = told or "; ".join(relevant) or ", ".join(certificate.drifted)
    error = float((found - plain).norm() / plain.norm())
    return Outcome(error if math.isfinite(error) else math.inf, certificate.error, told, certificate.tolerance)


def silently_wrong(model: nn.Module, batch: Tensor, policy: abyssal.Policy | None, **options: object) -> bool:
    """Whether the gradient is far off and nobody is told: the one thing that must never be.

    Args:
        model: as it is; a copy is stepped.
        batch: its input.
        policy: None is the default.
        options: `loss`, and what `abyssal.reconstruct` takes.

    Returns:
        True if the gradient's error is above ten times the tolerance though nothing warned, raised or drifted.
    """
    return outcome(model, batch, policy, **options).silently_wrong  # type: ignore[arg-type]


# ---------------------------------------------------------------------- blocks


class Block(nn.Module):
    """Pre-norm residual block `x + scale W2 tanh(W1 norm(x))`, the base of the hostile ones."""

    scale = 0.3

    def __init__(self, number: int, width: int = WIDTH) -> None:
        super().__init__()
        self.number = number
        self.norm = nn.LayerNorm(width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def branch(self, x: Tensor) -> Tensor:
        return self.scale * self.second(torch.tanh(self.first(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class HugeFirst(Block):
    """The first two increments are a thousand times the embedding, as in trained transformers, and worse."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (1000 if self.number < 2 else 1) * self.branch(x)


class Dropping(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.branch(F.dropout(x, 0.2, self.training)), 0.3, self.training)


class Batched(Block):
    """BatchNorm: every sample's branch depends on all others', and channels are weighed alike."""

    scale = 1.0

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.norm = nn.BatchNorm1d(WIDTH)

    def branch(self, x: Tensor) -> Tensor:
        return super().branch(x.flatten(0, 1)).view(x.shape)


class Experts(Block):
    """Hard top-k routing whose logits are close to one another, so that a small perturbation flips it."""

    count, k = 4, 1

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.router = nn.Linear(WIDTH, self.count, bias=False)
        with torch.no_grad():
            self.router.weight.mul_(0.1)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(self.count)])

    def branch(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        weights, chosen = self.router(h).softmax(-1).topk(self.k, dim=-1)
        out = torch.zeros_like(h)
        for i, expert in enumerate(self.experts):
            out = out + expert(h) * torch.where(chosen == i, weights, 0).sum(-1, keepdim=True)
        return 2 * out


class ArgmaxExperts(Experts):
    """The same by argmax and indexing, as in code that calls no `topk`."""

    def branch(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        logits = self.router(h)
        mask = F.one_hot(logits.argmax(-1), self.count).to(h.dtype) * logits.softmax(-1)
        return 2 * sum(expert(h) * mask[..., i : i + 1] for i, expert in enumerate(self.experts))


class Strong(Block):
    """Contracts, barely."""

    scale = 1.0


class NonContractive(Block):
    scale = 8.0


class Forgetful(Block):
    """What it adds takes the state away: the output does not tell the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.branch(x) - x if self.number % 3 == 1 else self.branch(x))


class Dead(Block):
    """The outputs of two blocks are zero, whatever came in."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0 + 0 * self.branch(x) if self.number in (2, 5) else x + self.branch(x) + x.new_ones(WIDTH)


class Branching(Block):
    """Another branch, by a number computed from the whole state."""

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.mean() > 0):
            return x + self.branch(x)
        return x - 2 * self.branch(x.flip(-1))


class Thresholded(Block):
    """Each token's branch is chosen by the sign of one of its numbers."""

    def branch(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return 0.5 * torch.where(h[..., :1] > 0, self.first(h), -self.second(h))


class Oscillating(Block):
    """A small branch with a large derivative: the gradient forgets what the state remembers."""

    def branch(self, x: Tensor) -> Tensor:
        return 0.02 * torch.sin(50 * self.first(self.norm(x)))


class PostNorm(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.scale * self.second(torch.tanh(self.first(x))))


class AddRelu(Block):
    """ReLU after the sum, as in the first ResNets: half of the state is cut off at each block."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.branch(x))


class Model(nn.Module):
    """Embedding, an offset or factor on the stream, blocks, norm, head."""

    def __init__(
        self,
        block: type[Block] = Block,
        *,
        embedding: float = 1.0,
        stream: Callable[[Tensor], Tensor] = lambda x: x,
        tied: bool = False,
        depth: int = DEPTH,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            self.embedding.weight.mul_(embedding)
        self.stream = stream
        one = block(0)
        self.blocks = nn.ModuleList([one if tied else block(number) for number in range(depth)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stream(self.embedding(x))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def with_channel(x: Tensor) -> Tensor:
    """One channel 500 times the others."""
    scale = torch.ones(WIDTH, dtype=x.dtype)
    scale[7] = 500
    return x * scale


def with_constant_channel(x: Tensor) -> Tensor:
    """Two channels at one token of each row hold what trained language models hold there: a large constant."""
    massive = torch.zeros(TOKENS, WIDTH, dtype=x.dtype)
    massive[0, 7], massive[0, 31] = 500, -300
    return x + massive


def with_sink(x: Tensor) -> Tensor:
    """The first token is a thousand times the others."""
    scale = torch.ones(TOKENS, 1, dtype=x.dtype)
    scale[0] = 1000
    return x * scale


def with_offset(x: Tensor) -> Tensor:
    """A common offset that every norm takes away."""
    return x + 1000


HOSTILE: dict[str, Callable[[], nn.Module]] = {
    "huge first increments": lambda: Model(HugeFirst, embedding=0.02),
    "dropout": lambda: Model(Dropping),
    "batch normalisation": lambda: Model(Batched),
    "tied layers": lambda: Model(tied=True),
    "experts by topk": lambda: Model(Experts),
    "experts by argmax": lambda: Model(ArgmaxExperts),
    "massive channel": lambda: Model(Strong, stream=with_channel),
    "massive channel, batch normalisation": lambda: Model(Batched, stream=with_channel),
    "massive constants at one token": lambda: Model(Strong, stream=with_constant_channel),
    "attention sink": lambda: Model(Strong, stream=with_sink),
    "outputs of 1e5": lambda: Model(Strong, stream=lambda x: 1e5 * x),
    "offset that norms take away": lambda: Model(Strong, stream=with_offset),
    "zero states": lambda: Model(Dead),
    "zero start": lambda: Model(stream=lambda x: x * 0),
    "states forgotten": lambda: Model(Forgetful),
    "no contraction": lambda: Model(NonContractive),
    "branching on the whole state": lambda: Model(Branching),
    "branching at a threshold": lambda: Model(Thresholded),
    "oscillating branch": lambda: Model(Oscillating),
    "post-norm": lambda: Model(PostNorm),
    "relu after the sum": lambda: Model(AddRelu),
    "float16": lambda: Model().half(),
    "float16, huge first increments": lambda: Model(HugeFirst, embedding=0.02).half(),
    "bfloat16": lambda: Model().bfloat16(),
    "bfloat16, huge first increments": lambda: Model(HugeFirst, embedding=0.02).bfloat16(),
    "everything": lambda: Everything(),
}


class Everything(Model):
    """Huge first increments, dropout, BatchNorm, tied layers and routing in one chain."""

    def __init__(self) -> None:
        super().__init__(HugeFirst, embedding=0.02, depth=2)
        batched, tied = Batched(4), Block(5)
        self.blocks.extend([Dropping(2), Experts(3), batched, tied, tied, Thresholded(6), Batched(7)])


def batch_for(model: nn.Module) -> Tensor:
    dtype = next(model.parameters()).dtype
    return torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
