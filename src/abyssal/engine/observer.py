"""Whom a chain tells what happens to its states; `certify.recorder.Recorder` is one."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Observer(Protocol):
    """Told of one call's states; a state is [*stream].

    `source` stands for the exact state that others are restored from (`certify.errors.Extremes`), `errors` for what one
    backward pass measures (`certify.errors.Errors`).
    """

    def entered(self, exact: Tensor, policy: Any) -> None:
        """The call's exact input is kept, so far; `policy` is in force."""

    def keeps(self, *, code: int = 0, runner: int | None = None, surroundings: int = 0) -> None:
        """Besides, so many bytes more of code, so many of what the decoder starts from, and of surroundings."""

    def returned(self, output: Tensor) -> None:
        """The first run's output."""

    def released(self, exact: Tensor) -> None:
        """The exact input is about to be let go."""

    def visited(self) -> None:
        """A backward pass came by."""

    def restored(self, state: Tensor, source: Any, errors: Any) -> None:
        """The input was restored."""

    def recomputed(self, output: Tensor, above: Observer | None, source: Any, errors: Any) -> None:
        """A later run's output; `above` observes the call that the first one's went to."""
