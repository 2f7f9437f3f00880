"""How far a stage is: a bar on a terminal, elsewhere at most twenty lines and the last.

Run: pytest tests/training/test_progress.py
"""

import io

import pytest
from rich.console import Console

from revffn.training.progress import LINES, Progress

LOGS = {"loss": 1.93216, "tokens_per_second": 1204.4, "peak_bytes": 3 * 2**30}


def shown(total: int, log_steps: int, first: int = 0) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=False, width=40, soft_wrap=True)
    progress = Progress("stage 2", first, total, console)
    for step in range(first + 1, total + 1):
        progress.advance(step)
        if step % log_steps == 0:
            progress.log(step, LOGS)
    progress.close()
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("log_steps", [1, 7])
@pytest.mark.parametrize("total", [1, 7, 19, 20, 21, 45, 1000])
def test_few_lines_without_a_terminal(total, log_steps):
    lines = shown(total, log_steps)
    assert len(lines) <= LINES + 1 and len(set(lines)) == len(lines)
    assert len(lines) >= min(total // log_steps, LINES // 2)
    last = total // log_steps * log_steps
    if last:
        assert lines[-1].startswith(f"stage 2: step {last:,} of {total:,}, loss 1.932, 1,204 tokens/s, 3.0 GiB")


def test_a_resumed_stage_goes_on_in_the_same_rhythm():
    assert [line.split()[3] for line in shown(100, 1, first=52)] == [str(step) for step in range(55, 101, 5)]


def test_the_first_log_has_no_speed():
    console = Console(file=io.StringIO(), force_terminal=False, soft_wrap=True)
    progress = Progress("stage 1", 0, 1, console)
    progress.log(1, {"loss": 2.0, "peak_bytes": 2**30})
    assert console.file.getvalue() == "stage 1: step 1 of 1, loss 2.000, 1.0 GiB\n"


def test_time_left(monkeypatch):
    seconds = iter((100.0, 110.0, 130.0))
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    progress = Progress("stage 2", 10, 100, Console(file=io.StringIO()))
    assert progress.left(20) == "0:01:20 left"  # ten steps in ten seconds, eighty to go
    assert progress.left(30) == "0:01:45 left"  # twenty in thirty
    assert progress.left(100) == "" and progress.left(10) == ""


def test_a_bar_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=100, color_system=None)
    progress = Progress("stage 2", 0, 300, console)
    for step in (14, 15):
        progress.advance(step)
        progress.log(step, LOGS)
    progress.close()
    last = console.file.getvalue().splitlines()[-2]  # behind it the cursor is shown again
    assert "stage 2" in last and "15/300" in last and "loss 1.932, 1,204 tokens/s, 3.0 GiB, 0:00:0" in last
    assert "left" in last and "step 15 of" not in console.file.getvalue()
