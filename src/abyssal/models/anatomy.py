"""What a module's own tree tells of it, read without running it: the evidence on which `chain` decides.

Each function answers one question about one module. Names are evidence here (a `shortcut` that is a
convolution, a `has_skip` that is false), because there is no other without an input; they are gathered in the
constants below, from torchvision, timm, transformers and what people write after them.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

__all__ = [
    "CONTAINERS",
    "adds_input",
    "changes_width",
    "declared_layers",
    "declares_layers",
    "end_widths",
    "has_projection",
    "has_shortcut",
    "is_bare_container",
    "is_torch_layer",
    "keeps_shape",
    "kind",
    "may_be_block",
    "signature",
    "title",
    "unwrap",
]

CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)

# What torch.compile, activation checkpointing and FSDP1 call the module they wrap.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# fully_shard, replicate and parametrize swap a module's class for one of their making, named so.
_MADE_PREFIXES = ("FSDP", "Replicate", "Parametrized")
# A block may be derived from these; a subclass of any other torch.nn class is still that layer.
_BASES = (nn.Module, *CONTAINERS, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
# A user's leaf with weights may be a block, but not where its name says that it is one of these.
_LAYER_NAMES = ("norm", "embed")
# Only a residual block has one of these, and it keeps its input's shape only if that is an identity.
_SHORTCUTS = (
    *("shortcut", "conv_shortcut", "shortcut_conv", "nin_shortcut", "proj_shortcut", "skip_connection"),
    *("conv_skip", "skip_conv", "skip_proj", "proj_skip", "residual_conv", "res_conv"),
)
# Some models have these beside a block's branch, others before or after a stage's blocks.
_RESAMPLERS = ("downsample", "downsampler", "downsampling_layer", "upsample")
_BESIDE = frozenset((*_SHORTCUTS, *_RESAMPLERS))
_SKIP_FLAGS = ("has_skip", "has_residual", "use_res_connect", "use_residual", "apply_residual")
_WIDTHS = (
    *(("in_channels", "out_channels"), ("in_features", "out_features")),
    *(("in_chs", "out_chs"), ("dim", "dim_out")),
)


def unwrap(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """Return the module inside torch.compile's, FSDP1's or a checkpointing wrapper, and its dotted name."""
    while True:
        held = next(((key, module._modules[key]) for key in _WRAPPED if key in module._modules), None)
        if held is None or held[1] is None:
            return name, module
        name, module = f"{name}.{held[0]}" if name else held[0], held[1]


def kind(core: nn.Module) -> type[Any]:
    """Return the class the user wrote, below one that FSDP2 or parametrize made for this module."""
    own = type(core).__name__
    for base in type(core).__mro__[1:]:
        if any(own == prefix + base.__name__ for prefix in _MADE_PREFIXES):
            return base
    return type(core)


def title(module: nn.Module) -> str:
    """Return a module's class name for messages, that of the wrapped module where it is wrapped."""
    return kind(unwrap("", module)[1]).__name__


def signature(core: nn.Module) -> tuple[object, ...]:
    """Return names and shapes of all parameters; a sharded one's shape is that of the whole."""
    return tuple((name, None if is_lazy(p) else tuple(p.shape)) for name, p in core.named_parameters())


def declares_layers(core: nn.Module) -> bool:
    """Whether a module is a model in transformers' manner, which says which classes are its layers."""
    return getattr(core, "_no_split_modules", False) is not False


def declared_layers(core: nn.Module) -> frozenset[str]:
    """Return the class names in every `_no_split_modules` at or below a module."""
    declared = (getattr(module, "_no_split_modules", None) for module in core.modules())
    return frozenset(name for names in declared for name in names or () if isinstance(name, str))


def is_torch_layer(core: nn.Module) -> bool:
    """Whether a module is torch.nn's or a variant of one (a quantised Linear, a padded Conv2d)."""
    own = kind(core)
    if own.__module__.startswith("torch.") and own not in _BASES:
        return True
    return any(base.__module__.startswith("torch.nn.") and base not in _BASES for base in own.__mro__)


def is_bare_container(core: nn.Module) -> bool:
    """Whether a module is a container without a `forward` of its own."""
    return isinstance(core, CONTAINERS) and kind(core).forward in (nn.Sequential.forward, nn.Module.forward)


def may_be_block(core: nn.Module) -> bool:
    """Whether a module could be a residual block at all: callable, with weights, and no plain layer."""
    if is_torch_layer(core) or kind(core).forward is nn.Module.forward:
        return False
    if next(core.parameters(), None) is None and next(core.buffers(), None) is None:
        return False
    if not core._modules:
        return not any(name in kind(core).__name__.lower() for name in _LAYER_NAMES)
    if is_bare_container(core):  # nothing adds a skip connection in an nn.Sequential of torch.nn layers
        return any(may_be_block(child) for child in core.children())
    return True


def has_shortcut(core: nn.Module) -> bool:
    """Whether a module has a place for a shortcut, if only an empty one; a stage of blocks has none."""
    return any(name in core._modules or core.__dict__.get(name, False) is None for name in _SHORTCUTS)


def adds_input(core: nn.Module) -> bool:
    """Whether a module says that it adds its own input, unchanged."""
    flagged = any(getattr(core, flag, False) is True for flag in _SKIP_FLAGS)
    return flagged or any(_is_identity(core._modules.get(name)) for name in _SHORTCUTS)


def has_projection(core: nn.Module) -> bool:
    """Whether something other than the identity, or nothing, is added to a module's branch."""
    if any(getattr(core, flag, True) is False for flag in _SKIP_FLAGS):
        return True
    # Looked for at every level: MaxViT's blocks change shape in a convolution block inside them.
    beside = (inner._modules[name] for inner in core.modules() for name in _BESIDE & inner._modules.keys())
    return any(module is not None and not _is_identity(module) for module in beside)


def keeps_shape(core: nn.Module) -> bool:
    """Whether nothing in a module's tree says that its output has another shape than its input."""
    for before, after in _WIDTHS:
        widths = getattr(core, before, None), getattr(core, after, None)
        if all(isinstance(width, int) for width in widths) and widths[0] != widths[1]:
            return False
    stride = getattr(core, "stride", 1)
    strides = stride if isinstance(stride, tuple | list) else (stride,)
    return all(step == 1 for step in strides if isinstance(step, int)) and not has_projection(core)


def end_widths(core: nn.Module) -> tuple[int | None, int | None]:
    """Return the width that the first torch.nn layer with weights reads, and the last one writes."""
    layers = [m for m in core.modules() if is_torch_layer(m) and next(m.parameters(recurse=False), None) is not None]
    return (_width(layers[0], "in"), _width(layers[-1], "out")) if layers else (None, None)


def changes_width(core: nn.Module) -> bool:
    """Whether a module visibly reads one width and writes another."""
    before, after = end_widths(core)
    return before is not None and after is not None and before != after


def _width(layer: nn.Module, side: str) -> int | None:
    for name in (f"{side}_features", f"{side}_channels", "num_features", "num_channels"):
        if isinstance(width := getattr(layer, name, None), int):
            return width
    shape = getattr(layer, "normalized_shape", None)
    return shape[-1] if isinstance(shape, tuple) and shape else None


def _is_identity(module: nn.Module | None) -> bool:
    if isinstance(module, nn.Sequential):
        return all(isinstance(member, nn.Identity) for member in module)
    return isinstance(module, nn.Identity)
