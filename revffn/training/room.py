"""What a run is predicted to take: which tiles and which place for the weights fit, memory and disk."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException
from transformers import PreTrainedConfig

from ..files import existing_parent, read_json
from ..memory.amounts import gib, parse_bytes
from ..memory.answers import USUAL_TILE, KeptChoice, Plan, TileChoice
from ..memory.measure import count
from ..memory.plan import choose_kept, choose_tile, plan, tiled, what_would_fit
from ..memory.predict import RESERVE_BYTES
from ..memory.simulation import Method
from ..models.architectures import ARCHITECTURES
from ..parallel.launch import number_of_processes
from ..recipe import InputError, RunConfig, with_kept, with_tile, with_weights
from .checkpoint import KEPT, STAGES, checkpoints


@contextlib.contextmanager
def rehearsal(path: str, *passed_on: type[Exception]) -> Iterator[None]:
    """A config.json with values that do not go together fails anywhere in a model's code.

    Raises:
        InputError: Any exception but those that are passed on, in one line.
    """
    try:
        yield
    except (InputError, *passed_on):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path}: no model can be made as config.json says ({type(error).__name__}: {said}). Get the model's "
            "files anew."
        ) from error


def method_of(config: RunConfig, hf_config: PreTrainedConfig) -> Method:
    """A recipe in the planner's words, its second stage; while nothing is chosen, with the whole batch and no kept
    layer."""
    if config.reversible.tile_tokens == "auto":
        config = with_tile(config, None)
    if config.reversible.kept_layers == "auto":
        config = with_kept(config, 0)
    reversible = config.reversible.resolve(config.training.calibration_tokens > 0)
    plain = "checkpointing" if config.training.activation_checkpointing else "plain"
    return Method(
        name=plain if reversible is None else "reversible",
        reversible=reversible,
        optimizer=config.optimizer.name,
        rounding=config.optimizer.rounding,
        optimizer_in_backward=config.optimizer.in_backward,
        linear_cross_entropy=config.memory.linear_cross_entropy,
        dtype=getattr(torch, config.model.dtype),
        padded=not config.data.packing and planned_batch(config) > 1,
        device="cuda" if torch.cuda.is_available() else "cpu",
        weights="device" if config.memory.weights == "auto" else config.memory.weights,
        **shared_by(config),
        **router_losses(config, hf_config),
    )


def router_losses(config: RunConfig, hf_config: PreTrainedConfig) -> dict[str, bool]:
    """Which losses of the routers are added, for the planner."""
    training, text_config = config.training, hf_config.get_text_config()
    balance = training.router_aux_loss_coef
    if balance is None:
        balance = getattr(text_config, "router_aux_loss_coef", 0.0) if training.freeze_router is False else 0.0
    return {
        "router_aux_loss": balance > 0 and hasattr(text_config, "output_router_logits"),
        "router_z_loss": training.router_z_loss_coef > 0,
    }


def shared_by(config: RunConfig) -> dict[str, Any]:
    """How several processes divide the model, for the planner; with ddp each has all of it."""
    number, strategy = number_of_processes(), config.parallel.strategy
    return {"gpus": number, "parallel": strategy} if strategy in ("fsdp", "ep") and number > 1 else {}


def planned_batch(config: RunConfig) -> int:
    """Sequences of those processes that the planner is told of: all, or with ddp one."""
    return config.training.batch_size // (number_of_processes() if config.parallel.strategy == "ddp" else 1)


def choose_weights(
    config: RunConfig, hf_config: PreTrainedConfig, rows: list[dict[str, list[int]]], checkpoint: Path | None
) -> RunConfig:
    """Say a place for `weights: auto`: host memory if the run is predicted to fit only so.

    Raises:
        InputError: See `check_memory`.
    """
    if config.memory.weights != "auto":
        return config
    on_device = with_weights(config, "device")
    # Without a GPU the host's memory is the only one, unless a limit stands for a device's.
    if not torch.cuda.is_available() and config.memory.limit is None or hf_config.model_type not in ARCHITECTURES:
        return on_device
    try:
        on_host = with_weights(config, "host")
    except ValueError:  # other settings keep them on the device
        return on_device
    limit = limit_of(config) + (0 if torch.cuda.is_available() else RESERVE_BYTES)
    for attempt in (on_device, on_host):
        method = method_of(attempt, hf_config)
        chosen, _ = choose(attempt, hf_config, method, rows, checkpoint)
        method = tiled(method, chosen.reversible.tile_tokens)
        answer = plan(hf_config, planned_batch(config), longest_of(config, rows), method, with_alternatives=False)
        if answer.total_bytes <= limit:
            return attempt
    return on_device


def choose(
    config: RunConfig,
    hf_config: PreTrainedConfig,
    method: Method,
    rows: list[dict[str, list[int]]],
    checkpoint: Path | None,
) -> tuple[RunConfig, TileChoice | None]:
    """Put a number for `tile_tokens: auto`; a run that is resumed keeps its own, whatever it is told now.

    Raises:
        InputError: See `check_memory`.
    """
    asked = config.reversible.tile_tokens
    if config.reversible.coupling is None or hf_config.model_type not in ARCHITECTURES:
        return (with_tile(config, None) if asked == "auto" else config), None
    saved = read_json(checkpoint / "config.json").get("revffn", {}) if checkpoint else {}
    if "tile_tokens" in saved:
        if asked == saved["tile_tokens"]:
            return config, None
        return with_tile(config, saved["tile_tokens"]), TileChoice(saved["tile_tokens"], f"as in {checkpoint}")
    if asked != "auto":
        return config, None
    limit, on_gpu = limit_of(config), torch.cuda.is_available()
    try:
        with rehearsal(config.model.path, ImportError):
            tile = choose_tile(
                hf_config,
                planned_batch(config),
                longest_of(config, rows),
                method,
                limit_bytes=limit,
                reserve_bytes=RESERVE_BYTES if on_gpu else 0,
                largest=None if on_gpu else USUAL_TILE,
            )
    except ImportError as error:
        raise InputError(f"optimizer.name: {error}") from None
    return with_tile(config, tile.tile_tokens), tile


def choose_layers(
    config: RunConfig, hf_config: PreTrainedConfig, method: Method, rows: list[dict[str, list[int]]]
) -> tuple[RunConfig, KeptChoice | None]:
    """Put a number for `kept_layers: auto`. Tiles, which come first, are in `method`.

    Raises:
        InputError: See `check_memory`.
    """
    if config.reversible.kept_layers != "auto":
        return config, None
    known = config.reversible.coupling is not None and hf_config.model_type in ARCHITECTURES
    if not known or not torch.cuda.is_available() or config.parallel.strategy == "ddp":
        return with_kept(config, 0), None
    with rehearsal(config.model.path):
        kept = choose_kept(
            hf_config, planned_batch(config), longest_of(config, rows), method, limit_bytes=limit_of(config)
        )
    return with_kept(config, kept.kept_layers), kept


def check_memory(
    config: RunConfig, hf_config: PreTrainedConfig, method: Method, rows: list[dict[str, list[int]]]
) -> Plan | None:
    """Predict the largest step, and refuse a run that cannot fit. (Not with ddp, whose copies are unknown.)

    Raises:
        InputError: The prediction is above the limit, or `memory.limit` cannot be read. The message says what would
            fit.
    """
    limit = limit_of(config)
    if hf_config.model_type not in ARCHITECTURES or config.parallel.strategy == "ddp":
        return None
    batch, tokens = config.training.batch_size, longest_of(config, rows)
    try:
        with rehearsal(config.model.path, ImportError, DataDependentOutputException):
            answer = plan(hf_config, batch, tokens, method, with_alternatives=False)
    except ImportError as error:
        raise InputError(f"optimizer.name: {error}") from None
    except DataDependentOutputException:
        return None  # plain experts on a CPU look at numbers on their way, up to transformers 5.17
    reserve = answer.reserve_bytes if torch.cuda.is_available() else 0
    if answer.peak_bytes + reserve <= limit or config.memory.force:
        return answer
    found = what_would_fit(hf_config, batch, tokens, method, gpu_bytes=limit - reserve + answer.reserve_bytes)
    remedy = "; or ".join(map(str, found)) or "nothing tried does: the weights and what goes with them are too large"
    raise InputError(
        f"{config.model.path}: a step of {batch} x {tokens} tokens is predicted to take "
        f"{gib(answer.peak_bytes + reserve)}, more than the {gib(limit)} there are. What would fit: {remedy}. "
        "memory.limit says how much there is; --force starts all the same."
    )


def check_disk(config: RunConfig, hf_config: PreTrainedConfig, method: Method, output_dir: Path) -> None:
    """Refuse a run for whose checkpoints and model there is no room.

    Raises:
        InputError: Says how much is needed, and how much there is.
    """
    try:
        counts = count(hf_config, replace(method, weights="device", gpus=1))
    except Exception:  # an architecture that the planner does not know
        return
    needed = disk_bytes(config, counts.weight_bytes, counts.optimizer_bytes)
    there = sum(
        file.stat().st_size for stage in STAGES for path in checkpoints(output_dir / stage) for file in path.rglob("*")
    )
    free = shutil.disk_usage(existing_parent(output_dir)).free
    if free + there < needed:
        raise InputError(
            f"training.output_dir {output_dir}: the run is going to write up to {needed:,} bytes (checkpoints with "
            f"the optimizer's states, and the model), and {free:,} are free there. Make room, name another folder, or "
            "keep no checkpoints (training.save_steps: null)."
        )


def disk_bytes(config: RunConfig, weights: int, states: int) -> int:
    """The most that a run has on the disk at a time; a new checkpoint is there before an old one goes."""
    training = config.training
    first, second = (
        number_of_checkpoints(steps, training.save_steps) for steps in (training.stage1_steps, training.num_steps)
    )
    if training.save_on_interrupt:
        second = max(second, 1)
    kept = min(first, KEPT) * weights  # in stage 1 there are next to no states
    checkpoint, most_kept = weights + states, KEPT + training.load_best_model_at_end
    most = [min(first, KEPT + 1) * weights, kept + min(second, most_kept + 1) * checkpoint]
    return max(*most, kept + min(second, most_kept) * checkpoint + weights)


def number_of_checkpoints(steps: int | None, every: int | None) -> float:
    """That a stage makes; its last step has one too."""
    if every is None:
        return 0
    return math.inf if steps is None else math.ceil(steps / every)


def longest_of(config: RunConfig, rows: list[dict[str, list[int]]]) -> int:
    """Tokens of the longest sequence in a batch."""
    if config.data.packing:
        return config.data.max_length
    return min(max(len(row["input_ids"]) for row in rows), config.data.max_length)


def limit_of(config: RunConfig) -> int:
    """Bytes that the run may take.

    Raises:
        InputError: `memory.limit` cannot be read.
    """
    try:
        return device_bytes() if config.memory.limit is None else parse_bytes(config.memory.limit)
    except ValueError as error:
        raise InputError(f"memory.limit: {error}") from None


def device_bytes() -> int:
    """All memory of the GPU, less what other processes take of it; or of the host without a GPU."""
    if not torch.cuda.is_available():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free, total = torch.cuda.mem_get_info()
    # The reserve stands for the context, which is there by now; what the allocator holds for nobody can be had.
    free += RESERVE_BYTES + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return min(free, total)
