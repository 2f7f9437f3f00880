"""How far a stage is, on stderr: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import math
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

LINES = 20
"""Most lines that a stage takes where there is no terminal; one more for its last log."""


class Progress:
    """Steps of a stage, with loss, tokens per second, the process's peak memory and the time that is left.

    Args:
        name: What stands in front.
        step: Steps that are done already.
        total: Steps of the whole stage.
        console: Where it is shown; stderr unless given.
    """

    def __init__(self, name: str, step: int, total: int, console: Console | None = None):
        self.name, self.total = name, total
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self.first, self.begun = step, time.perf_counter()
        self.every = math.ceil(total / LINES) or 1
        self.shown, self.waiting = step // self.every, ""
        self.bar: Bar | None = None
        if self.console.is_interactive:
            columns = (TextColumn(name), BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}"))
            self.bar = Bar(*columns, console=self.console, refresh_per_second=4)
            self.bar.add_task(name, total=total, completed=step, numbers="")
            self.bar.start()

    def advance(self, step: int) -> None:
        """`step` is done."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=step)

    def log(self, step: int, logs: dict[str, float]) -> None:
        """Show the numbers of a log of `step`: `loss` and `peak_bytes`, and `tokens_per_second` if it has them."""
        parts = [f"loss {logs['loss']:.3f}"]
        if "tokens_per_second" in logs:
            parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
        parts += [f"{logs['peak_bytes'] / 2**30:.1f} GiB", self.left(step)]
        numbers = ", ".join(filter(None, parts))
        if self.bar is not None:
            return self.bar.update(self.bar.task_ids[0], numbers=numbers)
        self.waiting = f"{self.name}: step {step:,} of {self.total:,}, {numbers}"
        if step // self.every > self.shown:
            self.shown = step // self.every
            self.write()

    def left(self, step: int) -> str:
        """The time that the other steps take if they are like those until now."""
        if not self.first < step < self.total:
            return ""
        seconds = (time.perf_counter() - self.begun) / (step - self.first) * (self.total - step)
        return f"{timedelta(seconds=math.ceil(seconds))} left"

    def write(self) -> None:
        if self.waiting:
            self.console.print(self.waiting, markup=False)
        self.waiting = ""

    def close(self) -> None:
        """Whatever ends the training: the last log is shown, and what follows begins on a line of its own."""
        if self.bar is not None:
            self.bar.stop()
        self.write()
