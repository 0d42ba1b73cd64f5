"""A forecast as a table for the terminal, and its conclusion in a line."""

from __future__ import annotations

import re
import textwrap

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from abyssal.forecasting.forecast_data import LOSS, MANY, ForecastData, MethodForecast
from abyssal.profiling.storages import STREAM
from abyssal.util.text import bytes_in_words, columns_of_terminal, printed

_WIDE = 110  # columns from which on there is room for what is alive at the peak
_REFERENCE = "checkpointing"
_JOINT = "\u00a0"  # textwrap does not break there


def forecast_text(forecast: ForecastData, width: int | None = None) -> str:
    """Return the forecast as text: what it is of, the table, what comes besides, and the conclusion."""
    width = columns_of_terminal(width)
    title = (
        f"One training step of {forecast.model}: {forecast.batch}, {forecast.dtype}, {forecast.blocks} residual blocks."
    )
    lines = [*_filled(title, width), "", *printed(_table(forecast, wide=width >= _WIDE), width=width).splitlines(), ""]
    for line in _lines(forecast):
        lines += _filled(line, width)
    return "\n".join(line.rstrip() for line in lines)


def _filled(text: str, width: int) -> list[str]:
    """Break a sentence into lines, never between a figure and its unit."""
    joined = re.sub(r"(?<=\d) (?=(B|KiB|MiB|GiB)\b)", _JOINT, text)
    return [line.replace(_JOINT, " ") for line in textwrap.wrap(joined, width, break_long_words=False)]


def _table(forecast: ForecastData, wide: bool) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("method", no_wrap=True)
    table.add_column("stream", justify="right", no_wrap=True)
    table.add_column("peak", justify="right", no_wrap=True)
    table.add_column("in all", justify="right", no_wrap=True)
    table.add_column("peak set by", overflow="fold")
    if wide:
        for what in ("stream", "blocks", "loss"):
            table.add_column(f"{what} then", justify="right", no_wrap=True)
    for method in forecast.methods:
        on_host = method.host_bytes > 0
        table.add_row(
            Text(method.name),
            Text(bytes_in_words(method.stream_bytes) + (" *" if on_host else "  ")),
            Text(bytes_in_words(method.peak_bytes)),
            Text(bytes_in_words(method.peak_bytes + forecast.fixed_bytes)),
            Text(method.peak_set_by),
            *(map(Text, _alive(method)) if wide else []),
        )
    return table


def _alive(method: MethodForecast) -> tuple[str, str, str]:
    """How much of the peak is kept stream, is in the blocks, and is logits and loss."""
    stream, loss = method.shares.get(STREAM, 0), method.shares.get(LOSS, 0)
    blocks = sum(nbytes for place, nbytes in method.shares.items() if place in method.blocks or place.endswith(MANY))
    return tuple(bytes_in_words(part) if part >= 0.005 * method.peak_bytes else "-" for part in (stream, blocks, loss))  # type: ignore[return-value]


def _lines(forecast: ForecastData) -> list[str]:
    lines = [
        f"Peak: above what is there all the time. In all: with parameters {bytes_in_words(forecast.parameter_bytes)}, "
        f"gradients {bytes_in_words(forecast.gradient_bytes)}, "
        + (f"buffers {bytes_in_words(forecast.buffer_bytes)}, " if forecast.buffer_bytes > 1 << 20 else "")
        + f"Adam's state in float32 {bytes_in_words(forecast.optimizer_bytes)}."
    ]
    for method in forecast.methods:
        if method.host_bytes > 0:
            lines.append(f"* {method.name}: {bytes_in_words(method.host_bytes)} of it in host memory.")
    lines += [f"Note: {note}." for note in forecast.notes]
    if (line := conclusion(forecast)) is not None:
        lines.append(line)
    if (line := _without_loss(forecast)) is not None:
        lines.append(line)
    return lines


def conclusion(forecast: ForecastData) -> str | None:
    """Say what reconstruction saves against checkpointing, in the stream and in the peak, and why not more."""
    reference, ours = _compared(forecast)
    if reference is None or ours is None:
        return None
    saved = 1 - ours.peak_bytes / reference.peak_bytes
    text = (
        f"{ours.name} keeps {bytes_in_words(ours.stream_bytes)} for the stream where {reference.name} keeps "
        f"{bytes_in_words(reference.stream_bytes)}; the peak "
    )
    if saved < -0.02:
        return text + f"rises by {-saved:.0%}, and is set by {_in_words(ours)}."
    if saved < 0.02:
        return text + f"hardly moves ({-saved:+.1%}), since it is set by {_in_words(ours)}."
    text += f"falls from {bytes_in_words(reference.peak_bytes)} to {bytes_in_words(ours.peak_bytes)} (-{saved:.0%})"
    return text + f", and is then set by {_in_words(ours)}."


def _in_words(method: MethodForecast) -> str:
    what = method.peak_set_by
    for way in ("forward", "backward"):
        what = what.replace(f"{way} of ", f"{way} pass of ", 1) if what.startswith(way) else what
    return what if what.startswith(("the ", "recomputing ", *"0123456789")) else f"the {what}"


def _compared(forecast: ForecastData) -> tuple[MethodForecast | None, MethodForecast | None]:
    """Checkpointing, and the first method that is neither that, plain, nor offload alone."""
    reference = next((m for m in forecast.methods if m.name == _REFERENCE), None)
    ours = next((m for m in forecast.methods if m.policy and not m.policy.startswith("Keep")), None)
    return reference, ours


def _without_loss(forecast: ForecastData) -> str | None:
    """Where the logits hide the stream: what the peaks would be if they were never there at once."""
    methods = [m for m in _compared(forecast) if m is not None]
    if not methods or any(m.place != LOSS for m in methods):
        return None
    figures = ", ".join(f"{bytes_in_words(m.peak_without_loss_bytes)} with {m.name}" for m in methods)
    return f"If the loss were computed in pieces (the logits never whole), the peak would be {figures}, plus one piece."
