"""The tables and the checks of reconstruct_trained.py."""

from __future__ import annotations

import math
import statistics
from typing import Any

import report

Results = dict[str, Any]
TITLES = {
    "gpt layers": "GPT, whole layers as blocks",
    "gpt branches": "GPT, residual branches as blocks",
    "convnext": "ConvNeXt",
    "resnet": "Pre-activation ResNet",
}
_ABOUT = (
    "Gradient error: relative, Euclidean, all parameters, float32, against plain autograd on the same held-out batch; "
    "median and worst over {batches}. In bf16's: the median as a multiple of the median error of bf16 autocast on the "
    "same batches ({unit}). State error: the worst block's, by the certificate. Stream: all bytes stored for it (kept "
    "blocks, chain ends and samples included) against checkpointing's in the same dtype; per coded block: the same of "
    "the largest block that is coded."
)


def median_error(network: dict[str, Any], config: str) -> float:
    """Median gradient error of a configuration, not a number where it was not measured."""
    errors = network["cells"].get(config, {}).get("error")
    return statistics.median(errors) if errors else math.nan


def worst_error(network: dict[str, Any], config: str) -> float:
    """The largest gradient error of a configuration, not a number where it was not measured."""
    return max(network["cells"].get(config, {}).get("error") or [math.nan])


def bytes_ratio(network: dict[str, Any], config: str, dtype: str = "float32") -> float:
    """Stored bytes of the whole stream against checkpointing's."""
    found = network["cells"].get(config, {}).get("bytes", {}).get(dtype)
    return found["stored"] / found["checkpointing"] if found else math.nan


def per_block(network: dict[str, Any], config: str, dtype: str = "float32") -> float:
    """Stored bytes of the largest coded block against checkpointing's."""
    found = network["cells"].get(config, {}).get("bytes", {}).get(dtype)
    return found["per coded block"][1] if found and found["per coded block"] else math.nan


def time_ratios(network: dict[str, Any], config: str) -> list[float]:
    """Step time against checkpointing's, round by round."""
    own, base = (network["cells"].get(name, {}).get("seconds") for name in (config, "checkpointing"))
    return [a / b for a, b in zip(own, base, strict=True)] if own and base else []


def number(value: float, digits: int = 2) -> str:
    """A figure for a table, or nothing."""
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def scientific(value: float) -> str:
    """An error for a table."""
    return "" if math.isnan(value) else "not finite" if math.isinf(value) else f"{value:.1e}" if value else "0"


def _row(network: dict[str, Any], config: str) -> list[str]:
    cell, unit = network["cells"][config], statistics.median(network.get("unit") or [math.nan])
    errors, states = cell.get("error") or [math.nan], cell.get("state") or [math.nan]
    middle, ratios = statistics.median(errors), time_ratios(network, config)
    time = ""
    if len(ratios) > 1:
        low, mid, high = statistics.quantiles(ratios, n=4)
        time = f"{mid:.2f} ({low:.2f}-{high:.2f})"
    fewer = f" ({len(errors)} batches)" if "error" in cell and len(errors) < len(network["unit"]) else ""
    return [
        config + fewer,
        scientific(middle),
        scientific(max(errors)),
        number(middle / unit) if math.isfinite(middle) else "",
        scientific(max(states)),
        *(number(bytes_ratio(network, config, dtype)) for dtype in ("float32", "bfloat16")),
        *(number(per_block(network, config, dtype), 3) for dtype in ("float32", "bfloat16")),
        time,
    ]


_HEAD = [
    "policy",
    "gradient error, median",
    "worst",
    "in bf16's",
    "state error, worst",
    "stream, float32",
    "stream, bf16",
    "per coded block, float32",
    "bf16",
    "time / checkpointing",
]


def _section(name: str, network: dict[str, Any]) -> str:
    unit = network.get("unit", [])
    told = f"{statistics.median(unit):.1e}, worst {max(unit):.1e}" if unit else "not measured"
    parts = [f"### {TITLES[name]}"]
    if records := network.get("records"):
        losses = ", ".join(f"{r['first']:.2f} to {r['last']:.2f} ({r['held_out']:.2f})" for r in records)
        right = ", ".join(f"{r['accuracy']:.1%}" for r in records)
        parts.append(f"Training loss (held-out in brackets) of each seed: {losses}; held-out accuracy: {right}.")
    batches = f"{len(unit)} batches ({len(unit) // max(1, len(network.get('records', [1])))} of each seed's network)"
    parts.append(_ABOUT.format(batches=batches, unit=told))
    rows = [_row(network, config) for config in network["cells"] if config != "checkpointing"]
    return "\n\n".join([*parts, report.table(_HEAD, rows)])


def checks(results: Results) -> list[tuple[str, float, float]]:
    """What has to hold: what it is, the figure, the largest that is allowed."""
    network = results["networks"].get("gpt layers")
    if network is None:
        return []
    unit = statistics.median(network.get("unit") or [math.nan])
    kept = "Code(2, refine=1), first kept"
    return [
        ("Code(4), per coded block, against bf16", per_block(network, "Code(4)", "bfloat16"), 0.28),
        ("Code(4), per coded block, against float32", per_block(network, "Code(4)"), 0.14),
        ("default, gradient error / bf16's own", median_error(network, "default") / unit, 1.0),
        ("Code(2, refine=1), per coded block, against bf16", per_block(network, kept, "bfloat16"), 0.16),
        (f"{kept}, gradient error / bf16's own", median_error(network, kept) / unit, 1.5),
        ("default, whole stream, against bf16", bytes_ratio(network, "default", "bfloat16"), 0.45),
        ("plan(0.01), worst gradient error", worst_error(network, "plan(0.01)"), 1.5e-2),
    ]


def render(results: Results) -> str:
    """Everything as Markdown."""
    networks = results["networks"]
    machines = [m for network in networks.values() for m in network.get("machine", {}).values()]
    parts = ["## Policies on trained networks", *([report.header(machines[-1])] if machines else [])]
    rows = [
        [what, number(found, 3), f"at most {limit:g}", "yes" if found <= limit else "**no**"]
        for what, found, limit in checks(results)
        if not math.isnan(found)
    ]
    if rows:
        parts += ["### What has to hold, on the GPT's whole layers", report.table(["", "", "target", "met"], rows)]
    for name, network in networks.items():
        parts.append(_section(name, network))
        parts.append(f"![{TITLES[name]}: gradient error against stored bytes](images/{image(name)})")
    return "\n\n".join(parts)


def image(name: str) -> str:
    """File name of a network's plot."""
    return f"trained-{name.replace(' ', '-')}.png"
