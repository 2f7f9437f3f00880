"""Which process is gone, when the others cannot go on.

A collective that waits for a dead process ends late, or with an error of the network that names nobody. So every
process says in the group's store, once a second, that it is there; the others look. One that ended with an error, or
was stopped, says so with its last breath; one that was killed is missed: at once on the same machine, after some
seconds on another.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import psutil
from torch.distributed import PrefixStore, TCPStore

EVERY = 1.0
"""Seconds between two signs of life."""
SILENCE = 20.0
"""Seconds without one from another machine, after which a process counts as gone. torchrun kills what is left 30
seconds after the first has gone."""


WITHOUT_STORE = {0: "neither it nor the store that all processes meet at can be reached"}
"""Without torchrun the first process has the store."""


class Watch:
    """Looks after the other processes of a group, in a thread.

    Args:
        rank: Of this one.
        size: Of the group.
        way_on: What is safe, and how to go on; asked for when a process is gone.
    """

    def __init__(self, rank: int, size: int, way_on: Callable[[], str]):
        self.rank, self.size, self.way_on = rank, size, way_on
        self.host = socket.gethostname()
        self.ended = threading.Event()
        self.lock = threading.Lock()
        # A connection of its own: the group's waits in collectives.
        self.store = PrefixStore(
            "revffn",
            TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=SILENCE),
            ),
        )
        self.store.set(f"who/{rank}", f"{self.host} {os.getpid()}")
        self.store.set(f"alive/{rank}", "0")
        self.who: dict[int, tuple[str, int]] = {}
        self.seen: dict[int, tuple[str, float]] = {}
        self.thread = threading.Thread(target=self.run, name="revffn-peers", daemon=True)
        self.thread.start()

    def run(self) -> None:
        beats = 0
        while not self.ended.wait(EVERY):
            beats += 1
            try:
                self.store.set(f"alive/{self.rank}", str(beats))
                gone = self.look()
            except RuntimeError:
                gone = WITHOUT_STORE
            if gone and not self.ended.is_set():
                self.end(gone)

    def look(self) -> dict[int, str]:
        """The processes that are gone, each with what is known of it."""
        with self.lock:
            found = {}
            for other in range(self.size):
                if other != self.rank and (what := self.what_of(other)) is not None:
                    found[other] = what
            return found

    def what_of(self, other: int) -> str | None:
        if self.store.check([f"done/{other}"]):
            return None
        if other not in self.who:
            if not self.store.check([f"who/{other}"]):
                return None  # not here yet: who waits for it says so in time
            host, pid = self.store.get(f"who/{other}").decode().rsplit(" ", 1)
            self.who[other] = host, int(pid)
        host, pid = self.who[other]
        name = f"process {pid} on {host}"
        if self.store.check([f"ended/{other}"]):
            return f"{name}: {self.store.get(f'ended/{other}').decode()}"
        if host == self.host and not runs(pid):
            return f"{name} has died"
        beat, now = self.store.get(f"alive/{other}").decode(), time.monotonic()
        if self.seen.get(other, ("", 0.0))[0] != beat:
            self.seen[other] = beat, now
        if now - self.seen[other][1] > SILENCE:
            return f"{name} has not been heard of for {SILENCE:.0f} seconds"
        return None

    def end(self, gone: dict[int, str]) -> None:
        """This process cannot go on. Its collectives wait for one that is gone, in code that knows no exception."""
        if self.rank == min(set(range(self.size)) - set(gone), default=self.rank):
            rank, what = min(gone.items())
            line = f"rank {rank} of {self.size} is gone ({what}); {self.way_on()}"
            os.write(2, f"revffn train: {' '.join(line.split())}\n".encode())
        os._exit(1)

    def conclude(self, error: BaseException) -> None:
        """This process has an error: because another is gone, which is said; or of its own, which the others are
        told."""
        if getattr(error, "everywhere", False):
            self.ended.set()
            return
        stopped = isinstance(error, KeyboardInterrupt)
        for number in (signal.SIGINT, signal.SIGTERM):
            if threading.current_thread() is threading.main_thread():
                signal.signal(number, signal.SIG_IGN)
        # A launcher stops the others as soon as one is gone; the network's errors come before anything else is known.
        patience = 3 * EVERY if stopped else SILENCE + 2 * EVERY if of_network(error) else 0.0
        deadline = time.monotonic() + patience
        try:
            while time.monotonic() < deadline:
                gone = {rank: what for rank, what in self.look().items() if "stopped by" not in what}
                if gone:
                    self.ended.set()
                    self.end(gone)
                time.sleep(0.1)
            self.ended.set()
            self.store.set(f"ended/{self.rank}", " ".join(str(error).split())[:300] or type(error).__name__)
        except RuntimeError:
            if of_network(error):
                self.ended.set()
                self.end(WITHOUT_STORE)

    def stop(self) -> None:
        """The group's work is done."""
        self.ended.set()
        self.store.set(f"done/{self.rank}", "1")
        self.thread.join()


def of_network(error: BaseException) -> bool:
    """Whether a collective failed; PyTorch has classes of its own for some backends only."""
    return isinstance(error, RuntimeError) and any(
        word in str(error).lower() for word in ("gloo", "nccl", "connection", "peer", "socket", "timed out")
    )


def runs(pid: int) -> bool:
    """Whether a process of this machine is alive; one that nobody has waited for is not."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
