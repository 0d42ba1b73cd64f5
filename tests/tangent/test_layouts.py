"""Whose sample a layer's rows are is never taken on trust: against whole Jacobians, in float64."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from abyssal.models.graph import walk
from abyssal.tangent.empirical.capture import Moved, capture
from abyssal.tangent.empirical.ntk import forecast_ntk, ntk
from abyssal.tangent.empirical.work import prepared
from toys import kernels as toys

EXACT = 1e-12


@pytest.fixture(autouse=True)
def _in_float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def off(model: nn.Module, x: Any, x2: Any = None, **options: Any) -> float:
    expected = toys.kernel(model, x, x2)
    return float((ntk(model, x, x2, "full", **options) - expected).abs().max() / expected.abs().max())


class TimeMajor(nn.Module):
    """Flattens with time first, and reads out the last position."""

    def __init__(self) -> None:
        super().__init__()
        # The second weight is too large for its gradient to be looked at.
        self.inner, self.middle, self.outer = nn.Linear(3, 72), nn.Linear(72, 72), nn.Linear(72, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        h = self.middle(self.inner(x.transpose(0, 1).reshape(length * n, -1)).tanh()).tanh()
        return self.outer(h).view(length, n, -1)[-1]


class CharRNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.rnn, self.outer = nn.Embedding(7, 6), nn.GRU(6, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.outer(self.rnn(self.embedding(ids.T))[0])[-1]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_rows_with_time_first_are_not_taken_for_rows_with_samples_first(n: int):
    assert off(TimeMajor(), torch.randn(n, 8, 3)) < EXACT
    assert off(CharRNN(), torch.randint(0, 7, (n, 4))) < EXACT


def test_the_plan_takes_no_row_for_a_sample_whose_gradient_it_does_not_show():
    # With 8 positions of 2 samples, the last position lies in the second half, as the second sample would.
    with prepared(TimeMajor(), torch.randn(2, 8, 3), None, "full", None, None, None) as work:
        assert work.plan.fallback == set(work.plan.parameters)


class Prototypes(nn.Module):
    """Projects learned prototypes, which all samples share."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 8), nn.Linear(5, 8)
        self.prototypes = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh() @ self.outer(self.prototypes).T


class Mixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h + (h - h.mean(dim=0)).tanh()


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_one_sample_against_several_is_looked_at_beside_another(n: int):
    x = torch.randn(6, 3)
    assert off(Prototypes(), x[:1], x[:n]) < EXACT
    assert off(toys.SequenceFirst(), torch.randn(1, 6, 8), torch.randn(n, 6, 8)) < EXACT
    if n > 1:
        with pytest.raises(ValueError, match="samples interact"):
            ntk(Mixing(), x[:1], x[:n])


class Experts(nn.Module):
    """Sends each token to one of two experts, by its sign: by index, or by products with one-hot matrices."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.inner, self.gate, self.outer = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).flatten(0, 1)
        shares = self.gate(h).softmax(dim=-1)
        chosen = (x[..., 0] < 0).flatten()
        out = torch.zeros_like(h)
        for k, expert in enumerate(self.experts):
            at = (chosen == bool(k)).nonzero()[:, 0]
            hot = F.one_hot(at, len(h)).to(h)  # [slots, tokens]
            given = {"index": h[at], "mm": hot @ h, "sum": (hot[..., None] * h).sum(dim=1)}
            found = expert(given[self.how]).tanh()
            out = out + hot.T @ found * shares[:, k : k + 1]
        return self.outer((h + out).view(*x.shape[:2], -1).mean(dim=1))


# The first two samples send a token to each expert, the others two to one: in all, as many rows as twice the first two.
SIGNS = torch.tensor([[1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, -1.0]])


@pytest.mark.parametrize("how", ["index", "mm", "sum"])
def test_tokens_that_are_routed_are_given_to_their_samples(how: str):
    x = torch.randn(4, 2, 3)
    x[..., 0] = x[..., 0].abs() * SIGNS
    model = Experts(how)
    with prepared(model, x, None, "full", None, None, None) as work:
        assert not work.plan.fallback
        with pytest.raises(Moved) as found:
            capture(model, work.plan, lambda: model(x), 4, slice(0, 2), lambda name, parts: None)
    assert found.value.names == {f"experts.{k}.{name}" for k in range(2) for name in ("weight", "bias")}
    assert off(model, x) < EXACT
    assert off(model, x[:2], x[1:]) < EXACT


def test_what_moved_can_be_told_by_another_process():
    names = frozenset({"expert.weight"})
    assert pickle.loads(pickle.dumps(Moved(names))).names == names


class Unpadded(nn.Module):
    """Computes on the tokens that are no padding, as models with variable-length attention do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.embedding, self.linear, self.outer = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        keep = ids != 0
        if self.how == "slice":
            h = self.embedding(ids)
            h = torch.cat([h[i, : int(row.sum())] for i, row in enumerate(keep)])
        else:
            h = self.embedding(ids[keep])
        h = h + self.linear(h).tanh()
        if self.how == "slice":
            return self.outer(torch.stack([part.sum(dim=0) for part in h.split(keep.sum(dim=1).tolist())]))
        return self.outer(h.new_zeros(*ids.shape, 6).index_put(keep.nonzero(as_tuple=True), h).sum(dim=1))


@pytest.mark.parametrize("how", ["slice", "index"])
@pytest.mark.parametrize("options", [{}, {"budget": 60_000}], ids=["whole", "blocks"])
def test_tokens_without_padding_are_given_to_their_samples(how: str, options: dict[str, Any]):
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 0], [7, 0, 0, 0], [8, 9, 10, 1], [2, 3, 4, 5]])  # 15 tokens: 5 times 3
    assert off(Unpadded(how), ids, **options) < EXACT
    assert off(Unpadded(how), ids[:2], ids[[0, 2, 3]], **options) < EXACT


def test_a_layer_may_get_no_rows_at_all():
    x = torch.randn(4, 3, 3)
    x[..., 0] = x[..., 0].abs()
    assert off(Experts("index"), x) < EXACT


class Frames(nn.Module):
    """A second convolution takes samples and frames in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 40, 3, padding=1), nn.Conv1d(40, 40, 3, padding=1)
        self.outer = nn.Linear(40, 2)

    def forward(self, x: Tensor) -> Tensor:
        n, frames = x.shape[:2]
        h = self.first(x[:, 0])[:, None] * x[:, :, :1]
        return self.outer(self.second(h.flatten(0, 1)).tanh().mean(dim=-1).view(n, frames, -1).sum(dim=1))


def test_convolutions_of_frames_get_their_own_samples():
    for n in (2, 3):
        assert off(Frames(), torch.randn(n, 4, 3, 7)) < EXACT


def proved(model: nn.Module, x: Any, output: Any = None) -> bool:
    found = model(**x) if isinstance(x, dict) else model(x)
    found = found if output is None else output(found)
    return walk(found.flatten(1), dict(model.named_parameters()), len(found))[1]


def test_common_models_prove_by_their_graph_that_samples_keep_their_places():
    for maker in (toys.residual_mlp, toys.conv1d, toys.rms, toys.gpt2, toys.llama):
        model, x, output = toys.in_float64(maker)
        assert proved(model, x, output), maker.__name__
    norms = (nn.BatchNorm2d(4), nn.GroupNorm(2, 4))
    layers = [layer for norm in norms for layer in (nn.Conv2d(4, 4, 3, padding=1), norm, nn.ReLU())]
    head = (nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert proved(nn.Sequential(nn.Conv2d(3, 4, 3), *layers, *head).eval(), torch.randn(4, 3, 8, 8))


def test_nothing_is_proved_of_samples_that_move():
    ids = torch.randint(1, 7, (4, 4))
    assert not proved(TimeMajor(), torch.randn(4, 8, 3))
    assert not proved(Unpadded("slice"), ids)
    assert not proved(Unpadded("index"), ids)
    for how in ("index", "mm", "sum"):
        assert not proved(Experts(how), torch.randn(4, 2, 3))
    assert not proved(Prototypes(), torch.randn(4, 3))


class ByItsInput(nn.Module):
    """Its outputs are derivatives: each weight is multiplied by twice, with one transpose of it in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 72), nn.Tanh(), nn.Linear(72, 72), nn.Tanh(), nn.Linear(72, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        values = self.layers(x)
        return torch.autograd.grad(values.sum(), x, create_graph=True)[0] + values


def test_weights_that_gradients_by_the_input_use_again_are_counted_twice():
    assert off(ByItsInput(), torch.randn(4, 4)) < EXACT


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.inner, self.outer = nn.Linear(3, 5), nn.Linear(5, 2)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        for layer in self.layers:
            h = h + checkpoint(layer, h, use_reentrant=self.reentrant)
        return self.outer(h)


def test_layers_in_checkpoints_are_recomputed_without_being_noted_again():
    assert off(Checkpointed(False), torch.randn(4, 3)) < EXACT


def test_reentrant_checkpoints_are_refused_since_their_inside_is_in_no_graph():
    for call in (ntk, forecast_ntk):
        with pytest.raises(ValueError, match="use_reentrant=False"):
            call(Checkpointed(True), torch.randn(4, 3))


class Caching(nn.Module):
    """Keeps, in eval mode, what it computes from a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bias = nn.Linear(3, 4), nn.Parameter(torch.randn(2))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and "bias" not in self.cache:
            self.cache["bias"] = self.bias[torch.tensor([0, 1, 1, 0])]
        bias = self.bias[torch.tensor([0, 1, 1, 0])] if self.training else self.cache["bias"]
        return torch.tanh(self.linear(x) + bias)


def test_what_a_model_keeps_in_eval_mode_cuts_no_parameter_off():
    x = torch.randn(3, 3)
    expected = toys.kernel(Caching().train(), x)
    torch.manual_seed(0)
    torch.randn(3, 3)
    model = Caching().eval()
    assert float((ntk(model, x, outputs="full") - expected).abs().max()) < EXACT * float(expected.abs().max())
    assert not model.cache
    model(x).sum().backward()
    assert model.bias.grad is not None and model.bias.grad.any()


def test_inference_mode_and_autocast_around_it_change_nothing():
    model, x, _ = toys.residual_mlp()
    expected = ntk(model, x)
    with torch.inference_mode():
        found = ntk(model, x * 1)
        made = x * 1
    assert torch.equal(found, expected) and torch.equal(ntk(model, made), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ntk(model, x), expected)
        assert forecast_ntk(model, x).shape == expected.shape


def test_a_model_made_in_inference_mode_is_refused_with_a_remedy_that_works():
    import copy

    with torch.inference_mode():
        model = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"inference_mode.*copy\.deepcopy\(model\)"):
        ntk(model, x)
    assert ntk(copy.deepcopy(model), x).shape == (4, 4)
