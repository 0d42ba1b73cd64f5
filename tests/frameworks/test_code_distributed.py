"""The default policy and coded streams over two gloo processes: gradients of the certificate's accuracy.

Nothing of a code goes between processes, and restoring a coded state evaluates no block, so that ranks may choose
their bits each for itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

import abyssal
from toys import distributed_scenarios as scenarios
from toys.distributed import Gang

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"),
]

DEFAULT, CODE, REFINED = abyssal.Code("auto"), abyssal.Code(8), abyssal.Code(8, refine=1)
POLICIES = pytest.mark.parametrize("policy", [DEFAULT, CODE, REFINED], ids=str)
# The state's error as `Code("auto")` allows it, and 2^-8 of increments that are smaller than the state; two steps.
ALLOWED = {DEFAULT: 2e-2, CODE: 2.0**-7, REFINED: 2.0**-7}


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    gang = Gang()
    yield gang
    gang.stop()


def check(results: list[scenarios.Result], policy: abyssal.Policy) -> None:
    for result in results:
        assert 0 < max(result.errors) <= ALLOWED[policy]
        assert result.certificate["drifted"] == []
        assert result.certificate["chains"] == 1


@POLICIES
@pytest.mark.parametrize("order", ["end", "sum"])
def test_ddp_gradients_are_close_to_those_without_us(gang: Gang, policy: abyssal.Policy, order: str) -> None:
    check(gang.run(scenarios.ddp, policy=policy, order=order), policy)


@POLICIES
def test_ddp_accumulates_with_two_graphs_alive(gang: Gang, policy: abyssal.Policy) -> None:
    check(gang.run(scenarios.ddp_accumulates, policy=policy, in_flight=True), policy)


@POLICIES
@pytest.mark.parametrize("order", ["end", "middle, then end"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_fsdp_gradients_are_close_to_those_without_us(
    gang: Gang, policy: abyssal.Policy, order: str, when: str
) -> None:
    check(gang.run(scenarios.fsdp, policy=policy, order=order, when=when), policy)


@POLICIES
def test_fsdp_leaves_every_parameter_sharded_after_an_out_of_order_restoration(
    gang: Gang, policy: abyssal.Policy
) -> None:
    assert gang.run(scenarios.fsdp_sharded_after, policy=policy) == [[], []]


def test_fsdp_in_bfloat16_is_nearer_to_bfloat16_than_that_is_to_float32(gang: Gang) -> None:
    for result, of_bfloat16 in gang.run(scenarios.fsdp_mixed, policy=CODE, output_dtype=None):
        assert result.certificate["chains"] == 1
        assert result.errors[0] < of_bfloat16


def test_codes_on_the_host_change_nothing(gang: Gang) -> None:
    near, far = (
        gang.run(scenarios.fsdp, policy=abyssal.Code(8, device=device), order="sum") for device in (None, "cpu")
    )
    assert [r.errors for r in near] == [r.errors for r in far]
    assert torch.tensor([b["host_bytes"] for b in far[0].certificate["blocks"]]).sum() > 0
