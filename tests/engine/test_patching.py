"""In place means in place: classes, names, hooks, state_dict, copies, pickles; release undoes it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import abyssal
from toys.blocks import TO_ROUNDING, Branch, Net, build, data, flat_gradients, one_step, relative, twins


def reconstructed(policy: abyssal.Policy = TO_ROUNDING, **options: object) -> Net:
    model = build(**options)
    abyssal.reconstruct(model, policy, blocks=list(model.blocks))
    return model


def test_classes_names_and_state_dict_are_untouched() -> None:
    plain, ours = twins(build(), TO_ROUNDING)
    assert [(n, type(m)) for n, m in plain.named_modules()] == [(n, type(m)) for n, m in ours.named_modules()]
    assert list(plain.state_dict()) == list(ours.state_dict())
    assert all(isinstance(block, Branch) for block in ours.blocks)
    assert inspect.signature(ours.blocks[0].forward) == inspect.signature(plain.blocks[0].forward)


def test_release_gives_the_model_back() -> None:
    plain, ours = twins(build(), TO_ROUNDING)
    abyssal.release(ours)
    assert all("forward" not in module.__dict__ for module in ours.modules())
    assert torch.equal(one_step(ours, data()), one_step(plain, data()))
    assert abyssal.release(ours) is ours  # again: nothing to do
    with pytest.raises(ValueError, match="not reconstructed"):
        abyssal.certificate(ours)


def test_release_between_forward_and_backward_leaves_the_graph_valid() -> None:
    plain, ours = twins(build(), TO_ROUNDING)
    true = one_step(plain, data())
    loss = ours(data()).square().mean()
    abyssal.release(ours)
    loss.backward()
    assert relative(flat_gradients(ours), true) < 1e-11


def test_an_instance_forward_that_was_there_before_is_used_and_put_back() -> None:
    model = build()
    calls: list[int] = []
    own = model.blocks[2].forward

    def accelerated(x: Tensor) -> Tensor:
        calls.append(1)
        return own(x)

    model.blocks[2].forward = accelerated
    abyssal.reconstruct(model, abyssal.Keep(), blocks=list(model.blocks))
    one_step(model, data())
    assert len(calls) == 2  # forward and recomputation
    abyssal.release(model)
    assert model.blocks[2].forward is accelerated


def test_reconstructing_again_replaces_the_policies() -> None:
    model = reconstructed(abyssal.Keep())
    abyssal.reconstruct(model, {"blocks.[0-2]": abyssal.Reverse(3)}, blocks=list(model.blocks))
    one_step(model, data())
    policies = [block.policy for block in abyssal.certificate(model).blocks]
    assert policies == ["Reverse(3)"] * 3 + ["Keep()"] * 3
    abyssal.release(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_the_first_matching_entry_decides_and_full_names_before_globs() -> None:
    def policies(mapping: dict[str, abyssal.Policy]) -> list[str]:
        model = build(depth=4)
        abyssal.reconstruct(model, mapping, blocks=list(model.blocks))
        return [block.policy for block in abyssal.certificate(model).blocks]

    keep, reverse, store = abyssal.Keep(), abyssal.Reverse(2), abyssal.Store()
    assert policies({"blocks.[01]": keep, "blocks.*": reverse}) == ["Keep()"] * 2 + ["Reverse(2)"] * 2
    assert policies({"blocks.*": reverse, "blocks.3": store}) == ["Reverse(2)"] * 3 + ["Store()"]
    assert policies({"blocks.*": reverse, **{f"blocks.{i}": keep for i in range(4)}}) == ["Keep()"] * 4
    with pytest.raises(ValueError, match=r"blocks\.\[01\].*earlier glob"):
        policies({"blocks.*": reverse, "blocks.[01]": keep})


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_gradients_of_a_copy_land_on_the_copy(make) -> None:
    model = reconstructed()
    true = one_step(model, data())
    twin = make(model)
    model.zero_grad()
    assert torch.equal(one_step(twin, data()), true)
    assert all(p.grad is None for p in model.parameters())
    assert abyssal.certificate(twin).blocks[0].policy == str(TO_ROUNDING)
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert torch.equal(one_step(model, data()), true)  # and the original does not see the copy's weights


def test_copying_while_a_graph_is_alive_copies_no_tape() -> None:
    model = reconstructed()
    loss = model(data()).square().mean()
    twin = copy.deepcopy(model)
    true = one_step(twin, data())
    model.zero_grad()
    loss.backward()
    assert torch.equal(flat_gradients(model), true)


def test_torch_save_of_the_whole_model_and_state_dict_round_trip() -> None:
    model = reconstructed()
    true = one_step(model, data())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(one_step(torch.load(file, weights_only=False), data()), true)
    fresh = reconstructed(seed=5)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(one_step(fresh, data()), true)


def test_hooks_run_as_often_as_without_us() -> None:
    def counts(model: Net) -> dict[str, int]:
        seen = {"pre": 0, "post": 0, "backward": 0, "pre-backward": 0}

        def bump(which: str):
            def hook(*_: object) -> None:
                seen[which] += 1

            return hook

        for block in model.blocks:
            block.register_forward_pre_hook(bump("pre"))
            block.register_forward_hook(bump("post"))
            block.register_full_backward_hook(bump("backward"))
            block.register_full_backward_pre_hook(bump("pre-backward"))
        one_step(model, data())
        return seen

    for policy in (abyssal.Keep(), TO_ROUNDING):
        plain, ours = twins(build(), policy)
        assert counts(plain) == counts(ours) == dict.fromkeys(("pre", "post", "backward", "pre-backward"), 6)


def test_forward_hooks_that_change_the_output_break_the_link_and_stay_exact() -> None:
    plain, ours = twins(build(), TO_ROUNDING)
    for model in (plain, ours):
        model.blocks[2].register_forward_hook(lambda module, args, out: out * 3)
    assert relative(one_step(ours, data()), one_step(plain, data())) < 1e-11
    assert abyssal.certificate(ours).chains == 2


def test_paused_runs_plainly() -> None:
    model = reconstructed(abyssal.Keep())
    with abyssal.paused(model):
        before = sum(block.evaluations for block in model.blocks)
        one_step(model, data())
        assert sum(block.evaluations for block in model.blocks) - before == 6
        with abyssal.paused(model):
            pass
        traced = torch.jit.trace(model, (data(),))
        assert torch.allclose(traced(data()), model(data()))
    before = sum(block.evaluations for block in model.blocks)
    one_step(model, data())
    assert sum(block.evaluations for block in model.blocks) - before == 12


@pytest.mark.parametrize("policy", [abyssal.Keep(), TO_ROUNDING], ids=str)
def test_functional_transforms(policy: abyssal.Policy) -> None:
    from torch.func import functional_call, grad, hessian, jvp, vmap

    plain, ours = twins(build(), policy)

    def loss(model: Net):
        return lambda parameters, x: functional_call(model, parameters, (x,)).square().mean()

    results = []
    for model in (plain, ours):
        parameters = dict(model.named_parameters())
        one = grad(loss(model))(parameters, data())
        per_sample = vmap(grad(loss(model)), in_dims=(None, 0))(parameters, data().unsqueeze(1))
        curvature = hessian(lambda x, model=model: model(x).square().sum())(data()[0])
        pushed = jvp(model, (data(),), (torch.ones_like(data()),))[1]
        results.append([*one.values(), *per_sample.values(), curvature, pushed])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_forward_mode_derivatives_outside_of_torch_func() -> None:
    from torch.autograd import forward_ad

    plain, ours = twins(build(), TO_ROUNDING)
    tangents = []
    for model in (plain, ours):
        with forward_ad.dual_level():
            out = model(forward_ad.make_dual(data(), torch.ones_like(data())))
            tangents.append(forward_ad.unpack_dual(out).tangent)
    assert torch.allclose(*tangents)


def test_evaluation_and_inference_mode_run_plainly() -> None:
    model = reconstructed()
    plain = build()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert torch.equal(model(data()), plain(data()))
    assert sum(block.evaluations for block in model.blocks) == 12


def test_saved_tensor_hooks_of_the_user() -> None:
    plain, ours = twins(build(), TO_ROUNDING)
    for model in (plain, ours):
        model.zero_grad()
        with torch.autograd.graph.save_on_cpu():
            model(data()).square().mean().backward()
    assert relative(flat_gradients(ours), flat_gradients(plain)) < 1e-11
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        assert relative(one_step(ours, data()), one_step(plain, data())) < 1e-11


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"policy": "reverse"}, TypeError, "abyssal.Reverse"),
        ({"policy": {"blocks.9": abyssal.Keep()}}, ValueError, r"blocks\.9.*blocks\.0"),
        ({"policy": {"blocks.0": 3}}, TypeError, "abyssal.Reverse"),
        ({"on_drift": "panic"}, ValueError, "'warn', 'raise', 'keep'"),
        ({"tolerance": 0}, ValueError, "positive"),
        ({"tolerance": float("nan")}, ValueError, "positive"),
        ({"blocks": "blokcs.*"}, ValueError, "blokcs"),
    ],
)
def test_bad_arguments_are_refused_and_change_nothing(arguments, error, words: str) -> None:
    model = build()
    with pytest.raises(error, match=words):
        abyssal.reconstruct(model, **{"policy": abyssal.Keep(), **arguments})
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("refine", [-1, 1.5, True, "2"])
def test_refine_has_to_be_a_count(refine: object) -> None:
    with pytest.raises(ValueError, match="whole number"):
        abyssal.Reverse(refine=refine)  # type: ignore[arg-type]


def test_a_model_without_blocks_is_refused_with_what_was_looked_for() -> None:
    with pytest.raises(abyssal.NoBlocksError, match="blocks="):
        abyssal.reconstruct(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="Module"):
        abyssal.reconstruct(lambda x: x)  # type: ignore[arg-type]
