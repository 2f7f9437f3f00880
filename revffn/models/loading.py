"""A model from a folder or the Hub, refused where its weights are not what its config says.

transformers fills a missing tensor with random numbers and goes on. Weights are only unpickled as weights, and code of
a model's folder does not run unless asked for: both are transformers' own rules.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..recipe import InputError

SHOWN = 3
"""Tensors that a line names; of the others it says how many there are."""


def load_causal_lm(path: str | Path, dtype: torch.dtype | str, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """`AutoModelForCausalLM.from_pretrained`, on the CPU, with every tensor looked at.

    Raises:
        InputError: There is no model, a file is broken, or tensors are missing, unexpected, of another shape or not
            finite. The line names them.
    """
    try:
        with only_errors():
            model, found = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, with all others
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of files, formats and the Hub: to the user all mean that nothing usable is there
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: the model cannot be loaded ({said}). Get its files anew.") from None
    wrong = [
        describe("there twice, under two names or in two files", twice(path, model.base_model_prefix)),
        describe("missing", found["missing_keys"]),
        describe("not known to the model", found["unexpected_keys"]),
        describe("of another shape than config.json says", map(shapes, found["mismatched_keys"])),
        describe("not finite", (f"{name}{file_of(path, name)}" for name in not_finite(model))),
    ]
    if any(wrong):
        raise InputError(
            f"{path}: the weights are not those of this config: {'; '.join(filter(None, wrong))}. Get the model's "
            "files anew, or the config that belongs to them."
        )
    return model


def describe(what: str, names: Iterator[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what}: {', '.join(names[:SHOWN])}{more}" if names else ""


def twice(path: str | Path, prefix: str) -> set[str]:
    """Tensors that a folder's files have more than once: transformers takes either. It accepts names without the
    prefix of the model inside (`layers.0...` for `model.layers.0...`)."""
    names = Counter()
    for file in files_read(Path(path)):
        with safe_open(file, "pt") as tensors:
            names.update(name.removeprefix(f"{prefix}.") for name in tensors.keys())
    return {name for name, number in names.items() if number > 1}


def files_read(folder: Path) -> list[Path]:
    """Those of a folder that transformers reads, as safetensors."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    return sorted({folder / name for name in weight_map(folder).values()})


def weight_map(folder: str | Path) -> dict[str, str]:
    """File by tensor, if there are several files."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads(Path(folder, "model.safetensors.index.json").read_text())["weight_map"]
    return {}


def shapes(mismatch: tuple | str) -> str:
    if isinstance(mismatch, str):
        return mismatch
    name, found, expected = mismatch
    return f"{name} ({tuple(found)} in place of {tuple(expected)})"


@torch.no_grad()
def not_finite(model: PreTrainedModel) -> Iterator[str]:
    """Names of parameters and buffers that hold NaN or infinity."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.numel() and tensor.device.type != "meta":
            least, most = torch.aminmax(tensor)
            if not (torch.isfinite(least) and torch.isfinite(most)):
                yield name


def file_of(path: str | Path, name: str) -> str:
    """ " in FILE", for a tensor that a file of the folder has under this name (fused experts have others)."""
    files = weight_map(path)
    return f" in {files[name]}" if name in files else ""


@contextlib.contextmanager
def only_errors() -> Iterator[None]:
    """transformers reports what it loads in bars and tables; here it is one line, or none."""
    logging = transformers.logging
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
