"""Models that kernels are compared on, and their kernels by the definition: whole Jacobians, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toys.huggingface import import_transformers


def rows(x: Any, at: slice) -> Any:
    if isinstance(x, dict):
        return {name: value[at] for name, value in x.items()}
    return x[at]


def jacobian(model: nn.Module, x: Any, output: Callable[[Any], Tensor] | None = None) -> Tensor:
    """Gradients of every output of every sample, evaluated alone, by all parameters. [n, k, parameters]"""
    parameters = [p for p in model.parameters() if p.requires_grad]
    samples = []
    for i in range(len(next(iter(x.values())) if isinstance(x, dict) else x)):
        one = rows(x, slice(i, i + 1))
        found = model(**one) if isinstance(one, dict) else model(one)
        flat = (found if output is None else output(found)).reshape(-1)
        gradients = []
        for value in flat:
            found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            pairs = zip(parameters, found, strict=True)
            gradients.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs]))
        samples.append(torch.stack(gradients))
    return torch.stack(samples)


def kernel(model: nn.Module, x: Any, x2: Any = None, output: Callable[[Any], Tensor] | None = None) -> Tensor:
    """By the definition. [n1, n2, k, k]"""
    first = jacobian(model, x, output)
    second = first if x2 is None else jacobian(model, x2, output)
    return torch.einsum("iap,jbp->ijab", first, second)


class ResidualMLP(nn.Module):
    """With one norm that all blocks share."""

    def __init__(self, width: int = 20, depth: int = 4, outputs: int = 3, features: int = 5) -> None:
        super().__init__()
        self.inner = nn.Linear(features, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.outer = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        for block in self.blocks:
            h = h + torch.tanh(block(self.norm(h))) / len(self.blocks)
        return self.outer(h)


class ConvBlock(nn.Module):
    def __init__(self, channels: int, groups: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=dilation, dilation=dilation, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(channels, channels, 3, padding="same", padding_mode="circular")
        self.last = nn.GroupNorm(2, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.last(self.second(self.relu(self.norm(self.first(x)))))


class WithTied(nn.Module):
    """An embedding that is also the output layer, and a linear layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6, padding_idx=3)
        self.linear = nn.Linear(6, 6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids)
        return self.head(self.linear(torch.tanh(self.linear(h)))).mean(dim=1)


class ByHand(nn.Module):
    """Weights used transposed and by functions, and parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 6)
        self.linear = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.linear(self.embedding(ids))) * self.scale
        h = h + h @ self.linear.weight.T
        return F.linear(h, self.embedding.weight).mean(dim=1)


class SequenceFirst(nn.Module):
    """Samples along the second dimension, or flattened with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.outer = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.linear(x.transpose(0, 1)))).transpose(0, 1)
        return self.outer(h.reshape(-1, 8)).reshape(len(x), -1, 3).sum(dim=1)


class RMSScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6)


def residual_mlp() -> tuple[nn.Module, Any, Any]:
    return ResidualMLP(), torch.randn(6, 5), None


def conv_resnet() -> tuple[nn.Module, Any, Any]:
    blocks = [ConvBlock(4), ConvBlock(4, groups=2, dilation=2), ConvBlock(4, groups=4)]
    for block in blocks:
        block.norm.running_mean.normal_()
        block.norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    return model.eval(), torch.randn(5, 3, 9, 9), None


def conv1d() -> tuple[nn.Module, Any, Any]:
    layers = [nn.Conv1d(2, 4, 3, stride=2), nn.PReLU(4), nn.Conv1d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(16, 2)]
    return nn.Sequential(*layers), torch.randn(4, 2, 11), None


def rms() -> tuple[nn.Module, Any, Any]:
    layers = [nn.Linear(4, 6), RMSScale(6), nn.Tanh(), nn.Linear(6, 6), nn.RMSNorm(6), nn.Tanh(), nn.Linear(6, 2)]
    return nn.Sequential(*layers), torch.randn(5, 4), None


def vit() -> tuple[nn.Module, Any, Any]:
    timm = pytest.importorskip("timm")
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "init_values": 0.5}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **options)
    return model.eval(), torch.randn(4, 3, 32, 32), None


def gpt2() -> tuple[nn.Module, Any, Any]:
    transformers = import_transformers()
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 31, "n_positions": 16}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    ids = torch.randint(0, 31, (4, 7))
    return transformers.GPT2LMHeadModel(config).eval(), {"input_ids": ids}, lambda found: found.logits[:, -1, :3]


def llama() -> tuple[nn.Module, Any, Any]:
    transformers = import_transformers()
    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=31, max_position_embeddings=16)
    ids = torch.randint(0, 31, (4, 7))
    return transformers.LlamaForCausalLM(config).eval(), {"input_ids": ids}, lambda found: found.logits[:, -1, :3]


def attention() -> tuple[nn.Module, Any, Any]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(40, 2)).eval(), torch.randn(4, 5, 8), None


def tied() -> tuple[nn.Module, Any, Any]:
    return WithTied(), torch.randint(0, 7, (4, 3)), None


def by_hand() -> tuple[nn.Module, Any, Any]:
    return ByHand(), torch.randint(0, 7, (4, 3)), None


def sequence_first() -> tuple[nn.Module, Any, Any]:
    return SequenceFirst(), torch.randn(4, 5, 8), None


MODELS = [
    residual_mlp,
    conv_resnet,
    conv1d,
    rms,
    vit,
    gpt2,
    llama,
    attention,
    tied,
    by_hand,
    sequence_first,
]


def in_float64(maker: Callable[[], tuple[nn.Module, Any, Any]]) -> tuple[nn.Module, Any, Any]:
    model, x, output = maker()
    return model.double(), x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, output
