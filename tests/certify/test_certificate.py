"""The certificate tells how the last forward pass was kept, and its figure is the true error."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import abyssal
from abyssal.codec.sample import Sample, sample_count
from toys.blocks import Net, build, data, one_step

pytestmark = pytest.mark.filterwarnings("ignore::abyssal.DriftWarning")


def test_the_sampled_error_is_the_true_error_of_the_restored_states() -> None:
    """Spy on what each block is evaluated at in the backward pass, and compare with its true input."""
    torch.manual_seed(0)
    model = build(depth=8, width=12)
    x = data(batch=2000)
    inputs: dict[int, list[Tensor]] = {}
    for i, block in enumerate(model.blocks):
        original = block.forward

        def spy(h: Tensor, i=i, original=original) -> Tensor:
            inputs.setdefault(i, []).append(h.detach().clone())
            return original(h)

        block.forward = spy
    abyssal.reconstruct(model, abyssal.Reverse(0), blocks=list(model.blocks))
    one_step(model, x)
    for i, entry in enumerate(abyssal.certificate(model).blocks[:-1]):
        true, restored = inputs[i][0], inputs[i][-1]
        error = float((restored - true).norm() / true.norm())
        # 46 of 24,000 elements: the estimate's relative standard deviation is about 1/sqrt(2 * 46) = 10 %.
        assert entry.error == pytest.approx(error, rel=0.5)


def test_samples_are_unbiased_over_seeds_and_not_stuck_in_a_channel() -> None:
    tensor = torch.zeros(128, 64)
    tensor[:, 5] = 1.0  # one channel carries everything
    count = sample_count(tensor.numel())
    sums = [float(Sample(tensor, count, seed, 0).values.sum()) for seed in range(3000)]
    stride = tensor.numel() / count
    # Expectation: 128 ones, each drawn with probability 1/stride.
    assert sum(sums) / len(sums) == pytest.approx(128 / stride, rel=0.1)
    # A stride that keeps to one channel would meet this one in 1/64 of the seeds only, then with all elements.
    assert sum(s > 0 for s in sums) > 0.5 * len(sums) and max(sums) <= 0.25 * count


def test_sampling_touches_no_random_state_and_repeats_itself() -> None:
    state = torch.get_rng_state()
    tensor = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Sample(tensor, 40, 1, 2).values, Sample(tensor, 40, 1, 2).values)
    assert not torch.equal(Sample(tensor, 40, 1, 2).values, Sample(tensor, 40, 1, 3).values)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("numel", [1, 2, 31, 32, 33, 511, 16384, 65536, 10**6 + 3, 4096 * 512 * 4])
def test_sample_sizes(numel: int) -> None:
    count = sample_count(numel)
    assert 1 <= count <= min(numel, max(64, numel // 512), 4096)
    values = Sample(torch.zeros(numel), count, 0, 0).values
    assert 1 <= values.numel() <= count


def test_to_dict_is_json_and_complete() -> None:
    model = build(depth=3)
    abyssal.reconstruct(model, abyssal.Reverse(1), blocks=list(model.blocks))
    one_step(model, data())
    certificate = abyssal.certificate(model)
    entry = json.loads(json.dumps(certificate.to_dict()))
    assert [b["name"] for b in entry["blocks"]] == ["blocks.0", "blocks.1", "blocks.2"]
    assert entry["stored_bytes"] == certificate.stored_bytes == sum(b["stored_bytes"] for b in entry["blocks"])
    assert entry["chains"] == 1 and entry["tolerance"] == 1e-2
    assert entry["error"] == max(b["error"] for b in entry["blocks"]) > 0
    assert entry["unmeasured"] == 0 and entry["drifted"] == []


def test_before_any_step_nothing_is_claimed() -> None:
    model = build(depth=3)
    abyssal.reconstruct(model, abyssal.Reverse(1), blocks=list(model.blocks))
    certificate = abyssal.certificate(model)
    assert certificate.error is None and certificate.stored_bytes == 0
    model(data())
    certificate = abyssal.certificate(model)
    assert [b.error for b in certificate.blocks] == [None, None, 0.0]  # the last one's input is at hand
    assert certificate.error is None and certificate.unmeasured == 2
    assert "not measured yet" in " ".join(str(certificate).split())


def stored(model: Net) -> int:
    return abyssal.certificate(model).stored_bytes


def test_a_forward_pass_is_told_from_the_next() -> None:
    model = build(depth=4)
    abyssal.reconstruct(model, abyssal.Reverse(1), blocks=list(model.blocks))
    one_step(model, data())
    once = pytest.approx(stored(model), abs=4 * 480)  # samples differ from pass to pass, the states are 480 bytes
    first = model(data())  # no backward, graph alive
    second = model(data())
    assert stored(model) == once
    assert [b.calls for b in abyssal.certificate(model).blocks] == [1] * 4
    (first.sum() + second.sum()).backward()
    one_step(model, data())
    assert stored(model) == once


def test_calls_within_one_forward_pass_are_added_up() -> None:
    def tied_with_something_between(net: Net, x: Tensor) -> Tensor:
        h = net.stem(x)
        for _ in range(5):
            h = torch.relu(net.blocks[0](h)) + x
        return h

    model = build(depth=2, join=tied_with_something_between)
    abyssal.reconstruct(model, abyssal.Reverse(1), blocks=list(model.blocks))
    for _ in range(2):
        one_step(model, data())
        block = abyssal.certificate(model).blocks[0]
        assert block.calls == 5
        assert 5 * data().nbytes <= block.stored_bytes <= 10 * data().nbytes  # with a sample of each output at most


@pytest.mark.slow
@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_fits_and_names_everything(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    model = build(depth=60)
    abyssal.reconstruct(model, abyssal.Reverse(0), blocks=list(model.blocks))
    one_step(model, data())
    text = str(abyssal.certificate(model))
    assert max(len(line) for line in text.splitlines()) <= width
    assert "blocks.0" in text and "blocks.59" in text and "more" in text and "tolerance" in text


def test_a_store_block_stores_nothing_of_ours() -> None:
    model = build(depth=4)
    policies = {"blocks.1": abyssal.Store(), "blocks.[023]": abyssal.Reverse(1)}
    abyssal.reconstruct(model, policies, blocks=list(model.blocks))
    one_step(model, data())
    blocks = abyssal.certificate(model).blocks
    assert blocks[1].policy == "Store()" and blocks[1].stored_bytes == 0
    assert blocks[0].policy == "Reverse(1), end"  # its successor keeps no state for it, so it keeps its own
    assert abyssal.certificate(model).chains == 2


def test_a_model_nobody_trains_reports_no_error() -> None:
    model = build(depth=3)
    abyssal.reconstruct(model, abyssal.Keep(), blocks=list(model.blocks))
    with torch.no_grad():
        model(data())
    assert abyssal.certificate(model).error is None
    assert [b.calls for b in abyssal.certificate(model).blocks] == [0] * 3
