"""What `measure` returns: figures of every block of a model under every policy, on one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from abyssal.engine.policy import Policy
from abyssal.profiling.phases import Usage


@dataclass(frozen=True)
class Candidate:
    """What one policy would do to one block.

    Attributes:
        policy: the policy.
        state_error: relative error of the restored input, `|s - x| / |x|`, given the block's exact output.
        worst_token_error: the largest relative error of one position (a vector along the last dimension; of
            images, one pixel's channels), since a mean over all elements hides a few bad tokens.
        gradient_share: this block's contribution to the relative error of the whole parameter gradient;
            contributions of several blocks add up in squares.
        stored_bytes: kept for the stream by this block.
        seconds: forward and backward pass of the block in a training step.
        handed_error: relative error of the state that the block below starts from.
        measured: False where `gradient_share` was scaled from a neighbouring candidate's by the state errors.
    """

    policy: Policy
    state_error: float
    worst_token_error: float
    gradient_share: float
    stored_bytes: int
    seconds: float
    handed_error: float = 0.0
    measured: bool = True


@dataclass(frozen=True)
class BlockMeasurement:
    """One block on the batch that was measured; of a block that was called often, all calls together.

    Attributes:
        name, kind: its name in the model, and its class.
        chain: which chain it is in, counted from 0 in the order of the forward pass.
        shape, dtype, stream_bytes: of the stream at its input; bytes of all its calls.
        increment_ratio: `|x[n+1] - x[n]| / |x[n]|`.
        contraction: by how much one fixed-point step reduces the error, from `x[n+1]`; below 1 it contracts.
        regularity: `|f[n+1](x) - f[n](x)| / |f[n](x)|` at the same x, where the next block is alike: about 1.4
            for independent random weights, about 1/N for weights smooth in depth. None without a next block.
        activation_bytes: what plain autograd stores for it.
        recompute_bytes: transient peak of its recomputation and vector-Jacobian product.
        forward_seconds, backward_seconds: of plain autograd, without recomputation; medians over all evaluations
            of blocks of the same kind and size.
        candidates: what each policy would do.
        notes: what is out of the ordinary, in words.
        calls: how often it was called.
        norm: Euclidean norm of the stream at its input.
        numel: elements of the stream at its input, in all calls.
        surroundings_bytes: random states and changed buffers, which every policy but `Store` keeps.
        responses: how the gradient answers to errors of the state in random directions, such as those of codes: pairs
            of relative errors of the state and of the gradient, by rising size. Mostly in proportion; where units
            switch (ReLU), the gradient's error may fall with the root of the state's only.
        jumps: whether its gradient jumps with its input, so that errors differ widely from batch to batch.
    """

    name: str
    kind: str
    chain: int
    shape: tuple[int, ...]
    dtype: str
    stream_bytes: int
    increment_ratio: float
    contraction: float
    regularity: float | None
    activation_bytes: int
    recompute_bytes: int
    forward_seconds: float
    backward_seconds: float
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...] = ()
    calls: int = 1
    norm: float = 0.0
    numel: int = 0
    surroundings_bytes: int = 0
    responses: tuple[tuple[float, float], ...] = ()
    jumps: bool = False

    def candidate(self, policy: Policy) -> Candidate | None:
        """Return what `policy` would do, or None if it is no candidate here."""
        return next((c for c in self.candidates if c.policy == policy), None)


@dataclass(frozen=True)
class Measurements:
    """All blocks of a model on one batch.

    Attributes:
        blocks: in the order of the forward pass.
        gradient_norm: Euclidean norm of the whole parameter gradient.
        bf16_error: relative error of the gradient under bfloat16 autocast on the same batch (of a bfloat16
            model: against its float32 copy); None where it could not be had, then `bf16_reason` says why.
        bf16_reason: see there.
        plain_peak_bytes: peak of live tensor bytes in a training step of the plain model, above the level
            before the step with gradient buffers allocated; None where it was not measured.
        keep_peak_bytes: the same with every block under `Keep()` (activation checkpointing).
        plain_seconds, keep_seconds: of one training step (forward and backward pass).
        batch: the batch in words.
        environment: versions, device, threads.
        chains: the calls of each chain, first to last, as names of blocks.
        profile: the memory of a step of checkpointing, by phases.
    """

    blocks: tuple[BlockMeasurement, ...]
    gradient_norm: float
    bf16_error: float | None
    bf16_reason: str
    plain_peak_bytes: int | None
    keep_peak_bytes: int | None
    plain_seconds: float
    keep_seconds: float
    batch: str
    environment: Mapping[str, str]
    chains: tuple[tuple[str, ...], ...] = ()
    profile: Usage | None = None

    @property
    def stream_bytes(self) -> int:
        """What activation checkpointing keeps of the stream: every block's input."""
        return sum(block.stream_bytes for block in self.blocks)
