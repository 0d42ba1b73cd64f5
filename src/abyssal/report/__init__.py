"""One self-contained HTML page per command, and its plots."""

from abyssal.report.page import Column, Figure, Headline, Page, Section, Table, render, write
from abyssal.report.plots import Curve, curves

__all__ = [
    "Column",
    "Curve",
    "Figure",
    "Headline",
    "Page",
    "Section",
    "Table",
    "curves",
    "render",
    "write",
]
