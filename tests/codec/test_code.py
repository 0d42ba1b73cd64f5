"""Coded streams: the decoder restores what the encoder's closed loop says, in exactly the bytes that it says."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import abyssal
from abyssal.codec.quantiser import BITS, Codec
from abyssal.profiling.track import track
from toys.backward_orders import (
    autograd_grad,
    gradient_of_a_middle_state,
    intermediate_losses_bottom_up,
    intermediate_losses_top_down,
    retained_twice,
    second_order,
)
from toys.blocks import Net, build, data, deep, relative, twins
from toys.streams import (
    Seen,
    absolute,
    batch,
    closed_loop,
    coded,
    error,
    increments,
    stack,
    step,
    true_and_restored,
    wide,
)

pytestmark = pytest.mark.filterwarnings("ignore::abyssal.DriftWarning")

# A residual is rounded to bfloat16, of 8 binary digits, once per coded block: by 2^-8 of itself at most.
RESIDUAL_ROUNDING = 2.0**-8
# Sums of a few hundred terms of about 1, in float32.
ROUNDING = 1e-5


# ---------------------------------------------------------------------- the closed loop


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_blocks_are_recomputed_at_what_the_closed_loop_decodes(bits: int, dtype: torch.dtype) -> None:
    model = coded(stack([0.3] * 8, dtype), abyssal.Code(bits))
    true, restored = true_and_restored(model, batch(dtype=dtype))
    for ours, obvious in zip(restored, closed_loop(true, [bits] * 8), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, obvious, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_the_obvious_loop_can_tell_another_code() -> None:
    model = coded(stack([0.3] * 8), abyssal.Code(3))
    true, restored = true_and_restored(model, batch())
    other = closed_loop(true, [4] * 8)
    assert absolute(restored[3], other[3]) > 100 * ROUNDING


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mixed_bits_along_one_chain(bits: int) -> None:
    chosen = [4, bits, 1, 8, bits, 6, 3, 2]
    model = coded(stack([0.3] * 8), {str(i): abyssal.Code(b) for i, b in enumerate(chosen)})
    true, restored = true_and_restored(model, batch())
    for ours, obvious in zip(restored, closed_loop(true, chosen), strict=True):
        torch.testing.assert_close(ours, obvious, rtol=ROUNDING, atol=ROUNDING)
    assert abyssal.certificate(model).chains == 1


@pytest.mark.slow
@pytest.mark.parametrize("depth", [8, 256])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_error_does_not_accumulate(bits: int, depth: int) -> None:
    """At 256 blocks as at 8, each state is off by one quantisation error, of its own increment."""
    true, restored = true_and_restored(coded(stack([0.3] * depth), abyssal.Code(bits)), batch())
    residuals = [r.float() for r, _ in increments(true, [bits] * depth)]
    # All that is left of the blocks above is their residuals' rounding, of either sign: a random walk.
    walk = depth**0.5 * RESIDUAL_ROUNDING * max(absolute(r, torch.zeros_like(r)) for r in residuals)
    for x, s, residual in zip(true[1:-1], restored[1:-1], residuals[1:-1], strict=True):
        assert absolute(x - s, residual) <= walk
        assert absolute(s, x) <= 0.3  # the branch itself is at most that


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_chains_first_state_is_exact_but_for_the_residuals_rounding(dtype: torch.dtype) -> None:
    model = coded(stack([0.3] * 8, dtype), abyssal.Code(2))
    true, restored = true_and_restored(model, batch(dtype=dtype))
    step_of_the_code = 0.3  # at most: |tanh| <= 1, twice that with the residual, and 2 levels to either side
    # 7 residuals of at most one step, rounded; and the rounding of the state itself.
    bound = 7 * RESIDUAL_ROUNDING * step_of_the_code + torch.finfo(dtype).eps * float(true[0].abs().max())
    assert float((restored[0].float() - true[0].float()).abs().max()) <= bound
    assert absolute(restored[1], true[1]) > 4 * absolute(restored[0], true[0])


def test_chains_of_one_block_and_of_two_are_exact_or_nearly() -> None:
    for depth in (1, 2):
        model = coded(stack([0.3] * depth), abyssal.Code(1))
        true, restored = true_and_restored(model, batch())
        assert torch.equal(restored[-1], true[-1])
        assert absolute(restored[0], true[0]) <= RESIDUAL_ROUNDING * 0.6


# ---------------------------------------------------------------------- kept, reversed and stored blocks in the chain


@pytest.mark.parametrize("kept", [[4], [0], [9], [3, 7], [4, 5], [0, 9], [*range(10)]], ids=str)
def test_segments_restart_at_kept_blocks(kept: list[int]) -> None:
    policies = {str(i): abyssal.Keep() for i in kept} | {"*": abyssal.Code(3)} if len(kept) < 10 else abyssal.Keep()
    model = coded(stack([0.3] * 10), policies)
    true, restored = true_and_restored(model, batch())
    for i in kept:
        assert torch.equal(restored[i], true[i])
        if i + 1 < 10:  # the first of its segment: what comes after a kept block costs no code
            assert absolute(restored[i + 1], true[i + 1]) <= 10 * RESIDUAL_ROUNDING * 0.1
    alone = coded(stack([0.3] * 10), abyssal.Code(3))
    worst = max(absolute(s, x) for x, s in zip(*true_and_restored(alone, batch()), strict=True))
    assert max(absolute(s, x) for x, s in zip(true, restored, strict=True)) <= 1.2 * worst


def test_blocks_below_a_kept_one_do_not_care_what_is_above_it() -> None:
    """What the decoder knows below a kept state starts from there."""
    below = []
    for above in (0.3, 30.0):
        model = coded(stack([0.3] * 5 + [above] * 4), {"5": abyssal.Keep(), "*": abyssal.Code(3)})
        below.append(true_and_restored(model, batch())[1][:5])
    assert all(torch.equal(a, b) for a, b in zip(*below, strict=True))


@pytest.mark.parametrize("factor", [30, 1000])
def test_a_kept_block_after_a_huge_increment_makes_nothing_worse(factor: float) -> None:
    """The closing code takes the decoder over the huge step, with 2^-16 of it left over for all blocks below."""
    scales = [0.3] * 4 + [0.3 * factor] + [0.3] * 3
    alone = true_and_restored(coded(stack(scales), abyssal.Code(4)), batch())
    kept = true_and_restored(coded(stack(scales), {"5": abyssal.Keep(), "*": abyssal.Code(4)}), batch())
    for i in range(8):
        without, with_ = (absolute(restored[i], true[i]) for true, restored in (alone, kept))
        if i == 0:  # both are exact but for roundings
            assert with_ <= max(without, factor * 2.0**-16)
        else:
            assert with_ <= 1.05 * without
    assert absolute(kept[1][5], kept[0][5]) == 0.0


def test_what_a_huge_increment_leaves_below_it_is_a_residuals_rounding() -> None:
    """It is the one way in which a block's size can be felt below: 2^-8 of the huge block's own error."""
    scales = [0.3] * 4 + [300.0] + [0.3] * 3
    huge = true_and_restored(coded(stack(scales), abyssal.Code(4)), batch())
    plain = true_and_restored(coded(stack([0.3] * 8), abyssal.Code(4)), batch())
    of_the_huge_one = absolute(huge[1][5], huge[0][5])
    for i in range(5):
        own, found = (absolute(restored[i], true[i]) for true, restored in (plain, huge))
        assert found <= 1.1 * own + RESIDUAL_ROUNDING * of_the_huge_one


@pytest.mark.parametrize(
    "policies",
    [
        {"[258]": abyssal.Reverse(12), "*": abyssal.Code(8)},
        {"[258]": abyssal.Code(8), "*": abyssal.Reverse(12)},
        {"0": abyssal.Reverse(12), "*": abyssal.Code(8)},
        {"9": abyssal.Reverse(12), "*": abyssal.Code(8)},
        {"[01234]": abyssal.Reverse(12), "*": abyssal.Code(8)},
        {"[56789]": abyssal.Reverse(12), "*": abyssal.Code(8)},
        {"5": abyssal.Store(), "*": abyssal.Code(8)},
        {"3": abyssal.Store(), "4": abyssal.Keep(), "[68]": abyssal.Reverse(12), "*": abyssal.Code(8)},
        {"[13579]": abyssal.Code(8, refine=1), "*": abyssal.Code(8)},
        {"[13579]": abyssal.PaperAdjoint(), "*": abyssal.Code(8)},
    ],
    ids=lambda p: ",".join(f"{k}={v}" for k, v in p.items()),
)
def test_coded_blocks_stand_among_others(policies: dict[str, abyssal.Policy]) -> None:
    model = coded(stack([0.1] * 10), policies)
    plain = step(abyssal.release(copy.deepcopy(model)), batch())
    assert relative(step(model, batch()), plain) <= 2e-3  # 2^-8 of the increments, and PaperAdjoint's 0.1^2 / 4
    true, restored = true_and_restored(model, batch())
    coded_alone = coded(stack([0.1] * 10), abyssal.Code(8))
    worst = max(absolute(s, x) for x, s in zip(*true_and_restored(coded_alone, batch()), strict=True))
    if abyssal.PaperAdjoint() not in policies.values():
        # Past two reversed blocks three increments are coded at once. And a reversed block multiplies what it was
        # given by the inverse of at most 1 - 0.1 |W| > 0.85.
        assert max(absolute(s, x) for x, s in zip(true, restored, strict=True)) <= 3 * worst / 0.85**2


def test_a_stored_block_costs_no_code_and_ends_the_chain() -> None:
    model = coded(stack([0.1] * 7), {"3": abyssal.Store(), "*": abyssal.Code(4)})
    step(model, batch())
    certificate = abyssal.certificate(model)
    assert [b.policy for b in certificate.blocks] == [
        "Code(4), start", "Code(4)", "Code(4), end", "Store()", "Code(4), start", "Code(4)", "Code(4), end",
    ]  # fmt: skip
    assert certificate.blocks[3].stored_bytes == 0
    assert certificate.chains == 2


# ---------------------------------------------------------------------- refinement


@pytest.mark.parametrize("refine", [1, 2])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_refinements_stay_within_the_cell_of_the_code_on_a_net_that_does_not_contract(bits: int, refine: int) -> None:
    depth = 64
    model = coded(stack([3.0] * depth), abyssal.Code(bits, refine=refine))
    true, restored = true_and_restored(model, batch())
    decoded = closed_loop(true, [bits] * depth)
    assert absolute(restored[0], true[0]) <= absolute(decoded[0], true[0]) * 1.01
    coarse = refined = 0.0
    for i, (_, cell) in enumerate(increments(true, [bits] * depth)):
        if cell is None or i == depth - 1:
            continue
        x, s, known, (low, high) = true[i], restored[i], decoded[i], cell
        slack = ROUNDING * float(known.abs().max())
        assert bool(((s >= known + low - slack) & (s <= known + high + slack)).all())
        # The true state is in there, too, but for the roundings of residuals, which are at most a cell wide.
        assert bool(((s - x).abs() <= (high - low) * (1 + depth * RESIDUAL_ROUNDING) + slack).all())
        coarse, refined = (coarse + absolute(known, x), refined + absolute(s, x)) if i <= 16 else (coarse, refined)
    # The blocks that are restored last: of a state that is anywhere in a cell, the cell's border is twice as far off
    # as its middle, in the root mean square.
    assert refined <= 2 * coarse


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_refining_pays_where_blocks_contract(bits: int) -> None:
    coarse, refined = (
        true_and_restored(coded(stack([0.1] * 12), abyssal.Code(bits, refine=k)), batch()) for k in (0, 1)
    )
    worst, better = (sum(absolute(s, x) for x, s in zip(*found, strict=True)) for found in (coarse, refined))
    assert better <= 0.3 * worst  # 0.1 times the branch's Lipschitz constant, about 1 here


# ---------------------------------------------------------------------- bytes

ELEMENTS = 256 * 64 * 4


class Wide(nn.Module):
    """A pre-norm block on streams of 65,536 elements."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        with torch.no_grad():
            self.linear.weight.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


def wide_stack(depth: int, dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*[Wide() for _ in range(depth)]).to(dtype)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return model


@pytest.fixture
def collected() -> Iterator[None]:
    """What earlier tests left to the garbage collector is not freed while memory is tracked."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.slow
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_stored_bytes_are_the_code_and_the_sample_to_the_byte(bits: int, dtype: torch.dtype) -> None:
    model = coded(wide_stack(8, dtype), abyssal.Code(bits))
    x = torch.randn(256, 256).to(dtype)
    assert x.numel() == ELEMENTS
    model(x)  # the first pass samples the end's output, too
    with track() as memory:
        out = model(torch.randn(256, 256).to(dtype))
        certificate = abyssal.certificate(model)
    item = x.element_size()
    samples = (ELEMENTS // 512) * (item + 2)
    first, *middle, last = (b.stored_bytes for b in certificate.blocks)
    for stored in (first + Codec(bits).nbytes(ELEMENTS), *middle):
        # The sample's stride has no divisor in common with the number of elements: up to a 128th fewer are drawn.
        assert 0.98 * samples <= stored - Codec(bits).nbytes(ELEMENTS) <= samples
    # The exact state, its own code, and in 8 bits the residual.
    ends = ELEMENTS * item + Codec(bits).nbytes(ELEMENTS) + Codec(8).nbytes(ELEMENTS)
    assert ends <= last <= ends + samples
    assert memory.end == certificate.stored_bytes + out.nbytes


@pytest.mark.parametrize(
    ("bits", "dtype", "most"),
    [(4, torch.bfloat16, 0.28), (4, torch.float32, 0.14), (2, torch.bfloat16, 0.16)],
)
@pytest.mark.parametrize("rows", [128, 129, 1024])
def test_a_coded_block_costs_at_most_the_share_that_was_promised(
    bits: int, dtype: torch.dtype, most: float, rows: int
) -> None:
    model = coded(wide_stack(6, dtype), abyssal.Code(bits))
    x = torch.randn(rows, 256).to(dtype)
    assert x.numel() >= 32_768
    model(x)
    coded_blocks = abyssal.certificate(model).blocks[1:-1]
    assert all(0 < b.stored_bytes <= most * x.nbytes for b in coded_blocks)


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize(
    "policies",
    [
        {"[135]": abyssal.Keep(), "*": abyssal.Code(4)},
        {"[135]": abyssal.Reverse(1), "*": abyssal.Code(4)},
        {"5": abyssal.Reverse(1), "*": abyssal.Code(4)},
        {"4": abyssal.Store(), "*": abyssal.Code(4)},
        {"[135]": abyssal.Code(2, refine=1), "*": abyssal.Code(4, device="cpu")},
        {"*": abyssal.Code("auto")},
    ],
    ids=lambda p: ",".join(f"{k}={v}" for k, v in p.items()),
)
def test_live_bytes_are_those_of_the_certificate_in_any_mix(policies: dict[str, abyssal.Policy]) -> None:
    torch.manual_seed(0)
    model = coded(wide_stack(6, torch.float32), policies)
    for _ in range(2):
        with track() as memory:
            out = model(torch.randn(256, 256))
            certificate = abyssal.certificate(model)
        # What plain autograd keeps of a stored block: its input, and tanh's output.
        plain = 2 * ELEMENTS * 4 * sum(b.policy == "Store()" for b in certificate.blocks)
        assert memory.end == certificate.stored_bytes + out.nbytes + plain
        assert certificate.stored_bytes == sum(b.stored_bytes for b in certificate.blocks)
        out.sum().backward()
        del out


@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("policy", [abyssal.Keep(), abyssal.Reverse(6), abyssal.Code(4), abyssal.Code("auto")], ids=str)
def test_frozen_blocks_below_the_first_trained_one_keep_nothing_and_are_not_counted(policy: abyssal.Policy) -> None:
    model = coded(wide_stack(7, torch.float32), policy)
    for p in model[:3].parameters():
        p.requires_grad_(False)
    for p in model[4].parameters():  # frozen above: gradients go through it
        p.requires_grad_(False)
    exact = step(abyssal.release(copy.deepcopy(model)), torch.ones(256, 256))
    coded(model, policy)
    for _ in range(2):
        with track() as memory:
            out = model(torch.randn(256, 256))
            certificate = abyssal.certificate(model)
        assert memory.end == certificate.stored_bytes + out.nbytes
        assert [b.stored_bytes for b in certificate.blocks[:3]] == [0, 0, 0]
        assert all("needs no gradients" in b.note for b in certificate.blocks[:3])
        assert certificate.chains == (policy != abyssal.Keep())
        out.sum().backward()
        del out
    assert relative(step(model, torch.ones(256, 256)), exact) <= 2e-2


def test_the_whole_stream_grows_by_one_code_per_block() -> None:
    shallow, deep_ = (coded(wide_stack(depth, torch.float32), abyssal.Code(4)) for depth in (8, 40))
    stored = []
    for model in (shallow, deep_):
        model(torch.randn(256, 256))
        stored.append(abyssal.certificate(model).stored_bytes)
    code = Codec(4).nbytes(ELEMENTS)
    assert 32 * code <= stored[1] - stored[0] <= 32 * (code + ELEMENTS // 512 * 6)


@pytest.mark.slow
@pytest.mark.usefixtures("collected")
@pytest.mark.parametrize("policy", [abyssal.Code(4), abyssal.Code(2, refine=1), abyssal.Code("auto")], ids=str)
def test_dropped_graphs_free_everything(policy: abyssal.Policy) -> None:
    class Fails(Wide):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 255:
                raise ValueError("told to")
            return super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(*[Wide() for _ in range(4)], Fails(), Wide())
    coded(model, policy)
    x = torch.randn(256, 256, requires_grad=True)
    model(x).sum().backward()
    with track() as memory:
        for _ in range(10):
            model(x * 2)
            with pytest.raises(ValueError, match="told to"):
                model(x[1:] * 2)
    assert memory.end == 0  # and nothing needed the garbage collector, which is off


@pytest.mark.slow
@pytest.mark.usefixtures("collected")
def test_a_step_leaves_nothing_behind() -> None:
    model = coded(
        deep(12), {"4": abyssal.Keep(device="cpu"), "[89]": abyssal.Reverse(1), "*": abyssal.Code(2, refine=1)}
    )
    x = torch.randn(256, 64)

    def one() -> None:
        out = model(x).square().mean()
        out.backward(retain_graph=True)
        out.backward()

    one()
    with track() as memory:
        for _ in range(5):
            one()
    assert memory.end == 0


# ---------------------------------------------------------------------- order of backward


ORDERS = [
    retained_twice,
    autograd_grad,
    second_order,
    intermediate_losses_bottom_up,
    intermediate_losses_top_down,
    gradient_of_a_middle_state,
]


@pytest.mark.parametrize("step_", ORDERS)
@pytest.mark.parametrize("policy", [abyssal.Code(8), abyssal.Code(8, refine=1), abyssal.Code("auto")], ids=str)
def test_gradients_are_close_in_any_order(step_: Callable[[nn.Module], Tensor], policy: abyssal.Policy) -> None:
    plain, ours = twins(build(), policy)
    # States are off by 2^-8 of increments of 0.1: 4e-4 at most, and auto's by AUTO_ACCURACY.
    assert relative(step_(ours), step_(plain)) <= (2e-3 if policy != abyssal.Code("auto") else 2e-2)


@pytest.mark.parametrize("step_", ORDERS)
@pytest.mark.parametrize("policy", [abyssal.Code(4), abyssal.Code(1)], ids=str)
def test_a_block_is_evaluated_at_the_same_state_to_the_bit_in_any_order(
    step_: Callable[[nn.Module], Tensor], policy: abyssal.Policy
) -> None:
    model = build(lambda: Seen(width=12))
    abyssal.reconstruct(model, policy, blocks=list(model.blocks), tolerance=1e9)
    model(data()).square().mean().backward()
    in_order = [block.inputs[-1] for block in model.blocks]
    for block in model.blocks:
        block.inputs.clear()
    step_(model)
    for block, expected in zip(model.blocks, in_order, strict=True):
        assert len(block.inputs) >= 2
        _, *restored = block.inputs
        assert all(torch.equal(s, expected) for s in restored)


def test_a_second_backward_gives_the_same_gradient_again() -> None:
    model = coded(stack([0.3] * 8), abyssal.Code(2, refine=1))
    loss = model(batch()).square().mean()
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), once, strict=True))


def test_interleaved_chains_do_not_meet() -> None:
    """Two encoders, one layer of each in turn: each chain is coded by itself."""
    plain = [stack([0.3] * 6), stack([0.2] * 6)]
    both = nn.ModuleList([nn.Sequential(*[Seen(0.3) for _ in range(6)]), nn.Sequential(*[Seen(0.2) for _ in range(6)])])
    both[0].load_state_dict(plain[0].state_dict())
    both[1].load_state_dict(plain[1].state_dict())
    abyssal.reconstruct(both, abyssal.Code(3), blocks=[*both[0], *both[1]], tolerance=1e9)
    for _ in range(2):  # in the first pass it is not known where chains end, and the residual there is not coded
        a, b = batch(seed=1), batch(seed=2)
        for left, right in zip(both[0], both[1], strict=True):
            a, b = left(a), right(b)
        (a.square().mean() + b.square().mean()).backward()
    for model, twin, seed in ((both[0], plain[0], 1), (both[1], plain[1], 2)):
        _, expected = true_and_restored(coded(twin, abyssal.Code(3)), batch(seed=seed))
        assert all(torch.equal(block.inputs[-1], s) for block, s in zip(model, expected, strict=True))


@pytest.mark.parametrize("lengths", [(4, 8), (8, 4), (4, 8, 8)], ids=str)
def test_a_chain_that_ends_elsewhere_than_last_time(lengths: tuple[int, ...]) -> None:
    """Where the chain is guessed to end, what is carried along it is rounded more coarsely; never wrongly."""
    model = coded(stack([0.3] * 8), abyssal.Code(4))
    for length in lengths:
        model.zero_grad()
        model[:length](batch()).square().mean().backward()
        last = abyssal.certificate(model).blocks[length - 1]
    true = [block.inputs[0] for block in model[:length]]
    for block, exact, obvious in zip(model, true, closed_loop(true, [4] * length), strict=False):
        assert error(block.inputs[-1], exact) <= 1.1 * error(obvious, exact) + 1e-4
    if lengths[-1] == lengths[-2]:
        assert last.stored_bytes < abyssal.certificate(model).blocks[0].stored_bytes + 3 * batch().nbytes


def test_siamese_calls_and_two_graphs_alive() -> None:
    """Both graphs' gradients are each what it would be alone, whichever backward pass comes first."""
    alone = []
    for seed in (1, 2):
        model = coded(stack([0.3] * 6), abyssal.Code(3))
        alone.append(step(model, batch(seed=seed)))
    for first, second in ((1, 2), (2, 1)):
        model = coded(stack([0.3] * 6), abyssal.Code(3))
        losses = {seed: model(batch(seed=seed)).square().mean() for seed in (1, 2)}
        for p in model.parameters():
            p.grad = None
        losses[first].backward()
        found = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert torch.equal(found, alone[first - 1])
        losses[second].backward()
        total = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert torch.equal(total, alone[first - 1] + alone[second - 1])


def test_an_operation_between_blocks_ends_the_chain_and_is_not_coded_through() -> None:
    class Between(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for i, block in enumerate(self.blocks):
                x = block(x)
                if i == 2:
                    x.add_(1.0) if self.in_place else None
                    x = x if self.in_place else x + 1.0
            return self.head(x)

    for in_place in (True, False):
        torch.manual_seed(0)
        model = Between(lambda: Seen(width=12)).double()
        model.in_place = in_place
        abyssal.reconstruct(model, abyssal.Code(4), blocks=list(model.blocks))
        model(data()).sum().backward()
        assert abyssal.certificate(model).chains == 2
        true, restored = ([b.inputs[i] for b in model.blocks] for i in (0, -1))
        assert torch.equal(true[2], restored[2])
        assert absolute(true[3], restored[3]) < 1e-3  # the start of the next


def test_what_the_caller_does_to_the_output_does_not_matter() -> None:
    """The code is made from private states: an in-place operation on the output gives plain autograd's gradient."""

    def gradient(model: nn.Module) -> Tensor:
        model.zero_grad()
        out = model(batch())
        out.mul_(2).add_(1).relu_()
        out.sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    exact = gradient(stack([0.3] * 6))
    assert relative(gradient(coded(stack([0.3] * 6), abyssal.Code(8))), exact) <= 4 * 0.6 / 128


# ---------------------------------------------------------------------- property


@settings(max_examples=40, deadline=None)
@given(
    policies=st.lists(
        st.one_of(
            st.sampled_from([abyssal.Keep(), abyssal.Store(), abyssal.Reverse(12), abyssal.Code("auto")]),
            st.builds(abyssal.Code, bits=st.sampled_from(BITS), refine=st.integers(0, 1)),
            st.builds(abyssal.Code, bits=st.sampled_from([6, 8]), group=st.sampled_from([16, 40, 128])),
        ),
        min_size=1,
        max_size=10,
    ),
    width=st.sampled_from([1, 3, 12, 64]),
    rows=st.integers(1, 9),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
def test_no_mix_of_policies_is_off_by_more_than_its_coarsest_code(
    policies: list[abyssal.Policy], width: int, rows: int, dtype: torch.dtype, seed: int
) -> None:
    """Every state is within the step of its own code; the reversed ones within that of what they were given."""
    torch.manual_seed(seed)
    scale = 0.05
    model = nn.Sequential(*[Seen(scale, width) for _ in policies]).to(dtype)
    coded(model, {str(i): policy for i, policy in enumerate(policies)})
    x = torch.randn(rows, width, dtype=dtype)
    true, restored = true_and_restored(model, x)
    # What is coded is at most the branches since the last code and its residual. |tanh| <= 1, so a run of m reversed
    # blocks and one coded one move the stream by (m + 1) * scale, and a residual is one step: half of that at most,
    # or, with one bit, all of it.
    largest = scale * (len(policies) + 1) * 2
    lipschitz = scale * float(max(torch.linalg.matrix_norm(b.linear.weight.detach(), 2) for b in model))
    growth = (1 - lipschitz) ** -len(policies)
    for policy, x_, s in zip(policies, true, restored, strict=True):
        off = float((wide(s) - wide(x_)).abs().max()) if x_.numel() else 0.0
        if isinstance(policy, abyssal.Keep):
            assert off == 0.0
        elif isinstance(policy, abyssal.Code):
            bits = 4 if policy.is_auto else policy.bits
            assert off <= 2 * largest / 2 ** (int(bits) - 1) * 1.02 + ROUNDING
        else:
            assert off <= 2 * largest * growth * width**0.5
    assert torch.isfinite(step(model, x)).all()


@settings(max_examples=25, deadline=None)
@given(
    depth=st.integers(1, 12),
    width=st.sampled_from([1, 2, 12, 40]),
    bits=st.sampled_from([6, 8]),
    refine=st.integers(0, 2),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_gradients_under_many_bits_are_close(
    depth: int, width: int, bits: int, refine: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(depth)
    model = nn.Sequential(*[Seen(0.1, width) for _ in range(depth)]).to(dtype)
    plain = step(model, torch.ones(4, width, dtype=dtype))
    coded(model, abyssal.Code(bits, refine=refine))
    found = step(model, torch.ones(4, width, dtype=dtype))
    # A state is off by 0.2 / 2^(bits - 1) at most, and tanh' by as much times the weights, of norm at most 2.
    assert relative(found, plain) <= 4 * 0.2 / 2 ** (bits - 1) * (1 + 0.2) ** depth


def test_the_bits_are_what_the_error_says() -> None:
    """Each bit halves the error, from where the quantiser has enough levels to be uniform."""
    errors = []
    for bits in (4, 6, 8):
        true, restored = true_and_restored(coded(stack([0.3] * 12), abyssal.Code(bits)), batch(64))
        errors.append(sum(error(s, x) for x, s in zip(true, restored, strict=True)))
    assert 3 <= errors[0] / errors[1] <= 5
    assert 3 <= errors[1] / errors[2] <= 5
