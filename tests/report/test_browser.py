"""The page in a real browser: nothing is fetched, nothing overflows, every plot is there to be seen."""

from __future__ import annotations

import html
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from abyssal.demo.page import save
from abyssal.demo.run import DemoSettings, run_demo

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

pytest.importorskip("sklearn", reason="the demo's images come with scikit-learn")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (Debian: apt install chromium)"),
]

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)

# Runs inside the page and leaves what it saw in a place that --dump-dom shows.
PROBE = """
<script>
addEventListener("load", () => {
  const box = (element) => { const r = element.getBoundingClientRect(); return [r.width, r.height]; };
  const seen = {
    width: innerWidth,
    scroll_width: document.documentElement.scrollWidth,
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    background: getComputedStyle(document.body).backgroundColor,
    requests: performance.getEntriesByType("resource").map((entry) => entry.name),
    plots: [...document.querySelectorAll("figure svg")].map(box),
    texts: [...document.querySelectorAll("figure svg")].map((svg) => {
      const outer = svg.getBoundingClientRect();
      return [...svg.querySelectorAll("text")].filter((text) => {
        const inner = text.getBoundingClientRect();
        return inner.left < outer.left - 2 || inner.right > outer.right + 2;
      }).map((text) => text.textContent);
    }),
    smallest_text: Math.min(...[...document.querySelectorAll("figure svg text")].map(
      (text) => text.getBoundingClientRect().height)),
    heading: document.querySelector("h1").innerText,
    table: document.querySelector("table").innerText,
  };
  const note = parent.document.createElement("pre");
  note.id = "seen";
  note.textContent = JSON.stringify(seen);
  parent.document.body.append(note);
});
</script>
"""


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


def chromium(*arguments: str, profile: Path) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def look(page: Path, width: int, tmp_path: Path, *flags: str) -> dict[str, Any]:
    """Open the page in a frame of exactly that width (a window's own least width is about 500 pixels)."""
    inner = html.escape(page.read_text() + PROBE, quote=True)
    outer = tmp_path / "frame.html"
    frame = f'<iframe srcdoc="{inner}" style="border:0; width:{width}px; height:3000px"></iframe>'
    outer.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{frame}')
    dom = chromium("--dump-dom", "--window-size=1600,3200", *flags, outer.as_uri(), profile=tmp_path / "profile")
    found = re.search(r'<pre id="seen">(.*?)</pre>', dom, flags=re.DOTALL)
    assert found is not None, "the page did not load"
    seen: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert seen["width"] == width
    return seen


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
