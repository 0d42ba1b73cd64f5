"""What a real browser sees of a page."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

in_browser = [
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
