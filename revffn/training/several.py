"""What the trainer does otherwise as one of several processes: its part of every batch, and checkpoints of shards."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from ..data import IGNORED
from ..files import new_folder
from ..parallel.processes import from_all, once, rank, size, together
from ..parallel.states import save_shards, write_counters
from ..recipe import InputError
from .lock import LOCK

if TYPE_CHECKING:
    from .trainer import RevFFNTrainer


def several_arguments() -> dict[str, Any]:
    """For `SFTConfig`: without GPUs accelerate has to be told that it is one of several processes."""
    return {"use_cpu": not torch.cuda.is_available()} if together() else {}


def check_shared(output_dir: Path) -> None:
    """Refuse processes that do not see one folder, where each writes its shards.

    Raises:
        InputError: Names the machine that does not see it.
    """
    found = from_all((output_dir / LOCK).exists() or socket.gethostname())
    missing = next((host for host in found if host is not True), None)
    if missing is not None:
        raise InputError(
            f"training.output_dir {output_dir} is not the same folder on {missing}. Name one that all machines share."
        )


class Part:
    """Collates a process's part of a batch: of the rows of all, in their order, as many as any other process has.

    All parts have one shape, so that all processes do the same: as wide as the longest row of all, filled up with rows
    that nothing is learnt of and no token of which counts. Of packed examples, which lie one behind another, the parts
    have one length.

    Args:
        collate: Of the trainer.
    """

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]], flat: bool):
        self.collate, self.flat = collate, flat

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        number = -(-len(examples) // size())
        parts = [examples[start : start + number] for start in range(0, number * size(), number)]
        mine = parts[rank()]
        if self.flat:
            lengths = [sum(len(row["input_ids"]) for row in part) for part in parts]
            missing = max(lengths) - lengths[rank()]
            return self.collate([*mine, *([nothing(missing, "seq_lengths" in examples[0])] if missing else [])])
        longest = max(examples, key=lambda row: len(row["input_ids"]))
        rows = [*mine, *[longest] * (number - len(mine) + 1)]
        batch = self.collate(rows)
        for name, fill in (("labels", IGNORED), ("attention_mask", 0)):
            batch[name][len(mine) :] = fill
        return {
            name: value[:number] if isinstance(value, Tensor) and value.shape[:1] == (len(rows),) else value
            for name, value in batch.items()
        }


def nothing(length: int, packed: bool) -> dict[str, list[int]]:
    """An example of which nothing is learnt, each token apart: so they are known not to count (`counted_tokens`)."""
    row = {"input_ids": [0] * length, "labels": [IGNORED] * length}
    return row | {"seq_lengths": [1] * length} if packed else row


def train_batches(trainer: RevFFNTrainer, loader: DataLoader) -> DataLoader:
    """The trainer's data in the order that one process would have, a function of seed and step alone; every process
    reads all rows' tokens, and makes its part.

    Args:
        loader: The trainer's own; its data set and collator are taken.
    """
    sampler = RandomSampler(loader.dataset)
    batches = DataLoader(
        loader.dataset,
        batch_size=trainer.args.per_device_train_batch_size * size(),
        sampler=sampler,
        collate_fn=Part(loader.collate_fn, trainer.padding_free),
        pin_memory=trainer.args.dataloader_pin_memory,
    )
    return prepare_data_loader(
        batches,
        trainer.accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        use_seedable_sampler=True,
        dispatch_batches=False,
    )


def save_checkpoint(trainer: RevFFNTrainer, final: Path, close: Callable[[Path], None]) -> None:
    """Write a checkpoint beside its name; `close` ends it. All processes take part; they see one file system."""
    folder = new_folder(final)
    partial = once(folder.__enter__)
    try:
        save_shards(partial, trainer.model, trainer.optimizer_of_run)
        once(lambda: write_rest(trainer, partial, close))
    except BaseException as error:
        if rank() == 0:
            folder.__exit__(type(error), error, error.__traceback__)
        raise
    once(lambda: folder.__exit__(None, None, None))


def write_rest(trainer: RevFFNTrainer, folder: Path, close: Callable[[Path], None]) -> None:
    """What there is besides shards: one process's."""
    write_counters(folder, trainer.optimizer_of_run)
    trainer.model.config.save_pretrained(folder)
    if trainer.model.can_generate():
        trainer.model.generation_config.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    torch.save(trainer.args, folder / "training_args.bin")
    torch.save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")
    torch.save(random_state(), folder / "rng_state.pth")
    trainer.state.stateful_callbacks["TrainerControl"] = trainer.control.state()
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    close(folder)


def random_state() -> dict[str, Any]:
    """As `Trainer` reads it. Every process has the same: its data does not depend on it."""
    import random

    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.random.get_rng_state()
    return states
