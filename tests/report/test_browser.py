"""The page in a real browser: nothing is fetched, nothing overflows, every plot is there to be seen."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from abyssal.demo.page import save
from abyssal.demo.run import DemoSettings, run_demo
from toys.browser import chromium, in_browser, look

pytest.importorskip("sklearn", reason="the demo's images come with scikit-learn")
pytestmark = in_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = DemoSettings(
        depth=4,
        width=8,
        batch=64,
        epochs=2,
        memory_depths=(2, 4, 1024),
        error_depths=(2, 4),
        keep_heap=False,
    )
    return save(run_demo(settings), tmp_path_factory.mktemp("page"))


def test_the_source_names_no_outside_address(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']?\s*(?!["']?(?:#|data:,))[^\s>]+""", text)
    assert not re.findall(r"url\((?!#)[^)]*\)|@import|<script|<iframe|<link(?! rel=\"icon\" href=\"data:,\")", text)
    assert "://" not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(ids)


@pytest.mark.parametrize("width", [360, 390, 768, 1280])
def test_the_page_reads_well_at(page: Path, width: int, tmp_path: Path) -> None:
    seen = look(page, width, tmp_path)
    assert seen["requests"] == []
    assert seen["scroll_width"] <= width  # tables scroll inside their own boxes
    assert len(seen["plots"]) == 3
    assert all(plot_width > 0.6 * min(width, 640) and height > 150 for plot_width, height in seen["plots"])
    assert seen["texts"] == [[], [], []], "text runs out of a plot"
    assert seen["smallest_text"] >= 9
    assert "4 residual blocks" in seen["heading"]
    assert all(label in seen["table"] for label in ("plain backprop", "checkpointing", "reconstruction"))


def test_the_page_follows_the_dark_scheme(page: Path, tmp_path: Path) -> None:
    (tmp_path / "light").mkdir()
    (tmp_path / "dark").mkdir()
    light = look(page, 1280, tmp_path / "light")
    dark = look(page, 1280, tmp_path / "dark", "--blink-settings=preferredColorScheme=0")
    assert (light["dark"], dark["dark"]) == (False, True)
    assert light["background"] != dark["background"]


def test_a_screenshot_is_not_blank(page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    chromium("--window-size=1280,3000", f"--screenshot={picture}", page.as_uri(), profile=tmp_path / "profile")
    data = picture.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (1280, 3000)
    assert len(data) > 50_000  # a blank page of this size compresses to a few kB
