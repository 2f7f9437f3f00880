"""For test_faults.py: runs that are killed, or whose disk is full, from a given moment on, then gone on with. Prints
what came of each as JSON.

    broken_off.py RECIPE FOLDER MOMENT...

A moment is a call and its number, counted from 0: `fsync 3` kills there. `full 12` fills the disk of FOLDER at that
write: opening a file for writing, making a folder, renaming, or a library's call that writes by itself; `inodes 12`
leaves room, but none for another file. `full every 5` stands for every fifth of a run's writes.

One process imports everything and forks for every run: no import is paid twice.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest  # noqa: E402, F401 - its environment
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

from revffn.__main__ import main  # noqa: E402
from revffn.training import preflight, trainer  # noqa: E402
from revffn.training.checkpoint import STAGES, checkpoints, wrong_with  # noqa: E402
from revffn.training.run import train  # noqa: E402, F401 - imported here, once

CALLS = {
    "save": (torch, "save"),
    "weights": (safetensors.torch, "serialize_file"),
    "manifest": (trainer, "write_manifest"),
    "line": (trainer, "append_line"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "replace": (os, "replace"),
    "rmtree": (shutil, "rmtree"),
    "step": (trainer.RevFFNTrainer, "training_step"),
}
FULL = ("full", "inodes")


def before(call: str, do) -> None:
    """Do something before each call of a function."""
    place, name = CALLS[call]
    real = getattr(place, name)

    def called(*args, **kwargs):
        do()
        return real(*args, **kwargs)

    setattr(place, name, called)


def before_writes(folder: Path, do) -> None:
    """Do something before everything that writes below a folder. Cannot be undone: for a process of its own."""

    def hook(event, args):
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            writes = event in ("os.rename", "os.mkdir")
        if writes and isinstance(args[0], (str, os.PathLike)) and Path(args[0]).is_relative_to(folder):
            do()

    sys.addaudithook(hook)
    for call in ("save", "weights"):  # they open files in other languages
        before(call, do)


def at(number: int, do):
    """Do something at the n-th call, counted from 0, and only there."""
    left = [number]

    def called():
        left[0] -= 1
        if left[0] == -1:
            do()

    return called


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill(disk: Path, what: str) -> None:
    """Leave no byte (full) or no name (inodes) on a disk; `empty` takes it back."""
    ballast = disk / "ballast"
    ballast.mkdir()
    with contextlib.suppress(OSError):
        if what == "inodes":
            for number in range(10**5):
                (ballast / str(number)).touch()
        for size in (2**20, 2**12, 1):
            with contextlib.suppress(OSError), (ballast / str(size)).open("wb", buffering=0) as stream:
                while stream.write(bytes(size)):
                    pass


def empty(disk: Path) -> bool:
    """Whether the disk had been filled."""
    filled = (disk / "ballast").is_dir()
    shutil.rmtree(disk / "ballast", ignore_errors=True)
    return filled


def forked(words: list[str], begin=None, said: Path | None = None) -> int:
    """The wait status of a run in a process of its own.

    Args:
        begin: Called there first.
        said: Where its stderr goes.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            with open(os.devnull, "w") as nothing, open(said or os.devnull, "w") as errors:
                os.dup2(nothing.fileno(), 1)
                if said is not None:
                    os.dup2(errors.fileno(), 2)
                if begin:
                    begin()
                status = main(words)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitpid(child, 0)[1]


def bits(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def torn(folder: Path) -> list[str]:
    """What has its final name and is not whole."""
    found = [str(path) for stage in STAGES for path in checkpoints(folder / stage) if wrong_with(path)]
    model = folder / "model"
    whole = {"config.json", "tokenizer_config.json", "model.safetensors"}
    if model.exists() and not whole <= {path.name for path in model.iterdir()}:
        found.append(str(model))
    # Anything else than checkpoints, lines that grow and the lock is not expected.
    files = {str(path.relative_to(folder)) for path in (*folder.glob("*"), *folder.glob("stage*/*")) if path.is_file()}
    known = {"run.json", "metrics.jsonl", "router.jsonl", ".lock"}
    found += sorted(files - known - {name for name in files if ".partial-" in name})
    if (folder / "run.json").exists() and not (folder / "run.json").read_text().endswith("}\n"):
        found.append("run.json")
    return found


def count_writes(words: list[str], folder: Path, counted: Path) -> int:
    """Of a run from its beginning to its end."""

    def begin():
        before_writes(folder, lambda: os.write(number, b"."))

    number = os.open(counted, os.O_WRONLY | os.O_CREAT)
    assert forked(words, begin) == 0
    return counted.stat().st_size


def break_off(words: list[str], folder: Path, place: Path, moment: str, said: Path) -> dict:
    """One run into `place`: what came of it, and what was said on stderr, which goes to another disk."""
    call, number = moment.split()[0], int(moment.split()[1])

    def begin():
        if call in FULL:
            before_writes(place, at(number, lambda: fill(folder, call)))
        else:
            before(call, at(number, kill))

    status = forked(words, begin, said)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    leavings = list(place.rglob(".*.partial-*"))
    return {
        "reached": empty(folder) or killed,
        "status": os.waitstatus_to_exitcode(status),
        "said": said.read_text(),
        "torn": torn(place),
        "in_save": any(path.is_dir() for path in leavings),
        "leavings": list(map(str, leavings)),
    }


def run() -> None:
    torch.set_num_threads(1)
    preflight.check_memory = lambda *args: None  # each process would plan anew
    recipe, folder, *asked = sys.argv[1:]
    folder, moments, results = Path(folder), [], {}
    whole = folder / "whole"
    same = ["train", recipe, "--reversible.tile_tokens", "64", "--data.heldout", "0", "--training.output_dir"]
    writes = count_writes([*same, str(whole)], whole, folder / "writes")
    for moment in asked:
        call, number, *every = moment.split()
        moments += [f"{call} {n}" for n in range(0, writes, int(every[0]))] if every else [moment]
    for moment in moments:
        place = folder / moment.replace(" ", "_")
        words = [*same, str(place)]
        result = break_off(words, folder, place, moment, Path(recipe).with_name("said"))
        begun = (place / "run.json").exists()
        result["resumed"] = forked([*words, "--training.resume", "true"] if begun else words)
        result["same"] = bits(place / "model") == bits(whole / "model") != {}
        result["left"] = [str(path) for path in place.rglob(".*")]
        results[moment] = result
        shutil.rmtree(place, ignore_errors=True)
    print(json.dumps({"writes": writes, "moments": results}))


if __name__ == "__main__":
    run()
