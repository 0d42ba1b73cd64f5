"""Kernel-vector products and Lanczos eigenvalues against full Jacobians, in float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import abyssal
from abyssal.profiling.track import track
from abyssal.tangent.empirical.ntk import ntk
from abyssal.tangent.operator.kernel import kernel_operator
from abyssal.tangent.operator.lanczos import ends

EPS = torch.finfo(torch.float64).eps
# One product is two passes of some ten sums of at most a few thousand terms each; so are the dense kernel's entries.
EXACT = 1e-12
# Asked for: eigenvalues against the dense kernel's, relative to the largest. Both solvers are backward stable, so what
# is left is products' rounding.
EIGENVALUE = 1e-10


def dense_kernel(model: nn.Module, inputs: tuple[Any, ...], outputs: str | int, read: Callable = lambda f: f) -> Tensor:
    """From full Jacobians, one output of one sample after the other, by backward passes through the model itself."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(inputs[0])):
        f = read(model(*(value[i : i + 1] for value in inputs))).reshape(-1)
        for value in f:
            grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g).reshape(-1)
                        for g, p in zip(grads, parameters, strict=True)
                    ]
                )
            )
    J = torch.stack(rows).reshape(len(inputs[0]), -1, sum(p.numel() for p in parameters)).double()
    if outputs == "full":
        flat = J.reshape(-1, J.shape[2])
        return flat @ flat.T
    if outputs == "trace":
        return torch.einsum("iap,jap->ij", J, J)
    return J[:, outputs] @ J[:, outputs].T


class Residual(nn.Module):
    def __init__(self, width: int = 12, depth: int = 3, outputs: int = 3) -> None:
        super().__init__()
        self.start = nn.Linear(5, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm, self.end = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = self.start(x)
        for block in self.blocks:
            h = h + torch.tanh(block(h)) / len(self.blocks)
        return self.end(self.norm(h))


class TiedText(nn.Module):
    """Embedding used again, transposed, as the head; attention between; a mask as a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        h = self.layer(self.embedding(ids), src_key_padding_mask=padding)
        return h.mean(1) @ self.embedding.weight.T


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 4, 3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Halting(torch.autograd.Function):
    """Square, without a forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class NoForwardMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(Halting.apply(self.a(x)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(5, 6, batch_first=True), nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x[:, None].expand(-1, 3, -1))[0][:, -1])[:, 0]


class Straight(nn.Module):
    """Stops a gradient by torch.no_grad(), which forward mode does not heed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        with torch.no_grad():
            gate = torch.sigmoid(self.a(x))
        return self.b(h * gate)


def real(n: int = 7) -> tuple[Tensor, ...]:
    return (torch.randn(n, 5, dtype=torch.float64),)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "residual": (Residual, real),
    "tied and transposed weights, attention": (TiedText, lambda: (torch.randint(0, 11, (6, 4)),)),
    "convolutions and BatchNorm": (Image, lambda: (torch.randn(5, 2, 6, 6, dtype=torch.float64),)),
    "no forward mode": (NoForwardMode, real),
    "recurrent, one output": (Recurrent, real),
    "a gradient stopped by no_grad": (Straight, real),
}


@pytest.mark.parametrize("outputs", ["trace", "full", 0])
@pytest.mark.parametrize("name", MODELS)
def test_products_are_those_of_the_dense_kernel(name: str, outputs: str | int) -> None:
    make, draw = MODELS[name]
    model, x = make().double().eval(), draw()
    K = dense_kernel(model, x, outputs)
    operator = kernel_operator(model, x, outputs=outputs)
    V = torch.randn(operator.shape[1], 3, dtype=torch.float64)
    assert (operator @ V - K @ V).abs().max() <= EXACT * K.norm() * V.norm()
    assert (operator.matvec(V[:, 0]) - K @ V[:, 0]).abs().max() <= EXACT * K.norm() * V.norm()
    assert (operator.dense() - K).abs().max() <= EXACT * K.norm()


def test_double_backward_takes_over_where_forward_mode_fails_or_disagrees() -> None:
    modes = {
        name: kernel_operator(make().double().eval(), draw()).jacobian.mode for name, (make, draw) in MODELS.items()
    }
    double = {"no forward mode", "a gradient stopped by no_grad"}
    assert {name for name, mode in modes.items() if mode == "double backward"} == double


def test_blocks_of_samples_give_the_same_product() -> None:
    model, x = Residual().double(), real(9)
    whole = kernel_operator(model, x)
    v = torch.randn(9, dtype=torch.float64)
    assert whole.jacobian.block == 9
    least = least_budget(model, x)
    for budget, block in ((least, 1), (4 * least, None)):
        parts = kernel_operator(model, x, budget=budget)
        assert 1 <= parts.jacobian.block < 9 or block is None
        assert torch.allclose(parts.matvec(v), whole.matvec(v), rtol=1e-13, atol=1e-13)


def least_budget(model: nn.Module, x: Any) -> int:
    with pytest.raises(ValueError, match="Give at least that") as caught:
        kernel_operator(model, x, budget=1)
    return int(str(caught.value).split(" takes ")[1].split(" for one")[0].replace(",", ""))


@pytest.mark.parametrize("which", ["forward", "double backward"])
def test_the_memory_of_a_product_stays_within_the_budget(which: str) -> None:
    """Images, whose activations are many times the parameters; 60 samples, of which only some fit."""
    body = [nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()] * 6
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(60, 1, 32, 32)
    budget = 8 << 20
    operator = kernel_operator(model, x, budget=budget)
    if which == "double backward":
        operator = kernel_operator(nn.Sequential(model, NoForward()), x, budget=budget)
    assert operator.jacobian.mode == which
    assert 1 <= operator.jacobian.block < 30
    with track() as usage:
        operator.matvec(torch.randn(60))
    assert usage.peak <= budget
    assert usage.peak >= budget / 8  # and the budget is used


class NoForward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Halting.apply(x)


def test_a_dictionary_of_keyword_arguments_and_an_output_of_ones_own() -> None:
    model = TiedText().double().eval()
    ids, padding = torch.randint(0, 11, (5, 4)), torch.zeros(5, 4, dtype=torch.bool)
    padding[2, 3] = True
    operator = kernel_operator(model, {"ids": ids, "padding": padding}, output=lambda f: f[:, :2], outputs="full")
    K = dense_kernel(model, (ids, padding), "full", read=lambda f: f[:, :2])
    assert operator.shape == (10, 10)
    assert (operator.dense() - K).abs().max() <= EXACT * K.norm()


@pytest.mark.slow
def test_logits_are_the_outputs_of_a_transformers_model() -> None:
    from toys.huggingface import import_transformers

    transformers = import_transformers()
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=13, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).double().eval()
    ids = torch.randint(0, 13, (3, 2))
    operator = kernel_operator(model, {"input_ids": ids, "use_cache": False})
    K = dense_kernel(model, (ids,), "trace", read=lambda f: f.logits)
    assert (operator.dense() - K).abs().max() <= EXACT * K.norm()


def test_frozen_parameters_do_not_count_and_patterns_choose_among_the_rest() -> None:
    model, x = Residual().double(), real()
    model.start.requires_grad_(False)
    frozen = dense_kernel(model, x, "trace")
    assert (kernel_operator(model, x).dense() - frozen).abs().max() <= EXACT * frozen.norm()
    model.requires_grad_(False)
    for p in (model.blocks[0].weight, model.blocks[1].weight, model.blocks[2].weight, model.end.bias):
        p.requires_grad_(True)
    chosen = dense_kernel(model, x, "trace")
    model.requires_grad_(True)
    found = kernel_operator(model, x, parameters=["blocks.*.weight", "end.bias"]).dense()
    assert (found - chosen).abs().max() <= EXACT * chosen.norm()


def test_a_float32_model_is_computed_in_float64_on_request() -> None:
    model, (x,) = Residual(), real()
    twin = Residual().double()
    twin.load_state_dict(model.state_dict())
    x = x.float().double()
    K = dense_kernel(twin, (x,), "trace")
    assert (kernel_operator(model, x.float(), dtype=torch.float64).dense() - K).abs().max() <= EXACT * K.norm()
    assert next(model.parameters()).dtype == torch.float32


# ---------------------------------------------------------------------- eigenvalues


@pytest.mark.parametrize("outputs", ["trace", "full", 1])
def test_the_largest_and_smallest_eigenvalues_are_the_dense_kernels(outputs: str | int) -> None:
    model, x = Residual(width=20).double(), real(50)
    values = torch.linalg.eigvalsh(dense_kernel(model, x, outputs)).flip(0)
    operator = kernel_operator(model, x, outputs=outputs)
    top = operator.top(6)
    assert (top.values - values[:6]).abs().max() <= EIGENVALUE * values[0]
    assert (top.residuals <= EIGENVALUE * values[0]).all()
    assert torch.allclose(top.vectors.T @ top.vectors, torch.eye(6, dtype=torch.float64), atol=1e-12)
    assert operator.products >= top.products > 6
    least = operator.smallest(3)
    assert (least.values - values[-3:]).abs().max() <= EIGENVALUE * values[0]


@pytest.mark.slow
def test_lanczos_reaches_the_least_eigenvalue_too_where_it_stands_apart() -> None:
    """Weights alone, at least as many outputs' gradients as samples; the kernel is not formed."""
    model = nn.Linear(60, 1, bias=False).double()
    scales = torch.logspace(0, -1, 60, dtype=torch.float64)
    q, _ = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))
    operator = kernel_operator(model, q * scales)
    found = operator.smallest(2, dense_up_to=0)
    values = torch.linalg.eigvalsh((q * scales) @ (q * scales).T).flip(0)
    assert (found.values - values[-2:]).abs().max() <= EIGENVALUE * values[0]


def test_every_copy_of_a_multiple_eigenvalue_is_found() -> None:
    """A linear model's full kernel is X X^T for every output: each eigenvalue as often as there are outputs."""
    model = nn.Linear(6, 5, bias=False).double()
    x = torch.randn(12, 6, dtype=torch.float64)
    single = torch.linalg.eigvalsh(x @ x.T).flip(0)
    operator = kernel_operator(model, x, outputs="full")
    assert operator.shape == (60, 60)
    found = operator.top(12)
    expected = single.repeat_interleave(5)[:12]
    assert (found.values - expected).abs().max() <= EIGENVALUE * single[0]


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_copies_are_found_in_any_operator(which: str) -> None:
    """A diagonal matrix's products are exact: one start vector sees nothing of a multiple eigenvalue's other copies."""
    values = np.concatenate([np.full(7, 5.0), np.full(2, 4.0), np.linspace(1, 2, 60), np.full(3, 0.5)])
    found = ends(lambda v: values * v, len(values), 4, which, tol=EPS).values.numpy()  # type: ignore[arg-type]
    expected = np.full(4, 5.0) if which == "largest" else np.array([1.0, 0.5, 0.5, 0.5])
    assert np.abs(found - expected).max() <= EIGENVALUE * 5


@pytest.mark.parametrize("k", [1, 5, 20, 40])
def test_as_many_eigenvalues_as_there_are_may_be_asked_for(k: int) -> None:
    model, x = Residual().double(), real(40)
    values = torch.linalg.eigvalsh(dense_kernel(model, x, 0)).flip(0)
    found = kernel_operator(model, x, outputs=0).top(k).values
    assert (found - values[:k]).abs().max() <= EIGENVALUE * values[0]


def test_eigenvalues_in_float32_are_accurate_to_float32() -> None:
    model, x = Residual(width=20), real(50)[0].float()
    values = torch.linalg.eigvalsh(dense_kernel(model, (x,), "trace")).flip(0)
    found = kernel_operator(model, x).top(3)
    # Products are sums of a few thousand terms of either sign: the root of their number times the rounding of one.
    assert (found.values - values[:3]).abs().max() <= 100 * torch.finfo(torch.float32).eps * values[0]


def test_scipy_takes_the_operator() -> None:
    from scipy.sparse.linalg import eigsh

    model, x = Residual().double(), real(40)
    K = dense_kernel(model, x, "trace").numpy()
    assert eigsh(kernel_operator(model, x).scipy(), 1)[0] == pytest.approx(np.linalg.eigvalsh(K)[-1], rel=1e-10)


# ---------------------------------------------------------------------- the model is left alone


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Everything that products could leave behind in a model or the process."""

    def state() -> list[Any]:
        return [
            {name: (id(v), v._version, v.clone()) for name, v in model.state_dict(keep_vars=True).items()},
            [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
            [module.training for module in model.modules()],
            [sorted(module.__dict__) for module in model.modules()],
            torch.get_rng_state(),
            str(np.random.get_state()),
            random.getstate(),
            torch.is_grad_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
        ]

    before = state()
    yield
    for a, b in zip(before, state(), strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=0) if isinstance(a, Tensor) else None
        assert repr(a) == repr(b)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_left_as_it_was(name: str) -> None:
    make, draw = MODELS[name]
    model, x = make().double().eval(), draw()
    calls: list[str] = []
    for p in model.parameters():
        p.grad = torch.ones_like(p)
        p.register_post_accumulate_grad_hook(lambda p: calls.append("stepped"))
        p.register_hook(lambda g: calls.append("hooked"))
    with untouched(model):
        kernel_operator(model, x).top(2)
        ntk(model, x)
    assert not calls


def test_no_gradients_inference_and_autocast_around_it_do_not_change_it() -> None:
    model, x = Residual(), real()[0].float()
    v = torch.randn(7)
    expected = kernel_operator(model, x).matvec(v)
    for around in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with around:
            found = kernel_operator(model, x).matvec(v)
        assert torch.equal(found, expected)


# ---------------------------------------------------------------------- what cannot be done is said


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 50)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.a(x), 0.5, training=True)


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        f = self.a(x)
        return f - f.mean(0)


class Detached(Centred):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).detach()


class Pair(Centred):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), x


X = torch.randn(4, 5)


@pytest.mark.parametrize(
    ("model", "x", "options", "error", "words"),
    [
        (nn.Sequential(nn.Linear(5, 2), nn.Dropout(0.1)), X, {}, ValueError, r"1 \(Dropout\) .* model\.eval\(\)"),
        (nn.Sequential(nn.Linear(5, 2), nn.BatchNorm1d(2)), X, {}, ValueError, r"1 \(BatchNorm1d\) .* model\.eval\(\)"),
        (Noisy().eval(), X, {}, ValueError, "The model is random"),
        (Centred(), X, {}, ValueError, "mixes samples"),
        (Detached(), X, {}, ValueError, "depend on none of the parameters"),
        (Pair(), X, {}, TypeError, r"returns a tuple.*output="),
        (nn.Tanh(), X, {}, ValueError, "has no parameters"),
        (nn.Linear(5, 2).requires_grad_(False), X, {}, ValueError, "None of the 2 parameters requires a gradient"),
        (nn.LazyLinear(2), X, {}, ValueError, "Call `forward` with a dummy batch"),
        (
            nn.Linear(5, 2),
            X.to(torch.uint8),
            {},
            ValueError,
            r"torch\.uint8 given to .*float32.*x\.to\(torch\.float32\) / 255",
        ),
        (nn.Linear(5, 2), torch.randn(4, 6), {}, ValueError, "failed on the first 2 samples"),
        (nn.Linear(5, 2), X * float("nan"), {}, ValueError, "not finite"),
        (nn.Linear(5, 2), "digits", {}, TypeError, "got str"),
        (nn.Linear(5, 2), {"a": X, "b": X[:2]}, {}, ValueError, r"'a': \(4, 5\), 'b': \(2, 5\)"),
        (nn.Linear(5, 2), X[:0], {}, ValueError, "has no samples"),
        (nn.Linear(5, 2), (), {}, ValueError, "no tensor"),
        ("resnet18", X, {}, TypeError, "got 'resnet18'"),
        (nn.Linear(5, 2), X, {"outputs": "diagonal"}, ValueError, "one index after the other"),
        (nn.Linear(5, 2), X, {"outputs": 2}, ValueError, "has 2 outputs"),
        (nn.Linear(5, 2), X, {"outputs": True}, ValueError, "got True"),
        (nn.Linear(5, 2), X, {"parameters": "layer.*"}, ValueError, r"'layer\.\*' fits none of weight, bias"),
        (nn.Linear(5, 2), X, {"budget": "much"}, ValueError, "not understood"),
    ],
)
def test_bad_input_is_refused_before_any_product(
    model: Any, x: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        kernel_operator(model, x, **options)


@pytest.mark.parametrize("k", [0, 5, 1.0, True])
def test_a_number_of_eigenvalues_that_there_is_not_is_refused(k: Any) -> None:
    with pytest.raises(ValueError, match="from 1 to 4"):
        kernel_operator(nn.Linear(5, 2), X).top(k)


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[8\], got \[4\]"):
        kernel_operator(nn.Linear(5, 2), X, outputs="full").matvec(torch.randn(4))


def test_a_reconstructed_models_kernel_is_that_of_its_exact_gradients() -> None:
    stack = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(4)))
    K = kernel_operator(stack, X).dense()
    formed = ntk(stack, X)
    abyssal.reconstruct(stack, abyssal.Code(bits=1), blocks=list(stack))
    assert torch.equal(kernel_operator(stack, X).dense(), K)
    assert torch.equal(ntk(stack, X), formed)
