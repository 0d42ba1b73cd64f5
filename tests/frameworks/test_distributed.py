"""DistributedDataParallel and FSDP2 over two gloo processes: the same gradients as without us.

The reference is always the same wrapper around the same network without us, so that what is compared is ours
alone. `Keep` has to agree to the last bit; `Reverse` to `distributed_toys.tolerance`.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

import abyssal
from toys import distributed_scenarios as scenarios
from toys.distributed import DEPTH, REFINE, Gang, tolerance

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"),
]

KEEP, REVERSE = abyssal.Keep(), abyssal.Reverse(refine=REFINE)
POLICIES = pytest.mark.parametrize("policy", [KEEP, REVERSE], ids=str)
ORDERS = pytest.mark.parametrize("order", ["end", "sum", "end, then middle", "middle, then end"])
WHEN = pytest.mark.parametrize("when", ["before", "after"])


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    gang = Gang()
    yield gang
    gang.stop()


def check(results: list[scenarios.Result], policy: abyssal.Policy, chains: int | None = None) -> None:
    allowed = 0.0 if policy == KEEP else tolerance(REFINE)
    for result in results:
        assert max(result.errors) <= allowed
        assert result.certificate["drifted"] == []
        assert result.certificate["chains"] == ((policy != KEEP) if chains is None else chains)


# ---------------------------------------------------------------------- DistributedDataParallel


@POLICIES
@WHEN
@pytest.mark.parametrize("order", ["end", "sum"])
def test_ddp_gradients_equal_those_without_us(gang: Gang, policy: abyssal.Policy, when: str, order: str) -> None:
    check(gang.run(scenarios.ddp, policy=policy, when=when, order=order), policy)


@POLICIES
@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph", "gradient_as_bucket_view"])
def test_ddp_options_change_nothing(gang: Gang, policy: abyssal.Policy, option: str) -> None:
    check(gang.run(scenarios.ddp, policy=policy, order="sum", **{option: True}), policy)


@POLICIES
def test_ddp_finds_blocks_that_take_no_part_on_one_rank_only(gang: Gang, policy: abyssal.Policy) -> None:
    check(gang.run(scenarios.ddp_skips_a_block, policy=policy), policy)


@POLICIES
@pytest.mark.parametrize("in_flight", [False, True], ids=["one graph at a time", "two graphs alive"])
def test_ddp_accumulates_under_no_sync(gang: Gang, policy: abyssal.Policy, in_flight: bool) -> None:
    check(gang.run(scenarios.ddp_accumulates, policy=policy, in_flight=in_flight), policy)


@POLICIES
@pytest.mark.parametrize("order", ["end, then middle", "middle, then end"])
def test_ddp_two_backwards_in_either_order(gang: Gang, policy: abyssal.Policy, order: str) -> None:
    check(gang.run(scenarios.ddp_two_backwards, policy=policy, order=order), policy)


@POLICIES
def test_ddp_after_a_gradient_of_the_middle_alone(gang: Gang, policy: abyssal.Policy) -> None:
    check(gang.run(scenarios.ddp_middle_by_grad, policy=policy), policy)


# ---------------------------------------------------------------------- FSDP2


@pytest.mark.slow
@POLICIES
@ORDERS
@pytest.mark.parametrize("reshard", [True, False], ids=["resharded after forward", "gathered until backward"])
def test_fsdp_gradients_equal_those_without_us(gang: Gang, policy: abyssal.Policy, order: str, reshard: bool) -> None:
    check(gang.run(scenarios.fsdp, policy=policy, order=order, reshard_after_forward=reshard), policy)


@pytest.mark.slow
@POLICIES
@pytest.mark.parametrize("order", ["sum", "middle, then end"])
def test_reconstruct_after_fully_shard(gang: Gang, policy: abyssal.Policy, order: str) -> None:
    check(gang.run(scenarios.fsdp, policy=policy, when="after", order=order), policy)


@pytest.mark.slow
@POLICIES
@pytest.mark.parametrize("grain", ["root", "pairs", "inside", "all"])
def test_fsdp_shards_in_groups_of_any_grain(gang: Gang, policy: abyssal.Policy, grain: str) -> None:
    """Only the root; two blocks in one group; a block and a layer inside it; each head, too.

    The middle's loss goes first, so that restoring it has to gather blocks out of FSDP2's order.
    """
    check(gang.run(scenarios.fsdp, policy=policy, order="middle, then end", grain=grain), policy)


@pytest.mark.slow
def test_fsdp_in_bfloat16_is_nearer_to_bfloat16_than_that_is_to_float32(gang: Gang) -> None:
    for result, of_bfloat16 in gang.run(scenarios.fsdp_mixed, policy=REVERSE, output_dtype=None):
        assert result.certificate["chains"] == 1
        # The second step starts from weights that differ by the first one's rounding.
        assert 0 < result.errors[0] < of_bfloat16


@pytest.mark.parametrize("output_dtype", [None, torch.float32], ids=str)
def test_fsdp_in_bfloat16_keeps_exactly(gang: Gang, output_dtype: torch.dtype | None) -> None:
    check([r for r, _ in gang.run(scenarios.fsdp_mixed, policy=KEEP, output_dtype=output_dtype)], KEEP)


@pytest.mark.slow
def test_fsdp_casts_between_blocks_break_every_link_and_the_certificate_says_so(gang: Gang) -> None:
    for result, _ in gang.run(scenarios.fsdp_mixed, policy=REVERSE, output_dtype=torch.float32):
        assert max(result.errors) == 0.0  # every input is kept
        assert result.certificate["chains"] == DEPTH
        assert "a cast" in result.certificate["note"]


def test_fsdp_leaves_every_parameter_sharded_after_an_out_of_order_restoration(gang: Gang) -> None:
    for still_whole in gang.run(scenarios.fsdp_sharded_after, policy=REVERSE):
        assert still_whole == []


@pytest.mark.slow
@POLICIES
@WHEN
def test_fsdp_of_blocks_compiled_in_place(gang: Gang, policy: abyssal.Policy, when: str) -> None:
    check(gang.run(scenarios.fsdp_compiled, policy=policy, when=when), policy)


@pytest.mark.slow
def test_fsdp_goes_on_after_a_drift_that_raised(gang: Gang) -> None:
    for raised, error in gang.run(scenarios.fsdp_raises):
        assert raised
        assert error == 0.0


@pytest.mark.slow
def test_fsdp_ranks_agree_on_what_drifted(gang: Gang) -> None:
    """Else one would gather a block that the other does not, and both would wait for ever."""
    first, second = gang.run(scenarios.fsdp_drifts_on_one_rank)
    assert first == second
    assert first.count("Keep()") == DEPTH - 1
