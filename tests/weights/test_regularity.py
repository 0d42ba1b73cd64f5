"""Regularity of a network's weights in depth: verdicts on networks whose law is known, and on real architectures."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from abyssal import NoBlocksError
from abyssal.models.torchvision import import_torchvision
from abyssal.nn import ResidualStack, residual_mlp
from abyssal.weights.families import Family, FractionalMotion, FractionalNoise, GaussianProcess, Iid
from abyssal.weights.init import fill_
from abyssal.weights.regularity import regularity


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stack_of(law: Family, depth: int = 64, width: int = 20) -> ResidualStack:
    stack = residual_mlp(depth, width)
    fill_(stack.blocks, law, seeded())
    return stack


@pytest.mark.parametrize(
    ("law", "verdict", "words"),
    [
        (Iid("normal"), "SDE-like", "independent"),
        (Iid("uniform"), "SDE-like", "independent"),
        (GaussianProcess(), "ODE-like", "differentiable"),
        (GaussianProcess(increments=False), "ODE-like", "differentiable"),
        (FractionalMotion(0.5), "ODE-like", "rough"),
        (FractionalNoise(0.75), "neither", "noise with memory"),
        (FractionalNoise(0.2), "neither", "alternates"),
    ],
    ids=str,
)
def test_the_verdict_on_weights_of_a_known_law(law, verdict, words):
    found = regularity(stack_of(law))
    assert found.verdict == verdict
    assert {role.verdict for role in found.roles if len(role.shape) == 2} == {verdict}
    assert words in found.summary
    assert [role.name for role in found.roles] == ["inner.weight", "inner.bias", "outer.weight", "outer.bias"]
    assert all(role.verdict == "constant" for role in found.roles if role.name.endswith("bias"))


@pytest.mark.parametrize("depth", [100, 300])
def test_smooth_training_on_top_of_independent_weights_is_neither(depth):
    noise = Iid("normal").sample(depth, 400, seeded(), dtype=torch.float64)
    smooth = GaussianProcess(increments=False).sample(depth, 400, seeded(1), dtype=torch.float64)
    found = regularity((noise + smooth).view(depth, 20, 20))
    assert found.verdict == "neither"
    assert "noise from block to block" in found.summary or "mixture" in found.summary


@pytest.mark.slow
def test_a_trained_networks_regularity_is_that_of_its_initialisation():
    """The paper's last figures in little: smooth weights stay smooth, independent ones stay rough."""
    depth, width = 48, 10
    verdicts = {}
    for law, power in ((GaussianProcess(increments=False), 1.0), (Iid("normal"), 0.5)):
        stack = residual_mlp(depth, width, scale=depth**-power)
        fill_(stack.blocks, law, seeded())
        before = [p.detach().clone() for p in stack.parameters()]
        x = torch.randn(64, width, generator=seeded(2))
        target = torch.tanh(x @ torch.randn(width, width, generator=seeded(3)))
        optimiser = torch.optim.SGD(
            stack.parameters(), lr=0.5 * depth ** (2 * power - 1)
        )  # so that steps are as large at either scale
        losses = []
        for _ in range(60):
            loss = (stack(x) - target).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.9 * losses[0], losses  # it did train
        assert any(not torch.equal(p, q) for p, q in zip(stack.parameters(), before, strict=True))
        verdicts[power] = regularity(stack).verdict
    assert verdicts == {1.0: "ODE-like", 0.5: "SDE-like"}


def test_twelve_blocks_have_figures_and_no_verdict():
    found = regularity(stack_of(Iid("normal"), depth=12))
    assert found.verdict == "undecided"
    assert "12 blocks are too few" in found.summary
    weight = found.roles[0]
    assert weight.hurst is not None
    assert weight.hurst.low < 0.5 < weight.hurst.high + 0.02
    assert "12 blocks are too few" in weight.reason


def test_few_entries_have_wide_intervals_and_no_verdict():
    found = regularity(FractionalNoise(0.6).sample(16, 2, seeded()))
    assert found.verdict == "undecided"
    assert "too wide" in found.roles[0].reason


def test_weights_that_blocks_share_are_constant():
    block = residual_mlp(1, 6).blocks[0]
    found = regularity(ResidualStack([block] * 20))
    assert found.verdict == "constant"
    assert {role.verdict for role in found.roles} == {"constant"}
    assert "do not change with depth" in found.summary


def test_a_shared_profile_over_depth_is_told_from_the_entries_own_paths():
    gains = torch.linspace(0.5, 2, 40)[:, None].expand(40, 64)
    noise = 0.1 * Iid("normal").sample(40, 64, seeded())
    role = regularity({"norm.weight": gains + noise}).roles[0]
    assert role.verdict == "SDE-like"
    assert role.smoothness.profile > 0.9
    only_profile = regularity({"norm.weight": gains}).roles[0]
    assert only_profile.verdict == "constant"
    assert "profile that all share" in only_profile.reason


def test_hugging_face_models_are_read_by_role():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=20, n_embd=32, n_head=4, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    found = regularity(model)
    matrices = {role.name: role.verdict for role in found.roles if len(role.shape) == 2}
    names = {"attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    assert matrices == dict.fromkeys(names, "SDE-like")  # freshly initialised: independent
    assert {role.chain for role in found.roles} == {"transformer.h"}
    text = str(found)
    assert "transformer.h.*.attn.c_attn.weight" in text
    assert found.summary.split(".")[0] in text


def test_vision_transformers_are_read_by_role():
    import_torchvision()
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=2, depth=18)
    found = regularity(model)
    assert {role.depth for role in found.roles} == {18}
    assert found.verdict == "SDE-like"


def test_every_chain_is_read_and_what_cannot_be_is_named():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = residual_mlp(20, 6)
            self.second = residual_mlp(20, 8)
            self.third = residual_mlp(3, 10)

    found = regularity(Two())
    assert {role.chain for role in found.roles} == {"first.steps", "second.steps"}
    assert any("third.steps: 3 blocks" in line for line in found.skipped)


def test_large_matrices_are_read_by_evenly_spaced_rows(monkeypatch):
    weights = FractionalNoise(0.75).sample(32, 1600, seeded()).view(32, 40, 40)
    monkeypatch.setattr("abyssal.weights.regularity._MOST_COLUMNS", 500)
    role = regularity(weights).roles[0]
    assert role.hurst is not None
    assert role.hurst.columns == 400  # every fourth row
    assert role.shape == (40, 40)
    assert abs(role.hurst.value - 0.75) < 4 * role.hurst.error


def test_it_changes_nothing_and_becomes_json():
    stack = stack_of(FractionalNoise(0.75), depth=20)
    before = {name: p.clone() for name, p in stack.state_dict().items()}
    state = torch.get_rng_state()
    found = regularity(stack)
    assert all(torch.equal(p, before[name]) for name, p in stack.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    again = json.loads(json.dumps(found.to_dict()))
    assert again["verdict"] == found.verdict
    assert again["roles"][0]["hurst"]["value"] == pytest.approx(found.roles[0].hurst.value)


def test_bad_input_is_refused_with_what_was_expected():
    with pytest.raises(ValueError, match=r"no parameter of at least 4 equal blocks.*3 blocks"):
        regularity(residual_mlp(3, 4))
    with pytest.raises(NoBlocksError):
        regularity(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="got a int"):
        regularity(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="has to hold modules"):
        regularity(["a", "b"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="not finite"):
        regularity(torch.full((20, 3, 3), math.nan))
