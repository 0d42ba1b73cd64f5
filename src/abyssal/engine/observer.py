"""Whom a chain tells what happens to its states; `certify.recorder.Recorder` is one."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Observer(Protocol):
    """Told of one call's states; a state is [*stream].

    `source` stands for the exact state that others are restored from (`certify.errors.Extremes`), `errors` for what one
    backward pass measures (`certify.errors.Errors`).
    """

    def entered(self, exact: Tensor, policy: Any, code_bytes: int) -> None:
        """The call's exact input is kept, so far, and a code of it; `policy` is in force."""

    def returned(self, output: Tensor | None, runner_bytes: int, surroundings_bytes: int) -> None:
        """The first run's output; what the decoder would start from takes so many bytes, and the surroundings."""

    def linked(self, exact: Tensor) -> None:
        """The exact input, which may stay, is the output of the call below: that is to be compared with it."""

    def released(self, exact: Tensor, kept_bytes: int) -> None:
        """The exact input is about to be let go, and in its place so much is kept by the policy itself."""

    def visited(self) -> None:
        """A backward pass came by, and found the exact input."""

    def restored(self, state: Tensor, source: Any, errors: Any) -> None:
        """A backward pass came by, and the input was restored."""

    def recomputed(self, output: Tensor, above: Observer | None, source: Any, errors: Any) -> None:
        """A later run's output; `above` observes the call that the first one's went to."""
