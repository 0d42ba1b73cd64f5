"""deepen: more blocks where there are some, and a function that changes little."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import abyssal
from abyssal.nn import (
    Deepened,
    DigitsResNet,
    Euler,
    Heun,
    MLPBranch,
    RefineError,
    ResidualStack,
    deepen,
    depth_smooth_,
    refinement,
    residual_mlp,
)
from abyssal.nn.refine.graft import fold_, foldable, offsets_of
from toys.huggingface import calm, import_transformers, llama, make, t5, timm_convnext, timm_resnetv2, timm_vit

DOUBLE = torch.float64


class Linear(nn.Module):
    """`x + W x + b`."""

    def __init__(self, width: int = 3):
        super().__init__()
        self.map = nn.Linear(width, width)

    def forward(self, x):
        return x + self.map(x)


class TwoBranches(nn.Module):
    """`x + gain * outer(tanh(inner(norm(x))))`, then `x + last(x)`."""

    def __init__(self, width: int = 4, size: float = 0.1):
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.gain, self.last = nn.Parameter(torch.full((width,), size)), nn.Linear(width, width)
        with torch.no_grad():
            self.last.weight.mul_(size)

    def forward(self, x):
        x = x + self.gain * self.outer(torch.tanh(self.inner(self.norm(x))))
        return x + self.last(x)


class InPlace(nn.Module):
    """`x += last(tanh(inner(x)))`, into its own input."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.inner, self.last = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        f = self.last(torch.tanh(self.inner(x.clone())))
        return x.add_(f)


class Chain(nn.Module):
    """A stem, blocks, a head."""

    def __init__(self, blocks: list[nn.Module], width: int = 4):
        super().__init__()
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def chain(depth: int = 3, size: float = 0.1) -> Chain:
    torch.manual_seed(0)
    return Chain([TwoBranches(size=size) for _ in range(depth)]).double()


def inputs(batch: int = 6) -> torch.Tensor:
    return torch.randn(batch, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))


def report_of(model: nn.Module) -> Deepened:
    report = refinement(model)
    assert isinstance(report, Deepened)
    return report


# ---------------------------------------------------------------------- the function


@pytest.mark.parametrize("factor", [2, 3, 5])
def test_copies_of_linear_blocks_multiply_to_the_power_of_their_small_steps(factor):
    torch.manual_seed(0)
    model = nn.Sequential(*[Linear() for _ in range(3)]).double()
    deep = deepen(model, factor, "copy", batch=torch.randn(2, 3, dtype=DOUBLE), tolerance=None)
    x = expected = torch.randn(4, 3, dtype=DOUBLE)
    for block in model:
        for _ in range(factor):
            expected = expected + (expected @ block.map.weight.T + block.map.bias) / factor
    assert len(deep) == 3 * factor
    torch.testing.assert_close(deep(x), expected)


def test_both_branches_are_divided_where_they_end():
    model = chain()
    deep = deepen(model, 2, "copy", batch=inputs(), tolerance=None)
    for n, block in enumerate(model.blocks):
        for twin in deep.blocks[2 * n : 2 * n + 2]:
            for name, p in block.named_parameters():
                share = 0.5 if name.startswith(("outer", "last")) else 1
                assert torch.equal(twin.get_parameter(name), share * p), name
    assert [type(b) for b in deep.blocks] == [TwoBranches] * 6
    assert list(deep.state_dict()) == list(Chain([TwoBranches() for _ in range(6)]).state_dict())


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_interpolated_weights_lie_between_those_of_neighbours_with_the_block_as_their_mean(factor):
    torch.manual_seed(0)
    stack = residual_mlp(5, 3).double()
    deep = deepen(stack, factor, "interpolate")
    old = [f.inner.weight for f in stack.blocks]
    for m, f in enumerate(deep.blocks):
        n, j = divmod(m, factor)
        s = min(max(n + (j + 0.5) / factor - 0.5, 0), 4)
        low = min(math.floor(s), 3)
        torch.testing.assert_close(f.inner.weight, torch.lerp(old[low], old[low + 1], s - low))
    for n in range(1, 4):  # the first and the last have a neighbour on one side only
        mean = sum(f.inner.weight for f in deep.blocks[n * factor : (n + 1) * factor]) / factor
        even = (old[n - 1] + old[n + 1] - 2 * old[n]) / 8  # of second order in depth
        assert (mean - old[n]).norm() <= even.norm() * (1 + 1e-9)
    assert deep.scale == pytest.approx(1 / (5 * factor))


@pytest.mark.slow
@pytest.mark.parametrize(("how", "scheme"), [("interpolate", Euler()), ("copy", Euler()), ("interpolate", Heun())])
def test_the_function_of_a_network_smooth_in_depth_changes_by_one_over_its_depth(how, scheme):
    changes = []
    for depth in (64, 128):
        stack = residual_mlp(depth, 6, scheme=scheme).double()
        depth_smooth_(stack.blocks, generator=torch.Generator().manual_seed(0))
        x = torch.randn(8, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
        changes.append(report_of(deepen(stack, 2, how, batch=x)).change)
    # To leading order halved (Euler) or quartered (Heun); what follows is smaller by (2 pi)^2 / depth at most: three
    # modes, and a second derivative.
    halvings = math.log2(changes[0] / changes[1])
    assert halvings == pytest.approx(1 if scheme == Euler() else 2, abs=math.log2(1 + (2 * math.pi) ** 2 / 128))


def test_auto_interpolates_what_is_smooth_in_depth_and_copies_what_is_not():
    torch.manual_seed(0)
    smooth, rough = residual_mlp(16, 6), residual_mlp(16, 6)
    depth_smooth_(smooth.blocks)
    assert report_of(deepen(smooth)).how == "interpolate"
    report = report_of(deepen(rough))
    assert report.how == "copy"
    assert report.roughness == pytest.approx(math.sqrt(2), abs=0.2)  # independent matrices of 36 entries


def test_a_block_that_cannot_be_halved_gives_its_first_copy_more():
    model = chain(size=0.05)
    with torch.no_grad():
        model.blocks[1].gain.fill_(20.0)
        model.blocks[1].norm.weight.mul_(3)
    even = deepen(model, 2, "copy", batch=inputs(), tolerance=None)
    deep = deepen(model, 2, "copy", batch=inputs(), tolerance=0.1)
    shares = [section.shares for section in report_of(deep).sections]
    assert shares[0] == shares[2] == (0.5, 0.5)
    assert max(shares[1]) > 0.5 and sum(shares[1]) == pytest.approx(1)
    assert report_of(deep).sections[1].change < report_of(even).sections[1].change
    assert report_of(deep).change < report_of(even).change
    share = shares[1][0]
    assert torch.equal(deep.blocks[2].outer.weight, model.blocks[1].outer.weight * share)
    assert "blocks.1: " in str(report_of(deep))


def test_the_reported_changes_are_those_of_the_two_models():
    model = chain().train()
    batch, loss = inputs(), lambda output: output.square().mean()
    deep = deepen(model, 2, "copy", batch=batch, loss=loss)
    report = report_of(deep)
    before, after = model(batch), deep(batch)
    assert report.change == pytest.approx(float((after - before).detach().norm() / before.detach().norm()))
    assert report.loss == pytest.approx((float(loss(before).detach()), float(loss(after).detach())))
    loss(after).backward()
    for norm, block in zip(report.gradients, deep.blocks, strict=True):
        assert norm == pytest.approx(float(torch.cat([p.grad.flatten() for p in block.parameters()]).norm()))
    assert min(report.gradients) > 0 and report.silent == (0, 0)
    x = model.stem(batch)
    for section, block in zip(report.sections, model.blocks, strict=True):
        y = deep.get_submodule(section.copies[1])(deep.get_submodule(section.copies[0])(x))
        assert section.change == pytest.approx(float(((y - block(x)).norm() / (block(x) - x).norm()).detach()))
        x = block(x)


def test_blocks_that_write_into_their_input_are_measured_on_what_it_was():
    torch.manual_seed(0)
    model = Chain([InPlace() for _ in range(3)])
    deep = deepen(model, 2, "copy", batch=inputs().float(), tolerance=None)
    x = model.stem(inputs().float()).detach()
    y = deep.blocks[1](deep.blocks[0](x.clone()))
    z = model.blocks[0](x.clone())
    assert report_of(deep).sections[0].change == pytest.approx(float((y - z).norm() / (z - x).norm()), rel=1e-4)


class Noisy(nn.Module):
    """`x + last(dropout(norm(x)))` with BatchNorm: random, and with a state, in training mode."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.norm, self.dropout, self.last = nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, width)

    def forward(self, x):
        return x + self.last(self.dropout(self.norm(x)))


def test_copies_are_measured_in_eval_mode_and_keep_their_statistics():
    torch.manual_seed(0)
    model = Chain([Noisy() for _ in range(3)]).double().train()
    deep = deepen(model, 2, "copy", batch=inputs(), tolerance=0.0)
    for n, block in enumerate(model.blocks):
        for twin in deep.blocks[2 * n : 2 * n + 2]:
            assert twin.training and twin.dropout.training
            assert torch.equal(twin.norm.running_mean, block.norm.running_mean)
            assert int(twin.norm.num_batches_tracked) == 0
    model.eval()
    deep.eval()
    x = model.stem(inputs())
    y = deep.blocks[1](deep.blocks[0](x))
    change = (y - model.blocks[0](x)).norm() / (model.blocks[0](x) - x).norm()
    assert report_of(deep).sections[0].change == pytest.approx(float(change.detach()))
    # A linear branch: the product of the two steps differs by share * (1 - share), the least at the largest share.
    assert max(report_of(deep).sections[0].shares) == 0.9


# ---------------------------------------------------------------------- what stays as it is


class Caching(nn.Module):
    """`x + last(tanh(weight x))`, whose weight in eval mode is what it was when first asked for, as LeViT's biases."""

    def __init__(self, width: int = 4):
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.randn(width)), nn.Linear(width, width)
        self.cache: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True):
        if mode:
            self.cache = {}
        return super().train(mode)

    def forward(self, x):
        weight = self.weight * 1
        if not self.training:
            weight = self.cache.setdefault("weight", weight)
        return x + self.last(torch.tanh(weight * x))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("filled", [True, False])
@pytest.mark.parametrize("how", ["interpolate", "copy"])
def test_what_blocks_keep_of_their_weights_in_eval_mode_is_neither_taken_along_nor_left(mode, filled, how):
    model = of_blocks(Caching).train(mode)
    x = torch.randn(3, 5)
    if filled and not mode:
        with torch.no_grad():
            model(x)
    before = [dict(block.cache) for block in model.blocks]
    deep = deepen(model, 2, how, batch=x)
    assert all(block.cache == was for block, was in zip(model.blocks, before, strict=True))
    assert all(block.training is mode and not block.cache for block in deep.blocks)
    fresh = Chain([Caching() for _ in range(4)]).eval()
    fresh.load_state_dict(deep.state_dict())
    assert torch.equal(deep.eval()(x), fresh(x))
    assert all(block.weight.grad_fn is None and block.cache["weight"].requires_grad for block in deep.blocks)
    with pytest.raises(RefineError, match=r"tensor in blocks\.0\.cache .* model\.train\(\) drops it"):
        deepen(fresh)


def test_reading_branches_leaves_no_trace_in_what_blocks_keep():
    model = of_blocks(Caching)
    abyssal.scaling.read_model(model, torch.randn(3, 5))
    assert model.training and not any(block.cache for block in model.blocks)


def test_the_model_given_is_left_as_it_is_and_so_is_the_random_state():
    model = chain().train()
    model.blocks[1].eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.random.get_rng_state()
    deep = deepen(model, 2, batch=inputs())
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert [b.training for b in deep.blocks] == [True, True, False, False, True, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*model.modules(), *deep.modules()))
    assert all(p.grad is None for p in (*model.parameters(), *deep.parameters()))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in deep.parameters()}


def test_a_deepened_model_can_be_copied_pickled_reconstructed_and_deepened_again():
    deep = deepen(chain(), 2)
    for twin in (copy.deepcopy(deep), pickle.loads(pickle.dumps(deep))):
        assert torch.equal(twin(inputs()), deep(inputs()))
        assert str(refinement(twin)) == str(refinement(deep))
    deeper = deepen(deep, 3)
    assert len(deeper.blocks) == 18
    exact = torch.autograd.grad(deeper(inputs()).sum(), list(deeper.parameters()))
    abyssal.reconstruct(deeper, abyssal.Keep())
    torch.testing.assert_close(torch.autograd.grad(deeper(inputs()).sum(), list(deeper.parameters())), exact)


def test_shared_blocks_stay_shared():
    block = TwoBranches().double()
    model = Chain([block] * 3).double()
    deep = deepen(model, 2, "copy", batch=inputs())
    assert [id(b) for b in deep.blocks] == [id(deep.blocks[0])] * 6
    assert torch.equal(deep.blocks[0].last.weight, block.last.weight / 2)
    f = MLPBranch(3)
    for scheme, count in ((Euler(), 8), (Heun(), 7)):
        stack = deepen(ResidualStack([f] * 4, scheme), 2)
        assert len({id(g) for g in stack.blocks}) == 1 and len(stack.blocks) == count
        assert float(sum(step.scale for step in stack.steps)) == pytest.approx(1)


def test_heun_steps_share_their_functions_with_their_neighbours():
    deep = deepen(residual_mlp(4, 3, scheme=Heun()).eval(), 3, "copy")
    assert len(deep.blocks) == 10 and len(deep) == 9
    assert deep.steps[3].second is deep.steps[4].first
    assert len({id(f) for f in deep.blocks}) == 10
    assert not any(module.training for module in deep.modules())


def test_what_stands_between_blocks_stays_in_its_place():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), TwoBranches(), TwoBranches(), nn.Tanh(), TwoBranches(), nn.Linear(4, 2))
    deep = deepen(model, 2, "interpolate", batch=torch.randn(2, 5))
    kinds = [type(member).__name__ for member in deep]
    assert kinds == ["Linear", *["TwoBranches"] * 4, "Tanh", *["TwoBranches"] * 2, "Linear"]
    for twin in deep[6:8]:  # no neighbour beyond the Tanh
        assert torch.equal(twin.inner.weight, model[4].inner.weight)
    named = nn.Sequential()
    for name in ("one", "two"):
        named.add_module(name, TwoBranches())
    assert list(deepen(named, 2)._modules) == ["one", "one_1", "two", "two_1"]


# ---------------------------------------------------------------------- other people's models


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    transformers = import_transformers()
    config = transformers.GPT2Config(
        n_layer=3, n_embd=32, n_head=2, vocab_size=61, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    ids = torch.randint(1, 61, (2, 7), generator=torch.Generator().manual_seed(0))
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


@pytest.mark.slow
@pytest.mark.parametrize("maker", [gpt2, llama])
def test_language_models_keep_their_configuration_cache_and_saving_right(maker, tmp_path):
    model, batch = make(maker)
    model.eval()
    deep = deepen(calm(model), 2, "copy", batch=batch)
    assert (model.config.num_hidden_layers, deep.config.num_hidden_layers) == (3, 6)
    layers = list(abyssal.find_blocks(deep).values())
    said = [[m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")] for layer in layers]
    assert said == [[n] * len(said[0]) for n in range(6)] and said[0]
    report = report_of(deep)
    assert report.change < 0.05 and report.loss[1] == pytest.approx(report.loss[0], rel=0.05)
    assert not [note for note in report.notes if "from_pretrained" in note]
    ids = batch["input_ids"][:1]
    whole = deep(input_ids=ids).logits
    kept = deep(input_ids=ids[:, :4], use_cache=True)
    rest = deep(input_ids=ids[:, 4:], past_key_values=kept.past_key_values, use_cache=True)
    torch.testing.assert_close(rest.logits, whole[:, 4:])  # every layer has a cache of its own
    deep.save_pretrained(tmp_path)
    again = type(deep).from_pretrained(tmp_path, dtype=DOUBLE).eval()
    torch.testing.assert_close(
        again(input_ids=ids).logits, whole, rtol=1e-12, atol=1e-14
    )  # other kernels, by alignment
    if maker is gpt2:
        assert deep.lm_head.weight is deep.transformer.wte.weight
    assert all(m.config is deep.config for m in deep.modules() if "config" in vars(m))


def test_lists_with_an_entry_for_each_layer_grow_with_them(tmp_path):
    transformers = import_transformers()
    config = transformers.Qwen2Config(
        num_hidden_layers=2,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=31,
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["full_attention", "sliding_attention"],
    )
    torch.manual_seed(0)
    deep = deepen(transformers.Qwen2ForCausalLM(config), 2, "copy")
    assert deep.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    deep.eval().save_pretrained(tmp_path)
    again = type(deep).from_pretrained(tmp_path).eval()
    ids = torch.arange(1, 9).view(1, 8)
    torch.testing.assert_close(again(ids).logits, deep(ids).logits)


@pytest.mark.parametrize(("maker", "options"), [(timm_vit, {"depth": 6}), (timm_convnext, {"depths": (4, 4, 6, 4)})])
def test_timms_models_load_into_the_deeper_class(maker, options):
    import timm

    model, batch = make(maker)
    deep = deepen(calm(model), 2, "copy", batch=batch)
    name = "vit_tiny_patch16_224" if maker is timm_vit else "convnext_atto"
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2} if maker is timm_vit else {}
    sizes = sizes or {"dims": (8, 16, 24, 32)}
    fresh = timm.create_model(name, num_classes=5, **sizes, **options).to(DOUBLE)
    assert list(fresh.state_dict()) == list(deep.state_dict())
    fresh.load_state_dict(deep.state_dict())
    assert torch.equal(fresh.eval()(**batch), deep.eval()(**batch))
    assert report_of(deep).change < 0.05
    assert report_of(deep).depth == ((3, 6) if maker is timm_vit else (9, 18))


def test_downsampling_blocks_stay_single():
    model, batch = make(timm_resnetv2)
    deep = deepen(calm(model), 2, "copy", batch=batch)
    assert [len(stage.blocks) for stage in deep.stages] == [3, 3, 5, 3]  # of 2, 2, 3, 2 one each changes the shape
    assert report_of(deep).change < 0.2


def test_an_albert_whose_groups_are_untied_is_deepened_with_its_count_of_groups(tmp_path):
    transformers = import_transformers()
    sizes = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    config = transformers.AlbertConfig(num_hidden_layers=3, vocab_size=31, max_position_embeddings=16, **sizes)
    free = abyssal.nn.untie(transformers.AlbertForMaskedLM(config).eval())
    ids = torch.arange(1, 9).view(1, 8)
    deep = deepen(free, batch={"input_ids": ids, "labels": ids})
    assert (deep.config.num_hidden_layers, deep.config.num_hidden_groups) == (6, 6)
    deep(input_ids=ids, labels=ids).loss.backward()
    silent = [name for name, p in deep.named_parameters() if "layer_groups" in name and not p.grad.any()]
    assert all(name.endswith("key.bias") for name in silent)  # the softmax takes no notice of it
    deep.save_pretrained(tmp_path)
    again = transformers.AlbertForMaskedLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, deep(input_ids=ids).logits)


def test_a_configuration_that_cannot_describe_the_model_is_reported():
    model, batch = make(t5)  # its first layers have a table that the others lack
    report = report_of(deepen(model, 2, "copy", batch=batch))
    assert any("from_pretrained cannot load it" in note for note in report.notes)


def test_mixtures_of_experts_are_divided_in_what_the_experts_write():
    transformers = import_transformers()
    config = transformers.MixtralConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    deep = deepen(model, 2, "copy", batch={"input_ids": torch.arange(1, 9).view(1, 8)}, tolerance=None)
    old, new = model.model.layers[1].mlp, deep.model.layers[3].mlp
    assert torch.equal(new.experts.down_proj, old.experts.down_proj / 2)
    assert torch.equal(new.experts.gate_up_proj, old.experts.gate_up_proj)
    assert report_of(deep).change < 0.1


def test_increments_that_are_rounding_are_not_compared():
    torch.manual_seed(0)
    model = Chain([TwoBranches(size=1e-7) for _ in range(2)]).float()
    with torch.no_grad():
        for block in model.blocks:
            block.last.bias.zero_()
    assert [s.shares for s in report_of(deepen(model, 2, "copy", batch=inputs().float())).sections] == [(0.5, 0.5)] * 2


def test_attention_divided_by_a_layers_position_is_refused():
    model, _ = gpt2()
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(RefineError, match="scale_attn_by_inverse_layer_idx"):
        deepen(model)


# ---------------------------------------------------------------------- folding


def _conv1d() -> nn.Module:
    import_transformers()
    from transformers.pytorch_utils import Conv1D

    return Conv1D(4, 4)


def _layer_scale() -> nn.Module:
    pytest.importorskip("timm")
    from abyssal.models.torchvision import import_torchvision

    import_torchvision()
    from timm.layers import LayerScale

    return LayerScale(4)


def _lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    )
    return model.base_model.model[0]


class _Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


ENDS = {
    "linear": lambda: nn.Linear(4, 4),
    "convolution": lambda: nn.Conv1d(4, 4, 1),
    "Conv1D": _conv1d,
    "norm": lambda: nn.BatchNorm1d(4),
    "per-channel scale": _layer_scale,
    "LoRA": _lora,
    "attention": lambda: _Attention(4, 2),
}


@pytest.mark.parametrize("make_end", ENDS.values(), ids=ENDS)
def test_folding_multiplies_the_output_of_the_end(make_end):
    torch.manual_seed(0)
    end = make_end().double().eval()
    with torch.no_grad():
        for p in end.parameters():
            p.normal_()
    twin = copy.deepcopy(end)
    names = foldable(end)
    assert names
    x = torch.randn(4, 4, 4, dtype=DOUBLE)
    offsets = offsets_of(end, names, ((x,), {}))
    assert offsets
    fold_(twin, end, {"": offsets}, 0.25)
    torch.testing.assert_close(twin(x), end(x) / 4, rtol=1e-12, atol=1e-12)


class GainNorm(nn.Module):
    """A norm that multiplies by some function of its weight, by `1 + weight` as Gemma's do."""

    def __init__(self, gain=lambda weight: 1 + weight, width: int = 4):
        super().__init__()
        self.weight, self.gain = nn.Parameter(torch.randn(width)), gain

    def forward(self, x):
        return self.gain(self.weight) * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class NormLast(nn.Module):
    """`x + norm(outer(tanh(inner(x))))`."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.inner, self.outer, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), norm

    def forward(self, x):
        return x + self.norm(self.outer(torch.tanh(self.inner(x))))


def of_blocks(make_block) -> Chain:
    torch.manual_seed(0)
    return Chain([make_block() for _ in range(2)])


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.bfloat16])
@pytest.mark.parametrize("weight", [0.0, 0.5, 10.0, -1.0, None])
def test_a_norm_that_multiplies_by_one_plus_its_weight_is_divided_all_the_same(weight, dtype):
    torch.manual_seed(0)
    model = of_blocks(lambda: NormLast(GainNorm())).to(dtype)
    if weight is not None:
        with torch.no_grad():
            for block in model.blocks:
                block.norm.weight.fill_(weight)
    deep = deepen(model, 2, "copy")
    z = torch.randn(3, 4, dtype=dtype)
    for n, block in enumerate(deep.blocks):
        want = model.blocks[n // 2].norm(z) / 2
        tolerance = 4 * torch.finfo(dtype).eps * max(1, want.abs().max().item())
        torch.testing.assert_close(block.norm(z), want, rtol=0, atol=tolerance)


def test_the_offset_is_seen_where_the_branch_is_silent_at_first():
    model = of_blocks(lambda: NormLast(GainNorm()))
    with torch.no_grad():
        for block in model.blocks:
            block.outer.weight.zero_(), block.outer.bias.zero_()  # the norm's input is 0
    torch.testing.assert_close(deepen(model).blocks[1].norm.weight, (model.blocks[0].norm.weight - 1) / 2)


@pytest.mark.parametrize("gain", [torch.exp, torch.square, torch.nn.functional.normalize, lambda w: 2 + w])
def test_a_norm_whose_weight_multiplies_it_in_no_known_way_is_refused(gain):
    given = of_blocks(lambda: NormLast(GainNorm(lambda weight: gain(weight.unsqueeze(0))[0])))
    before = copy.deepcopy(given.state_dict())
    with pytest.raises(
        RefineError, match=r"'blocks\.0\.norm', a GainNorm, and tried out, its 'weight' do not multiply"
    ):
        deepen(given)
    assert all(torch.equal(before[name], value) for name, value in given.state_dict().items())


@pytest.mark.parametrize("kind", ["Gemma2", "Gemma3Text"])
def test_gemmas_branches_are_halved_where_they_end(kind):
    transformers = import_transformers()
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.normal_()
    deep = deepen(model, 2, "copy", batch={"input_ids": torch.randint(3, 40, (2, 6))}, tolerance=None)
    z = torch.randn(1, 3, 16)
    for end in ("post_attention_layernorm", "post_feedforward_layernorm"):
        want = model.get_submodule(f"model.layers.1.{end}")(z) / 2
        torch.testing.assert_close(deep.get_submodule(f"model.layers.2.{end}")(z), want)


def test_what_has_no_weights_that_multiply_it_is_not_folded():
    assert foldable(nn.Sequential(nn.Linear(2, 2))) is None
    assert foldable(nn.PReLU()) is None
    assert foldable(nn.BatchNorm1d(2, affine=False)) is None
    assert foldable(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) is None


# ---------------------------------------------------------------------- refusals


class Counted(Chain):
    """Counts its blocks by itself."""

    def __init__(self):
        super().__init__([TwoBranches() for _ in range(3)])
        self.depth = 3

    def forward(self, x):
        x = self.stem(x)
        for n in range(self.depth):
            x = self.blocks[n](x)
        return self.head(x)


class Grouped(Counted):
    """Calls each of a fixed number of groups equally often, however many there are."""

    def forward(self, x):
        x = self.stem(x)
        for n in range(len(self.blocks)):
            x = self.blocks[n * self.depth // len(self.blocks)](x)
        return self.head(x)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x):
        return x + torch.tanh(self.map(x))


class Lonely(nn.Module):
    """Holds its block by name."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = nn.Linear(5, 4), TwoBranches()

    def forward(self, x):
        return self.first(self.stem(x))


class Downsampling(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.map, self.shortcut = nn.Linear(before, after), nn.Linear(before, after)

    def forward(self, x):
        return self.shortcut(x) + self.map(x)


def test_wrong_arguments_are_refused_before_any_work():
    for factor in (1, 0, -2):
        with pytest.raises(ValueError, match="at least 2"):
            deepen(chain(), factor)
    for factor in (2.0, True, "2"):
        with pytest.raises(TypeError, match="whole number"):
            deepen(chain(), factor)
    with pytest.raises(ValueError, match="one of auto, interpolate, copy, got 'linear'"):
        deepen(chain(), how="linear")
    with pytest.raises(ValueError, match="tolerance"):
        deepen(chain(), tolerance=-1)
    with pytest.raises(TypeError, match="got a function"):
        deepen(chain)


@pytest.mark.slow
def test_models_that_are_patched_scaled_or_compiled_are_refused():
    patched = chain()
    abyssal.reconstruct(patched)
    with pytest.raises(RefineError, match=r"abyssal\.release\(model\) before"):
        deepen(patched)
    abyssal.release(patched)
    deepen(patched)
    abyssal.scaling.apply(patched, "1/sqrt(L)")
    with pytest.raises(RefineError, match=r"abyssal\.scaling\.remove\(model\) before"):
        deepen(patched)
    compiled = chain()
    compiled.blocks[1] = torch.compile(compiled.blocks[1])
    with pytest.raises(RefineError, match=r"'blocks\.1' is wrapped by torch\.compile"):
        deepen(compiled)


def test_models_that_cannot_be_read_are_refused():
    with pytest.raises(abyssal.NoBlocksError):
        deepen(nn.Sequential(Downsampling(5, 4), Downsampling(4, 3), Downsampling(3, 2)))
    with pytest.raises(ValueError, match="'Tanh'"):
        deepen(Chain([Functional() for _ in range(3)]))
    with pytest.raises(RefineError, match=r"calls 3 of the 6 blocks.*Counted\.depth"):
        deepen(Counted())
    with pytest.raises(RefineError, match=r"calls 3 of the 6 blocks.*Grouped\.depth"):
        deepen(Grouped())  # as many calls as blocks, but each of three blocks twice
    with pytest.raises(RefineError, match=r"'first' is not a member of an nn\.ModuleList"):
        deepen(Lonely(), blocks="first")


def test_a_last_layer_that_another_module_shares_is_refused():
    model = chain()
    model.blocks[2].last.weight = model.blocks[0].last.weight
    with pytest.raises(RefineError, match=r"abyssal\.nn\.untie\(model\)"):
        deepen(model)
    assert report_of(deepen(abyssal.nn.untie(model))).depth == (3, 6)


def test_an_image_classifier_of_ours_is_deepened_in_its_stack():
    torch.manual_seed(0)
    model = DigitsResNet(4, 8)
    deep = deepen(model, 4, batch=torch.randn(3, 1, 8, 8))
    assert deep.stack.scale == 1 / 16 and len(deep.stack) == 16
    assert [step.index for step in deep.stack.steps] == list(range(16))
    assert report_of(deep).change < 0.1
