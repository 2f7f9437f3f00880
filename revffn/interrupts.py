"""Ctrl-C and SIGTERM as an exception with an exit status."""

from __future__ import annotations

import signal
import threading
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run; the message is one line."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message or f"stopped by {signal.Signals(number).name}.")
        self.number = number
        self.status = 128 + number
        """The exit status that a shell expects."""


class Interrupts:
    """Ctrl-C and SIGTERM while it is entered: `Interrupted`, at once or after the current step.

    Args:
        after_step: Let a step that has begun come to its end; `between_steps` raises then. A second signal does not
            wait.
    """

    def __init__(self, after_step: bool = False):
        self.after_step, self.in_step, self.received = after_step, False, 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # What a shell has told a background process to ignore, it goes on ignoring.
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self.before[number] = signal.signal(number, self.receive)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame: Any) -> None:
        waits = self.after_step and self.in_step and not self.received
        self.received = number
        if not waits:
            raise Interrupted(number)

    def between_steps(self) -> None:
        """Raise what was received meanwhile: where it was let wait, or where somebody swallowed it."""
        if self.received:
            raise Interrupted(self.received)
