"""Applied rules against networks written out by hand, and through everything a model goes through."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import abyssal
from abyssal.models.reading import UnreadableModelError, read_model
from abyssal.nn import DigitsResNet, residual_mlp
from abyssal.scaling.rules.application import Scaled, applied, apply, remove
from abyssal.scaling.rules.hooks import GATE
from abyssal.scaling.rules.known import RULES, LayerScale, SkipInit
from toys import huggingface as toys
from toys import scaled_scenarios as scenarios
from toys.distributed import Gang

RULE_NAMES = [name for name in RULES if name != "deepnorm"]  # which is for post-norm blocks, and has its own tests
# float64; a product is taken at another place of the sum than by hand, so each of some 100 operations may round
# differently, on values of up to 100.
ROUNDING = 1e-11


class TwoBranches(nn.Module):
    """A pre-norm block with two branches, whose forward no library has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_a, self.norm_b = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.1)

    def branches(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        return (
            lambda x: self.drop(self.out(self.mix(self.norm_a(x)).roll(1, 1))),
            lambda x: self.drop(self.down(self.act(self.up(self.norm_b(x))))),
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.branches()
        x = x + first(x)
        return torch.add(second(x).transpose(0, 1).transpose(0, 1), x)


class Plain(nn.Module):
    """An embedding, blocks and a head."""

    def __init__(self, depth: int = 4, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(TwoBranches(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def plain() -> tuple[nn.Module, dict[str, Tensor]]:
    return Plain(), {"ids": torch.arange(12).reshape(2, 6) % 11}


# ---------------------------------------------------------------------- written by hand: where the multiplier goes


def _plain_block(block: Any, m: float) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        for branch in block.branches():
            x = x + m * branch(x)
        return x

    return forward


def _gpt2_block(block: Any, m: float) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        x = hidden_states + m * block.attn(block.ln_1(hidden_states), attention_mask=attention_mask)[0]
        return x + m * block.mlp(block.ln_2(x))

    return forward


def _llama_block(block: Any, m: float) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *, position_embeddings: Any, attention_mask: Any, **kwargs: Any) -> Tensor:
        normed = block.input_layernorm(hidden_states)
        mixed = block.self_attn(
            hidden_states=normed, position_embeddings=position_embeddings, attention_mask=attention_mask
        )
        x = hidden_states + m * mixed[0]
        return x + m * block.mlp(block.post_attention_layernorm(x))

    return forward


def _timm_vit_block(block: Any, m: float) -> Callable[..., Tensor]:
    def forward(x: Tensor, **kwargs: Any) -> Tensor:
        x = x + m * block.drop_path1(block.attn(block.norm1(x)))
        return x + m * block.drop_path2(block.mlp(block.norm2(x)))

    return forward


def _timm_convnext_block(block: Any, m: float) -> Callable[..., Tensor]:
    def forward(x: Tensor) -> Tensor:
        branch = block.mlp(block.norm(block.conv_dw(x)))
        return x + m * block.drop_path(block.gamma.reshape(1, -1, 1, 1) * branch)

    return forward


BY_HAND: list[tuple[toys.Maker, Callable[[Any, float], Callable[..., Tensor]]]] = [
    (plain, _plain_block),
    (toys.gpt2, _gpt2_block),
    (toys.llama, _llama_block),
    (toys.timm_vit, _timm_vit_block),
    (toys.timm_convnext, _timm_convnext_block),
]
MODELS = pytest.mark.parametrize("maker", [maker for maker, _ in BY_HAND], ids=lambda maker: maker.__name__)


def output_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    torch.manual_seed(1)
    output = model(**batch)
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize(("maker", "by_hand"), BY_HAND, ids=lambda value: value.__name__)
@pytest.mark.parametrize("rule", ["completep", "depth-mup", "1/sqrt(L)"])
def test_the_scaled_network_is_the_one_written_by_hand(maker: Any, by_hand: Any, rule: str) -> None:
    model, batch = toys.make(maker)
    reference = copy.deepcopy(model)
    scaled = apply(model, rule, base_depth=1.5, batch=batch, init=False)
    depth, branches = len(scaled.reading.blocks), len(scaled.reading.branches)
    m = {"completep": 1.5 / depth, "depth-mup": math.sqrt(1.5 / depth), "1/sqrt(L)": branches**-0.5}[rule]
    assert scaled.multipliers == pytest.approx(dict.fromkeys(scaled.multipliers, m))
    for block in abyssal.find_blocks(reference).values():
        block.forward = by_hand(block, m)
    assert torch.allclose(output_of(model, batch), output_of(reference, batch), rtol=ROUNDING, atol=ROUNDING)
    found, expected = toys.step(model, batch), toys.step(reference, batch)
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, g in expected.items():
        assert float((found[name] - g).abs().max()) <= ROUNDING * scale, name


@pytest.mark.parametrize("maker", toys.MAKERS, ids=lambda maker: maker.__name__)
def test_known_models_are_read_without_being_given_a_batch_and_left_as_they_were(maker: toys.Maker) -> None:
    model, batch = toys.make(maker)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    assert read_model(model).roles == read_model(model, batch).roles
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def _mixture() -> nn.Module:
    config = toys.import_transformers().MixtralConfig(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=toys.VOCABULARY,
    )
    return toys.import_transformers().MixtralForCausalLM(config)


def _sandwich() -> nn.Module:
    config = toys.import_transformers().Olmo2Config(
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=toys.VOCABULARY,
        pad_token_id=0,
    )
    return toys.import_transformers().Olmo2ForCausalLM(config)


class Pool(nn.Module):
    """Mixing without weights, less its input: neither linear to the eye of autograd's graph nor with a last matrix."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool1d(x.mT, 3, 1, 1, count_include_pad=False).mT - x


class PoolBlock(nn.Module):
    """A block whose first branch begins with a norm and has no matrix, as in PoolFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.up, self.down = nn.LayerNorm(8), Pool(), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm(x))
        return x + self.down(torch.relu(self.up(x)))


def _poolformer() -> nn.Module:
    return nn.Sequential(PoolBlock(), PoolBlock())


@pytest.mark.parametrize(
    ("maker", "ends", "projection"),
    [
        (_mixture, ["self_attn.o_proj", "mlp.experts"], "mlp.experts.down_proj"),
        (_sandwich, ["post_attention_layernorm", "post_feedforward_layernorm"], "mlp.down_proj.weight"),
        (_poolformer, ["mix", "down"], "down.weight"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_blocks_that_do_more_than_a_projection_at_the_end_are_read(
    maker: Any, ends: list[str], projection: str
) -> None:
    model = maker()
    reading = read_model(model, torch.randn(2, 6, 8) if isinstance(model, nn.Sequential) else None)
    block = f"{reading.blocks[0]}."
    mine = [branch for branch in reading.branches if branch.block == reading.blocks[0]]
    assert [branch.end.removeprefix(block) for branch in mine] == ends
    assert (mine[-1].projection or "").removeprefix(block) == projection
    assert not reading.post_norm


@pytest.mark.parametrize("norm_first", [True, False])
def test_torchs_own_transformer_is_scaled_in_training_and_on_its_fast_path(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 3).eval()
    x = expected = torch.randn(2, 4, 8, dtype=torch.float64)
    for block in model.layers:
        for sublayer, norm in ((block._sa_block, block.norm1), (block._ff_block, block.norm2)):
            extra = (None, None) if sublayer == block._sa_block else ()
            if norm_first:
                expected = expected + sublayer(norm(expected), *extra) / 3
            else:
                expected = norm(expected + sublayer(expected, *extra) / 3)
    reading = apply(model, "completep", base_depth=1, batch=x).reading
    assert reading.roles["layers.0.self_attn.out_proj.weight"] == "projection"
    assert reading.post_norm is not norm_first
    assert torch.allclose(model(x), expected, rtol=ROUNDING, atol=ROUNDING)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, rtol=ROUNDING, atol=ROUNDING)


def test_roles_are_those_of_a_transformer() -> None:
    model, _ = toys.make(toys.llama)
    reading = read_model(model)
    ends = [branch.end for branch in reading.branches[:2]]
    assert ends == ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    assert (reading.depth, reading.width, reading.head, reading.post_norm) == (3, 32, "lm_head", False)
    expected = {
        "model.embed_tokens.weight": "embedding",
        "model.layers.1.self_attn.q_proj.weight": "hidden",
        "model.layers.1.self_attn.o_proj.weight": "projection",
        "model.layers.1.mlp.gate_proj.weight": "hidden",
        "model.layers.1.mlp.down_proj.weight": "projection",
        "model.layers.1.input_layernorm.weight": "norm",
        "model.norm.weight": "vector",
        "lm_head.weight": "head",
    }
    assert {name: reading.roles[name] for name in expected} == expected


def test_roles_are_those_of_a_convnext() -> None:
    reading = read_model(toys.make(toys.timm_convnext)[0])
    expected = {
        "stem.0.weight": "embedding",
        "stages.1.downsample.1.weight": "between",
        "stages.0.blocks.0.conv_dw.weight": "narrow",
        "stages.0.blocks.0.mlp.fc1.weight": "hidden",
        "stages.0.blocks.0.mlp.fc2.weight": "projection",
        "stages.0.blocks.0.gamma": "bias",
        "head.fc.weight": "head",
        "head.fc.bias": "vector",
    }
    assert {name: reading.roles[name] for name in expected} == expected


# ---------------------------------------------------------------------- optimiser groups


@MODELS
@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_groups_hold_every_parameter_once_at_its_roles_settings(maker: Any, rule: str, optimizer: Any) -> None:
    model, batch = toys.make(maker)
    scaled = apply(model, rule, base_depth=1.5, base_width=16, batch=batch)
    groups = scaled.parameter_groups(0.3, weight_decay=0.2, eps=1e-6, optimizer=optimizer)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    for group in groups:
        factors = scaled.rule.factors(group["name"], scaled.sizes, optimizer)
        assert group["lr"] == 0.3 * factors.lr
        assert group["weight_decay"] == 0.2 * factors.weight_decay
        assert group.get("eps") == (1e-6 * factors.eps if optimizer == "adamw" else None)
    {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer](groups)


def _cosine(optimiser: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=10)


def _lambda(optimiser: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))


def _one_cycle(optimiser: torch.optim.Optimizer) -> Any:
    rates = [group["lr"] for group in optimiser.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rates, total_steps=10)


@pytest.mark.parametrize("schedule", [_cosine, _lambda, _one_cycle], ids=lambda f: f.__name__)
def test_schedulers_keep_the_ratios_of_the_learning_rates(schedule: Any) -> None:
    model, batch = plain()
    scaled = apply(model, "completep", base_depth=1, base_width=2, lr=0.1, batch=batch)
    optimiser = torch.optim.AdamW(scaled.parameter_groups())
    ratios = [group["lr"] / 0.1 for group in optimiser.param_groups]
    assert len(set(ratios)) > 1
    scheduler = schedule(optimiser)
    for _ in range(5):
        optimiser.step()
        scheduler.step()
        rates = [group["lr"] for group in optimiser.param_groups]
        assert [rate / rates[0] for rate in rates] == pytest.approx([ratio / ratios[0] for ratio in ratios])


def test_frozen_parameters_are_in_no_group() -> None:
    model, batch = plain()
    scaled = apply(model, "completep", base_depth=1, batch=batch)
    model.get_parameter("embed.weight").requires_grad_(False)
    assert "embedding" not in [group["name"] for group in scaled.parameter_groups(0.1)]


# ---------------------------------------------------------------------- learned scalars


@pytest.mark.parametrize("rule", ["rezero", "skipinit", "fixup"])
def test_a_network_whose_branches_begin_at_zero_is_the_identity_in_depth(rule: str) -> None:
    model, batch = plain()
    apply(model, rule, batch=batch)
    x = torch.randn(2, 6, 8)
    blocks = model.get_submodule("blocks")
    assert all(torch.equal(block(x), x) for block in blocks.children())


@MODELS
def test_layer_scale_multiplies_channels(maker: Any) -> None:
    model, batch = toys.make(maker)
    model.eval()
    reference = copy.deepcopy(model)
    apply(model, LayerScale(start=1.0), batch=batch)
    gates = {name: p for name, p in model.named_parameters() if name.endswith(GATE)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, gate in gates.items():  # the same as multiplying the rows of the last matrix, and its bias
            gate.copy_(torch.rand(gate.shape, generator=generator, dtype=gate.dtype))
            end = reference.get_submodule(name.removesuffix(f".{GATE}"))
            weight: Any = end.weight
            weight.mul_(gate if type(end).__name__ == "Conv1D" else gate.view(-1, *[1] * (weight.dim() - 1)))
            if getattr(end, "bias", None) is not None:
                end.bias.mul_(gate)  # type: ignore[operator,union-attr,unused-ignore]
    assert torch.allclose(output_of(model, batch), output_of(reference, batch), rtol=ROUNDING, atol=ROUNDING)


def test_rezero_adds_one_number_per_block_and_skipinit_one_per_branch() -> None:
    for rule, count in (("rezero", 4), ("skipinit", 8), (SkipInit(start=0.1), 8)):
        model, batch = plain()
        before = set(model.state_dict())
        apply(model, rule, batch=batch)
        added = set(model.state_dict()) - before
        assert len(added) == count
        assert all(model.get_parameter(name).shape == (1,) for name in added)


@pytest.mark.parametrize("rule", ["rezero", "skipinit", "fixup", "layerscale"])
def test_learned_scalars_are_trained(rule: str) -> None:
    model, batch = plain()
    scaled = apply(model, rule, batch=batch)
    with torch.no_grad():
        model.get_parameter("head.weight").normal_()  # which Fixup begins at 0
    optimiser = torch.optim.SGD(scaled.parameter_groups(0.1, optimizer="sgd"))
    gates = {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith(GATE)}
    for _ in range(2):  # Fixup's numbers have no gradient until the last matrices have left 0
        optimiser.zero_grad()
        model(**batch).square().mean().backward()
        optimiser.step()
    assert all(not torch.equal(gate, model.get_parameter(name)) for name, gate in gates.items())


# ---------------------------------------------------------------------- fresh weights


def stds(model: nn.Module, reading: Any, role: str) -> list[float]:
    return [float(p.detach().std()) for name, p in model.named_parameters() if reading.roles[name] == role]


@pytest.mark.parametrize(("rule", "expected"), [("completep", 0.02 / 2), ("gpt2", 0.02 / math.sqrt(6))])
@pytest.mark.parametrize("maker", [toys.gpt2, toys.llama], ids=lambda maker: maker.__name__)
def test_projections_get_the_standard_deviation_of_the_rule_whether_or_not_gpt2s_factor_was_there(
    maker: Any, rule: str, expected: float
) -> None:
    torch.manual_seed(0)
    model, _ = maker()
    scaled = apply(model, rule, base_depth=3, base_width=8)  # three blocks, six branches, m_N = 4
    for std in stds(model, scaled.reading, "projection"):
        assert std == pytest.approx(expected, rel=4 / math.sqrt(2 * 32 * 32))  # four standard errors


def test_weights_that_follow_fan_in_already_get_no_factor_of_width_unless_told() -> None:
    model, batch = plain()
    scaled = apply(model, "completep", base_depth=1, base_width=2, batch=batch)
    assert scaled.init_factors == {}
    assert "taken to fall with fan-in" in str(scaled)
    model, batch = plain()
    scaled = apply(model, "completep", base_depth=1, base_width=2, batch=batch, constant_std=True)
    assert set(scaled.init_factors.values()) == {0.5}


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_pretrained_weights_are_left_alone_when_asked(rule: str) -> None:
    model, batch = plain()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    apply(model, rule, base_depth=2, base_width=2, batch=batch, init=False)
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())


def test_deepnorm_is_a_times_the_stream_before_the_norm() -> None:
    model, batch = toys.make(toys.bert)
    model.eval()
    reference = copy.deepcopy(model)
    apply(model, "deepnorm", batch=batch, init=False)
    a = (2 * toys.DEPTH) ** 0.25

    def residual(out: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda hidden, x: out.LayerNorm(a * x + out.dropout(out.dense(hidden)))

    for name, module in reference.named_modules():
        if name.endswith(("attention.output", ".output")) and hasattr(module, "LayerNorm"):
            module.forward = residual(module)
            module.LayerNorm.eps *= a**2  # that of LN(x + f / a), which is eps, is a^2 eps of LN(a x + f)
    assert torch.allclose(output_of(model, batch), output_of(reference, batch), rtol=ROUNDING, atol=ROUNDING)


def test_deepnorm_scales_values_but_no_queries() -> None:
    model, batch = toys.make(toys.bert)
    factors = apply(model, "deepnorm", batch=batch).init_factors
    layer = "bert.encoder.layer.1"
    assert factors[f"{layer}.attention.self.value.weight"] == pytest.approx((8 * toys.DEPTH) ** -0.25)
    assert f"{layer}.attention.self.query.weight" not in factors
    assert f"{layer}.intermediate.dense.weight" in factors


# ---------------------------------------------------------------------- what models go through


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, _pickled, _saved], ids=lambda way: way.__name__)
@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("maker", [plain, toys.gpt2], ids=lambda maker: maker.__name__)
def test_copies_are_scaled_and_independent(maker: Any, rule: str, way: Any) -> None:
    model, batch = toys.make(maker)
    apply(model, rule, base_depth=1.5, batch=batch)
    twin = way(model)
    expected = toys.step(model, batch)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)  # the copy takes nothing from the original
    model.zero_grad()
    found = toys.step(twin, batch)
    assert all(torch.equal(found[name], g) for name, g in expected.items())
    scaled = applied(twin)
    assert scaled is not None
    assert {id(p) for g in scaled.parameter_groups(1.0) for p in g["params"]} == {id(p) for p in twin.parameters()}


@pytest.mark.parametrize("rule", ["completep", "depth-mup", "1/sqrt(L)", "gpt2", "none"])
def test_rules_without_learned_scalars_keep_the_keys_of_the_state_dict(rule: str) -> None:
    model, batch = plain()
    keys = list(model.state_dict())
    apply(model, rule, base_depth=1, base_width=2, batch=batch)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("rule", RULE_NAMES)
def test_a_state_dict_goes_into_a_network_scaled_alike(rule: str) -> None:
    (model, batch), (other, _) = plain(), plain()
    for net in (model, other):
        apply(net, rule, base_depth=1, batch=batch)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output_of(model, batch), output_of(other, batch))


@pytest.mark.parametrize("order", ["on top", "below"])
@pytest.mark.parametrize("rule", ["completep", "rezero", "layerscale", "fixup"])
@pytest.mark.parametrize("maker", [plain, toys.gpt2, toys.timm_vit], ids=lambda maker: maker.__name__)
def test_reconstruct_gives_the_same_gradients(maker: Any, rule: str, order: str) -> None:
    model, batch = toys.make(maker)
    reference = copy.deepcopy(model)
    if order == "below":
        abyssal.reconstruct(model, abyssal.Keep())
    for net in (model, reference):
        apply(net, rule, base_depth=1.5, batch=batch)
        with torch.no_grad():
            for name, p in net.named_parameters():
                if name.endswith(GATE):
                    p.fill_(0.5)
    if order == "on top":
        abyssal.reconstruct(model, abyssal.Keep())
    found, expected = toys.step(model, batch), toys.step(reference, batch)
    assert abyssal.certificate(model).chains == 0 or abyssal.certificate(model).drifted == []
    scale = max(float(g.abs().max()) for g in expected.values())
    assert all(float((found[name] - g).abs().max()) <= ROUNDING * scale for name, g in expected.items())


@pytest.mark.parametrize("rule", ["completep", "rezero", "layerscale", "fixup"])
def test_compiled_blocks_compute_the_same(rule: str) -> None:
    model, batch = plain()
    model.eval()
    apply(model, rule, base_depth=1, batch=batch)
    before = output_of(model, batch)
    for block in model.get_submodule("blocks").children():
        block.compile(backend="eager", fullgraph=True)
    try:
        assert torch.equal(output_of(model, batch), before)
    finally:
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def gang() -> Iterator[Gang]:
    gang = Gang()
    yield gang
    gang.stop()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo")
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("rule", ["completep", "rezero", "layerscale", "fixup"])
def test_two_processes_train_as_one(gang: Gang, rule: str, wrapper: str) -> None:
    errors = gang.run(scenarios.trains_as_alone, rule=rule, wrapper=wrapper)
    # Three steps of AdamW in float64, whose first is +- lr for each weight: the mean's rounding, 1e-16, is
    # divided by gradients' sizes or eps = 1e-8 at the least.
    assert max(errors) <= 1e-7


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo")
def test_a_wrapped_model_is_refused_since_what_is_added_would_not_be_synchronised(gang: Gang) -> None:
    for messages in gang.run(scenarios.refuses):
        assert all("before" in message for message in messages)


# ---------------------------------------------------------------------- identity, removal


@MODELS
@pytest.mark.parametrize("rule", ["completep", "depth-mup", "none"])
def test_at_the_base_depth_nothing_changes(maker: Any, rule: str) -> None:
    model, batch = toys.make(maker)
    before = output_of(model, batch)
    depth = read_model(model, batch).depth
    scaled = apply(model, rule, base_depth=depth, batch=batch, init=False)
    assert torch.equal(output_of(model, batch), before)
    groups = scaled.parameter_groups(0.1, weight_decay=0.5)
    assert all((group["lr"], group["eps"]) == (0.1, 1e-8) for group in groups)


def test_one_branch_is_left_as_it_is_by_one_over_sqrt_depth() -> None:
    stack = residual_mlp(1, 4, scale=1.0)
    x = torch.randn(2, 4)
    before = stack(x)
    apply(stack, "1/sqrt(L)", blocks="steps.*")
    assert torch.equal(stack(x), before)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("whole", [False, True])
def test_removing_a_rule_gives_back_the_network(rule: str, whole: bool) -> None:
    model, batch = plain()
    keys, before = list(model.state_dict()), output_of(model, batch)
    apply(model, rule, base_depth=1, base_width=2, batch=batch, init=False, whole_blocks=whole)
    remove(model)
    assert torch.equal(output_of(model, batch), before)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    apply(model, rule, base_depth=1, batch=batch)  # and may be applied again


class Opaque(nn.Module):
    """A block that ends in a function, so that there is no module to multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


def test_a_block_that_cannot_be_read_is_named_and_may_be_taken_whole() -> None:
    model = nn.Sequential(*(Opaque() for _ in range(4)))
    x = torch.randn(3, 4)
    with pytest.raises(UnreadableModelError, match=r"Block '0' \(Opaque\).*'Tanh'.*whole_blocks=True"):
        apply(model, "completep", base_depth=2)
    assert applied(model) is None
    expected = x
    for block in model:
        expected = expected + 0.5 * (block(expected) - expected)
    apply(model, "completep", base_depth=2, whole_blocks=True)
    assert torch.allclose(model(x), expected)
    copied = copy.deepcopy(model)
    abyssal.reconstruct(copied, abyssal.Reverse(refine=1))
    assert torch.allclose(copied(x), expected)
    assert abyssal.certificate(copied).chains == 1


class Twisted(nn.Module):
    """A block whose skip connection is not its input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * x + self.norm(self.inner(x))


def test_a_block_without_a_skip_connection_is_refused() -> None:
    with pytest.raises(UnreadableModelError, match=r"Block '0' \(Twisted\)"):
        apply(nn.Sequential(Twisted(), Twisted()), "completep", base_depth=2)


class Hidden(nn.Module):
    """A block that adds something else to the stream through its own parameter, beside a branch that can be found."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.matrix = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x + self.inner(x) + x.detach() @ self.matrix, (4,))


def test_what_is_left_of_a_block_when_its_branches_are_zero_is_noticed() -> None:
    with pytest.raises(UnreadableModelError, match="Block '0'"):
        apply(nn.Sequential(Hidden(), Hidden()), "completep", base_depth=2)


# ---------------------------------------------------------------------- errors, before anything is changed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "complete", "base_depth": 2}, "No rule is called 'complete'"),
        ({"rule": "completep"}, "relative to a base network: give its depth"),
        ({"base_depth": 0}, "base_depth has to be a number of at least 1, got 0"),
        ({"base_depth": math.nan}, "base_depth has to be a number of at least 1, got nan"),
        ({"base_depth": 2, "base_width": -3}, "base_width has to be a number of at least 1, got -3"),
        ({"base_depth": 2, "depth": 0}, "depth has to be a number of at least 1, got 0"),
        ({"base_depth": 2, "batch": None, "blocks": "nothing.*"}, "matches no module"),
        ({"rule": "deepnorm"}, "is for post-norm blocks"),
        ({"rule": SkipInit(start=2.0)}, "begin at 0 or at most"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_changed(arguments: dict[str, Any], message: str) -> None:
    model, batch = plain()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        apply(model, **{"batch": batch, **arguments})
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert applied(model) is None


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("at", ["", "blocks"])
def test_applying_twice_is_refused(rule: str, at: str) -> None:
    model, batch = plain()
    apply(model, rule, base_depth=1, batch=batch)
    with pytest.raises(ValueError, match="applied already"):
        apply(model, rule, base_depth=1, batch=batch)
    with pytest.raises(ValueError, match="applied already"):
        apply(nn.ModuleDict({"inner": model}), rule, base_depth=1, batch=batch)


def test_removing_what_was_never_applied_is_refused() -> None:
    with pytest.raises(ValueError, match="no rule to remove"):
        remove(plain()[0])


def test_a_model_that_takes_nothing_that_can_be_made_up_asks_for_a_batch() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(TwoBranches(8) for _ in range(2))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x + y)
            return x

    with pytest.raises(UnreadableModelError, match="Give one: batch="):
        apply(Two(), "completep", base_depth=1)
    x = torch.randn(1, 3, 8)
    assert apply(Two(), "completep", base_depth=1, batch=(x, x)).sizes.depth == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "No learning rate"),
        ({"lr": math.nan}, "lr has to be a finite number"),
        ({"lr": 0.1, "weight_decay": -1}, "weight_decay has to be"),
        ({"lr": 0.1, "optimizer": "lion"}, "has to be one of adamw, sgd, got 'lion'"),
    ],
    ids=str,
)
def test_bad_settings_of_the_optimiser_are_refused(arguments: dict[str, Any], message: str) -> None:
    model, batch = plain()
    scaled = apply(model, "completep", base_depth=1, batch=batch)
    with pytest.raises(ValueError, match=message):
        scaled.parameter_groups(**arguments)


def test_a_parameter_that_came_later_is_named() -> None:
    model, batch = plain()
    scaled = apply(model, "completep", base_depth=1, batch=batch)
    model.register_parameter("later", nn.Parameter(torch.zeros(3)))
    with pytest.raises(ValueError, match="'later' was added to the model after"):
        scaled.parameter_groups(0.1)


def test_the_table_says_what_was_changed() -> None:
    model, _ = toys.make(toys.gpt2)
    text = str(apply(model, "completep", base_depth=1.5, base_width=8))
    assert "m_L = 2" in text
    assert "m_N = 4" in text
    assert "Every branch times 0.5, at the output of 6 modules: transformer.h.0.attn.c_proj" in text
    assert "'lm_head' times 0.25" in text
    row = next(line for line in text.splitlines() if line.startswith("│ projection"))
    assert [cell.strip() for cell in row.strip("│").split("│")][3:6] == ["x 0.25", "x 0.125", "x 4"]


@pytest.mark.slow
def test_depth_and_width_may_be_said_instead_of_read() -> None:
    sizes = apply(DigitsResNet(4, 8), "completep", 3, 4, depth=12, width=16).sizes
    assert (sizes.depth, sizes.branches, sizes.depth_ratio, sizes.width_ratio) == (12, 12, 4, 4)


@pytest.mark.slow
def test_a_shared_block_counts_as_often_as_it_is_called() -> None:
    block = TwoBranches(8)
    model = nn.Sequential(*[block] * 6)
    scaled: Scaled = apply(model, "completep", base_depth=2, batch=torch.randn(1, 3, 8))
    assert (scaled.sizes.depth, scaled.sizes.branches, len(scaled.multipliers)) == (6, 12, 2)
    assert set(scaled.multipliers.values()) == {1 / 3}
