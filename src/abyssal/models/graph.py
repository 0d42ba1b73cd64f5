"""Autograd's graph, walked: where it ends, and whether samples keep their places in it.

Where a layer's rows are which sample's can depend on the data: tokens are routed to experts, or padding is cut out.
What two samples show then need not hold for others. But most graphs prove it by their shape. Call a tensor *in order*
if its entries, in row-major order, are n equal runs, one for each sample. The outputs [n, k] are in order, and if a
node's output is in order, so are its inputs wherever it is one of those below: entry by entry, a change of shape, or
something done within the entries of the first dimension. What no rule knows is not proved, which is no fault yet.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["names_of", "walk"]

_DEPTH = 4  # of views of a parameter that are followed


def names_of(parameters: Mapping[str, nn.Parameter]) -> dict[int, str]:
    """Return parameters' names by their identity."""
    return {id(p): name for name, p in parameters.items()}


def walk(outputs: Tensor, parameters: Mapping[str, nn.Parameter], n: int) -> tuple[Counter[str], bool]:
    """Walk the graph from outputs to parameters.

    Args:
        outputs: of n samples. [n, k]
        parameters: that count, by name.
        n: samples.

    Returns:
        How many edges end at each parameter or its views, of which one can be used several times (a model that takes
        gradients by its input multiplies by a weight's transpose again); whether every tensor on the way is proved to
        be in order.

    Raises:
        ValueError: for reentrant checkpoints, whose inside is in no graph.
    """
    names = names_of(parameters)
    counts: Counter[str] = Counter()
    ordered = True
    seen, waiting = set(), [outputs.grad_fn] if outputs.grad_fn is not None else []
    while waiting:
        node = waiting.pop()
        kind = node.name()
        if kind == "CheckpointFunctionBackward":
            raise ValueError(
                "The model runs parts of itself in reentrant checkpoints (torch.utils.checkpoint with "
                "use_reentrant=True): the parameters inside are in no graph, and would be left out. Pass "
                "use_reentrant=False (transformers: gradient_checkpointing_enable(gradient_checkpointing_kwargs="
                '{"use_reentrant": False})), or switch checkpointing off.'
            )
        if ordered and n > 1:
            rule = _RULES.get(kind)
            ordered = (rule is not None and rule(node, n)) or _of_parameters(node)
        for follower, _ in node.next_functions:
            if follower is None:
                continue
            if (leaf := _leaf(follower)) is not None:
                if id(leaf) in names:
                    counts[names[id(leaf)]] += 1
            elif follower not in seen:
                seen.add(follower)
                waiting.append(follower)
    return counts, ordered


def _leaf(node: Any) -> Tensor | None:
    """Return the leaf that a node gives, or changes the shape of; None for any other node."""
    while node is not None:
        if (leaf := getattr(node, "variable", None)) is not None:
            return leaf
        node = node.next_functions[0][0] if node.name() in _SHAPES else None
    return None


# ---------------------------------------------------------------------- rules: a node and n to whether it is proved


def _shape(node: Any, index: int = 0) -> tuple[int, ...]:
    return tuple(node._input_metadata[index].shape)  # autograd calls what a node's backward is given its inputs


def _carried(node: Any) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Positions and shapes of a node's arguments, of those that samples may have gone into."""
    for at, (follower, index) in enumerate(node.next_functions):
        if follower is not None and not _of_parameters(follower):
            yield at, _shape(follower, index)


def _of_parameters(node: Any, depth: int = _DEPTH) -> bool:
    """Whether a node gives a parameter, a view of one or rows of one."""
    if hasattr(node, "variable"):
        return True
    if depth == 0 or node.name() not in _FROM_PARAMETERS:
        return False
    return all(follower is None or _of_parameters(follower, depth - 1) for follower, _ in node.next_functions)


def _view(node: Any, n: int) -> bool:
    return True


def _entrywise(node: Any, n: int) -> bool:
    """Entry by entry; broadcast along other dimensions than the first, if at all."""
    own = _shape(node)
    return all(
        shape == own or (len(shape) == len(own) and shape[0] == own[0] and own[0] % n == 0)
        for _, shape in _carried(node)
    )


def _within(node: Any, n: int, among: tuple[int, ...] | None = None) -> bool:
    """Within each entry of the first dimension, which samples divide evenly; only some arguments carry samples."""
    own = _shape(node)
    if not own or own[0] % n:
        return False
    return all(len(shape) > 0 and shape[0] == own[0] and (among is None or at in among) for at, shape in _carried(node))


def _first_argument(node: Any, n: int) -> bool:
    return _within(node, n, (0,))


def _product(left: int) -> Callable[[Any, int], bool]:
    """A matrix product's rows are those of its left factor, if the right one is not made of samples."""

    def rule(node: Any, n: int) -> bool:
        factor = node.next_functions[left][0]
        return (factor is None or not _of_parameters(factor)) and _within(node, n, (left,))

    return rule


def _layer_norm(node: Any, n: int) -> bool:
    return len(node._saved_normalized_shape) < len(_shape(node)) and _first_argument(node, n)


def _batch_norm(node: Any, n: int) -> bool:
    return not node._saved_training and _first_argument(node, n)


def _along(*names: str) -> Callable[[Any, int], bool]:
    """Along dimensions that are not the first."""

    def rule(node: Any, n: int) -> bool:
        own = _shape(node)
        shapes = [shape for _, shape in _carried(node)]
        size = max(map(len, (own, *shapes)))
        for name in names:
            found = getattr(node, name, None)  # some overloads reduce everything
            if found is None:
                return False
            for d in found if isinstance(found, tuple | list) else (found,):
                if (d - 2**64 if d >= 2**63 else d) % size == 0:  # negative ones are kept as unsigned
                    return False
        return _within(node, n)

    return rule


def _slice(node: Any, n: int) -> bool:
    own = _shape(node)
    return all(shape == own for _, shape in _carried(node)) or _along("_saved_dim")(node, n)


def _permute(node: Any, n: int) -> bool:
    return node._saved_dims[0] == 0 and _within(node, n)


def _named(names: str) -> frozenset[str]:
    """Nodes of operations; overloads are numbered."""
    return frozenset(f"{name}Backward{i}" for name in names.split() for i in range(5))


_VIEWS = _named("View UnsafeView ReshapeAlias Unsqueeze Squeeze Clone ToCopy Alias")
_ENTRYWISE = _named(
    "Add Sub Rsub Mul Div Neg Tanh Sigmoid Relu Gelu Silu Mish Elu Celu LeakyRelu Hardswish Hardsigmoid Hardtanh "
    "Softplus LogSigmoid Exp Exp2 Expm1 Log Log1P Sqrt Rsqrt Pow Abs Sin Cos Sinh Cosh Atan Erf Reciprocal Clamp "
    "ClampMin ClampMax Where MaskedFill Maximum Minimum Threshold Lerp Addcmul Addcdiv PreluKernel Expand NativeDropout"
)
_ALONG = _named(
    "Sum Mean Amax Amin Max Min Softmax LogSoftmax Select Unbind Split SplitWithSizes Cat Stack Cumsum Logsumexp Var "
    "Std LinalgVectorNorm Glu"
)
_WITHIN = _named(
    "Bmm Baddbmm ScaledDotProductFlashAttentionForCpu ScaledDotProductFlashAttention "
    "ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention AvgPool2D AvgPool3D AdaptiveAvgPool2D "
    "AdaptiveAvgPool3D MaxPool2DWithIndices MaxPool3DWithIndices ConstantPadNd ReflectionPad1D ReflectionPad2D "
    "ReplicationPad1D ReplicationPad2D UpsampleNearest2D UpsampleBilinear2D PixelShuffle"
)
_SHAPES = _named("View UnsafeView ReshapeAlias Unsqueeze Squeeze Alias T Transpose Permute")
_FROM_PARAMETERS = _VIEWS | _named("T Transpose Permute Expand Slice Select Embedding Exp Softplus Sigmoid Tanh Neg")

_RULES: dict[str, Callable[[Any, int], bool]] = {
    **dict.fromkeys(_VIEWS, _view),
    **dict.fromkeys(_ENTRYWISE, _entrywise),
    **dict.fromkeys(_ALONG, _along("_saved_dim")),
    **dict.fromkeys(_WITHIN, _within),
    "_TapBackward": _entrywise,
    "MmBackward0": _product(0),
    "AddmmBackward0": _product(1),
    "LinearBackward0": _product(0),
    "EmbeddingBackward0": _first_argument,
    "ConvolutionBackward0": _first_argument,
    "NativeGroupNormBackward0": _first_argument,
    "NativeLayerNormBackward0": _layer_norm,
    "NativeBatchNormBackward0": _batch_norm,
    "CudnnBatchNormBackward0": _batch_norm,
    "TransposeBackward0": _along("_saved_dim0", "_saved_dim1"),
    "PermuteBackward0": _permute,
    "SliceBackward0": _slice,
}
