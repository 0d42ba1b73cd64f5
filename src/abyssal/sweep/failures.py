"""What went wrong in a cell, in one line, out of its traceback."""

from __future__ import annotations

import re

__all__ = ["error_of"]

_HEADER = "Traceback (most recent call last):"
_CHAINED = (
    "The above exception was the direct cause of the following exception:",
    "During handling of the above exception, another exception occurred:",
)
_LONGEST = 400


def error_of(traceback: str) -> str:
    """Return type and message of the exception that a traceback ends with, the lines of its message joined by " / ".

    Args:
        traceback: as `traceback.format_exc` writes it, chained exceptions too; anything else is taken as a message.
    """
    lines = traceback.strip().splitlines()
    chained = max((n for n, line in enumerate(lines) if line in _CHAINED), default=0)
    # A message may hold a traceback, such as one of another process: the first after the last link is the exception's.
    header = next((n for n in range(chained, len(lines)) if lines[n] == _HEADER), None)
    if header is not None:
        start = next((n for n in range(header + 1, len(lines)) if not lines[n].startswith(" ")), len(lines) - 1)
        message = lines[start:]
    else:  # of a group, the exceptions in which are indented
        message = [line[4:] for line in lines if re.match(r"  \| \S", line)][:1] or lines
    text = " / ".join(line.strip() for line in message if line.strip())
    text = re.sub(r"^_abyssal_sweep_\w+\.", "", text)  # the name that a user's file has as a module
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."
