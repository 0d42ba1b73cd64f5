"""Unmodified models after some training: `abyssal.reconstruct(model)` is right on each, or keeps, and trains them."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import abyssal
from abyssal.certify.drift import CODED_ALLOWANCE
from toys.distributed import relative_error
from toys.real_models import REAL, gradients, loss_of, trained

HELD_OUT = 1_000_000  # seed of a batch that training did not see
# What is allowed is what computing in bfloat16 costs on the same batch, which nobody hesitates to do. Where that is
# less than the certificate's tolerance, the tolerance.
TOLERANCE = 1e-2
names = pytest.mark.parametrize("name", REAL)
pytestmark = pytest.mark.slow


@names
def test_gradients_of_untrained_models_are_within_ten_tolerances_or_as_good_as_bfloat16s(name: str) -> None:
    """In the first steps nothing is damped yet: a state's error moves the gradient by several times as much."""
    torch.manual_seed(0)
    model, batch = REAL[name].make().train(), REAL[name].batch(HELD_OUT)
    exact = gradients(copy.deepcopy(model), batch)
    plain = copy.deepcopy(model)
    ours = abyssal.reconstruct(model, blocks=REAL[name].blocks)
    error = relative_error(gradients(ours, batch), exact)
    assert error <= 10 * TOLERANCE or error <= relative_error(gradients(plain, batch, autocast=True), exact)


def reconstructed(name: str, policy: abyssal.Policy | None = None) -> nn.Module:
    return abyssal.reconstruct(trained(name), policy, blocks=REAL[name].blocks)


@names
def test_gradients_of_the_default_are_as_good_as_bfloat16s(name: str) -> None:
    plain, batch = trained(name), REAL[name].batch(HELD_OUT)
    exact = gradients(plain, batch)
    ours = reconstructed(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", abyssal.DriftWarning)
        found = gradients(ours, batch)
    error = relative_error(found, exact)
    assert error <= TOLERANCE or error <= relative_error(gradients(trained(name), batch, autocast=True), exact)
    for (buffer, ours_has), theirs in zip(ours.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours_has, theirs), buffer


@names
def test_each_block_is_measured_and_within_tolerance_or_kept(name: str) -> None:
    model = reconstructed(name)
    gradients(model, REAL[name].batch(HELD_OUT))
    certificate = abyssal.certificate(model)
    assert certificate.error is not None
    assert certificate.unmeasured == 0
    assert not certificate.drifted
    for block in certificate.blocks:
        assert block.error is not None, block
        assert block.error <= certificate.tolerance * (CODED_ALLOWANCE if "Code" in block.policy else 0), block


def stored(name: str, policy: abyssal.Policy | None) -> int:
    model, batch = reconstructed(name, policy), REAL[name].batch(HELD_OUT)
    for _ in range(2):  # the first pass also takes samples of what kept blocks give out
        gradients(model, batch)
    return abyssal.certificate(model).stored_bytes


@names
def test_the_default_stores_no_more_than_keeping_every_input(name: str) -> None:
    assert 0 < stored(name, None) <= stored(name, abyssal.Keep())


@pytest.mark.parametrize("name", ["GPT-2", "Llama", "BERT", "ALBERT", "ViT", "DeiT"])
def test_the_default_stores_less_than_half_of_a_chain_of_six(name: str) -> None:
    """At most four codes of 8.25 bits of 32 each, one exact input and half of one for the decoder: 0.42 of six."""
    assert stored(name, None) < 0.5 * stored(name, abyssal.Keep())


@names
def test_training_goes_on_as_without_us(name: str) -> None:
    """Ten steps of SGD end no further from plain training's than ten in bfloat16 do, or than the tolerance explains.

    A gradient that is wrong by g moves the loss by g of what is gained, to first order; ten times for growth.
    """
    steps = 3 if name == "ResNet-101" else 10
    theirs = descend(trained(name), name, steps)
    ours = descend(reconstructed(name), name, steps)
    found = apart(ours, theirs)
    explained = 10 * TOLERANCE * (max(theirs) - min(theirs))
    assert found <= explained or found <= apart(descend(trained(name), name, steps, autocast=True), theirs)


def descend(model: nn.Module, name: str, steps: int, autocast: bool = False) -> list[float]:
    """SGD on one batch, with gradients cut to length 1: as many losses as steps, in float32."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    batch, losses = REAL[name].batch(HELD_OUT), []
    for step in range(steps):
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("name", [name for name, real in REAL.items() if real.routed])
def test_blocks_that_choose_among_experts_are_kept(name: str) -> None:
    """A restored state that is off by a little may be sent to another expert, whatever the tolerance says."""
    model = reconstructed(name)
    gradients(model, REAL[name].batch(HELD_OUT))
    certificate = abyssal.certificate(model)
    assert [block.error for block in certificate.blocks] == [0.0] * len(certificate.blocks)
    assert all("Keep()" in block.policy for block in certificate.blocks)


def test_the_chains_of_an_unmodified_resnet101() -> None:
    """Four stages' blocks after the first, which projects; a code goes through the ReLU after each sum."""
    batch = REAL["ResNet-101"].batch(HELD_OUT)
    coded, reversed_ = (reconstructed("ResNet-101", policy) for policy in (abyssal.Code(8), abyssal.Reverse(1)))
    for model in (coded, reversed_):
        gradients(model, batch)
        assert len(abyssal.certificate(model).blocks) == 2 + 3 + 22 + 2
    assert abyssal.certificate(coded).chains == 4
    for block in abyssal.certificate(reversed_).blocks:
        assert block.error == 0.0
        assert "comes out of a ReLU" in block.note  # on which the paper's method fails: kept, and it is said


def test_sgd_trains_an_unmodified_resnet101_as_without_us() -> None:
    def losses(model: nn.Module) -> list[float]:
        optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
        found = []
        for _ in range(5):
            loss = loss_of(model, batch)
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            found.append(loss.item())
        return found

    batch = REAL["ResNet-101"].batch(HELD_OUT)
    plain, ours = losses(trained("ResNet-101")), losses(reconstructed("ResNet-101"))
    assert ours == pytest.approx(plain, rel=1e-3)
    assert ours[-1] < ours[0]


def test_shared_layers_that_are_not_found_are_asked_for_by_name() -> None:
    """ALBERT calls one layer again and again: a list of one, in which no chain can be seen from outside."""
    with pytest.raises(abyssal.NoBlocksError, match="Name the blocks yourself"):
        abyssal.reconstruct(trained("ALBERT"))
    model = reconstructed("ALBERT")
    gradients(model, REAL["ALBERT"].batch(HELD_OUT))
    [block] = abyssal.certificate(model).blocks
    assert block.calls == trained("ALBERT").config.num_hidden_layers


def test_an_untrained_model_is_told_from_a_trained_one() -> None:
    """The figures above are worth something only because training has made the first layers large."""
    untrained = copy.deepcopy(REAL["GPT-2"].make())
    errors = []
    for model in (untrained, trained("GPT-2")):
        abyssal.reconstruct(model, abyssal.Reverse(1), tolerance=1e3)
        gradients(model, REAL["GPT-2"].batch(HELD_OUT))
        errors.append(abyssal.certificate(model).error)
    assert errors[1] > errors[0]
