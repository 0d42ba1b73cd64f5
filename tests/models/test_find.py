"""Which modules of a model are taken for its residual blocks, and how a caller names them instead.

Every model is built from its configuration, tiny and without a download. That the blocks found are blocks of
a residual stream is checked by running the model: each keeps the shape of the stream that enters it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from abyssal.models.find import NoBlocksError, find_blocks, resolve_blocks
from abyssal.nn import Heun, ResidualStack

WIDTH = 8


class Branch(nn.Module):
    """Two linear layers; `x + Branch()(x)` is a block, the branch alone is not."""

    def __init__(self, width: int = WIDTH, hidden: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Block(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class DirectBlock(nn.Module):
    """A block without submodules: its weight is its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.weight)


class Residual(nn.Sequential):
    """How many people write a block: a sequence whose `forward` adds the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ListBlock(nn.Module):
    """A block with a list of equal modules inside it, as attention heads and experts are."""

    def __init__(self, heads: int = 3) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Branch() for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        return x + sum(head(x) for head in self.heads)


class Loop(nn.Module):
    """Applies the members of a list, as most models do."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class DeclaredLoop(Loop):
    """A model that says which class is its layer, in transformers' manner."""

    _no_split_modules = ("Block",)


class Stage(nn.Module):
    """A stage as in ConvNeXt and Swin: something that changes the shape, then blocks."""

    def __init__(self, width_in: int, width: int, depth: int) -> None:
        super().__init__()
        self.downsample = nn.Identity() if width_in == width else nn.Linear(width_in, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


def numbered(pattern: str, *numbers: int) -> list[str]:
    return [pattern.format(number) for number in numbers]


def stream(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def assert_blocks_keep_their_stream(model: nn.Module, run: Callable[[nn.Module], object]) -> None:
    """Runs a model and holds each block it is said to have to the shape of its input."""
    shapes: dict[str, tuple[torch.Size, torch.Size]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            shapes[name] = stream(args, kwargs).shape, first.shape

        return hook

    blocks = find_blocks(model)
    for name, block in blocks.items():
        block.register_forward_hook(note(name), with_kwargs=True)
    with torch.no_grad():
        run(model.eval())
    assert set(shapes) == set(blocks), "some blocks were never called"
    changed = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    assert not changed


# --- models people write themselves ---------------------------------------------------------------------


def test_a_sequence_of_blocks_between_other_layers() -> None:
    model = nn.Sequential(nn.Linear(3, WIDTH), *(Block() for _ in range(3)), nn.ReLU(), nn.Linear(WIDTH, 2))
    assert list(find_blocks(model)) == ["1", "2", "3"]
    assert_blocks_keep_their_stream(model, lambda m: m(torch.randn(5, 3)))


@pytest.mark.parametrize("make", [Block, DirectBlock, ListBlock, lambda: Residual(nn.Linear(WIDTH, WIDTH))])
def test_a_list_of_blocks_however_they_are_written(make: Callable[[], nn.Module]) -> None:
    model = Loop(*(make() for _ in range(4)))
    assert list(find_blocks(model)) == numbered("layers.{}", 0, 1, 2, 3)
    assert_blocks_keep_their_stream(model, lambda m: m(torch.randn(5, WIDTH)))


def test_the_modules_returned_are_those_of_the_model() -> None:
    model = Loop(Block(), Block())
    assert find_blocks(model) == {"layers.0": model.layers[0], "layers.1": model.layers[1]}


def test_blocks_in_a_module_dict_are_found_by_their_keys() -> None:
    model = nn.Sequential()
    model.add_module("named", nn.ModuleDict({"first": Block(), "second": Block()}))
    assert list(find_blocks(model)) == ["named.first", "named.second"]


def test_torchs_own_transformer_layers_are_blocks() -> None:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    assert list(find_blocks(model)) == numbered("layers.{}", 0, 1, 2)
    both = nn.Transformer(WIDTH, 2, 2, 2, 16, batch_first=True)
    assert list(find_blocks(both)) == [
        *numbered("encoder.layers.{}", 0, 1),
        *numbered("decoder.layers.{}", 0, 1),
    ]


def test_pairs_of_different_residual_branches_are_all_found() -> None:
    """Attention and feed-forward in turn, each its own block, as `ModuleList([ModuleList([a, f]), ...])`."""
    pairs = [nn.ModuleList([Residual(nn.LayerNorm(WIDTH), Branch()), Block(hidden=16)]) for _ in range(3)]
    flat = nn.Sequential(*(module for pair in pairs for module in pair))
    assert list(find_blocks(flat)) == [str(n) for n in range(6)]


def test_blocks_of_differing_inner_width_are_found_on_their_common_stream() -> None:
    model = nn.Sequential(*(Block(hidden=hidden) for hidden in (4, 9, 16)))
    assert list(find_blocks(model)) == ["0", "1", "2"]


def test_layers_that_change_the_width_are_not_blocks() -> None:
    class Layer(nn.Module):
        def __init__(self, before: int, after: int) -> None:
            super().__init__()
            self.linear = nn.Linear(before, after)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.linear(x))

    with pytest.raises(NoBlocksError):
        find_blocks(nn.Sequential(Layer(4, 8), Layer(8, 16), Layer(16, 16), Layer(16, 4)))


@pytest.mark.parametrize(
    "told",
    [{"stride": 2}, {"stride": (1, 2)}, {"in_channels": 4, "out_channels": 8}, {"use_res_connect": False}],
)
def test_blocks_that_say_that_they_change_the_shape_are_left_out(told: dict[str, Any]) -> None:
    blocks = [Block() for _ in range(4)]
    for name, value in told.items():
        setattr(blocks[0], name, value)
    assert list(find_blocks(nn.Sequential(*blocks))) == ["1", "2", "3"]


def test_stages_are_looked_into_and_their_downsampling_is_left_alone() -> None:
    model = nn.Sequential(Stage(4, 4, 2), Stage(4, 8, 1), Stage(8, 16, 3))
    assert list(find_blocks(model)) == ["0.blocks.0", "0.blocks.1", *numbered("2.blocks.{}", 0, 1, 2)]
    assert_blocks_keep_their_stream(model, lambda m: m(torch.randn(5, 4)))


def test_a_list_inside_a_block_does_not_win_over_the_blocks() -> None:
    assert list(find_blocks(Loop(ListBlock(), ListBlock()))) == ["layers.0", "layers.1"]
    # Not for a block that differs from its siblings, either.
    assert list(find_blocks(Loop(ListBlock(4), ListBlock(), ListBlock()))) == numbered("layers.{}", 0, 1, 2)


def test_normalisation_layers_of_ones_own_are_not_blocks() -> None:
    class ScaleNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x / x.norm(dim=-1, keepdim=True)

    model = Loop(Block(), Block())
    model.norms = nn.ModuleList([ScaleNorm(), ScaleNorm()])
    assert list(find_blocks(model)) == ["layers.0", "layers.1"]


def test_weights_in_buffers_make_a_block_and_no_weights_make_none() -> None:
    """Quantised layers hold their weights in buffers."""

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("code", torch.zeros(WIDTH, WIDTH, dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return x + x @ self.code.to(x.dtype)

    class Swish(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x)

    assert list(find_blocks(nn.Sequential(Quantised(), Swish(), Quantised(), Swish()))) == ["0", "2"]


def test_blocks_are_looked_for_in_sequences_inside_a_sequence() -> None:
    plain = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)))
    with pytest.raises(NoBlocksError):  # nothing in them adds anything
        find_blocks(plain)
    nested = nn.Sequential(*(nn.Sequential(Block(), Block(), nn.ReLU()) for _ in range(2)))
    assert list(find_blocks(nested)) == ["0.0", "0.1", "1.0", "1.1"]


# --- tied, compiled, wrapped ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Block, DirectBlock])
def test_a_tied_block_is_returned_once_under_its_first_name(make: Callable[[], nn.Module]) -> None:
    block = make()
    assert find_blocks(nn.Sequential(*[block] * 4)) == {"0": block}
    assert find_blocks(Loop(*[block] * 4)) == {"layers.0": block}


def test_compiled_blocks_count_as_what_they_wrap_and_are_returned_compiled() -> None:
    model = Loop(*(Block() for _ in range(3)))
    model.layers[1] = torch.compile(model.layers[1])
    assert find_blocks(model) == {f"layers.{n}": model.layers[n] for n in range(3)}
    assert list(find_blocks(torch.compile(model))) == numbered("_orig_mod.layers.{}", 0, 1, 2)


def test_checkpointing_wrappers_are_looked_through() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = DeclaredLoop(*(checkpoint_wrapper(Block()) for _ in range(2)))
    assert find_blocks(model) == {"layers.0": model.layers[0], "layers.1": model.layers[1]}


@pytest.mark.parametrize("prefix", ["FSDP", "Parametrized"])
@pytest.mark.parametrize("loop", [Loop, DeclaredLoop])
def test_a_class_swapped_at_run_time_is_still_the_users(loop: type[Loop], prefix: str) -> None:
    """fully_shard makes a class per module's class, parametrize one per module."""
    model = loop(*(Block() for _ in range(3)))
    for block in list(model.layers)[1:]:
        block.__class__ = type(f"{prefix}Block", (type(block),), {})
    assert list(find_blocks(model)) == numbered("layers.{}", 0, 1, 2)


def test_parametrized_blocks_are_found_and_their_parametrizations_are_not() -> None:
    linear = Loop(*(Block() for _ in range(3)))
    direct = Loop(*(DirectBlock() for _ in range(3)))
    for block in linear.layers:
        parametrizations.spectral_norm(block.up)
    for block in direct.layers:
        parametrizations.weight_norm(block)
    assert list(find_blocks(linear)) == list(find_blocks(direct)) == numbered("layers.{}", 0, 1, 2)


def test_a_reconstructed_models_blocks_are_the_same() -> None:
    """Patching puts an instance-level `forward` on each block."""
    model = Loop(*(Block() for _ in range(3)))
    before = find_blocks(model)
    for block in model.layers:
        block.forward = copy.copy(block.forward)
    assert find_blocks(model) == before


def test_fake_and_lazy_parameters_are_enough() -> None:
    with torch.device("meta"):
        assert len(find_blocks(Loop(Block(), Block()))) == 2

    class LazyBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.LazyLinear(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.linear(x)

    assert len(find_blocks(Loop(LazyBlock(), LazyBlock()))) == 2


# --- our own networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Block, ListBlock, DirectBlock, lambda: nn.Linear(WIDTH, WIDTH)])
def test_the_steps_of_a_residual_stack_are_its_blocks_not_the_functions_inside(
    make: Callable[[], nn.Module],
) -> None:
    stack = ResidualStack([make() for _ in range(4)])
    assert find_blocks(stack) == {f"steps.{n}": stack.steps[n] for n in range(4)}


def test_steps_of_heun_are_found_though_neighbours_share_functions() -> None:
    stack = ResidualStack([Block() for _ in range(5)], scheme=Heun())
    assert find_blocks(stack) == {f"steps.{n}": stack.steps[n] for n in range(4)}
    tied = ResidualStack([Block()] * 5, scheme=Heun())
    assert list(find_blocks(tied)) == numbered("steps.{}", 0, 1, 2, 3)


# --- models that declare their layers -------------------------------------------------------------------


def test_declared_layers_are_preferred_to_equal_modules_elsewhere() -> None:
    model = DeclaredLoop(Block(), Block())
    model.stem = nn.Sequential(DirectBlock(), DirectBlock())
    assert list(find_blocks(model)) == ["layers.0", "layers.1"]


def test_a_single_declared_layer_is_a_block_and_a_single_other_module_is_not() -> None:
    assert list(find_blocks(DeclaredLoop(Block()))) == ["layers.0"]
    with pytest.raises(NoBlocksError):
        find_blocks(Loop(Block()))


def test_a_model_that_declares_layers_is_itself_no_block() -> None:
    model = nn.Sequential(DeclaredLoop(Block(), Block()), DeclaredLoop(Block(), Block()))
    assert list(find_blocks(model)) == ["0.layers.0", "0.layers.1", "1.layers.0", "1.layers.1"]


def test_equal_stages_of_declared_layers_are_looked_into() -> None:
    model = DeclaredLoop(Stage(WIDTH, WIDTH, 2), Stage(WIDTH, WIDTH, 2))
    assert list(find_blocks(model)) == [f"layers.{stage}.blocks.{n}" for stage in (0, 1) for n in (0, 1)]


def test_declared_names_that_lie_inside_the_blocks_do_not_mislead() -> None:
    """transformers' ResNet declares its convolution layers, not its blocks."""

    class Misled(Loop):
        _no_split_modules = ("Branch",)

    blocks = [ListBlock() for _ in range(2)]
    for block in blocks:
        block.shortcut = nn.Identity()
    assert list(find_blocks(Misled(*blocks))) == ["layers.0", "layers.1"]


def test_each_part_of_a_composed_model_is_judged_by_what_it_declares() -> None:
    model = nn.Sequential()
    model.add_module("tower", Loop(DirectBlock(), DirectBlock()))
    model.add_module("text", DeclaredLoop(Block(), Block()))
    assert list(find_blocks(model)) == ["tower.layers.0", "tower.layers.1", "text.layers.0", "text.layers.1"]


# --- torchvision and timm -------------------------------------------------------------------------------


def image(size: int) -> Callable[[nn.Module], object]:
    return lambda model: model(torch.randn(1, 3, size, size))


def stages(pattern: str, first: int, depths: list[int], skip_first: list[bool]) -> list[str]:
    return [
        pattern.format(first + stage, block)
        for stage, (depth, skip) in enumerate(zip(depths, skip_first, strict=True))
        for block in range(int(skip), depth)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", stages("layer{}.{}", 1, [2, 2, 2, 2], [False, True, True, True])),
        ("resnet50", stages("layer{}.{}", 1, [3, 4, 6, 3], [True] * 4)),
        ("regnet_y_400mf", stages("trunk_output.block{0}.block{0}-{1}", 1, [1, 3, 6, 6], [True] * 4)),
        ("vit_b_16", numbered("encoder.layers.encoder_layer_{}", *range(12))),
        ("convnext_tiny", stages("features.{}.{}", 1, [3, 0, 3, 0, 9, 0, 3], [False] * 7)),
        ("swin_t", stages("features.{}.{}", 1, [2, 0, 2, 0, 6, 0, 2], [False] * 7)),
        ("mobilenet_v2", numbered("features.{}", 3, 5, 6, 8, 9, 10, 12, 13, 15, 16)),
    ],
)
def test_blocks_of_torchvision(name: str, expected: list[str]) -> None:
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.get_model(name, weights=None)
    assert list(find_blocks(model)) == expected
    assert_blocks_keep_their_stream(model, image(224))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnetv2_50", stages("stages.{}.blocks.{}", 0, [3, 4, 6, 3], [True] * 4)),
        ("convnext_atto", stages("stages.{}.blocks.{}", 0, [2, 2, 6, 2], [False] * 4)),
        ("vit_tiny_patch16_224", numbered("blocks.{}", *range(12))),
        ("swin_tiny_patch4_window7_224", stages("layers.{}.blocks.{}", 0, [2, 2, 6, 2], [False] * 4)),
        ("maxvit_nano_rw_256", stages("stages.{}.blocks.{}", 0, [1, 2, 3, 1], [True] * 4)),
        ("poolformer_s12", stages("stages.{}.blocks.{}", 0, [2, 2, 6, 2], [False] * 4)),
        ("mixer_s32_224", numbered("blocks.{}", *range(8))),
        ("nfnet_l0", stages("stages.{}.{}", 0, [1, 2, 6, 3], [True] * 4)),
        ("efficientnet_b0", stages("blocks.{}.{}", 0, [1, 2, 2, 3, 3, 4, 1], [True] * 7)),
        ("efficientvit_b0", None),
        ("davit_tiny", None),
    ],
)
def test_blocks_of_timm(name: str, expected: list[str] | None) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, pretrained=False)
    found = list(find_blocks(model))
    assert expected is None or found == expected
    assert_blocks_keep_their_stream(model, image(model.default_cfg["input_size"][-1]))


def test_a_convolutional_network_without_skip_connections_has_no_blocks() -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.vgg11(weights=None)
    with pytest.raises(NoBlocksError, match=r"features' \(Sequential: "):
        find_blocks(model)


# --- transformers ---------------------------------------------------------------------------------------

IDS = torch.arange(12).reshape(2, 6)
TINY = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = {**TINY, "vocab_size": 40, "max_position_embeddings": 32}
PICTURE = {**TINY, "image_size": 32, "patch_size": 8}
PAIR = {
    **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "vocab_size": 40, "pad_token_id": 0},
    **{
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
    },
}


def text(model: nn.Module) -> object:
    return model(input_ids=IDS)


def text_to_text(model: nn.Module) -> object:
    return model(input_ids=IDS, decoder_input_ids=IDS)


def sound(model: nn.Module) -> object:
    return model(input_features=torch.randn(2, 8, 40), decoder_input_ids=IDS)


def picture(model: nn.Module) -> object:
    return model(pixel_values=torch.randn(2, 3, 32, 32))


WHISPER = {**PAIR, "max_source_positions": 20, "num_mel_bins": 8, "decoder_start_token_id": 1}
HUGGING_FACE: dict[str, tuple[str, str, dict[str, Any], Callable[[nn.Module], object], list[str]]] = {
    "GPT-2": (
        *("GPT2LMHeadModel", "GPT2Config"),
        {"n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": 40, "n_positions": 32},
        *(text, numbered("transformer.h.{}", 0, 1, 2)),
    ),
    "GPT-2 of one layer": (
        *("GPT2Model", "GPT2Config"),
        {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 40, "n_positions": 32},
        *(text, ["h.0"]),
    ),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", TEXT, text, numbered("model.layers.{}", 0, 1, 2)),
    "Mixtral": (
        *("MixtralForCausalLM", "MixtralConfig"),
        {**TEXT, "num_key_value_heads": 2, "num_local_experts": 4},
        *(text, numbered("model.layers.{}", 0, 1, 2)),
    ),
    "Qwen2-MoE, dense and sparse layers in turn": (
        *("Qwen2MoeForCausalLM", "Qwen2MoeConfig"),
        {**TEXT, "num_key_value_heads": 2, "num_experts": 4, "decoder_sparse_step": 2},
        *(text, numbered("model.layers.{}", 0, 1, 2)),
    ),
    "BERT": ("BertModel", "BertConfig", TEXT, text, numbered("encoder.layer.{}", 0, 1, 2)),
    "T5, whose first blocks hold the position bias": (
        *("T5ForConditionalGeneration", "T5Config"),
        {
            "d_model": 32,
            "d_kv": 16,
            "num_heads": 2,
            "d_ff": 64,
            "num_layers": 3,
            "num_decoder_layers": 2,
            "vocab_size": 40,
        },
        *(text_to_text, [*numbered("encoder.block.{}", 0, 1, 2), *numbered("decoder.block.{}", 0, 1)]),
    ),
    "Whisper": (
        *("WhisperModel", "WhisperConfig", WHISPER, sound),
        [*numbered("encoder.layers.{}", 0, 1), *numbered("decoder.layers.{}", 0, 1, 2)],
    ),
    "ViT": ("ViTModel", "ViTConfig", PICTURE, picture, numbered("layers.{}", 0, 1, 2)),
    "ResNet, basic": (
        *("ResNetModel", "ResNetConfig"),
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic"},
        *(picture, ["encoder.stages.0.layers.0", "encoder.stages.0.layers.1", "encoder.stages.1.layers.1"]),
    ),
    "ConvNeXt": (
        *("ConvNextModel", "ConvNextConfig"),
        {"hidden_sizes": [16, 32], "depths": [2, 1], "num_stages": 2},
        *(picture, [*numbered("encoder.stages.0.layers.{}", 0, 1), "encoder.stages.1.layers.0"]),
    ),
    "Swin": (
        *("SwinModel", "SwinConfig"),
        {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "image_size": 32, "window_size": 4},
        *(
            picture,
            [*numbered("encoder.layers.0.blocks.{}", 0, 1), *numbered("encoder.layers.1.blocks.{}", 0, 1)],
        ),
    ),
}


def build(model: str, config: str, settings: dict[str, Any]) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return getattr(transformers, model)(getattr(transformers, config)(**settings))


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_blocks_of_transformers(family: str) -> None:
    model, config, settings, run, expected = HUGGING_FACE[family]
    built = build(model, config, settings)
    assert list(find_blocks(built)) == expected
    assert_blocks_keep_their_stream(built, run)


def test_both_towers_of_a_model_of_text_and_images() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT), vision_config=transformers.CLIPVisionConfig(**PICTURE)
    )
    found = list(find_blocks(transformers.LlavaForConditionalGeneration(config)))
    assert found == [
        *numbered("model.vision_tower.encoder.layers.{}", 0, 1, 2),
        *numbered("model.language_model.layers.{}", 0, 1, 2),
    ]


@pytest.mark.parametrize("layers_to_transform", [None, [0], [1, 2]])
def test_blocks_below_peft(layers_to_transform: list[int] | None) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], layers_to_transform=layers_to_transform)
    model = peft.get_peft_model(build("LlamaForCausalLM", "LlamaConfig", TEXT), config)
    assert list(find_blocks(model)) == numbered("base_model.model.model.layers.{}", 0, 1, 2)
    assert_blocks_keep_their_stream(model, text)


# --- cost -----------------------------------------------------------------------------------------------


def calls_of(function: Callable[..., Any], *args: Any) -> int:
    """How many functions, Python's and C's, a call makes: its work, whatever the machine does beside."""
    count = 0

    def counting(_frame: Any, event: str, _arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(counting)
    try:
        function(*args)
    finally:
        sys.setprofile(before)
    return count


def test_the_search_makes_at_most_a_hundred_calls_a_module_however_deep_the_model() -> None:
    for layers in (25, 100):
        with torch.device("meta"):
            model = build("LlamaForCausalLM", "LlamaConfig", {**TEXT, "num_hidden_layers": layers})
        assert len(find_blocks(model)) == layers
        assert calls_of(find_blocks, model) <= 100 * len(list(model.modules()))  # 60; at 0.3 us a call, 25 ms


# --- naming blocks --------------------------------------------------------------------------------------


@pytest.fixture
def model() -> nn.Module:
    model = Loop(*(ListBlock() for _ in range(4)))
    model.head = nn.Linear(WIDTH, 2)
    return model


def test_without_a_name_the_blocks_are_found(model: nn.Module) -> None:
    assert resolve_blocks(model) == find_blocks(model)


def test_a_name_a_module_and_a_glob_name_the_same_block(model: nn.Module) -> None:
    expected = {"layers.1": model.layers[1]}
    assert resolve_blocks(model, "layers.1") == expected
    assert resolve_blocks(model, model.layers[1]) == expected
    assert resolve_blocks(model, "layers.[1]") == expected
    assert resolve_blocks(model, ["layers.1"]) == expected


def test_a_glob_does_not_reach_into_the_blocks(model: nn.Module) -> None:
    assert list(resolve_blocks(model, "layers.*")) == numbered("layers.{}", 0, 1, 2, 3)
    assert list(resolve_blocks(model, "*.[23]")) == ["layers.2", "layers.3"]
    assert list(resolve_blocks(model, "layers.0.heads.*")) == numbered("layers.0.heads.{}", 0, 1, 2)


def test_mixed_names_come_back_once_each_and_in_model_order(model: nn.Module) -> None:
    blocks = ["layers.3", model.layers[0], "layers.[03]", "head"]
    assert list(resolve_blocks(model, blocks)) == ["layers.0", "layers.3", "head"]
    assert list(resolve_blocks(model, (block for block in blocks))) == ["layers.0", "layers.3", "head"]


def test_a_list_that_cannot_be_called_stands_for_its_members(model: nn.Module) -> None:
    expected = numbered("layers.{}", 0, 1, 2, 3)
    assert list(resolve_blocks(model, model.layers)) == expected
    assert list(resolve_blocks(model, "layers")) == expected
    assert list(resolve_blocks(model, list(model.layers))) == expected


def test_the_whole_model_can_be_a_block() -> None:
    block = Block()
    assert resolve_blocks(block, block) == resolve_blocks(block, "") == resolve_blocks(block, [block]) == {"": block}


def test_every_name_of_a_tied_block_names_it() -> None:
    block = Block()
    model = Loop(block, block)
    assert resolve_blocks(model, "layers.1") == resolve_blocks(model, "layers.*") == {"layers.0": block}


def test_an_unknown_name_is_reported_with_those_near_it(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"name 'layer\.0'.*no module of this Loop.*'layers\.0'"):
        resolve_blocks(model, "layer.0")
    with pytest.raises(ValueError, match=r"glob 'block\.\*'.*does not reach across a dot"):
        resolve_blocks(model, ["layers.0", "block.*"])


def test_a_module_of_another_model_is_reported_with_its_like_in_this_one(model: nn.Module) -> None:
    stranger = copy.deepcopy(model).layers[0]
    with pytest.raises(ValueError, match=r"a ListBlock that is not part of this Loop.*'layers\.0'.*copy"):
        resolve_blocks(model, stranger)


def test_what_is_no_name_at_all_is_a_type_error(model: nn.Module) -> None:
    for wrong in (3, [0, 1], {"layers.0": "keep"}):
        with pytest.raises(TypeError, match="blocks= takes"):
            resolve_blocks(model, wrong)  # type: ignore[arg-type]


def test_naming_no_block_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match="names no block of this Loop"):
        resolve_blocks(model, [])


def test_a_model_without_blocks_is_told_what_was_looked_for_and_what_to_do() -> None:
    perceptron = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(NoBlocksError) as caught:
        resolve_blocks(perceptron)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "in this Sequential" in message
    assert "two or more modules of one type with equal parameter shapes" in message
    assert "'the model itself' (Sequential: 2 Linear, 1 ReLU)" in message
    assert 'blocks="layers.*"' in message
    with pytest.raises(NoBlocksError, match=r"Containers seen: none.*blocks=\[model\] where the whole model"):
        find_blocks(Block())
