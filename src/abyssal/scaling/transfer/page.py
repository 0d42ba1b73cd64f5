"""A depth check as files: a page, a picture, and everything as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from abyssal.report.page import Column, Figure, Headline, Page, Section, Table, write
from abyssal.report.plots import SERIES, Curve, curves
from abyssal.scaling.transfer.check_result import DepthCheck
from abyssal.scaling.transfer.learning_rate import Transfer
from abyssal.scaling.transfer.sizes import JUDGED, QUANTITIES, Run
from abyssal.util.environment import Environment
from abyssal.util.files import write_whole

__all__ = ["build_page", "save"]

_CURVES = {  # of the judged quantities, those that get a curve
    "stream": "stream,\nat the start",
    "first_step": "output, first\nstep of blocks",
    "output_change": "output,\nall steps",
    "stream_change": "stream,\nall steps",
}
_WORDS = {
    "stable": "stable",
    "allowed": "0: allowed",
    "unstable": "not stable",
    "undecided": "not decided",
    "still": "0: nothing learned",
    "diverged": "diverged",
}


def save(
    check: DepthCheck,
    folder: Path,
    command: str,
    environment: Environment,
    subject: str,
    transfer: Transfer | None = None,
) -> Path:
    """Write `depth-check.png`, `depth-check.json`, `transfer.png` where there is one, and `index.html`; return that.

    Args:
        check: what was found.
        folder: exists, and can be written to.
        command: the command line that gives it.
        environment: machine and versions.
        subject: the network and its batch, in words.
        transfer: loss against learning rate.
    """
    check.plot(folder / "depth-check.png")
    if transfer is not None:
        transfer.plot(folder / "transfer.png")
    numbers = {
        "subject": subject,
        "check": check.to_dict(),
        "transfer": None if transfer is None else transfer.to_dict(),
        "environment": environment.to_dict(),
    }
    write_whole(folder / "depth-check.json", json.dumps(numbers, indent=1, allow_nan=False) + "\n")
    return write(build_page(check, command, environment, subject, transfer), folder / "index.html")


def build_page(
    check: DepthCheck, command: str, environment: Environment, subject: str, transfer: Transfer | None = None
) -> Page:
    """Return the page; every number on it comes from the check and the transfer."""
    seeds = f"{len(check.seeds)} seed" + ("" if len(check.seeds) == 1 else "s")
    lead = (
        f"{subject}. Rule `{check.rule}`; depths {', '.join(map(str, check.depths))}; {check.steps} steps of "
        f"{'AdamW' if check.optimizer == 'adamw' else 'SGD'} at a base learning rate of {check.lr:g}; {seeds}. "
        + check.verdict()
    )
    rates = () if transfer is None else (_rates(transfer),)
    return Page(
        title=_title(check),
        lead=lead,
        command=command,
        headlines=_headlines(check, transfer),
        sections=(_powers(check), _steps(check), *_profiles(check), *rates, _numbers(check)),
        facts=environment.facts(),
    )


def _title(check: DepthCheck) -> str:
    first, last = check.depths[0], check.depths[-1]
    name = "No rule of depth" if check.rule == "none" else check.rule
    if check.passed:
        return f"{name}: stable from depth {first} to {last}"
    if check.diverged:
        return f"{name}: diverged at depth {check.diverged[0]}"
    unstable = [finding for finding in check.findings if finding.state == "unstable"]
    return f"{name}: {'not stable' if unstable else 'not decided'} from depth {first} to {last}"


def _headlines(check: DepthCheck, transfer: Transfer | None) -> tuple[Headline, ...]:
    shown = [("first_step", "how far the first step of the blocks moves the output, in depth L")]
    shown += [("output_change", f"how far {check.steps} steps move the output")]
    shown += [("stream", "the stream's size after the last block, at initialisation")]
    heads = [
        Headline(_power(check.slopes[name].value), text)
        for name, text in shown
        if not math.isnan(check.slopes[name].value)
    ]
    if transfer is not None and not math.isnan(transfer.shift):
        heads.append(Headline(f"{2**transfer.shift:.2f}x", "the best learning rate, deepest by shallowest"))
    return tuple(heads)


def _powers(check: DepthCheck) -> Section:
    lines = []
    for series, (name, label) in enumerate(_CURVES.items(), start=1):
        middle = np.median(check.sizes(name), axis=1)
        if np.isfinite(middle).any() and (middle > 0).any():
            lines.append(Curve(label, check.depths, [_shown(value) for value in middle], series))
    text = (
        "If a step of a given learning rate moves the output as `L^p`, the learning rate has to go as `L^-p` to keep "
        f"that motion. Over these depths it moves by less than a factor of 2, and is nearer to 0 than to the next "
        f"power that theory knows, if p is within ±{check.threshold:.2f}. A quantity is stable if its whole interval "
        "is.",
        "The first step of the blocks: all parameters outside of the blocks are held at initialisation, so that "
        "embedding and head, which do not see the depth, do not hide what the blocks do.",
    )
    if not lines:
        return Section("Nothing was a finite number", text)
    svg = curves(
        lines,
        alt=f"Sizes against depth. {check.verdict()}",
        x_label="depth",
        y_label="size, by that at initialisation" if check.relative else "size",
        x_scale="log2",
        y_scale="log",
    )
    return Section("What grows with depth", text, Figure(svg, "Medians over seeds. Flat is stable."), _table(check))


def _table(check: DepthCheck) -> Table:
    states = {finding.quantity: _WORDS[finding.state] for finding in check.findings}
    rows = []
    for name in QUANTITIES:
        slope = check.slopes[name]
        interval = "" if math.isnan(slope.low) else f"{slope.low:+.2f} to {slope.high:+.2f}"
        power = "" if math.isnan(slope.value) else f"{slope.value:+.2f}"
        rows.append((QUANTITIES[name], power, interval, states.get(name, "not judged")))
    columns = (Column("quantity", False), Column("power of depth"), Column("95 %"), Column("verdict", False))
    return Table(
        f"Powers of the depth; the verdict is on the first {len(JUDGED)}",
        columns,
        tuple(rows),
        notes=(
            "Sizes are root mean squares over entries. Increments are by the block's input, root mean square over "
            "blocks; their change is by the increment at initialisation, median over blocks: where it falls with "
            "depth, the blocks of deep networks hardly learn.",
        ),
    )


def _steps(check: DepthCheck) -> Section:
    lines = [
        Curve(f"depth {depth}", range(1, check.steps + 1), [_shown(y) for y in check.by_step(depth)], series)
        for series, depth in _few(check.depths)
    ]
    title = "The output, step by step"
    if check.steps < 2 or not any(math.isfinite(y) and y > 0 for line in lines for y in line.y):
        return Section(title, ("There is nothing to draw: a single step, or no finite size.",))
    svg = curves(
        lines,
        alt=f"Change of the output over {check.steps} steps at {len(lines)} depths",
        x_label="step",
        y_label="change of the output" + (" / its size" if check.relative else ""),
        y_scale="log",
    )
    return Section(
        title,
        ("How far the output is from what it was at initialisation, on one batch. Curves that lie on one another are "
         "what a rule of depth is for.",),
        Figure(svg, "Medians over seeds."),
    )  # fmt: skip


def _profiles(check: DepthCheck) -> tuple[Section, ...]:
    found = []
    for title, label, text, values in (
        (
            "What each block adds, at initialisation",
            "increment / stream",
            "Independent blocks whose increments are about L^-1/2 of the stream have a stochastic differential "
            "equation as their limit; with L^-1 they cancel, and a deep network begins as the identity. With less than "
            "L^-1/2 it explodes.",
            lambda run: run.increment,
        ),
        (
            f"What {check.steps} steps change in the stream",
            "change of the stream / its size",
            "After each block, since initialisation: what the blocks below have learned together.",
            lambda run: run.stream_change,
        ),
    ):
        lines = _along(check, values)
        if not any(math.isfinite(y) and y > 0 for line in lines for y in line.y):
            continue
        svg = curves(lines, alt=f"{title}, at {len(lines)} depths", x_label="block / depth", y_label=label,
                     y_scale="log")  # fmt: skip
        found.append(
            Section(title, (text,), Figure(svg, "Medians over seeds; blocks where the size is 0 are left out."))
        )
    return tuple(found)


def _along(check: DepthCheck, values: Callable[[Run], tuple[float, ...]]) -> list[Curve]:
    lines = []
    for series, depth in _few(check.depths):
        y = [_shown(value) for value in check.profile(depth, values)]
        lines.append(Curve(f"depth {depth}", [(i + 1) / len(y) for i in range(len(y))], y, series, "dots"))
    return lines


def _rates(transfer: Transfer) -> Section:
    means = transfer.mean_losses
    lines = [
        Curve(
            f"depth {depth}",
            [math.log2(rate) for rate in transfer.rates],
            [float(y) if math.isfinite(y) else math.nan for y in means[transfer.depths.index(depth)]],
            series,
        )
        for series, depth in _few(transfer.depths)
    ]
    rows = []
    for best in transfer.optima:
        interval = "" if math.isnan(best.low) or best.at_edge else f"{best.low:.2e} to {best.high:.2e}"
        rate = f"{best.rate:.2e}" + (" or beyond" if best.at_edge else "")
        rows.append((str(best.depth), rate, interval, f"{best.loss:.4f}", f"{transfer.regret(best.depth):.4f}"))
    columns = ("depth", "best base rate", "95 %", "loss there", "lost at the shallowest one's")
    table = Table("Best learning rates", tuple(map(Column, columns)), tuple(rows)) if rows else None
    if not np.isfinite(means).any():
        return Section("Every training diverged", (transfer.verdict(),))
    svg = curves(
        lines,
        alt=f"Loss against learning rate. {transfer.verdict()}",
        x_label="log2 of the base learning rate",
        y_label="loss",
    )
    return Section(
        "Do the best learning rates line up?",
        (
            transfer.verdict(),
            "The best rate is the lowest point of a parabola through the best one and its neighbours.",
        ),
        Figure(svg, f"Means over {len(transfer.seeds)} seeds; what diverged is left out."),
        table,
    )


def _numbers(check: DepthCheck) -> Section:
    columns = (Column("quantity", False), *(Column(f"L = {depth}") for depth in check.depths))
    rows = tuple(
        (QUANTITIES[name], *(f"{value:.3g}" for value in np.median(check.sizes(name), axis=1))) for name in QUANTITIES
    )
    return Section(
        "All sizes",
        ("`depth-check.json` beside this page has every run and every block.",),
        table=Table("Medians over seeds", columns, rows),
    )


def _few(depths: Sequence[int]) -> list[tuple[int, int]]:
    """Return `(series, depth)` for as many depths as there are colours: the first, the last, and some between."""
    chosen = sorted({depths[round(i * (len(depths) - 1) / (SERIES - 1))] for i in range(SERIES)})
    return list(enumerate(chosen, start=1))


def _power(value: float) -> str:
    return f"L^{value:+.2f}".replace("-", "−")


def _shown(value: float) -> float:
    return float(value) if math.isfinite(value) else math.nan
