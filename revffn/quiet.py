"""What the libraries underneath say about themselves, kept out of a command's output by their own switches.

Only what no user could act on is named here; every other warning comes through. Importing `revffn` changes nothing:
the commands enter these, and leave them as they were.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

NOISE = {
    # torchao, which transformers imports where it is installed: enums that it registers, kernels of other machines.
    "torch.utils._pytree": "is an Enum subclass",
    "torchao": "Failed to load",
    # Of a checkpoint that another number of processes wrote: batches are of all processes together.
    "transformers.trainer_utils": "The following arguments do not match the ones in the `trainer_state.json`",
}
"""By logger, what a message that is left out contains."""
WARNINGS = (
    # Carriers are views; nothing of the engine's changes one in place.
    "FSDP2-wrapped module .* returned a view tensor",
)
"""Begin of warnings that are left out."""


class Without(logging.Filter):
    """Leaves out the messages that contain a text."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        return self.text not in record.getMessage()


@contextlib.contextmanager
def without_noise() -> Iterator[None]:
    """For a while `NOISE` is not logged, and `WARNINGS` are not given. Imports nothing."""
    filters = {name: Without(text) for name, text in NOISE.items()}
    for name, found in filters.items():
        logging.getLogger(name).addFilter(found)
    try:
        with warnings.catch_warnings():
            for text in WARNINGS:
                warnings.filterwarnings("ignore", text)
            yield
    finally:
        for name, found in filters.items():
            logging.getLogger(name).removeFilter(found)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """For a while transformers draws no bars for reading and writing weights, and datasets none for passing over rows.
    Those of downloads stay: a user waits for them."""
    from transformers import logging as of_transformers

    before = of_transformers.is_progress_bar_enabled()
    of_transformers.disable_progress_bar()
    datasets = sys.modules.get("datasets")
    rows = datasets is not None and not datasets.are_progress_bars_disabled()
    if rows:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if before:
            of_transformers.enable_progress_bar()
        if rows:
            datasets.enable_progress_bars()
