"""Tangent kernels as files: a page with plots, tables as CSV."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from abyssal.papers.experiment import Row
from abyssal.papers.page import findings_table
from abyssal.papers.shared.lly import as_width, factor
from abyssal.papers.shared.powers import by_seed, by_size, power
from abyssal.papers.tangent_widths import AgainstWidth, Training
from abyssal.report.page import Column, Figure, Headline, Page, Section, Table, write
from abyssal.report.plots import Curve, curves
from abyssal.util.environment import Environment
from abyssal.util.files import write_table

__all__ = ["save", "save_training", "training_page", "width_page"]


def save(found: AgainstWidth, folder: Path, command: str, environment: Environment) -> Path:
    """Write `drift.csv`, `truncation.csv` and `index.html` into a folder, each whole or not at all; return the page."""
    write_table(found.drift_rows, folder / "drift")
    write_table(found.truncation_rows, folder / "truncation")
    return write(width_page(found, command, environment), folder / "index.html")


def save_training(found: Training, folder: Path, command: str, environment: Environment) -> Path:
    """Write `training.csv` and `index.html` into a folder, each whole or not at all; return the page."""
    write_table(found.rows(), folder / "training")
    return write(training_page(found, command, environment), folder / "index.html")


# ---------------------------------------------------------------------- against width


def width_page(found: AgainstWidth, command: str, environment: Environment) -> Page:
    """Return the page of kernels against width; every number on it comes from the rows."""
    widths = found.drift.widths
    lead = (
        f"{found.subject}. Widths {', '.join(map(str, widths))}; {found.drift.seeds} seeds each. Gradient flow of the "
        "squared loss, float64; time in units of `n / lambda_max` of the kernel at the start, in which the kernel's "
        "fastest direction learns at the same pace in every network."
    )
    return Page(
        title=_title(found),
        lead=lead,
        command=command,
        headlines=_headlines(found),
        sections=(*_drift(found), *_higher(found), *_truncations(found), _verdicts(found), _numbers(found)),
        facts={**environment.facts(), "CPU time": f"{found.seconds:.0f} s in all"},
    )


def _last(found: AgainstWidth) -> str:
    return f"drift_max_{max(found.drift.by_largest):g}"


def _sized(rows: Sequence[Row], column: str, **where: object) -> tuple[list[int], np.ndarray]:
    """Return sizes and values as numbers, nan for what was not measured."""
    return by_size([row for row in rows if row.get(column) is not None], "width", column, **where)


def _title(found: AgainstWidth) -> str:
    width, column = found.drift.widths[-1], _last(found)
    if len(found.networks) > 1:
        ratio = factor(
            by_seed(found.drift_rows, column, network="plain", width=width),
            by_seed(found.drift_rows, column, network="resnet", width=width),
        )
        if ratio.low <= 1 <= ratio.high:
            return f"At width {width} the two networks' kernels move about equally far, as far as the seeds tell"
        how = f"{ratio.value:.1f} times less" if ratio.value > 1 else f"{1 / ratio.value:.1f} times more"
        return f"At width {width} the ResNet's kernel moves {how}"
    (network,) = found.networks
    slope = power(*_sized(found.drift_rows, column, network=network))
    if math.isnan(slope.value):
        return f"How far the kernel of {found.networks[network]} moves"
    return f"The kernel's drift goes as {as_width(slope).partition(' ')[0]}"


def _headlines(found: AgainstWidth) -> tuple[Headline, ...]:
    tau, width = max(found.drift.by_largest), found.drift.widths[-1]
    heads = []
    for network, name in found.networks.items():
        values = list(by_seed(found.drift_rows, _last(found), network=network, width=width).values())
        text = f"drift of the kernel at time {tau:g}, width {width}" + (f", {name}" if len(found.networks) > 1 else "")
        heads.append(Headline(f"{np.median(values):.2%}", text))
    order, network = (found.orders or [2])[-1], next(iter(found.networks))
    time = found.truncation.times[-1]
    values = list(
        by_seed(found.truncation_rows, "kernel_error", network=network, width=width, order=order, time=time).values()
    )
    if values and order > 2:
        heads.append(
            Headline(f"{np.median(values):.1e}", f"what the hierarchy cut off at order {order} is wrong by, then")
        )
    return tuple(heads)


def _curve(found: AgainstWidth, rows: Sequence[Row], column: str, label: str, series: int, **where: object) -> Curve:
    sizes, values = _sized(rows, column, **where)
    slope = power(sizes, values)
    shown = "" if math.isnan(slope.value) else f"\nm^{slope.value:.2f}".replace("-", "−")
    return Curve(label + shown, sizes, [float(v) for v in np.median(values, axis=1)], series)


def _against_width(lines: Sequence[Curve], alt: str, what: str) -> str:
    return curves(lines, alt=alt, x_label="width m", y_label=what, x_scale="log2", y_scale="log")


def _drift(found: AgainstWidth) -> list[Section]:
    parts = [("max", max(found.drift.by_largest), "n / lambda_max", "The fast clock: how far the kernel moves")]
    if found.drift.by_least:
        parts.append(("min", max(found.drift.by_least), "n / lambda_min", "The slow clock"))
    texts = {
        "max": "Distance of the kernel from its start, `|K - K_0| / |K_0|`, in Frobenius norms. Training that leaves "
        "the kernel where it was is linear in the parameters (the lazy regime); drift is what it learns beyond.",
        "min": "The same with time counted by the kernel's slowest direction, whose error falls by e in time 1.",
    }
    sections = []
    for unit, tau, name, title in parts:
        column = f"drift_{unit}_{tau:g}"
        lines = [
            _curve(found, found.drift_rows, column, _short(label), series, network=network)
            for series, (network, label) in enumerate(found.networks.items(), start=1)
        ]
        svg = _against_width(lines, f"Kernel drift against width at time {tau:g} {name}", "|K − K₀| / |K₀|")
        caption = f"Medians over {found.drift.seeds} seeds at time {tau:g} `{name}`."
        sections.append(Section(title, (texts[unit],), Figure(svg, caption), _drift_table(found, column)))
    return sections


def _drift_table(found: AgainstWidth, column: str) -> Table:
    names = list(found.networks.values())
    both = len(names) > 1
    rows = []
    for width in found.drift.widths:
        drifts = [by_seed(found.drift_rows, column, network=network, width=width) for network in found.networks]
        cells = [_spread(list(values.values())) for values in drifts]
        rows.append((str(width), *cells, *([factor(drifts[0], drifts[1]).show(".2g")] if both else [])))
    powers = [as_width(power(*_sized(found.drift_rows, column, network=network))) for network in found.networks]
    rows.append(("power", *powers, *([""] if both else [])))
    ratio = (Column(f"{names[0]} / {names[1]}"),) if both else ()
    return Table(
        "Drift: median over seeds (least to most)",
        (Column("width"), *map(Column, names), *ratio),
        tuple(rows),
        notes=("Powers and ratios with 95 % intervals.",),
    )


def _spread(values: Sequence[float]) -> str:
    return f"{np.median(values):.2%} ({min(values):.2%} to {max(values):.2%})" if values else ""


def _higher(found: AgainstWidth) -> list[Section]:
    kernels = [name for name in ("K3", "K4") if any(row.get(name) is not None for row in found.drift_rows)]
    if not kernels:
        return []
    lines = [
        _curve(found, found.drift_rows, kernel, f"{kernel}, {_short(label)}", 2 * i + j + 1, network=network)
        for i, kernel in enumerate(kernels)
        for j, (network, label) in enumerate(found.networks.items())
    ]
    svg = _against_width(lines, "Largest entries of K3 and K4 against width", "sup |K|")
    text = (
        "K3 is what moves the kernel, `dK/dt = -(1/n) sum_b K3(., ., b) (f_b - y_b)`, and K4 what moves K3. Where they "
        "fall with width, a wide network's kernel stands still.",
    )
    return [Section("What moves it", text, Figure(svg, "Largest absolute entries at the start, medians over seeds."))]


def _truncations(found: AgainstWidth) -> list[Section]:
    sections = []
    time = found.truncation.times[-1]
    for network, name in found.networks.items():
        lines = [
            _curve(found, found.truncation_rows, "kernel_error", f"order {order}", series, network=network,
                   order=order, time=time)
            for series, order in enumerate(found.orders, start=1)
        ]  # fmt: skip
        if not lines:
            continue
        alt = f"Error of the truncated hierarchy against width, {name}"
        svg = _against_width(lines, alt, "relative error of the kernel")
        text = (
            "The kernel of the true flow against that of the hierarchy cut off at an order, whose last kernel is held "
            "constant. Order 2 is the kernel at the start.",
        )
        caption = f"At time {time:g} `n / lambda_max`; medians over seeds."
        title = "What the hierarchy predicts" + (f": {name}" if len(found.networks) > 1 else "")
        sections.append(Section(title, text, Figure(svg, caption), _error_table(found, network)))
    return sections


def _error_table(found: AgainstWidth, network: str) -> Table:
    rows = []
    for time in found.truncation.times:
        for order in found.orders:
            where = {"network": network, "order": order, "time": time}
            _, errors = _sized(found.truncation_rows, "kernel_error", **where)
            slope = power(found.truncation.widths, errors)
            cells = [f"{value:.1e}" for value in np.median(errors, axis=1)]
            rows.append((f"{time:g}, order {order}", *cells, as_width(slope)))
    columns = (Column("time, order"), *(Column(f"m = {m}") for m in found.truncation.widths), Column("power"))
    return Table("Relative errors of the kernel, medians over seeds", columns, tuple(rows))


def _verdicts(found: AgainstWidth) -> Section:
    how = "Decided by 95 % intervals over seeds and widths; a claim whose interval reaches across the border is not."
    return Section("Does it hold?", (how, *found.notes), table=findings_table(found.findings))


def _numbers(found: AgainstWidth) -> Section:
    columns = ["lambda_max", "lambda_min", "K2", "K3", "K4"]
    rows = []
    for network, name in found.networks.items():
        for width in found.drift.widths:
            cells = []
            for column in columns:
                mine = [row for row in found.drift_rows if row.get(column) is not None]
                values = list(by_seed(mine, column, network=network, width=width).values())
                cells.append(f"{np.median(values):.3g}" if values else "")
            rows.append((f"{name}, {width}", *cells))
    heads = ("network, width", "lambda_max", "lambda_min", "sup |K2|", "sup |K3|", "sup |K4|")
    return Section(
        "The kernel at the start",
        ("`drift.csv` and `truncation.csv` beside this page have every network, width and seed.",),
        table=Table("Medians over seeds", tuple(Column(head, i > 0) for i, head in enumerate(heads)), tuple(rows)),
    )


def _short(label: str) -> str:
    return "fully\nconnected" if label == "fully connected" else label


# ---------------------------------------------------------------------- along a training


def training_page(found: Training, command: str, environment: Environment) -> Page:
    """Return the page of one model's kernel along a training."""
    import torch

    from abyssal.tangent.training.spectra import from_eigenvalues

    recipe, (shown, total) = found.recipe, found.outputs
    first, last = (from_eigenvalues(torch.from_numpy(values), found.rounding) for values in found.eigenvalues[[0, -1]])
    which = f"all {total} outputs" if shown == total else f"{shown} of {total:,} outputs, evenly spaced"
    optimizer = {"adamw": "AdamW", "sgd": "SGD"}[recipe.optimizer]
    lead = (
        f"{found.subject}. Tangent kernel of {found.eigenvalues.shape[1]} samples, summed over {which}, at the start "
        f"and after each of {recipe.steps} steps of {optimizer}, learning rate {recipe.lr:g}, on the same samples."
    )
    steps = [float(step) for step in found.steps]
    moved = curves(
        [
            Curve("drift", steps[1:], found.distance[1:], 1),
            Curve("1 − align-\nment", steps[1:], [1 - cosine for cosine in found.alignment[1:]], 2),
        ],
        alt="Distance and alignment of the kernel along training", x_label="step", y_label="from the first kernel",
        y_scale="log",
    )  # fmt: skip
    index = list(range(1, found.eigenvalues.shape[1] + 1))
    spectra = curves(
        [
            Curve("start", index, _above(found.eigenvalues[0], found.rounding), 1),
            Curve("end", index, _above(found.eigenvalues[-1], found.rounding), 2),
        ],
        alt="Eigenvalues of the kernel at the start and at the end", x_label="index", y_label="eigenvalue",
        y_scale="log",
    )  # fmt: skip
    heads = ("step", "loss", "drift", "alignment", "lambda_max", "lambda_min")
    rows = tuple(tuple(f"{value:.5g}" for value in row.values()) for row in found.rows())
    table = Table("Readings", tuple(map(Column, heads)), rows)
    return Page(
        title=f"The kernel moved by {found.distance[-1]:.1%} in {recipe.steps} steps",
        lead=lead,
        command=command,
        headlines=(
            Headline(f"{found.distance[-1]:.1%}", "of its own size is how far the kernel moved"),
            Headline(f"{found.losses[0]:.3g} to {found.losses[-1]:.3g}", "the loss"),
            Headline(f"{first.effective_rank:.1f}", f"effective rank of {len(index)} at the start"),
        ),
        sections=(
            Section(
                "How far it moves",
                ("Drift is `|K - K_0| / |K_0|`; alignment is the cosine between K and K_0, which a change of scale "
                 "leaves at 1.",),
                Figure(moved, "Step by step."),
                folded=table,
            ),
            Section(
                "Its spectrum",
                (f"At the start: {first}", f"At the end: {last}"),
                Figure(spectra, "Eigenvalues, largest first; those below rounding are left out."),
            ),
        ),
        facts={**environment.facts(), "Seed": str(recipe.seed), "CPU time": f"{found.seconds:.0f} s"},
    )  # fmt: skip


def _above(values: np.ndarray, rounding: float) -> list[float]:
    floor = len(values) * rounding * float(np.abs(values).max())
    return [float(value) if value > floor else math.nan for value in values]
