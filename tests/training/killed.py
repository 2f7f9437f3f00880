"""For test_resume.py: runs that are killed at given moments, then gone on with. Prints what came of each as JSON.

One process imports everything and forks for every run: no import is paid twice.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import conftest  # noqa: E402, F401 - its environment
import torch  # noqa: E402

from revffn.__main__ import main  # noqa: E402
from revffn.training import preflight  # noqa: E402
from revffn.training.checkpoint import STAGES, checkpoints, wrong_with  # noqa: E402
from revffn.training.run import train  # noqa: E402, F401 - imported here, once
from revffn.training.trainer import RevFFNTrainer  # noqa: E402

CALLS = {
    "save": (torch, "save"),
    "fsync": (os, "fsync"),
    "rename": (os, "rename"),
    "rmtree": (shutil, "rmtree"),
    "step": (RevFFNTrainer, "training_step"),
}


def kill_at(call: str, number: int) -> None:
    """The n-th call of a function, counted from 0, is this process's last."""
    place, name = CALLS[call]
    real, left = getattr(place, name), [number]

    def counted(*args, **kwargs):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return real(*args, **kwargs)

    setattr(place, name, counted)


def forked(words: list[str], moment: str | None = None) -> int:
    """The wait status of a run in a process of its own."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 70
        try:
            with open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), 1)
                if moment:
                    call, number = moment.split()
                    kill_at(call, int(number))
                status = main(words)
        finally:
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
    return found


def run() -> None:
    torch.set_num_threads(1)
    preflight.check_memory = lambda *args: None  # each process would plan anew
    recipe, folder, *moments = sys.argv[1:]
    whole = Path(folder, "whole")
    same = ["train", recipe, "--reversible.tile_tokens", "64", "--data.heldout", "0", "--training.output_dir"]
    assert forked([*same, str(whole)]) == 0
    results = {}
    for moment in moments:
        place = Path(folder, moment.replace(" ", "_"))
        words = [*same, str(place)]
        status = forked(words, moment)
        result = {"killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "torn": torn(place)}
        result["resumed"] = forked([*words, "--training.resume", "true"])
        result["same"] = bits(place / "model") == bits(whole / "model") != {}
        result["left"] = [str(path) for path in place.rglob(".*")]
        results[moment] = result
        shutil.rmtree(place, ignore_errors=True)
    print(json.dumps(results))


run()
