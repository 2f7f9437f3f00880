"""Groups of processes that make runs. They are forked, so that all share the imports.

    python tests/parallel/worker.py

reads lines of JSON: {"size", "folder", "runs": [{"name", "recipe", "options", "port", "fault"}]}. The processes of a
group write outN and errN into the folder, after each run a JSON line with what came of it; when all have ended a line
with their exit statuses is printed, and how many seconds after the first each ended.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch

from revffn.command_line import load_run_config
from revffn.engine import exchange
from revffn.optim import in_backward, rules
from revffn.quiet import without_noise
from revffn.training import several, trainer
from revffn.training.run import train

FAULTS = {}
"""By name, what a run is made to do wrong. Each must be seen in what comes of it."""


def fault(function):
    FAULTS[function.__name__] = function
    return function


@fault
def other_order(patch):
    """The second process takes the first one's part of every batch."""
    patch(several, "rank", lambda: 0)


@fault
def lost_sum(patch):
    """Norms and statistics of shards are not added up."""
    for module in (in_backward, rules):
        patch(module, "sum_over_shards", lambda value, parameter: value)


@fault
def lost_share(patch):
    """Experts' gradients are not divided by the number of ranks, as the others' are."""
    before = exchange.LocalPart

    class Undivided(before):
        @staticmethod
        def backward(ctx, grad):
            found = before.backward(ctx, grad)
            return None if found is None else found * ctx.mesh.size()

    patch(exchange, "LocalPart", Undivided)


@fault
def killed(patch):
    """The second process is killed in its fourth step."""
    before, steps = trainer.RevFFNTrainer.training_step, []

    def training_step(self, *args, **kwargs):
        steps.append(0)
        if len(steps) == 4 and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return before(self, *args, **kwargs)

    patch(trainer.RevFFNTrainer, "training_step", training_step)


def run(recipe, options, port, fault, seen):
    patched = []

    def patch(owner, name, value):
        patched.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    before = trainer.RevFFNTrainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        counts = inputs["labels"] != -100
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        tokens = inputs["input_ids"][mask].tolist()
        seen.append({"shape": list(counts.shape), "tokens": sorted(tokens), "learnt": int(counts.sum())})
        loss = before(self, model, inputs, *args, **kwargs)
        seen[-1] |= {"kept": sum(p.grad is not None for p in self.model.parameters()), "measured": self.measured}
        return loss

    patch(trainer.RevFFNTrainer, "training_step", training_step)
    if fault:
        FAULTS[fault](patch)
    os.environ["MASTER_PORT"] = str(port)
    try:
        train(load_run_config(Path(recipe), options), Path(recipe))
    finally:
        for owner, name, value in reversed(patched):
            setattr(owner, name, value)


def rank_of(group, rank):
    """All runs of a group, as one of its processes."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(group["folder"]) / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), number)
    if group["size"] > 1:
        several = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": group["size"], "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {name: str(value) for name, value in several.items()}
    for work in group["runs"]:
        seen, error = [], None
        try:
            with without_noise():
                run(work["recipe"], work["options"], work["port"], work.get("fault"), seen)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        print(json.dumps({"name": work["name"], "seen": seen, "error": error}), file=sys.__stdout__, flush=True)


def main():
    for line in sys.stdin:
        group, pids, ended = json.loads(line), [], {}
        for rank in range(group["size"]):
            if not (pid := os.fork()):
                try:
                    rank_of(group, rank)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            pids.append(pid)
        while len(ended) < len(pids):
            pid, status = os.wait()
            ended[pid] = os.waitstatus_to_exitcode(status), time.monotonic()
        first = min(moment for _, moment in ended.values())
        print(json.dumps([[ended[pid][0], ended[pid][1] - first] for pid in pids]), flush=True)


if __name__ == "__main__":
    main()
