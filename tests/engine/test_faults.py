"""Faulty blocks in an ordinary training step: the certificate catches each, and names the block."""

import copy
import random
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import abyssal

WIDTH, DEPTH, FAULTY = 64, 5, "2"


class Branch(nn.Module):
    """x + scale * f(x), f a two-layer perceptron."""

    def __init__(self, scale=0.05):
        super().__init__()
        self.scale, self.inner, self.outer = scale, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.scale * self.outer(torch.tanh(self.inner(x)))


class NumpyNoise(Branch):
    def forward(self, x):
        return super().forward(x * torch.as_tensor(1 + 0.3 * np.random.randn(*x.shape), dtype=x.dtype))


class PythonNoise(Branch):
    def forward(self, x):
        return super().forward(x * (1 + random.random()))


class OwnGenerator(Branch):
    def __init__(self):
        super().__init__()
        self.rng = torch.Generator().manual_seed(1)

    def forward(self, x):
        return super().forward(x + 0.5 * torch.randn(x.shape, generator=self.rng, dtype=x.dtype))


class Counting(Branch):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x * (1 + self.calls % 7))


class InPlace(Branch):
    """Adds its branch to its input in place, last of all."""

    def forward(self, x):
        return x.add_(self.scale * self.outer(torch.tanh(self.inner(x.clone()))))


class InPlaceFirst(Branch):
    """Begins with an in-place operation on its input."""

    def forward(self, x):
        return super().forward(x.mul_(1.01))


class Cubic(nn.Module):
    """x + c x^3: finite forward, but its inverse by fixed point overflows at once."""

    def __init__(self, factor=1e4):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return x + self.factor * x**3


class ToInfinity(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return x + 1e30 * self.scale * x**2


def network(faulty, dtype=torch.float64):
    torch.manual_seed(0)
    blocks = [Branch() for _ in range(DEPTH)]
    blocks[int(FAULTY)] = faulty()
    return nn.Sequential(*blocks).to(dtype)


def batch(dtype=torch.float64):
    return torch.randn(32, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(7))


def step(model, x=None):
    """One backward pass; returns the gradients."""
    model.zero_grad()
    model(batch() if x is None else x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def reconstructed(model, policy, on_drift="warn", **settings):
    return abyssal.reconstruct(model, policy, blocks=list(model), on_drift=on_drift, **settings)


def error(true, other):
    assert true.keys() == other.keys()
    wrong = sum(float((other[n] - g).square().sum()) for n, g in true.items())
    return (wrong / sum(float(g.square().sum()) for g in true.values())) ** 0.5


RANDOM_OR_COUNTING = [NumpyNoise, PythonNoise, OwnGenerator, Counting]
POLICIES = [abyssal.Keep(), abyssal.Reverse(refine=1)]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("faulty", RANDOM_OR_COUNTING)
def test_a_block_that_is_random_or_counts_is_warned_of_by_name(faulty, policy):
    model = reconstructed(network(faulty), policy)
    with pytest.warns(abyssal.DriftWarning, match=f"'{FAULTY}'"):
        step(model)
    certificate = abyssal.certificate(model)
    assert FAULTY in certificate.drifted
    block = certificate.blocks[int(FAULTY)]
    assert block.error > certificate.tolerance
    assert ("counter" if policy == abyssal.Keep() else "drifted") in block.note


@pytest.mark.parametrize("faulty", RANDOM_OR_COUNTING)
def test_blocks_above_a_faulty_one_are_not_blamed(faulty):
    model = reconstructed(network(faulty), abyssal.Reverse(refine=1))
    with pytest.warns(abyssal.DriftWarning):
        step(model)
    assert not {"3", "4"} & set(abyssal.certificate(model).drifted)
    model = reconstructed(network(faulty), abyssal.Keep())
    with pytest.warns(abyssal.DriftWarning):
        step(model)
    assert abyssal.certificate(model).drifted == [FAULTY]  # a kept block's error reaches no other


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("faulty", RANDOM_OR_COUNTING)
def test_raise_stops_within_backward_and_before_the_optimiser(faulty, policy):
    model = reconstructed(network(faulty), policy, "raise")
    loss = model(batch()).square().mean()
    with pytest.raises(abyssal.DriftError, match=rf"'{FAULTY}'.*on_drift='raise'"):
        loss.backward()


def test_a_healthy_model_neither_warns_nor_raises():
    for policy in POLICIES:
        model = reconstructed(network(Branch), policy, "raise")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                step(model)
        assert abyssal.certificate(model).drifted == []


def test_each_block_is_warned_of_once():
    model = reconstructed(network(Counting), abyssal.Reverse(refine=1))
    with pytest.warns(abyssal.DriftWarning):
        step(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", abyssal.DriftWarning)
        step(model)


# ---------------------------------------------------------------------- on_drift="keep" repairs the run


@pytest.mark.parametrize("faulty", RANDOM_OR_COUNTING)
def test_a_random_block_falls_back_until_it_is_stored(faulty):
    model = reconstructed(network(faulty), abyssal.Reverse(refine=1), "keep")
    policies = []
    with pytest.warns(abyssal.DriftWarning, match="From the next step on"):
        for _ in range(4):
            step(model)
            policies.append(abyssal.certificate(model).blocks[int(FAULTY)].policy)
            if policies[-1] == "Store()":
                break
    assert policies == ["Reverse(1)", "Keep()", "Store()"]
    assert "Reverse(1) drifted" in abyssal.certificate(model).blocks[int(FAULTY)].note

    plain = network(faulty)
    for attribute in ("calls", "rng"):  # the two draw alike from here on
        if hasattr(model[int(FAULTY)], attribute):
            setattr(plain[int(FAULTY)], attribute, copy.deepcopy(getattr(model[int(FAULTY)], attribute)))
    assert error(_seeded_step(plain), _seeded_step(model)) < 1e-2


def _seeded_step(model):
    np.random.seed(5)
    random.seed(5)
    return step(model)


def test_a_block_that_does_not_contract_is_kept_and_the_run_is_right_from_then_on():
    def expanding():
        return Branch(scale=5.0)

    model = reconstructed(network(expanding), abyssal.Reverse(refine=1), "keep")
    true = step(network(expanding))
    with pytest.warns(abyssal.DriftWarning):
        assert error(true, step(model)) > 1e-2
    assert error(true, step(model)) < 1e-3
    certificate = abyssal.certificate(model)
    assert certificate.blocks[int(FAULTY)].policy == "Keep()"
    assert certificate.drifted == []


def test_a_kept_random_block_falls_back_to_store_in_one_step():
    model = reconstructed(network(NumpyNoise), abyssal.Keep(), "keep")
    with pytest.warns(abyssal.DriftWarning):
        step(model)
    assert error(_seeded_step(network(NumpyNoise)), _seeded_step(model)) < 1e-12


# ---------------------------------------------------------------------- blocks that change their input


@pytest.mark.parametrize("faulty", [InPlace, InPlaceFirst])
def test_gradients_of_a_block_that_changes_its_input_are_exact_under_keep(faulty):
    true = step(network(faulty))
    for _ in range(2):
        assert error(true, step(reconstructed(network(faulty), abyssal.Keep(), "raise"))) == 0.0


@pytest.mark.parametrize("faulty", [InPlace, InPlaceFirst])
def test_gradients_of_a_block_that_changes_its_input_converge_under_reverse(faulty):
    true = step(network(faulty))
    errors = [error(true, step(reconstructed(network(faulty), abyssal.Reverse(k), "raise", tolerance=0.1)))
              for k in (0, 1, 2, 6)]  # fmt: skip
    assert errors[1] < 1e-2
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9


def test_a_first_block_that_changes_its_input_gives_the_inputs_gradient():
    def input_gradient(model):
        x = batch().requires_grad_(True)
        model(x * 1.0).square().mean().backward()
        return x.grad

    blocks = network(InPlace)[int(FAULTY) :]
    true = input_gradient(copy.deepcopy(blocks))
    assert torch.equal(true, input_gradient(reconstructed(blocks, abyssal.Keep())))


# ---------------------------------------------------------------------- what is not finite


@pytest.mark.parametrize("on_drift", ["warn", "raise", "keep"])
def test_a_restored_state_that_is_not_finite_raises_and_names_the_block(on_drift):
    model = reconstructed(network(Cubic, torch.float32), abyssal.Reverse(refine=4), on_drift)
    loss = model(batch(torch.float32)).square().mean()
    assert torch.isfinite(loss)
    with pytest.raises(abyssal.NonFiniteError, match=rf"block '{FAULTY}'.*Reverse\(4\).*does not contract"):
        loss.backward()
    reconstructed(model, abyssal.Keep())
    assert all(torch.isfinite(g).all() for g in step(model, batch(torch.float32)).values())


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_when_the_forward_pass_itself_overflows_nothing_is_raised_by_us(policy):
    model = reconstructed(network(ToInfinity, torch.float32), policy, "raise")
    loss = model(1e10 * batch(torch.float32)).square().mean()
    assert not torch.isfinite(loss)
    loss.backward()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_run_with_a_gradient_scaler_survives_an_overflow(policy):
    model = reconstructed(network(ToInfinity, torch.float32), policy, "raise")
    model[int(FAULTY)].scale.data.fill_(1e-32)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = copy.deepcopy(model.state_dict())
    for factor, skipped in ((1e20, True), (1.0, False)):
        optimiser.zero_grad()
        scaler.scale(model(factor * batch(torch.float32)).square().mean()).backward()
        scaler.step(optimiser)
        scaler.update()
        unchanged = all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
        assert unchanged == skipped
    assert scaler.get_scale() < 2.0**10
