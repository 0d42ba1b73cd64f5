"""The layout of a chain: what it says is kept is what the engine keeps, to the byte, and where its inputs come from."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import abyssal
from abyssal import Code, Keep, PaperAdjoint, Policy, Reverse, Store
from abyssal.engine.block import Block
from abyssal.engine.rules import Layout
from abyssal.models.patch import patches

WIDTH, BATCH = 24, 6
POLICIES = [
    Store(),
    Keep(),
    Keep(device="cpu"),
    Reverse(0),
    Reverse(2),
    PaperAdjoint(),
    Code(1),
    Code(4),
    Code(8, group=16),
    Code(6, refine=1),
    Code(2, device="cpu"),
]


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.05 * torch.tanh(self.inner(x))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(POLICIES), min_size=1, max_size=8), st.sampled_from([torch.float32, torch.float64]))
def test_a_layout_says_what_the_engine_keeps_to_the_byte(policies: list[Policy], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[Branch() for _ in policies]).to(dtype)
    named = {str(i): policy for i, policy in enumerate(policies)}
    abyssal.reconstruct(model, named, blocks=list(model), tolerance=1e3)
    x = torch.randn(BATCH, WIDTH, dtype=dtype, requires_grad=True)
    for _ in range(2):  # from the second pass on it is known which blocks end their chains
        model(x).sum().backward()
    model(x).sum().backward()
    (session,) = {patch.session for patch in patches(model) if isinstance(patch, Block)}
    layout = Layout(policies)
    for place, record in zip(layout, session.records, strict=True):
        expected = place.nbytes(x.numel(), x.nbytes) if place.policy.recomputes else 0
        assert record.held_bytes + record.code_bytes + record.runner_bytes == expected, (place, policies)
        if place.policy.recomputes:
            assert record.is_exact == place.is_exact


def test_where_inputs_come_from() -> None:
    first, second, passed, kept, alone = Layout([Code(4), Code(4), Reverse(1), Keep(), Reverse(0)])
    assert first.is_first and first.entry.codec is None  # the decoder ends there exactly
    assert second.entry.codec == Code(4).codec and second.entry.lag == 1
    assert passed.entry.carries and passed.entry.codec is None and passed.entry.lag == 2
    assert kept.is_exact and kept.entry.stages == 2 and not kept.entry.carries  # ends the segment, finely
    assert alone.is_end and alone.is_exact and not alone.entry.carries


def test_nothing_is_restored_through_a_stored_block() -> None:
    below, stored, above = Layout([Code(4), Store(), Code(4)])
    assert below.is_exact
    assert not stored.policy.recomputes
    assert above.is_first
