"""Pictures of matplotlib's in a page: a PNG inside the SVG element that figures are made of.

For drawings with colours of their own, which a page's dark scheme would not suit, and with too many points for SVG.
"""

from __future__ import annotations

import base64
import struct
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from abyssal.util.files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["embedded", "save_png"]

_DPI = 160  # a figure 9 inches wide has 1,440 pixels, which is sharp on a page of 1,088
_START = b"\x89PNG\r\n\x1a\n"


def save_png(figure: Figure, path: Path) -> Path:
    """Draw a figure on white, whole or not at all, and return `path`."""
    with whole(path) as beside:
        # Without the version of matplotlib, which would change the file without changing the picture.
        figure.savefig(beside, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return path


def embedded(path: Path, alt: str) -> str:
    """Return a PNG file as an inline SVG element, sized by its container.

    Args:
        path: of the file.
        alt: what the picture shows, in words.

    Raises:
        ValueError: if the file is no PNG.
    """
    data = path.read_bytes()
    if not data.startswith(_START) or len(data) < 24:
        raise ValueError(f"{path}: is no PNG file.")
    width, height = struct.unpack(">II", data[16:24])
    coded = base64.b64encode(data).decode()
    return (
        f'<svg role="img" aria-label="{escape(alt)}" viewBox="0 0 {width} {height}" '
        f'preserveAspectRatio="xMidYMid meet"><image width="{width}" height="{height}" '
        f'href="data:image/png;base64,{coded}"/></svg>'
    )
