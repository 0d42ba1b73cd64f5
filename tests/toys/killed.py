"""What tests that kill a command midway need: to see how far it has come, and to strike before it is done."""

from __future__ import annotations

import signal
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from subprocess import Popen


def finished(store: Path, study: str = "%") -> dict[str, tuple[int, str]]:
    """Finished cells of a store by key: how often a result was handed in, and when the first one was."""
    if not store.exists():
        return {}
    with closing(sqlite3.connect(store, timeout=60)) as connection:
        try:
            rows = connection.execute(
                "SELECT key, computed, finished FROM cells WHERE study LIKE ?", (study,)
            ).fetchall()
        except sqlite3.OperationalError:  # the tables are not there yet
            rows = []
    return {key: (computed, when) for key, computed, when in rows}


def wait_until(reached: Callable[[], bool], process: Popen[str]) -> None:
    """Wait until a running command has come so far. How long that may take is up to the suite's time limit."""
    while not reached():
        assert process.poll() is None, f"ended with {process.returncode} before it came so far"
        time.sleep(0.02)


def interruptible() -> None:
    """Mind interrupts, as a `preexec_fn`: what a script starts in its background, these tests too, ignores them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
