"""revffn: fine-tune all parameters of a Mixture-of-Experts language model on one GPU, with reversible blocks."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0.dev0"


def _is_command() -> bool:
    """Whether this process is `revffn ...` or `python -m revffn ...`, which imports what its command needs: torch and
    transformers take seconds, and most mistakes are seen without them."""
    return Path(sys.argv[0] if sys.argv else "").name == "revffn" or sys.orig_argv[1:3] == ["-m", "revffn"]


if TYPE_CHECKING or not _is_command():
    from .public import *  # noqa: F403
    from .public import __all__ as __all__
