"""`abyssal.memory` gives the byte counts that one can work out by hand."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from abyssal import memory

MEGABYTE = 1 << 20
FLOAT = 4  # bytes


def block_of(nbytes: int, device: str = "cpu") -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


class Linear(torch.autograd.Function):
    """y = x w.T by exactly one matrix product forward and two backward, so that bytes can be counted."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad @ w, grad.T @ x


def test_nothing_allocated_is_zero_bytes():
    with memory.track() as used:
        pass
    assert (used.peak, used.end) == (0, 0)


def test_two_megabytes_of_which_one_is_freed():
    with memory.track() as used:
        first, second = block_of(MEGABYTE), block_of(MEGABYTE)
        del first
        third = block_of(MEGABYTE // 2)
    assert used.peak == 2 * MEGABYTE
    assert used.end == MEGABYTE + MEGABYTE // 2 == len(second) + len(third)


def test_release_of_what_an_enclosing_tracker_saw_counts_as_negative():
    with memory.track() as whole:
        old = block_of(MEGABYTE)
        with memory.track() as phase:
            del old
            new = block_of(MEGABYTE // 4)
    assert (phase.peak, phase.end) == (0, -MEGABYTE + MEGABYTE // 4)
    assert (whole.peak, whole.end) == (MEGABYTE, len(new))


def test_release_of_what_an_earlier_tracker_saw_counts_as_negative():
    with memory.track():
        old = block_of(MEGABYTE)
    with memory.track() as later:
        del old
    assert (later.peak, later.end) == (0, -MEGABYTE)


def test_linear_chain_by_plain_backprop_holds_every_state_and_two_gradients():
    """depth inputs of [batch, width] are saved, then one gradient comes in while the next is made."""
    depth, batch, width = 7, 32, 48
    weights = [torch.zeros(width, width, requires_grad=True) for _ in range(depth)]
    for w in weights:
        w.grad = torch.zeros_like(w)
    x = torch.ones(batch, width, requires_grad=True)
    x.grad = torch.zeros_like(x)
    state, weight = batch * width * FLOAT, width * width * FLOAT

    with memory.track() as step:
        y = x
        for w in weights:
            y = Linear.apply(y, w)
        with memory.track() as backward:
            y.backward(torch.ones_like(y))
        del y
    # All outputs live (depth states); in the last block's backward: the incoming gradient, the new one
    # and the weight's gradient before it is added to .grad.
    assert step.peak == (depth + 2) * state + weight
    assert backward.peak == 2 * state + weight
    assert step.end == 0


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=12))
def test_agrees_with_a_ledger_kept_by_hand(actions):
    level = peak = 0
    held: list[torch.Tensor] = []
    with memory.track() as used:
        for nbytes, drop in actions:
            held.append(block_of(nbytes))
            level += nbytes
            peak = max(peak, level)
            if drop:
                level -= held[0].numel()
                held.pop(0)
    assert (used.peak, used.end) == (peak, level)


def test_temporaries_inside_one_operator_count():
    # In float64, which oneDNN does not do: torch's own convolution unfolds the image in a buffer of its own.
    x = torch.randn(4, 8, 32, 32, dtype=torch.float64)
    conv = nn.Conv2d(8, 8, 3, dtype=torch.float64)
    with torch.no_grad():
        used = memory.peak_bytes(conv, x)
    output = 4 * 8 * 30 * 30 * 8
    unfolded_image = 8 * 3 * 3 * 30 * 30 * 8
    assert used >= output + unfolded_image


def test_checkpointing_is_seen_to_save_memory():
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)) for _ in range(16)]
    x = torch.randn(128, 64, requires_grad=True)

    def step(call):
        y = x
        for block in blocks:
            y = call(block, y)
        y.sum().backward()

    step(lambda block, y: block(y))  # gradient buffers exist from here on
    plain = memory.peak_bytes(step, lambda block, y: block(y))
    checkpointed = memory.peak_bytes(step, lambda block, y: checkpoint(block, y, use_reentrant=False))
    assert checkpointed < 0.75 * plain


def test_the_same_step_gives_the_same_bytes_every_time():
    net = nn.Sequential(*[nn.Linear(32, 32) for _ in range(20)])
    x = torch.randn(16, 32)

    def step():
        net(x).sum().backward()

    step()
    assert len({memory.peak_bytes(step) for _ in range(3)}) == 1


def test_peak_bytes_passes_arguments_on():
    assert memory.peak_bytes(torch.full, (10, 10), 3.0, dtype=torch.float64) == 800


def test_reading_an_open_tracker_raises():
    with memory.track() as used, pytest.raises(RuntimeError, match="still open"):
        used.peak  # noqa: B018


def test_an_exception_inside_closes_the_tracker():
    with pytest.raises(ValueError), memory.track() as used:
        kept = block_of(MEGABYTE)
        raise ValueError
    assert used.peak == MEGABYTE == len(kept)
    assert memory.peak_bytes(block_of, 100) == 100


def test_trackers_may_leave_in_another_order_than_they_came():
    outer, inner = contextlib.ExitStack(), contextlib.ExitStack()
    first = outer.enter_context(memory.track())
    a = block_of(100)
    second = inner.enter_context(memory.track())
    b = block_of(200)
    outer.close()
    c = block_of(400)
    inner.close()
    assert (first.peak, second.peak) == (300, 600)
    assert len(a) + len(b) + len(c) == 700


def in_thread(work):
    found = []

    def run():
        try:
            found.append(work())
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def test_another_thread_can_measure():
    assert in_thread(lambda: memory.peak_bytes(block_of, 3000)) == 3000
    assert memory.peak_bytes(block_of, 1000) == 1000


def test_a_second_thread_is_refused_while_a_tracker_is_open():
    with memory.track() as used:
        error = in_thread(lambda: memory.peak_bytes(block_of, 3000))
    assert isinstance(error, RuntimeError) and "another thread" in str(error)
    assert used.peak == 0


def test_memory_of_threads_that_user_code_starts_is_not_seen():
    with memory.track() as used:
        in_thread(lambda: block_of(3000).sum())
    assert used.peak == 0


def test_a_running_profiler_is_refused_clearly():
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    refused = pytest.raises(RuntimeError, match="while a torch profiler is running")
    with profiler, refused, memory.track():
        pass


def test_other_devices_are_refused_clearly():
    with pytest.raises(ValueError, match="'cpu' and 'cuda' devices, not 'meta'"), memory.track("meta"):
        pass


@pytest.mark.slow
def test_nothing_is_printed():
    code = "import torch\nfrom abyssal import memory\nprint(memory.peak_bytes(torch.empty, 10))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("40\n", "")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="VmHWM is Linux's")
def test_resident_set_peak_sees_a_large_tensor():
    before = memory.rss_peak()
    kept = torch.ones(64 * MEGABYTE // FLOAT)
    after = memory.rss_peak()
    assert before is not None and after is not None
    assert after >= kept.nbytes
    assert after >= before


@pytest.mark.cuda
def test_cuda_counts_releases_of_older_memory():
    old = block_of(MEGABYTE, "cuda")
    with memory.track("cuda") as used:
        new = block_of(4 * MEGABYTE, "cuda")
        del old
    assert (used.peak, used.end) == (4 * MEGABYTE, 3 * MEGABYTE)
    assert new.is_cuda


@pytest.mark.cuda
def test_cuda_trackers_nest():
    with memory.track("cuda") as whole:
        first = block_of(4 * MEGABYTE, "cuda")
        del first
        with memory.track("cuda") as phase:
            second = block_of(MEGABYTE, "cuda")
    assert (whole.peak, phase.peak) == (4 * MEGABYTE, MEGABYTE)
    assert second.is_cuda
