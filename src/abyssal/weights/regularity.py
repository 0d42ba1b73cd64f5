"""Whether a trained network's weights are a function of depth, noise in depth, or something between.

Which limit a residual network has as it deepens is decided by the regularity of its weights in depth (Marion,
Fermanian, Biau, Vert 2022, arXiv 2206.06929): weights that sample a continuous function of n/N lead to an ordinary
differential equation, independent ones to a stochastic one, fractional noise to neither. A given network has one
depth, so that what can be said about it is how its weights look at that depth, with an interval, and no more.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from abyssal.models.find import find_blocks
from abyssal.nn import ResidualStack
from abyssal.util.files import for_json
from abyssal.weights import columns as _columns
from abyssal.weights import hurst
from abyssal.weights.families import check_dtype
from abyssal.weights.hurst import Estimate
from abyssal.weights.smoothness import Smoothness, changes, describe

__all__ = ["Regularity", "Role", "Verdict", "regularity"]

Verdict = Literal["ODE-like", "SDE-like", "neither", "constant", "undecided"]

TELLING_DEPTH = 16  # below it, fewer than two octaves of scales lie between one block and the whole depth
WHITE = (0.45, 0.55)  # an interval that meets this is called i.i.d.
SMOOTHEST_NOISE = 0.1  # a path rougher than this at short scales cannot be told from one with noise added
WIDEST = 0.3  # an interval wider than this decides nothing
_MOST_COLUMNS = 2**20  # of one parameter; of a larger one, evenly spaced output rows are read


@dataclass(frozen=True)
class Role:
    """One parameter of the blocks of a chain, through depth.

    Attributes:
        chain: name of the chain: the container that holds its blocks; empty for weights given as such.
        name: the parameter's name in a block.
        shape: its shape in one block.
        depth: number of blocks.
        verdict: "ODE-like": a continuous path; "SDE-like": noise, independent from block to block; "neither";
            "constant": no change with depth to speak of; "undecided".
        reason: the verdict in words, with its figures.
        hurst: the Hurst index with its interval; None where nothing changes with depth.
        smoothness: what increments against depth look like.
    """

    chain: str
    name: str
    shape: tuple[int, ...]
    depth: int
    verdict: Verdict
    reason: str
    hurst: Estimate | None
    smoothness: Smoothness

    @property
    def entries(self) -> int:
        """Number of entries in one block."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Regularity:
    """How the weights of a model change with depth, by role; `print` shows a table and the verdict.

    Attributes:
        roles: every parameter that the blocks of a chain share, in model order.
        verdict: on the whole, by the matrices among them (all roles where there is none): the one that they
            agree on, and "neither" or "undecided" where they do not.
        summary: the same in a sentence.
        skipped: what could not be read as a path through depth, and why.
    """

    roles: tuple[Role, ...]
    verdict: Verdict
    summary: str
    skipped: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers, strings and lists, for JSON; None for what could not be measured."""
        return {name: for_json(value) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        # `file` keeps a console's contents out of the terminal.
        console = Console(file=io.StringIO(), width=150)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title="Weights against depth")
        for heading in ("weights", "one block", "blocks"):
            table.add_column(heading, justify="left" if heading == "weights" else "right")
        for heading in ("looks like", "Hurst index", "N max|dw|", "lag 1", "shared"):
            table.add_column(heading, justify="left" if heading == "looks like" else "right")
        table.add_column("verdict")
        for role in self.roles:
            h, s = role.hurst, role.smoothness
            table.add_row(
                Text(_label(role.chain, role.name)),
                "x".join(map(str, role.shape)),
                str(role.depth),
                "" if h is None else h.kind,
                "" if h is None else f"{h.value:.3f} [{h.low:.3f}, {h.high:.3f}]",
                f"{s.steepest:.3g}",
                f"{s.lag1:.2f}",
                f"{s.profile:.0%}",
                role.verdict,
            )
        yield table
        yield Text(
            "Hurst index: of noise 1/2 is i.i.d.; of a path, its roughness (95% interval). N max|dw|: blocks times the "
            "largest rms change\nfrom one to the next, relative to the weights' rms; bounded in depth for smooth ones. "
            "shared: share of the change that is one profile.",
            style="dim",
        )
        for line in self.skipped:
            yield Text(f"Not read: {line}", style="dim")
        yield Text(self.summary, style="bold")


def regularity(model: nn.Module | Tensor | Sequence[nn.Module] | Mapping[str, Tensor]) -> Regularity:
    """Say whether a network's weights are ODE-like, SDE-like or neither, by role, with numbers and intervals.

    Only weights are looked at, in one or two passes; nothing is run or changed. A limit also needs the right
    scale of the branches: 1/N for ODE-like weights, 1/sqrt(N) for SDE-like ones.

    Args:
        model: a model whose blocks :func:`~abyssal.find_blocks` finds; a
            :class:`~abyssal.nn.ResidualStack`; the blocks themselves, first to last; weights [depth, ...]; or
            several of these by name. Of parameters with more than 2^20 entries in a block, evenly spaced rows
            are read.

    Returns:
        The table. Below 16 blocks the figures are there and the verdict is "undecided".

    Raises:
        NoBlocksError: if the model has no blocks that can be found.
        ValueError: if no parameter of at least 4 blocks can be read as a path, with the reasons; for weights that
            are not finite.
        TypeError: for something else.
    """
    skipped: list[str] = []
    paths = _paths(model, skipped)
    roles = []
    for chain, name, tensors in paths:
        try:
            roles.append(_role(chain, name, tensors))
        except ValueError as error:
            skipped.append(f"{_label(chain, name)}: {error}")
    if not roles:
        raise ValueError(
            "There is no parameter of at least 4 equal blocks to read as a path through depth. "
            + ("Not read: " + "; ".join(skipped) if skipped else "The blocks have no parameters.")
        )
    verdict, summary = _overall(roles)
    return Regularity(tuple(roles), verdict, summary, tuple(skipped))


def _paths(model: object, skipped: list[str]) -> list[tuple[str, str, list[Tensor]]]:
    """Return chain, parameter name and the tensors of all depths."""
    if isinstance(model, Tensor):
        return [("", "weights", list(model.detach().unbind(0)))]
    if isinstance(model, Mapping):
        return [("", str(name), list(weights.detach().unbind(0))) for name, weights in model.items()]
    if isinstance(model, ResidualStack):
        return _parameters("", model.blocks, skipped)
    if isinstance(model, nn.ModuleList) or (isinstance(model, Sequence) and not isinstance(model, str)):
        return _parameters("", list(model), skipped)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"regularity takes a model, a ResidualStack, blocks, or weights [depth, ...]; got a {type(model).__name__}."
        )
    chains: dict[tuple[str, type], list[nn.Module]] = defaultdict(list)
    for name, block in find_blocks(model).items():
        chains[name.rpartition(".")[0], type(block)].append(block)
    return [path for (name, _), blocks in chains.items() for path in _parameters(name, blocks, skipped)]


def _parameters(chain: str, blocks: list[nn.Module], skipped: list[str]) -> list[tuple[str, str, list[Tensor]]]:
    if not all(isinstance(block, nn.Module) for block in blocks):
        raise TypeError(f"A sequence of blocks has to hold modules; got {[type(block).__name__ for block in blocks]}.")
    if len(blocks) < _columns.MIN_DEPTH:
        skipped.append(f"{chain or 'the blocks'}: {len(blocks)} blocks, at least {_columns.MIN_DEPTH} are needed")
        return []
    # With duplicates: a weight that blocks share is a path too, a constant one.
    named = [dict(block.named_parameters(remove_duplicate=False)) for block in blocks]
    paths = []
    for name in dict.fromkeys(name for parameters in named for name in parameters):
        tensors = [parameters[name].detach() for parameters in named if name in parameters]
        label = _label(chain, name)
        if len(tensors) < len(blocks):
            skipped.append(f"{label}: only {len(tensors)} of {len(blocks)} blocks have it")
        elif len({tensor.shape for tensor in tensors}) > 1:
            skipped.append(f"{label}: its shape differs from block to block")
        elif tensors[0].numel():
            paths.append((chain, name.replace("_orig_mod.", ""), tensors))
    return paths


def _label(chain: str, name: str) -> str:
    return f"{chain}.*.{name}" if chain else name


def _role(chain: str, name: str, tensors: list[Tensor]) -> Role:
    shape = tuple(tensors[0].shape) if tensors else ()
    for tensor in tensors:
        check_dtype(tensor.dtype)
    if tensors and tensors[0].dim() >= 2 and tensors[0].numel() > _MOST_COLUMNS:
        stride = -(-tensors[0].numel() // _MOST_COLUMNS)
        tensors = [tensor[::stride] for tensor in tensors]
    columns = _columns.Columns.of(tensors)
    summary = _columns.summarise(columns)
    smooth = describe(summary)
    if not changes(summary):
        shared = smooth.step > 1e-7
        reason = "every block has the same entries" + (", but for a profile that all share" if shared else "")
        return Role(chain, name, shape, columns.depth, "constant", reason, None, smooth)
    found = hurst.estimate(columns, summary, None, 0.95)
    verdict, reason = _judge(found, smooth)
    return Role(chain, name, shape, columns.depth, verdict, reason, found, smooth)


def _judge(found: Estimate, smooth: Smoothness) -> tuple[Verdict, str]:
    """Return the verdict on one role, and why."""
    interval = f"H = {found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
    if found.depth < TELLING_DEPTH:
        return "undecided", (
            f"{found.depth} blocks are too few to tell a law from its neighbours: at this depth they look like "
            f"{_look(found)}, {interval}"
        )
    if found.high - found.low > WIDEST:
        return "undecided", f"the interval is too wide: {interval} as {_look(found)}"
    nearby = found.value if found.short is None else found.short[0]  # the limit is decided by short scales
    if found.kind == "path" and nearby < SMOOTHEST_NOISE:
        return "neither", (
            f"noise from block to block on top of a path (or a path rougher than H = {SMOOTHEST_NOISE}): {interval}, "
            f"lag-1 correlation {smooth.lag1:.2f}"
        )
    if found.kind == "path":
        roughness = "differentiable" if found.at_edge else f"rough, {interval}"
        return "ODE-like", f"a continuous function of depth ({roughness}), lag-1 correlation {smooth.lag1:.2f}"
    if not found.scales_agree and found.long is not None and found.short is not None:
        return "neither", (
            f"a mixture: H = {found.short[0]:.2f} from block to block, {found.long[0]:.2f} on long scales; "
            f"lag-1 correlation {smooth.lag1:.2f}"
        )
    if found.high < WHITE[0]:
        return "neither", f"noise that alternates from block to block, {interval}"
    if found.low <= WHITE[1]:
        return "SDE-like", f"noise, nearly independent from block to block, {interval}"
    if found.at_edge:
        return "ODE-like", f"hardly any noise left, {interval}"
    return "neither", f"noise with memory, between an SDE's (1/2) and an ODE's (1), {interval}"


def _look(found: Estimate) -> str:
    return "noise" if found.kind == "noise" else "a path"


def _overall(roles: list[Role]) -> tuple[Verdict, str]:
    """Return the verdict that the matrices agree on, or that they do not."""
    telling = [role for role in roles if len(role.shape) >= 2] or roles
    moving = [role for role in telling if role.verdict != "constant"]
    if not moving:
        return (
            "constant",
            "The weights do not change with depth: a constant path, so ODE-like if branches are scaled 1/N.",
        )
    if max(role.depth for role in moving) < TELLING_DEPTH:
        depth = max(role.depth for role in moving)
        return "undecided", (
            f"No verdict: {depth} blocks are too few to tell ODE-like from SDE-like weights "
            f"({TELLING_DEPTH} at least). The intervals say what these blocks look like at this depth only."
        )
    votes: Counter[Verdict] = Counter()
    for role in moving:
        votes[role.verdict] += role.entries * role.depth
    verdict, share = votes.most_common(1)[0]
    total = sum(votes.values())
    parts = ", ".join(f"{vote} {count / total:.0%}" for vote, count in votes.most_common())
    if share < 0.9 * total:
        return (
            "undecided" if verdict == "undecided" else "neither"
        ), f"Neither as a whole: of the matrix entries, {parts}."
    words = {
        "ODE-like": "ODE-like: the weights follow a continuous function of depth.",
        "SDE-like": "SDE-like: the weights are independent noise from block to block.",
        "neither": "Neither: the weights are no function of depth, and no independent noise either.",
        "undecided": "No verdict: the intervals are too wide.",
        "constant": "",
    }
    main = max((role for role in moving if role.verdict == verdict), key=lambda role: role.entries)
    return verdict, f"{words[verdict]} {main.name}: {main.reason}."
