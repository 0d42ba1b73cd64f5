"""What a call saves, made again on demand: equal to torch's own checkpointing, the slow twin, and to plain autograd."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from abyssal.models.replay.frame import Frame, run_with_frame
from abyssal.models.surroundings import BufferWatch, Surroundings

WIDTH = 6


class Counted(nn.Module):
    """Two linear maps with a tanh between; counts how often it was begun and ended."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH).double(), nn.Linear(WIDTH, WIDTH).double()
        self.begun = self.ended = 0

    def forward(self, x: Tensor) -> Tensor:
        self.begun += 1
        y = x + self.second(torch.tanh(self.first(x)))
        y = y * y.sigmoid()
        self.ended += 1
        return y


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["ours", "torch"])
def frames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Whose frames they are."""
    monkeypatch.setenv("ABYSSAL_FRAME", request.param)
    yield request.param


def block() -> Counted:
    torch.manual_seed(1)
    return Counted()


def stream() -> Tensor:
    return torch.randn(4, WIDTH, dtype=torch.float64, requires_grad=True)


def framed(module: Callable[[Tensor], Tensor], x: Tensor, **settings: bool) -> Tensor:
    return run_with_frame(lambda: module(x), lambda: module(x), "the block", x, **settings)


def grads(output: Tensor, module: nn.Module, x: Tensor, **settings: bool) -> list[Tensor]:
    return list(torch.autograd.grad(output.square().sum(), [x, *module.parameters()], **settings))


def test_gradients_are_plain_ones_and_one_second_run_is_cut_short(frames: str) -> None:
    module, plain, x = block(), block(), stream()
    found, exact = grads(framed(module, x), module, x), grads(plain(x), plain, x)
    assert all(map(torch.equal, found, exact))
    assert (module.begun, module.ended) == (2, 1)  # all is filled before its last line


def test_without_early_stop_the_second_run_ends(frames: str) -> None:
    module, x = block(), stream()
    grads(framed(module, x, early_stop=False), module, x)
    assert (module.begun, module.ended) == (2, 2)


def test_a_graph_is_walked_several_times(frames: str) -> None:
    module, plain, x = block(), block(), stream()
    y, z = framed(module, x), plain(x)
    for _ in range(3):
        found = grads(y, module, x, retain_graph=True)
        assert all(map(torch.equal, found, grads(z, plain, x, retain_graph=True)))
    assert module.begun == 4


def test_second_derivatives(frames: str) -> None:
    module, plain, x = block(), block(), stream()

    def second(network: Counted, output: Tensor) -> list[Tensor]:
        first = grads(output, network, x, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *network.parameters()]))

    found, exact = second(module, framed(module, x)), second(plain, plain(x))
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_frames_within_frames_and_within_checkpoints(frames: str) -> None:
    outer, inner = block(), block()
    plain = [block(), block()]
    x = stream()

    def nested(x: Tensor) -> Tensor:
        return outer(framed(inner, outer(checkpoint(inner, x, use_reentrant=False))))

    def plainly(x: Tensor) -> Tensor:
        return plain[0](plain[1](plain[0](plain[1](x))))

    modules, others = nn.ModuleList([outer, inner]), nn.ModuleList(plain)
    found = grads(checkpoint(lambda x: framed(nested, x), x, use_reentrant=False), modules, x)
    for ours, theirs in zip(found, grads(plainly(x), others, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("early_stop", [True, False])
def test_gradients_taken_in_the_middle_of_a_forward_pass(frames: str, early_stop: bool) -> None:
    """Forces in a network of energies: the block differentiates what it has computed so far."""
    module, plain, x = block(), block(), stream()

    def forces(network: Counted) -> Callable[[Tensor], Tensor]:
        def call(x: Tensor) -> Tensor:
            y = network(x)
            (force,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
            return y - 0.1 * force

        return call

    found = grads(framed(forces(module), x, early_stop=early_stop), module, x)
    for ours, theirs in zip(found, grads(forces(plain)(x), plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_saved_tensors_are_read_outside_of_a_backward_pass(frames: str) -> None:
    x = stream()
    y = framed(lambda x: x.exp().sin(), x)
    for _ in range(2):
        assert torch.equal(y.grad_fn._saved_self, x.exp())


def test_a_saved_tensor_is_read_twice_in_one_backward_pass() -> None:
    """torch's own refuses; ours runs the call once more."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
            (once,), (again,) = ctx.saved_tensors, ctx.saved_tensors
            assert torch.equal(once, again)
            return g * (once + again)

    x = stream()
    framed(Twice.apply, x).sum().backward()
    assert torch.equal(x.grad, 2 * x)


def test_only_the_part_of_a_graph_that_is_asked_for_is_walked(frames: str) -> None:
    modules, x = [block() for _ in range(3)], stream()
    y = x
    kept = []
    for module in modules:
        y = framed(module, y)
        kept.append(y)
    torch.autograd.grad(kept[1].sum(), x, retain_graph=True)
    assert [m.begun for m in modules] == [2, 2, 1]
    torch.autograd.grad(kept[2].sum(), x)
    assert [m.begun for m in modules] == [3, 3, 2]


# ---------------------------------------------------------------------- memory


def test_a_graph_that_is_dropped_frees_all_of_it_at_once() -> None:
    gc.disable()
    try:
        module, x = block(), stream()
        filled = []

        def call(x: Tensor) -> Tensor:
            y = module(x)
            filled.append(weakref.ref(y))
            return y.exp()

        y = framed(call, x)
        grads(y, module, x, retain_graph=True)
        del y
        assert [reference() for reference in filled] == [None, None]
    finally:
        gc.enable()


def test_what_is_filled_in_goes_as_it_is_used() -> None:
    """After its backward pass a graph that is retained holds no more than before."""
    x = stream()
    seen: list[weakref.ref[Tensor]] = []

    class Saving(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
            saved = x.detach() * 2
            seen.append(weakref.ref(saved))
            ctx.save_for_backward(saved)
            return x.clone()

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> Tensor:
            assert len(ctx.saved_tensors) == 1
            return g

    y = framed(Saving.apply, x)
    y.sum().backward(retain_graph=True)
    assert len(seen) == 2
    assert [reference() for reference in seen] == [None, None]


# ---------------------------------------------------------------------- filled ahead of its turn


def test_a_run_that_happens_anyway_fills_a_frame_ahead_of_its_turn() -> None:
    module, plain, x = block(), block(), stream()
    frame = Frame(lambda: pytest.fail("it was filled"), "the block")
    y = frame.record(lambda: module(x))
    keys = []

    def before(_: Tensor) -> None:
        from abyssal.models.replay.frame import current_pass

        keys.append(current_pass())
        output = frame.fill(keys[-1], lambda: module(x), early_stop=False)
        assert isinstance(output, Tensor)
        assert torch.equal(output, y)

    y.register_hook(before)
    assert all(map(torch.equal, grads(y, module, x), grads(plain(x), plain, x)))
    assert module.begun == 2
    assert len(keys) == 1


# ---------------------------------------------------------------------- what goes wrong


class Unsteady(nn.Module):
    """Does something else each time that it is called."""

    def __init__(self, *runs: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.runs = list(runs)

    def forward(self, x: Tensor) -> Tensor:
        return self.runs.pop(0)(x) if len(self.runs) > 1 else self.runs[0](x)


@pytest.mark.parametrize(
    ("first", "second", "early_stop", "said"),
    [
        (lambda x: x.exp().sin().exp(), lambda x: x.exp(), True, "1 tensors, not 3"),
        (lambda x: x.exp(), lambda x: x.exp().sin(), False, "more than 1 tensors"),
        (lambda x: x.exp(), lambda x: x[:1].exp(), True, r"number 1 is \[1, 6\] .* not \[4, 6\]"),
        (lambda x: x.exp(), lambda x: x.float().exp(), True, "number 1 is .* torch.float32 .* not .* torch.float64"),
    ],
)
def test_other_tensors_in_the_second_run_are_refused_in_words(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], early_stop: bool, said: str
) -> None:
    x = stream()
    y = framed(Unsteady(first, second), x, early_stop=early_stop)
    with pytest.raises(RuntimeError, match=f"block 'the block'.*{said}.*hook or a context.*Store.*check_block"):
        y.sum().backward()


def test_a_block_that_changes_what_it_saved_is_refused_as_by_plain_autograd() -> None:
    def call(x: Tensor) -> Tensor:
        y = x.exp()
        z = y.sin()
        y.zero_()
        return z * z

    x = stream()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        call(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"'the block': a tensor that it saved .* was changed in place"):
        framed(call, x).sum().backward()


def test_a_callers_change_of_the_output_does_not_reach_what_is_made_again(frames: str) -> None:
    x = stream()
    y = framed(torch.exp, x)
    with torch.no_grad():
        y.zero_()
    y.sum().backward()
    assert torch.equal(x.grad, x.detach().exp())


def test_a_parameter_that_is_stepped_within_the_backward_pass_is_noticed() -> None:
    linear, x = nn.Linear(WIDTH, WIDTH).double(), stream()

    def step(_: Tensor) -> None:
        with torch.no_grad():
            linear.weight.add_(1.0)

    def call(x: Tensor) -> Tensor:
        h = torch.tanh(linear(x))
        h.register_hook(step)
        return linear(h)

    with pytest.raises(RuntimeError, match="an optimiser that steps within the backward pass"):
        framed(call, x).sum().backward()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_second_run_comes_out_and_the_graph_can_be_walked_again(error: type[BaseException]) -> None:
    module, plain, x = block(), block(), stream()
    failing = False

    def call(x: Tensor) -> Tensor:
        y = module(x)
        if failing:
            raise error("on purpose")
        return y.exp()

    y = framed(call, x)
    failing = True
    with pytest.raises(error, match="on purpose"):
        grads(y, module, x, retain_graph=True)
    failing = False
    assert all(map(torch.equal, grads(y, module, x), grads(plain(x).exp(), plain, x)))


def test_a_block_that_catches_all_exceptions_does_not_catch_the_early_stop() -> None:
    module, plain, x = block(), block(), stream()

    def careful(x: Tensor) -> Tensor:
        try:
            return module(x)
        except Exception:
            return x

    assert all(map(torch.equal, grads(framed(careful, x), module, x), grads(plain(x), plain, x)))


def test_the_users_own_hooks_around_see_nothing_of_a_framed_call(frames: str) -> None:
    """As with checkpointing: hooks around the model are not asked for what a block saves inside."""
    seen: list[Tensor] = []
    x = stream()
    with saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        y = framed(block(), x)
    assert not seen
    y.sum().backward()


def test_new_tensors_are_made_on_the_device_of_the_first_run() -> None:
    x = stream()
    with torch.device("meta"):
        seen = Surroundings(nn.Identity(), x, BufferWatch())
    assert seen.run(torch.empty, (1,), {}, "the block", caching=True).device.type == "meta"
    assert torch.empty(1).device.type == "cpu"


def test_frames_of_nobody_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABYSSAL_FRAME", "tourch")
    with pytest.raises(ValueError, match=r"ABYSSAL_FRAME='tourch'.*expected ours, or torch"):
        framed(block(), stream())
