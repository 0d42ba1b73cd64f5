"""One self-contained HTML page per command, its plots, and progress while the numbers are being made."""

from abyssal.report.environment import Environment, environment
from abyssal.report.page import Column, Figure, Headline, Page, Section, Table, render, write
from abyssal.report.plots import Curve, curves
from abyssal.report.progress import Event, LiveProgress, LogProgress, Reporter, progress_for, silent

__all__ = [
    "Column",
    "Curve",
    "Environment",
    "Event",
    "Figure",
    "Headline",
    "LiveProgress",
    "LogProgress",
    "Page",
    "Reporter",
    "Section",
    "Table",
    "curves",
    "environment",
    "progress_for",
    "render",
    "silent",
    "write",
]
