"""What is kept, in exact bytes; flat in depth; nothing left behind."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import abyssal
from abyssal.profiling.track import track
from toys.blocks import Net, Wide, build, data, deep, one_step
from toys.fuzzed import WIDTH, Coupling, Dropping, InPlaceInside, Kind, Nested, Normed, Resizing

STREAM = 256 * 64 * 4  # bytes of one state


def step(model: nn.Module) -> None:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    model(x).square().mean().backward()


def peak(model: nn.Module) -> int:
    step(model)
    with track() as memory:
        step(model)
    return memory.peak


@pytest.mark.slow
@pytest.mark.parametrize("policy", [abyssal.Reverse(0), abyssal.Reverse(2), abyssal.PaperAdjoint()], ids=str)
def test_peak_memory_is_flat_in_depth(policy: abyssal.Policy) -> None:
    shallow, deep_ = (abyssal.reconstruct(deep(n), policy, tolerance=10.0) for n in (8, 256))
    # Samples may take 128 KiB in one forward pass, and as much again for a moment when they are compared.
    assert peak(deep_) <= peak(shallow) + 2 * 128 * 1024


def test_keeping_costs_one_state_per_block() -> None:
    shallow, deep_ = (peak(abyssal.reconstruct(deep(n), abyssal.Keep())) for n in (8, 72))
    assert 64 * STREAM <= deep_ - shallow <= 64 * STREAM + 128 * 1024


def test_stored_bytes_are_the_exact_inputs_and_the_samples() -> None:
    model = abyssal.reconstruct(deep(16), abyssal.Reverse(1))
    with track() as memory:
        out = model(torch.randn(256, 64))
        held = abyssal.certificate(model).stored_bytes
    most = 16 * 64 * 6  # inputs of all but the last block, whose output is sampled; 2 bytes are a weight
    assert STREAM + 0.9 * most < held <= STREAM + most
    assert held == sum(b.stored_bytes for b in abyssal.certificate(model).blocks)
    # Live after the forward pass: that, the output itself, and nothing else.
    assert memory.end == held + out.nbytes
    out.sum().backward()
    assert abyssal.certificate(model).stored_bytes == held  # still known afterwards
    assert STREAM <= abyssal.certificate(model).blocks[-1].stored_bytes <= STREAM + 64 * 4


KINDS = (Kind, InPlaceInside, Dropping, Normed, Coupling, Resizing, Nested)
POLICIES = (
    abyssal.Keep(), abyssal.Keep("cpu"), abyssal.Reverse(1), abyssal.Code(4), abyssal.Code(8, refine=1), abyssal.Code()
)  # fmt: skip


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(POLICIES)), min_size=1, max_size=7),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_stored_bytes_are_those_alive_for_any_blocks_and_policies(chosen: list, dtype: torch.dtype) -> None:
    width, blocks = WIDTH, []
    for kind, _ in chosen:
        blocks.append(kind(width))
        width = blocks[-1].width_out
    model = nn.Sequential(*blocks).to(dtype)
    abyssal.reconstruct(model, {str(i): policy for i, (_, policy) in enumerate(chosen)}, blocks=list(model))
    x = torch.randn(48, WIDTH, dtype=dtype)
    for _ in range(2):  # the second with what was learned in the first
        with track() as memory:
            out = model(x)
            held = abyssal.certificate(model).stored_bytes
        numbers = memory.end - held - out.nbytes  # autograd keeps a Python number as 8 bytes
        assert numbers % 8 == 0 and 0 <= numbers <= 8 * 4 * len(blocks)
        out.square().sum().backward()
        del out
        model.zero_grad()


def test_stored_bytes_of_kept_blocks() -> None:
    model = abyssal.reconstruct(deep(4), abyssal.Keep())
    for _ in range(2):
        step(model)
    expected = sum(b.stored_bytes for b in abyssal.certificate(model).blocks)
    assert 4 * STREAM <= expected <= 4 * STREAM + 4 * 65 * 4


@pytest.mark.slow
def test_samples_stay_within_their_budget_and_rotate() -> None:
    model = abyssal.reconstruct(deep(1500), abyssal.Reverse(0), tolerance=10.0)
    measured: set[str] = set()
    for _ in range(5):
        step(model)
        certificate = abyssal.certificate(model)
        assert certificate.stored_bytes <= STREAM + 128 * 1024
        measured |= {b.name for b in certificate.blocks if b.error is not None}
    assert len(measured) > 1400


@pytest.mark.slow
@pytest.mark.parametrize("policy", [abyssal.Keep(), abyssal.Reverse(1)], ids=str)
def test_dropped_graphs_free_everything(policy: abyssal.Policy) -> None:
    class Fails(Wide):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 255:
                raise ValueError("told to")
            return super().forward(x)

    torch.manual_seed(0)
    model = abyssal.reconstruct(
        nn.Sequential(*[Wide() for _ in range(5)], Fails(), Wide()), policy, blocks=["[0-4]", "5", "6"]
    )
    condition = torch.randn(256, 64, requires_grad=True)
    step(model)
    gc.disable()  # nothing may need the garbage collector: cycles through a graph are beyond it
    try:
        with track() as memory:
            for _ in range(100):
                model(condition * 2)
                with pytest.raises(ValueError, match="told to"):
                    model(condition[1:] * 2)
        assert memory.end == 0
    finally:
        gc.enable()


@pytest.mark.slow
def test_a_backward_pass_that_fails_leaves_nothing_behind() -> None:
    model = abyssal.reconstruct(deep(6), abyssal.Reverse(1))

    def fail(gradient: Tensor) -> None:
        raise ValueError("told to")

    def failing() -> None:
        x = torch.randn(256, 64, requires_grad=True)
        h = model[2](model[1](model[0](x)))
        h.register_hook(fail)
        for block in model[3:]:
            h = block(h)
        with pytest.raises(ValueError, match="told to"):
            h.sum().backward()

    failing()
    gc.collect()
    with track() as memory:
        for _ in range(20):
            failing()
        gc.collect()  # the exceptions' tracebacks hold frames
    assert memory.end <= 0  # below 0 if what other tests left is collected meanwhile


def test_parameter_gradients_accumulate_as_they_come() -> None:
    """No second copy of all gradients at the end of the backward pass: with large weights the peak is the weights'."""

    class Heavy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(512, 512)

        def forward(self, x: Tensor) -> Tensor:
            return x + 0.05 * torch.tanh(self.linear(x))

    model = nn.Sequential(*[Heavy() for _ in range(24)])
    abyssal.reconstruct(model, abyssal.Reverse(1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    x = torch.randn(2, 512)
    model(x).sum().backward()
    with track() as memory:
        model(x).sum().backward()
    assert memory.peak < 3 * 512 * 512 * 4  # of 24 weights' gradients


def test_extra_arguments_are_not_kept_twice_nor_do_they_keep_the_graph_alive() -> None:
    class Conditioned(Wide):
        def forward(self, x: Tensor, condition: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x) * torch.sigmoid(condition)

    torch.manual_seed(0)
    blocks = nn.ModuleList([Conditioned() for _ in range(8)])
    abyssal.reconstruct(blocks, abyssal.Keep())
    source = torch.randn(256, 64, requires_grad=True)

    def run() -> Tensor:
        condition, h = source * 2, source * 3
        for block in blocks:
            h = block(h, condition)
        return h

    run()
    gc.disable()
    try:
        with track() as memory:
            for _ in range(20):
                run()
        assert memory.end == 0
    finally:
        gc.enable()


@pytest.mark.slow
def test_repeated_steps_do_not_grow() -> None:
    model: Net = build(depth=12)
    abyssal.reconstruct(model, abyssal.Reverse(2), blocks=list(model.blocks))
    one_step(model, data())
    with track() as memory:
        for _ in range(30):
            one_step(model, data())
            model.zero_grad()
    assert memory.end <= 0
