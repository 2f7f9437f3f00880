"""Ctrl-C and SIGTERM: the end of the process while nothing has begun, then an exception with an exit status."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
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
        self.before = handle(self.receive)
        return self

    def __exit__(self, *error: Any) -> None:
        restore(self.before)

    def receive(self, number: int, frame: Any) -> None:
        waits = self.after_step and self.in_step and not self.received
        self.received = number
        if not waits:
            raise Interrupted(number)

    def between_steps(self) -> None:
        """Raise what was received meanwhile: where it was let wait, or where somebody swallowed it."""
        if self.received:
            raise Interrupted(self.received)


@contextlib.contextmanager
def at_once(command: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM while packages are imported and words are read: one line, and the process is gone. An
    exception that is raised in an import may come out of it as another one, or not at all."""

    def end(number: int, frame: Any) -> None:
        os.write(2, f"{command}: stopped by {signal.Signals(number).name}.\n".encode())
        os._exit(128 + number)

    before = handle(end)
    try:
        yield
    finally:
        restore(before)


def handle(handler: Callable[[int, Any], None]) -> dict[int, Any]:
    """Have both signals handled, if this is the main thread; the handlers of before. What a shell has told a
    background process to ignore, it goes on ignoring."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        signal.signal(number, handler)
