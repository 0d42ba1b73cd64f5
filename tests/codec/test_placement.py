"""What waits in host memory: the same gradients to the bit, counted; on CUDA, pinned, beside the computation."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import abyssal
from abyssal.codec.placement import Parked
from abyssal.codec.quantiser import Codec
from abyssal.profiling.track import track
from toys.backward_orders import intermediate_losses_bottom_up, retained_twice, second_order
from toys.blocks import build
from toys.streams import Seen, batch, coded, stack, step, true_and_restored

CPU = torch.device("cpu")


# ---------------------------------------------------------------------- on the CPU


@pytest.mark.parametrize(
    ("near", "far"),
    [
        (abyssal.Keep(), abyssal.Keep(device="cpu")),
        (abyssal.Code(4), abyssal.Code(4, device="cpu")),
        (abyssal.Code(2, refine=1), abyssal.Code(2, refine=1, device="cpu")),
        (abyssal.Code("auto"), abyssal.Code("auto", device="cpu")),
    ],
    ids=str,
)
def test_gradients_are_the_same_to_the_bit_on_a_model_in_host_memory(near: abyssal.Policy, far: abyssal.Policy) -> None:
    found = [step(coded(stack([0.3] * 6), policy), batch()) for policy in (near, far)]
    assert torch.equal(*found)


@pytest.mark.parametrize("step_", [retained_twice, second_order, intermediate_losses_bottom_up])
def test_in_any_order_of_backward(step_: Callable[[nn.Module], Tensor]) -> None:
    found = []
    for device in (None, "cpu"):
        model = build()
        policies = {"*[14]": abyssal.Keep(device=device), "*": abyssal.Code(4, device=device)}
        abyssal.reconstruct(model, policies, blocks=list(model.blocks), tolerance=1e9)
        found.append(step_(model))
    assert torch.equal(*found)


def test_host_bytes_are_the_inputs_and_the_codes() -> None:
    policies = {"3": abyssal.Keep(device="cpu"), "4": abyssal.Keep(), "*": abyssal.Code(4, device="cpu")}
    model = coded(stack([0.3] * 8), policies)
    x = batch()
    model(x)
    certificate = abyssal.certificate(model)
    code, closing = Codec(4).nbytes(x.numel()), 2 * Codec(8).nbytes(x.numel())
    expected = [0, code, code, x.nbytes + closing, 0, 0, code, code]  # the end's exact state stays where it is
    assert [b.host_bytes for b in certificate.blocks] == expected
    assert all(b.host_bytes <= b.stored_bytes for b in certificate.blocks)


def test_a_block_that_changes_its_input_does_not_reach_what_is_parked() -> None:
    class InPlace(Seen):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.branch(x.clone()))

    torch.manual_seed(0)
    model = nn.Sequential(*[InPlace() for _ in range(5)])
    plain = copy.deepcopy(model)
    abyssal.reconstruct(model, abyssal.Keep(device="cpu"), blocks=list(model))
    gradients = []
    for each in (plain, model):
        loss = each(batch() * 1).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in each.parameters()]))
    assert torch.equal(*gradients)


def test_dropping_the_graph_drops_what_is_parked() -> None:
    model = coded(stack([0.3] * 6), {"3": abyssal.Keep(device="cpu"), "*": abyssal.Code(4, device="cpu")})
    step(model, batch())
    for block in model:
        block.inputs.clear()
    x = batch()
    gc.collect()
    with track() as memory:
        out = model(x)
        for block in model:
            block.inputs.clear()
        del out
    assert memory.end == 0


def test_parked_gives_the_tensor_back_as_often_as_asked() -> None:
    tensor = torch.randn(7, 5).t()
    parked = Parked(tensor, CPU)
    assert parked.nbytes == tensor.nbytes
    parked.prefetch()
    for _ in range(3):
        found = parked.fetch()
        assert torch.equal(found, tensor)
        assert found.stride() == tensor.stride()
        assert found.device == tensor.device


def test_parked_tensors_do_not_keep_each_other() -> None:
    first = Parked(torch.ones(3), CPU)
    second = Parked(torch.ones(3), CPU)
    gone = weakref.ref(first)
    del first
    assert gone() is None
    assert torch.equal(second.fetch(), torch.ones(3))  # the one before it is gone: nothing to fetch ahead


def test_fetching_one_asks_for_the_one_parked_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Parked] = []
    monkeypatch.setattr(Parked, "prefetch", lambda parked: asked.append(parked))
    parked = [Parked(torch.full((2,), float(i)), CPU) for i in range(4)]
    for i in (3, 2, 1):
        assert parked[i].fetch()[0] == i
        assert asked[-1] is parked[i - 1]


@pytest.mark.parametrize("policy", [abyssal.Keep, abyssal.Code])
@pytest.mark.parametrize("device", ["cuda", "disk", 0])
def test_another_place_is_refused(policy: type, device: object) -> None:
    with pytest.raises(ValueError, match="expected 'cpu'"):
        policy(device=device)


# ---------------------------------------------------------------------- on CUDA


@pytest.mark.cuda
@pytest.mark.parametrize("policy", [abyssal.Keep(device="cpu"), abyssal.Code(4, device="cpu")], ids=str)
def test_cuda_gradients_are_those_without_offload(policy: abyssal.Policy) -> None:
    near = abyssal.Keep() if isinstance(policy, abyssal.Keep) else abyssal.Code(4)
    torch.use_deterministic_algorithms(False)
    for _ in range(5):  # a race would show now and then
        found = [step(coded(stack([0.3] * 24).cuda(), one), batch(4096).cuda()) for one in (near, policy)]
        assert torch.equal(*found)


@pytest.mark.cuda
def test_cuda_what_is_parked_is_pinned_and_leaves_the_device() -> None:
    tensor = torch.randn(1024, 1024, device="cuda")
    expected = tensor.cpu()
    before = torch.cuda.memory_allocated()
    parked = Parked(tensor, CPU)
    assert parked._parked.is_pinned()
    del tensor
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before - expected.nbytes
    for _ in range(2):
        assert torch.equal(parked.fetch().cpu(), expected)


@pytest.mark.cuda
def test_cuda_parking_waits_for_what_computes_the_tensor() -> None:
    for _ in range(10):
        a = torch.randn(2048, 2048, device="cuda")
        expected = (a @ a @ a).cpu()
        tensor = a @ a @ a
        parked = Parked(tensor, CPU)
        tensor = None
        torch.randn(2048, 2048, device="cuda").mul_(0)  # would overwrite memory that was let go too early
        torch.testing.assert_close(parked.fetch().cpu(), expected)


@pytest.mark.cuda
def test_cuda_fetching_starts_the_copy_of_the_one_parked_before_it() -> None:
    parked = [Parked(torch.full((1024,), float(i), device="cuda"), CPU) for i in range(3)]
    parked[2].fetch()
    assert parked[1]._arriving is not None
    assert parked[0]._arriving is None
    assert float(parked[1].fetch()[0]) == 1.0
    assert parked[0]._arriving is not None


@pytest.mark.cuda
def test_cuda_device_memory_holds_no_state_of_a_kept_block() -> None:
    model = stack([0.3] * 16).cuda()
    coded(model, abyssal.Keep(device="cpu"))
    x = batch(65_536).cuda()
    step(model, x)
    for block in model:
        block.inputs.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = model(x)
    for block in model:
        block.inputs.clear()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= out.nbytes + 16 * 128 * 1024
    _, restored = true_and_restored(model, x)
    assert len(restored) == 16
