"""What a forward pass or a helper of torch's writes into a model is undone, and does not make kernels wrong."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from abyssal.tangent.empirical.layers import guess
from abyssal.tangent.empirical.ntk import ntk
from abyssal.tangent.hierarchy.hierarchy import Hierarchy
from abyssal.tangent.operator.kernel import kernel_operator
from abyssal.tangent.training.recorder import DriftRecorder

# Sums of a few dozen products in float64; hundreds of times their rounding.
EXACT = {"rtol": 1e-11, "atol": 1e-12}
X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def slow_kernel(model, x=X, parameters=None):
    """By autograd, one output of one sample after the other, on a copy that nothing has touched."""
    model = copy.deepcopy(model)
    own = [p for name, p in model.named_parameters() if parameters is None or name in parameters]
    rows = []
    for sample in x:
        for output in model(sample[None])[0]:
            grads = torch.autograd.grad(output, own, retain_graph=True, allow_unused=True)
            found = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, own, strict=True)]
            rows.append(torch.cat([torch.view_as_real(g).flatten() if g.is_complex() else g.flatten() for g in found]))
    jacobian = torch.stack(rows).double().view(len(x), -1, len(rows[0]))
    return torch.einsum("aip,bip->ab", jacobian, jacobian)


def by_ntk(model, x=X):
    return ntk(model, x)


def by_hierarchy(model, x=X):
    n = len(x)
    kernel = Hierarchy(model, x, torch.zeros(n, 2)).kernel(2).view(n, 2, n, 2)
    return torch.einsum("aibi->ab", kernel)


def by_operator(model, x=X):
    return kernel_operator(model, x).dense()


def by_recorder(model, x=X):
    recorder = DriftRecorder(model, x)
    recorder.record(0)
    return slow_kernel(model, x)


EVERY_WAY = pytest.mark.parametrize("kernel", [by_ntk, by_operator, by_hierarchy])


def held(model):
    """Everything that a model's modules hold, by identity, and the values of its tensors."""
    found = []
    for name, m in model.named_modules():
        for kind in ("_parameters", "_buffers", "_modules"):
            found += [(name, kind, key, id(value)) for key, value in getattr(m, kind).items()]
        found += [(name, key, id(value)) for key, value in vars(m).items()]
        found += [(name, key, repr(value)) for key, value in vars(m).items() if isinstance(value, dict | list)]
        found += [(name, key, value.tolist()) for key, value in vars(m).items() if isinstance(value, torch.Tensor)]
        found += [(name, key, b.tolist()) for key, b in m.named_buffers(recurse=False)]
    return found


class Shared(nn.Module):
    """One block three times in a chain: `torch.func.functional_call` does not give it its parameters back."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.chain = nn.ModuleList([layer] * 3)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.chain:
            x = x + torch.tanh(layer(x, x) if isinstance(layer, nn.Bilinear) else layer(x))
        return self.head(x)


@EVERY_WAY
@pytest.mark.parametrize("layer", [lambda: nn.Linear(4, 4), lambda: nn.Bilinear(4, 4, 4)])
def test_a_module_that_stands_several_times_in_a_model_keeps_its_parameters(kernel, layer):
    torch.manual_seed(0)
    model = Shared(layer()).double()
    before, true = held(model), slow_kernel(model)
    torch.testing.assert_close(kernel(model), true, **EXACT)
    assert held(model) == before
    assert isinstance(model.chain[2].weight, nn.Parameter)


class Caching(nn.Module):
    """Keeps in eval mode what it computes from its parameter, as LeViT and TinyViT do."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.bias = nn.Parameter(torch.randn(4))
        self.cache = {}

    def train(self, mode=True):
        super().train(mode)
        if mode and self.cache:
            self.cache = {}
        return self

    def forward(self, x):
        if self.training:
            return self.head(torch.tanh(self.layer(x) + self.bias * 2))
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias * 2
        return self.head(torch.tanh(self.layer(x) + self.cache["bias"]))


@EVERY_WAY
def test_what_a_model_caches_in_eval_mode_cuts_no_parameter_off(kernel):
    torch.manual_seed(0)
    model = Caching().double()
    true = slow_kernel(model)
    model.eval()
    torch.testing.assert_close(kernel(model), true, **EXACT)
    assert not model.cache
    assert torch.autograd.grad(model(X).sum(), model.bias)[0].any()


@EVERY_WAY
def test_a_cache_that_was_filled_without_gradients_is_looked_past_and_left(kernel):
    torch.manual_seed(0)
    model = Caching().double()
    true = slow_kernel(model)
    model.eval()
    with torch.no_grad():
        model(X)
    cache, entry = model.cache, model.cache["bias"]
    torch.testing.assert_close(kernel(model), true, **EXACT)
    assert model.cache is cache
    assert list(cache.items()) == [("bias", entry)]
    assert cache["bias"] is entry


class Untidy(nn.Module):
    """Writes into all it has: a buffer that grows, one that it counts in, attributes and containers."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.register_buffer("table", torch.zeros(0, 4), persistent=False)
        self.register_buffer("count", torch.zeros(()))
        self.written, self.last, self.calls, self.seen = torch.zeros(4), None, 0, [torch.zeros(1)]

    def forward(self, x):
        if len(self.table) < 3:
            self.table = torch.ones(3, 4, dtype=x.dtype).mul_(0.1)
        self.count = self.count + 1
        self.written.add_(1)
        self.calls += 1
        self.register_buffer(f"new{self.calls}", torch.ones(1), persistent=False)
        self.last = self.layer(x + self.table[0])
        self.seen.append(self.last)
        return self.head(torch.tanh(self.last))


@pytest.mark.parametrize("kernel", [by_ntk, by_operator, by_hierarchy, by_recorder])
def test_what_a_forward_pass_writes_into_its_module_is_undone(kernel):
    torch.manual_seed(0)
    model = Untidy().double()
    true, before = slow_kernel(model), held(model)
    torch.testing.assert_close(kernel(model), true, **EXACT)
    assert held(model) == before
    assert copy.deepcopy(model).calls == 0  # nothing is left that belongs to a graph


class Checkpointed(nn.Module):
    """The checkpoints' first input is a leaf, as where the embedding of a language model is frozen."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = x.detach().clone().requires_grad_()
        for layer in self.layers:
            h = h + checkpoint(layer, h, use_reentrant=True)
        return self.head(h)


@EVERY_WAY
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_reentrant_checkpoints_are_refused_with_the_remedy(kernel):
    with pytest.raises(ValueError, match="use_reentrant=False"):
        kernel(Checkpointed().double())


class Spectral(nn.Module):
    """Complex weights, as in Fourier neural operators."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex128))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=4)))


@pytest.mark.parametrize("kernel", [by_ntk, by_operator])
def test_both_parts_of_a_complex_parameter_count(kernel):
    torch.manual_seed(0)
    model = Spectral()
    model.head.double()
    torch.testing.assert_close(kernel(model), slow_kernel(model), **EXACT)


class ComplexLayer(nn.Module):
    """A complex layer among real ones of its class, and too large to be checked one by one."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 70).double(), nn.Linear(70, 2).double()
        self.layer = nn.Linear(70, 70, dtype=torch.complex128)

    def forward(self, x):
        h = self.first(x)
        return self.head(torch.tanh(self.layer(torch.complex(h, h.flip(1))).abs()))


def test_complex_weights_of_a_layer_known_by_its_class_are_right_too():
    torch.manual_seed(0)
    model = ComplexLayer()
    torch.testing.assert_close(ntk(model, X), slow_kernel(model), **EXACT)


class Slope(nn.Module):
    """Not linear in its one number, which samples of zeros do not show."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return x * torch.sigmoid(self.scale * x)


def test_a_layer_with_one_number_has_to_be_linear_in_it():
    layer = Slope().double()
    with pytest.raises(ValueError, match="not linear"):
        guess(layer, X, torch.ones(5, 1, 4, dtype=torch.float64))


def test_a_sample_that_shows_nothing_vouches_for_no_other():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), Slope(), nn.Linear(6, 2)).double()
    x = 3 * X
    x[1] = 0
    torch.testing.assert_close(ntk(model, x), slow_kernel(model, x), **EXACT)


class Product(nn.Module):
    """Linear in either parameter, and not in both."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.weight * (x + self.bias)


def test_a_layer_has_to_be_linear_in_its_parameters_together():
    with pytest.raises(ValueError, match="together"):
        guess(Product().double(), X, torch.ones(5, 1, 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_an_operator_follows_the_model_in_either_type(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    operator = kernel_operator(model, X.float(), dtype=dtype)
    operator.dense()
    with torch.no_grad():
        model[2].weight.mul_(2)
    model[0].weight.data = model[0].weight.data + 1
    true = slow_kernel(copy.deepcopy(model).double())
    torch.testing.assert_close(operator.dense().double(), true, rtol=1e-5, atol=1e-5 * float(true.max()))


def test_an_operator_says_when_the_model_is_another_one_by_now():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2)).double().eval()
    operator = kernel_operator(model, X)
    model.train()
    with pytest.raises(ValueError, match="drops at random"):
        operator.matvec(torch.ones(5))
    model.eval().float()
    with pytest.raises(ValueError, match=r"0\.weight of the model is torch\.float32 .*make it anew"):
        operator.matvec(torch.ones(5))


class SingleInside(nn.Module):
    """Computes in float32 whatever it is given, by another order of sums in another batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 64), nn.Linear(64, 2)

    def forward(self, x):
        h = self.layer(x).float()
        h = h * (1 + 1e-7 * len(x))  # what float32 cannot tell apart
        return self.head(torch.tanh(h).to(x.dtype))


@pytest.mark.parametrize("kernel", [by_operator, by_hierarchy])
def test_rounding_of_float32_within_a_model_of_float64_is_no_interaction(kernel):
    torch.manual_seed(0)
    model = SingleInside().double()
    true = slow_kernel(model)
    torch.testing.assert_close(kernel(model), true, rtol=1e-4, atol=1e-4 * float(true.max()))


@pytest.mark.parametrize("kernel", [by_operator, by_hierarchy])
def test_the_mode_of_the_caller_changes_nothing(kernel):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x = X.float()
    true = kernel(model, x)
    with torch.inference_mode():
        made_there = x * 1
        torch.testing.assert_close(kernel(model, x), true, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(kernel(model, made_there), true, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(kernel(model, x), true, rtol=0, atol=0)


@EVERY_WAY
def test_a_model_made_in_inference_mode_is_refused_with_the_remedy(kernel):
    with torch.inference_mode():
        model = nn.Linear(4, 2).double()
    with pytest.raises(ValueError, match=r"weight of Linear was made in torch.inference_mode.*copy\.deepcopy"):
        kernel(model)
    kernel(copy.deepcopy(model))


class Picky(nn.Embedding):
    def __init__(self, words):
        super().__init__(9, 2)
        self.words = words

    def forward(self, ids):
        raise RuntimeError(self.words)


@pytest.mark.parametrize("use", [ntk, kernel_operator])
@pytest.mark.parametrize("words", ["the tokeniser is missing", "Expected mat_a to be Float32, got Double"])
def test_an_error_that_is_not_about_integers_is_not_blamed_on_them(use, words):
    with pytest.raises(Exception, match=words) as caught:
        use(Picky(words), torch.randint(0, 9, (3, 5)))
    assert "Images" not in str(caught.value)


@pytest.mark.parametrize("use", [ntk, kernel_operator])
@pytest.mark.parametrize("layer", [nn.Linear(5, 2), nn.Conv1d(1, 2, 5), nn.LayerNorm(5), nn.Embedding(3, 2)])
def test_an_error_that_is_about_integers_says_what_to_do(use, layer):
    ids = torch.full((3, 1, 5), 7)
    with pytest.raises((TypeError, ValueError), match=r"torch\.int64\. Images have to be floating.*Indices"):
        use(layer, ids)


def test_a_kernel_that_is_broken_off_leaves_the_model_as_found():
    torch.manual_seed(0)
    model = Untidy().double()
    before = held(model)

    def stop(phase, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        ntk(model, X, progress=stop)
    del caught
    gc.collect()  # ends the generator that was interrupted
    assert held(model) == before


def test_every_evaluation_is_of_the_function_that_was_found():
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)).double()
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 2).double()).train()  # one power iteration at each look
    before = held(model)
    rows = []
    for x in X:
        for output in (0, 1):
            fresh = copy.deepcopy(model)
            grads = torch.autograd.grad(fresh(x[None])[0, output], list(fresh.parameters()))
            rows.append(torch.cat([g.flatten() for g in grads]))
    jacobian = torch.stack(rows).view(len(X), 2, -1)
    true = torch.einsum("aip,bip->ab", jacobian, jacobian)
    for kernel in (by_ntk, by_operator, by_hierarchy):
        torch.testing.assert_close(kernel(model), true, **EXACT)
        assert held(model) == before
