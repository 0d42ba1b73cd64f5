"""What the hierarchy cannot do it says before it works; and it leaves the model as it found it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import abyssal
from abyssal.nn import LiLuoYipResNet
from abyssal.tangent.hierarchy.hierarchy import Hierarchy

X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.zeros(4, 1)


def mlp(*inner: nn.Module, outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), *(inner or (nn.Tanh(),)), nn.Linear(8, outputs))


class Wrap(nn.Module):
    """A module around a function of a linear layer's output and of the input."""

    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


def refused(match: str, model: nn.Module, x=X, y=Y, error=ValueError, **options) -> None:
    with pytest.raises(error, match=match):
        Hierarchy(model, x, y, **options)


def test_models_that_have_no_kernel_are_refused():
    refused("Flatten has no parameters, and so no tangent kernel", nn.Flatten())
    refused("None of the 4 parameters requires a gradient", mlp().requires_grad_(False))
    refused(r"1 \(Dropout\) drops at random with p = 0.5, being in training mode.*eval", mlp(nn.Dropout(0.5)))
    refused(r"1 \(BatchNorm1d\) is in training mode and normalises over the batch.*eval", mlp(nn.BatchNorm1d(8)))
    refused("running statistics", mlp(nn.BatchNorm1d(8, track_running_stats=False)).eval())
    refused("torch.nn.Module, got a function", lambda x: x, error=TypeError)
    refused("meta device", mlp().to("meta"))


def test_what_only_shows_when_the_model_runs_is_refused_too():
    refused("The model is random.*different outputs", Wrap(lambda h: nn.functional.dropout(h)[:, :1]))
    refused("The model mixes samples.*what else is in the batch", Wrap(lambda h: (h - h.mean(0))[:, :1]))
    refused("torch.func cannot evaluate this Wrap one sample at a time", Wrap(lambda h: h[:, :1] * h.sum().item()))
    refused("outputs are not finite", Wrap(lambda h: h[:, :1] / 0))
    refused(r"have shape \[\] for 4 samples: expected \[n, k\]", Wrap(lambda h: h.mean()))
    refused("returns a tuple, not a tensor.*output=", Wrap(lambda h: (h[:, :1], h)), error=TypeError)
    assert Hierarchy(Wrap(lambda h: (h[:, :1], h)), X, Y, output=lambda found: found[0]).outputs == 4


def test_samples_and_targets_that_do_not_fit_are_refused():
    refused(r"failed on .*\[4, 6\] of torch.int64.*x.to\(.*\) / 255", mlp(), x=torch.ones(4, 6, dtype=torch.int64))
    refused("x has to be a tensor", mlp(), x=[1, 2], error=TypeError)
    refused("x has no samples", mlp(), x=X[:0])
    refused(r"counts the samples, but the shapes are .*\(2, 6\)", mlp(), x=(X, X[:2]))
    refused("x holds values that are not finite", mlp(), x=X * torch.nan)
    refused("y has to be a tensor", mlp(), y=[0.0] * 4, error=TypeError)
    refused(r"y has shape \[3\], the model's outputs have \[4, 1\]", mlp(), y=torch.zeros(3))
    refused(r"y has shape \[4\], .* \[4, 3\].*one_hot\(y, 3\)", mlp(outputs=3), y=torch.tensor([0, 1, 2, 0]))
    refused("y has to hold finite", mlp(), y=Y * torch.nan)
    refused("dtype has to be", mlp(), dtype=torch.int32)
    refused("outputs need about .* the budget is 1e\\+03", mlp(), budget=1000)


def test_going_back_to_train_mode_is_noticed():
    model = mlp(nn.Dropout(0.5)).eval()
    h = Hierarchy(model, X, Y)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        h.kernel(3)


def test_kinks_are_warned_of_once_and_only_where_derivatives_are_taken():
    for model in (mlp(nn.ReLU()), Wrap(lambda h: torch.relu(h)[:, :1])):
        h = Hierarchy(model, X, Y)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            h.kernel(2)
            h.flow([0.1])
        with pytest.warns(UserWarning, match="The model uses ReLU, whose derivatives jump"):
            h.kernel(3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            h.kernel(4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Hierarchy(mlp(nn.GELU()), X, Y).kernel(3)


def test_operators_whose_derivatives_torch_gets_wrong_are_found_out():
    """torch.linalg.det's second forward derivative is wrong in torch 2.13; once that is mended, nothing is refused."""

    def determinant(h: torch.Tensor) -> torch.Tensor:
        return torch.linalg.det(h.view(-1, 2, 2) + torch.eye(2, dtype=h.dtype))

    def written_out(h: torch.Tensor) -> torch.Tensor:
        m = h.view(-1, 2, 2) + torch.eye(2, dtype=h.dtype)
        return m[:, 0, 0] * m[:, 1, 1] - m[:, 0, 1] * m[:, 1, 0]

    model = Wrap(written_out)
    true = Hierarchy(model, X, Y[:, 0]).kernel(4)
    model.function = determinant
    try:
        found = Hierarchy(model, X, Y[:, 0]).kernel(4)
    except ValueError as error:
        assert "torch's derivatives of this Wrap are wrong" in str(error)
    else:
        torch.testing.assert_close(found, true)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "plain"),
    [
        (
            nn.LayerNorm(8),
            lambda h: (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt(),
        ),
        (nn.GLU(), lambda h: h[..., :4] * torch.sigmoid(h[..., 4:])),
    ],
    ids=["LayerNorm", "GLU"],
)
def test_operators_that_torch_cannot_differentiate_often_are_composed(norm, plain):
    class Plain(nn.Module):
        def forward(self, x):
            return plain(x)

    head = nn.Linear(8 if isinstance(norm, nn.LayerNorm) else 4, 1)
    first = nn.Linear(6, 8)
    norm.requires_grad_(False)
    ours, twin = (Hierarchy(nn.Sequential(first, nn.Tanh(), part, head), X, Y) for part in (norm, Plain()))
    for order in (3, 4):
        torch.testing.assert_close(ours.kernel(order), twin.kernel(order), rtol=0, atol=1e-10)
    for a, b in zip(ours.rates(3), twin.rates(3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_model_is_left_as_it_was_found():
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 1)).eval()
    model(X.float()).sum().backward()
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    state = torch.random.get_rng_state()
    h = Hierarchy(model, X, Y)
    h.kernel(4), h.rates(2), h.flow([0.1]), h.predict([0.1], 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert p.requires_grad and torch.equal(p.grad, gradient) and p.dtype == torch.float32
    assert not any(m._forward_hooks or "forward" in vars(m) or m.training for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_error_while_working_leaves_no_hooks_behind():
    model = LiLuoYipResNet(6, 32, 3)

    def stop(phase, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Hierarchy(model, X, Y[:, 0], progress=stop).kernel(3)
    assert not any(m._forward_hooks for m in model.modules())


def test_several_arguments_and_keywords_are_samples_too():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, a, b):
            return (torch.tanh(self.linear(a)) * b).sum(-1)

    model, b = Two(), X.flip(0)
    by_position = Hierarchy(model, (X, b), Y[:, 0]).kernel(3)
    by_name = Hierarchy(model, {"b": b, "a": X}, Y[:, 0]).kernel(3)
    torch.testing.assert_close(by_position, by_name)


def test_a_reconstructed_model_works_when_paused():
    model = LiLuoYipResNet(6, 8, 5)
    expected = Hierarchy(model, X, Y[:, 0]).kernel(3)
    abyssal.reconstruct(model)
    with abyssal.paused(model):
        torch.testing.assert_close(Hierarchy(model, X, Y[:, 0]).kernel(3), expected)


def test_a_small_gpt2_of_transformers_has_a_hierarchy():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=6)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    x = {"input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])}
    h = Hierarchy(model, x, torch.zeros(2, 1), output=lambda found: found.logits[:, -1, :1])
    first = h.rates(1)[0]
    with torch.no_grad():
        r = model.double()(**x).logits[:, -1, 0]
    torch.testing.assert_close(first, -torch.einsum("abc,c->ab", h.kernel(3), r) / 2, rtol=1e-9, atol=1e-12)
