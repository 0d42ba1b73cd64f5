"""The demo's result for people: a table for the terminal, a page for the browser, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table as TerminalTable

from abyssal.demo.run import DemoResult, MethodResult
from abyssal.report.page import Column, Figure, Headline, Page, Section, Table, write
from abyssal.report.plots import Curve, curves

__all__ = ["build_page", "conclusion", "save", "terminal_table", "warning"]

_SERIES = {
    "plain": 1,
    "checkpoint": 2,
    "reconstruct": 3,
    "Reverse(0)": 1,
    "PaperAdjoint()": 2,
    "Reverse(1)": 3,
}
_NAMES = {"PaperAdjoint()": "paper's adjoint"}


def save(result: DemoResult, folder: Path, command: str = "abyssal demo") -> Path:
    """Write `index.html` and `results.json` into `folder` and return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result.to_dict(), indent=2, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    return write(build_page(result, command), folder / "index.html")


def terminal_table(result: DemoResult) -> TerminalTable:
    """Return the comparison as a table that fits 80 columns."""
    table = TerminalTable(
        title=f"{result.settings.depth} residual blocks, trained three ways on {result.train_images:,} images",
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for name in (
        "test\naccuracy",
        "step time,\n× plain",
        "peak activation\nmemory",
        "gradient error\nagainst plain",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for method in result.methods:
        style = "bold" if method.key == "reconstruct" else ""
        time = f"{method.step_ratio:.2f}"
        table.add_row(method.label, *_cells(method, time), style=style)
    return table


def conclusion(result: DemoResult) -> str:
    """Return what the result means, in a sentence."""
    plain, kept, ours = (result[key] for key in ("plain", "checkpoint", "reconstruct"))
    gap = ours.accuracy - plain.accuracy
    verdict = "the same test accuracy" if gap == 0 else f"{100 * gap:+.1f} points of test accuracy"
    return (
        f"Reconstruction trained the network in {_times(plain.peak_bytes / ours.peak_bytes)} less "
        f"activation memory than plain backprop and {_times(kept.peak_bytes / ours.peak_bytes)} less than "
        f"checkpointing, to {verdict}, for {_times(ours.step_ratio / kept.step_ratio)} checkpointing's "
        "step time."
    )


def warning(result: DemoResult) -> str:
    """Return what the certificate has against the result, or nothing."""
    if not result.drift_warnings:
        return ""
    return (
        f"The certificate warned {len(result.drift_warnings)} time(s) during training that restored states "
        f"were off by more than its tolerance: {result.settings.depth} blocks are few for reversing x + "
        f"f(x)/N. The first warning: {result.drift_warnings[0]}"
    )


def build_page(result: DemoResult, command: str = "abyssal demo") -> Page:
    """Return the page; every number on it comes from `result`."""
    plain, kept, ours = (result[key] for key in ("plain", "checkpoint", "reconstruct"))
    s = result.settings
    return Page(
        title=f"{s.depth} residual blocks, trained on {_megabytes(ours.peak_bytes)} of activations "
        f"instead of {_megabytes(plain.peak_bytes)}",
        lead="One residual network, three ways to get its gradient, on scikit-learn's handwritten digits. "
        "Plain backprop stores every activation. Checkpointing stores the input of every block. "
        "Reconstruction stores neither: it walks the network's trajectory back from its end, block by block.",
        command=command,
        headlines=(
            Headline(
                f"{_times(plain.peak_bytes / ours.peak_bytes)} less",
                f"activation memory than plain backprop; {_times(kept.peak_bytes / ours.peak_bytes)} less "
                "than checkpointing every block",
            ),
            Headline(
                f"{100 * ours.accuracy:.1f} %",
                f"test accuracy; plain backprop reached {100 * plain.accuracy:.1f} %",
            ),
            Headline(
                f"{_times(ours.step_ratio / kept.step_ratio)}",
                f"checkpointing's step time, or {_times(ours.step_ratio)} that of plain backprop: the price",
            ),
            Headline(_scientific(ours.gradient_error), "relative error of the gradient on the trained network"),
        ),
        sections=(
            _comparison(result),
            _memory(result),
            _errors(result),
            _losses(result),
            _limits(result),
        ),
        facts={**result.environment.facts(), "Run": _run(result)},
    )


def _comparison(result: DemoResult) -> Section:
    s = result.settings
    rows = []
    for method in result.methods:
        low, high = method.step_ratio_quartiles
        spread = "" if method.key == "plain" else f"\N{NO-BREAK SPACE}({low:.2f}–{high:.2f})"
        rows.append((method.label, *_cells(method, f"{method.step_ratio:.2f}{spread}")))
    state = "not measured" if result.state_error is None else _scientific(result.state_error)
    heap = (
        "the heap is kept between steps, since page faults would otherwise make plain backprop look slow"
        if result.heap_kept
        else "the heap could not be kept between steps here, so these ratios flatter the two that recompute"
    )
    notes = (
        f"Step time: processor time of one forward and backward pass on {result.threads} thread, as a "
        f"ratio to plain backprop's ({1000 * result['plain'].step_seconds:.0f} ms); the three take one "
        f"step in turn; median (quartiles) over the rounds; {heap}. With blocks this small, a good part of "
        "it is Python's.",
        "Peak activation memory: highest level of live tensor bytes during one step, above parameters, "
        "gradient buffers and data; exact, from the allocator's events.",
        "Gradient error: of all parameters' gradient together, relative, float32, at the trained network. "
        f"Plain backprop's own rounding, against float64, is {_scientific(result.float32_error)}.",
        "The certificate, which every training step makes by itself, found the restored states at most "
        f"{state} from the true ones (relative, last step).",
        *([warning(result)] if result.drift_warnings else ()),
    )
    caption = (
        f"{s.depth} blocks x + f(x)/{s.depth} of width {s.width}, {result.parameters:,} parameters; "
        f"{len(result['plain'].losses)} steps of Adam on batches of {s.batch}; {result.train_images:,} "
        f"training and {result.test_images:,} test images; same initial weights, same batches"
    )
    columns = (
        Column("method", numeric=False),
        Column("test accuracy"),
        Column("step time, × plain"),
        Column("peak activation memory"),
        Column("gradient error against plain"),
    )
    return Section("What each way costs", table=Table(caption, columns, tuple(rows), emphasis=2, notes=notes))


def _memory(result: DemoResult) -> Section:
    sweep = result.memory
    first, last = sweep.depths[0], sweep.depths[-1]
    growth = {key: peaks[-1] / peaks[0] for key, peaks in sweep.peak_bytes.items()}
    figure = _against_depth(
        sweep.depths,
        {
            m.label: Curve(
                f"{m.label}\n{_megabytes(sweep.peak_bytes[m.key][-1])}",
                sweep.depths,
                [peak / 1e6 for peak in sweep.peak_bytes[m.key]],
                _SERIES[m.key],
            )
            for m in result.methods
        },
        lambda peak: _megabytes(1e6 * peak, 2),
        what="peak activation memory",
        unit=" MB",
        caption="Both axes are logarithmic: a steady rise goes with depth, a flat line does not depend on it.",
        table="Peak activation memory of one step",
    )
    text = (
        f"From {first} to {last:,} blocks, the peak of plain backprop grows {_fold(growth['plain'])}, that "
        f"of checkpointing {_fold(growth['checkpoint'])}, that of reconstruction "
        f"{_fold(growth['reconstruct'])}.",
        "Checkpointing frees what is inside a block, but keeps one tensor per block, the residual stream. "
        "That is what reconstruction does away with: it keeps the end of the stream and small samples of "
        f"it, from which the certificate is made ({_kilobytes(result.stored_bytes)} in all for the trained "
        "network). What is left is the memory of one block's own backward pass.",
    )
    return Section("Memory against depth", text, figure)


def _against_depth(
    depths: Sequence[int],
    lines: Mapping[str, Curve],
    write_out: Callable[[float], str],
    *,
    what: str,
    caption: str,
    table: str,
    unit: str = "",
) -> Figure:
    """Return curves over the depth by name, with their numbers as `write_out` gives them."""
    first, last = depths[0], depths[-1]
    said = ", ".join(f"{name} {write_out(line.y[-1])}" for name, line in lines.items())
    svg = curves(
        list(lines.values()),
        alt=f"{what.capitalize()} against depth, {first} to {last} blocks. At {last} blocks: {said}.",
        x_label="residual blocks",
        y_label=what,
        x_scale="log2",
        y_scale="log",
        y_unit=unit,
    )
    rows = tuple((f"{n:,}", *(write_out(line.y[i]) for line in lines.values())) for i, n in enumerate(depths))
    return Figure(svg, caption, Table(table, (Column("blocks"), *map(Column, lines)), rows))


def _errors(result: DemoResult) -> Section:
    sweep = result.errors
    last = sweep.depths[-1]
    figure = _against_depth(
        sweep.depths,
        {
            _NAMES.get(name, name): Curve(
                f"{_NAMES.get(name, name)}\nslope {_minus(sweep.slopes[name])}", sweep.depths, errors, _SERIES[name]
            )
            for name, errors in sweep.errors.items()
        },
        _scientific,
        what="relative gradient error",
        caption="Against exact backprop in float64. Slopes are least-squares fits over all depths shown.",
        table="Relative error of the parameter gradient, float64",
    )
    ours, paper = sweep.errors["Reverse(1)"][-1], sweep.errors["PaperAdjoint()"][-1]
    text = (
        "Reconstruction solves x + f(x)/N = y for x, approximately, and the deeper the network, the "
        "smaller each step and the better the solution. `Reverse(k)` makes k refinements per block; theory "
        "says that its error falls as N to the power −(k+1). Measured: "
        f"{_minus(sweep.slopes['Reverse(0)'])} for k = 0 and {_minus(sweep.slopes['Reverse(1)'])} for k = 1.",
        "The paper's adjoint (Sander, Ablin, Peyré 2022) evaluates each block as often as `Reverse(1)`, "
        "but throws away the evaluation that the gradient makes anyway. Handing it on to the block below "
        f"is all the difference: {_scientific(ours)} instead of {_scientific(paper)} at {last} blocks.",
        f"Networks of width {result.settings.error_width} with independent random weights in every block, "
        "which is the rough case: no smoothness in depth is needed.",
    )
    return Section("Gradient error against depth", text, figure)


def _losses(result: DemoResult) -> Section:
    styles = {"plain": "wide", "checkpoint": "dashed", "reconstruct": "line"}
    steps = range(1, len(result["plain"].losses) + 1)
    lines = [
        Curve(m.label, steps, m.losses, _SERIES[m.key], styles[m.key])  # type: ignore[arg-type]
        for m in result.methods
    ]
    finals = ", ".join(f"{m.label} {m.losses[-1]:.4f}" for m in result.methods)
    figure = curves(
        lines,
        alt=f"Training loss of the three over {len(steps)} steps, on top of each other. Last: {finals}.",
        x_label="training step",
        y_label="training loss",
    )
    text = (
        f"{_distance(result, 'checkpoint')} {_distance(result, 'reconstruct')}",
        f"The residual blocks work for this: on test images they move the state by {result.movement:.2f} "
        "times its own length between first and last block.",
    )
    return Section(
        "The same training, three times",
        text,
        Figure(
            figure,
            "Plain backprop wide, checkpointing dashed, reconstruction thin: drawn to be seen through.",
        ),
    )


def _distance(result: DemoResult, key: str) -> str:
    method = result[key]
    largest = max(abs(a - b) for a, b in zip(method.losses, result["plain"].losses, strict=True))
    label = method.label.capitalize()
    if largest == 0:
        return f"{label}'s losses are plain backprop's to the last bit."
    return f"{label}'s differ from plain backprop's by at most {_scientific(largest)}."


def _limits(result: DemoResult) -> Section:
    ours, kept = result["reconstruct"], result["checkpoint"]
    return Section(
        "Where this holds, and where not",
        (
            f"The price is time: {_times(ours.step_ratio / kept.step_ratio)} checkpointing's step, since "
            "every block is evaluated once more. `Reverse(0)` evaluates none more often than checkpointing does, at a "
            "larger gradient error.",
            "The gradient is as good as the blocks contract: f(x)/N is small beside x here. The first "
            "blocks of an unscaled pre-norm transformer are not like that, and reversing them gives "
            "useless gradients. The certificate says so in the step in which it happens and names the "
            "blocks; "
            '`on_drift="keep"` keeps their inputs from then on.',
            "The peak of live bytes is what an accelerator's memory has to hold for activations. Parameters, "
            "gradients and the optimiser's state come on top, and are the same for all three.",
        ),
    )


def _run(result: DemoResult) -> str:
    seed = result.settings.seed
    return f"seed {seed}, {result.threads} thread, {result.seconds:.0f} s in all; numbers in results.json"


def _cells(method: MethodResult, time: str) -> tuple[str, ...]:
    error = "reference" if method.key == "plain" else _scientific(method.gradient_error)
    return f"{100 * method.accuracy:.1f} %", time, _megabytes(method.peak_bytes), error


def _scientific(value: float) -> str:
    """Return e.g. 5.7e-6, and 0 for an exact one."""
    if value == 0:
        return "0"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio >= 10 else f"{ratio:.1f}×"


def _fold(ratio: float) -> str:
    digits = 0 if ratio >= 10 else 2
    return f"{ratio:.{digits}f}\N{NON-BREAKING HYPHEN}fold"


def _minus(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _megabytes(count: float, digits: int = 1) -> str:
    if count < 1e6:
        digits = 2
    return f"{count / 1e6:.{digits}f}\N{NO-BREAK SPACE}MB"


def _kilobytes(count: float) -> str:
    return f"{count / 1e3:.0f}\N{NO-BREAK SPACE}kB"
