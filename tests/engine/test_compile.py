"""torch.compile, export and tracing: equal gradients, no needless compilation, or a refusal that says why."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import abyssal
from abyssal.models import patch
from toys.distributed import DEPTH, REFINE, Net, data, gradients, net, relative_error, tolerance

ROUNDING = 1e-12  # aot_eager sums the terms of a product's gradient in another order; the toys are in float64
KEEP, REVERSE = abyssal.Keep(), abyssal.Reverse(refine=REFINE)
POLICIES = pytest.mark.parametrize("policy", [KEEP, REVERSE], ids=str)


def allowed(policy: abyssal.Policy) -> float:
    return ROUNDING if policy == KEEP else tolerance(REFINE)


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(model: nn.Module, number: int = 0) -> dict[str, Tensor]:
    model.zero_grad()
    sum(model(data(0, number))).backward()
    return {name.replace("_orig_mod.", ""): g for name, g in gradients(model).items()}


def compile_around(model: Net, **options: object) -> None:
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, **options)


def compile_in_place(model: Net, **options: object) -> None:
    for block in model.blocks:
        block.compile(**options)


@contextmanager
def silence_from_us() -> Iterator[None]:
    with warnings.catch_warnings(record=True) as told:  # dynamo warns of its own affairs
        warnings.simplefilter("always")
        yield
    assert [str(w.message) for w in told if "abyssal" in w.filename] == []


HOW = pytest.mark.parametrize("compile_blocks", [compile_around, compile_in_place])


@pytest.mark.slow
@pytest.mark.parametrize("fullgraph", [False, True], ids=["", "fullgraph"])
@POLICIES
@HOW
def test_blocks_compiled_before_stay_compiled_and_compile_once(
    compile_blocks: Callable[..., None], policy: abyssal.Policy, fullgraph: bool
) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = net()
    compile_blocks(model, backend=counter, fullgraph=fullgraph)
    with silence_from_us():
        abyssal.reconstruct(model, policy)
        for number in range(3):
            assert relative_error(step(model, number), step(net(), number)) <= allowed(policy)
            # One graph with gradients for all blocks, and one without for restoring: none in later steps.
            assert counter.frame_count == (1 if policy == KEEP else 2)
    assert abyssal.certificate(model).chains == (policy != KEEP)


@HOW
def test_release_gives_the_compiled_blocks_back(compile_blocks: Callable[..., None]) -> None:
    model = net()
    compile_blocks(model, backend="aot_eager")
    before = [(b.__dict__.get("forward"), b.__dict__.get("_compiled_call_impl")) for b in model.blocks]
    abyssal.reconstruct(model, REVERSE)
    abyssal.reconstruct(model, KEEP)
    step(model)
    abyssal.release(model)
    assert before == [(b.__dict__.get("forward"), b.__dict__.get("_compiled_call_impl")) for b in model.blocks]
    assert relative_error(step(model), step(net())) <= ROUNDING


@POLICIES
def test_blocks_compiled_in_place_afterwards_are_compiled_inside(policy: abyssal.Policy) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    model = abyssal.reconstruct(net(), policy)
    compile_in_place(model, backend=counter)
    for number in range(2):
        assert relative_error(step(model, number), step(net(), number)) <= allowed(policy)
    assert counter.frame_count == (1 if policy == KEEP else 2)


def test_hooks_of_a_block_compiled_in_place_run_once_per_call() -> None:
    model, calls = net(), []
    model.blocks[3].register_forward_hook(lambda *_: calls.append(3))
    compile_in_place(model, backend="aot_eager")
    abyssal.reconstruct(model, REVERSE)
    step(model)
    assert calls == [3]


def test_compilation_that_cannot_be_kept_is_told_and_the_gradients_are_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(patch, "compile_alike", lambda call, forward: None)
    model = net()
    model.blocks[2].compile(backend="aot_eager")
    with pytest.warns(UserWarning, match=r"'blocks\.2'.*no effect.*torch\.compile\(model\.blocks\[i\]\)"):
        abyssal.reconstruct(model, KEEP)
    assert relative_error(step(model), step(net())) == 0.0
    assert "no effect" in abyssal.certificate(model).blocks[2].note


# ---------------------------------------------------------------------- the whole model


@POLICIES
def test_the_whole_model_compiled_has_equal_gradients_and_says_that_blocks_are_not_compiled(
    policy: abyssal.Policy,
) -> None:
    model = abyssal.reconstruct(net(), policy)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.warns(UserWarning, match="Compile the blocks themselves") as told:
        for number in range(3):
            assert relative_error(step(compiled, number), step(net(), number)) <= allowed(policy)
    assert sum("Compile the blocks" in str(w.message) for w in told) == 1
    assert "uncompiled" in abyssal.certificate(model).blocks[0].note


@HOW
def test_the_whole_model_compiled_around_compiled_blocks_needs_no_warning(
    compile_blocks: Callable[..., None],
) -> None:
    model = net()
    compile_blocks(model, backend="aot_eager")
    compiled = torch.compile(abyssal.reconstruct(model, REVERSE), backend="aot_eager")
    with silence_from_us():
        for number in range(2):
            assert relative_error(step(compiled, number), step(net(), number)) <= allowed(REVERSE)


def test_fullgraph_is_refused_with_the_reason() -> None:
    compiled = torch.compile(abyssal.reconstruct(net(), KEEP), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"outside of the compiled graph. Compile the blocks instead"):
        compiled(data(0))


def test_inference_compiles_as_one_graph() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(abyssal.reconstruct(net(), REVERSE), backend=counter, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(data(0)), net()(data(0)))
    assert counter.frame_count == 1


def test_paused_training_compiles_as_one_graph() -> None:
    model = abyssal.reconstruct(net(), REVERSE)
    with abyssal.paused(model):
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert relative_error(step(compiled), step(net())) <= ROUNDING
    assert relative_error(step(model), step(net())) <= allowed(REVERSE)


# ---------------------------------------------------------------------- export and tracing


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("pause", [False, True], ids=["", "paused"])
def test_export(strict: bool, pause: bool) -> None:
    model = abyssal.reconstruct(net(), REVERSE)
    if pause:
        with abyssal.paused(model):
            exported = torch.export.export(model, (data(0),), strict=strict)
    else:
        exported = torch.export.export(model, (data(0),), strict=strict)
    torch.testing.assert_close(exported.module()(data(0, 1)), net()(data(0, 1)))
    assert relative_error(step(model), step(net())) <= allowed(REVERSE)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_trace() -> None:
    model = abyssal.reconstruct(net(), REVERSE)
    with abyssal.paused(model):
        traced = torch.jit.trace(model, (data(0),))
    torch.testing.assert_close(traced(data(0, 1)), net()(data(0, 1)))


# ---------------------------------------------------------------------- copies


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@HOW
def test_copies_of_compiled_blocks_get_their_own_gradients(
    compile_blocks: Callable[..., None], duplicate: Callable[[Net], Net]
) -> None:
    """As without us, a copy of a block compiled in place is not compiled.

    What `torch.compile(block)` makes leaves every `forward` behind when it is copied, ours too: such a copy
    computes right gradients, and is not reconstructed.
    """
    model = net()
    compile_blocks(model, backend="aot_eager")
    keys = list(model.state_dict())
    abyssal.reconstruct(model, REVERSE)
    step(model)
    model.zero_grad()
    copied = duplicate(model)
    assert relative_error(step(copied), step(net())) <= allowed(REVERSE)
    assert all(p.grad is None for p in model.parameters())
    assert list(copied.state_dict()) == list(model.state_dict()) == keys
    if compile_blocks is compile_around:
        with pytest.raises(ValueError, match="not reconstructed"):
            abyssal.certificate(copied)
    else:
        assert abyssal.certificate(copied).chains == 1


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("ATEN_CPU_CAPABILITY") == "default", reason="torch's own C++ for inductor does not compile there"
)
def test_inductor() -> None:
    model = net()
    compile_in_place(model)
    abyssal.reconstruct(model, REVERSE)
    for number in range(2):
        assert relative_error(step(model, number), step(net(), number)) <= allowed(REVERSE)
    assert len(abyssal.certificate(model).blocks) == DEPTH


@pytest.mark.parametrize("frames", ["ours", "torch"])
def test_the_compiler_does_not_trace_what_stands_behind_saved_tensors(
    frames: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled function inside a block that the compiler gives up on runs under its eye, and calls the hooks."""

    def gate(h: Tensor) -> Tensor:
        return nn.functional.silu(h) * torch.sigmoid(h)

    fused = torch.compile(gate, backend="eager")

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + fused(self.inner(x))

    monkeypatch.setenv("ABYSSAL_FRAME", frames)
    model = nn.Sequential(*[Gated() for _ in range(6)])
    abyssal.reconstruct(model, abyssal.Code(8), blocks=list(model))
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        model(torch.randn(2, 4)).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
