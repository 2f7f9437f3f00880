"""A run, checked: what a user can get wrong is looked at before weights are loaded and before anything is written.

The folder, the data, the model's architecture and settings, its tokenizer, and whether the step fits into memory. Each
mistake is one line: what was given, what is accepted, what to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, get_scheduler

from ..config import ReversibleConfig
from ..data import Counts, SourceCounts, batches, check_left_out, load_split, load_tokenizer, tokenize_and_count
from ..data.tokenizer import load_hf
from ..files import existing_parent, read_json, reason
from ..memory import disk
from ..memory.answers import KeptChoice, Plan, TileChoice
from ..memory.plan import keeping, tiled
from ..memory.simulation import Method
from ..models.architectures import ARCHITECTURES, PREFIX, has_routers
from ..models.conversion import convert, coupling_parameters
from ..models.losses import check_plain_loss
from ..parallel.launch import check_launch, number_of_processes
from ..parallel.shard import check_strategy
from ..recipe import InputError, RunConfig
from ..upstream import reports_to
from . import resume
from .best import check_heldout
from .checkpoint import STAGES
from .lock import check_free
from .resume import Resume
from .room import check_disk, check_memory, choose, choose_layers, choose_weights, method_of, rehearsal

MOST_LAYERS = 10_000
# Read by transformers itself; the first one that a config has bounds the sequence length.
LENGTH_LIMITS = ("max_position_embeddings", "n_positions")


@dataclass
class Run:
    """A checked run: what can be had without loading weights."""

    config: RunConfig
    """As given, with numbers for `reversible.tile_tokens` (or None) and `reversible.kept_layers`, and a place for
    `memory.weights`."""
    method: Method
    """The run in the planner's words; its `reversible` is what `convert` takes."""
    freezes_routers: bool
    output_dir: Path
    hf_config: PreTrainedConfig
    tokenizer: Any
    training: list[dict[str, list[int]]]
    """Tokenized, as `data.tokenize` returns them."""
    heldout: list[dict[str, list[int]]]
    sources: list[SourceCounts]
    """Where the examples come from."""
    counts: dict[str, Counts]
    """What became of the examples: `training` and `heldout`."""
    resume: Resume
    """Where to resume from."""
    plan: Plan | None
    """What the largest step of stage 2 is predicted to take; None for a model that the planner does not know."""
    tile: TileChoice | None
    """Where the run was not told `tile_tokens`: what was chosen, and why."""
    kept: KeptChoice | None
    """The same for `kept_layers`, where there was a choice."""

    @property
    def checkpoint(self) -> Path | None:
        return self.resume.checkpoint


def check(config: RunConfig, recipe: Path | None = None) -> Run:
    """Look at everything that can be wrong without loading weights or writing.

    A run that is finished is not looked at any further: `resume.finished` says so.

    Raises:
        InputError: One line with the remedy.
    """
    check_launch(config.parallel.strategy)
    if config.training.output_dir is None:
        raise InputError("training.output_dir is not set. Name the folder of the run.")
    output_dir = Path(config.training.output_dir)
    check_folder(output_dir)
    check_schedule(config)
    check_report_to(config.training.report_to)
    found = resume.find(config, output_dir)
    checkpoint = found.checkpoint
    split = load_split(config.data, recipe)
    check_layers(config.model.path)
    hf_config = load_hf(AutoConfig, config.model)
    method = method_of(config, hf_config)
    check_model(config, hf_config, method.reversible)
    tokenizer = load_tokenizer(config.model, [*split.training, *split.heldout])
    if len(tokenizer) > hf_config.get_text_config().vocab_size:
        raise InputError(
            f"{config.model.path}: the tokenizer has {len(tokenizer)} tokens, the model's embedding "
            f"{hf_config.get_text_config().vocab_size}. Take the tokenizer that belongs to the model, or resize the "
            "embedding (model.resize_token_embeddings) and save both."
        )
    if config.evaluation.prompt and not tokenizer.chat_template:
        raise InputError(
            f"evaluation.prompt: the tokenizer of {config.model.path} has no chat template to ask it with. Leave the "
            "key out."
        )
    data, rows, counts = config.data, [], {}
    for name, examples in (("training", split.training), ("heldout", split.heldout)):
        kept, counts[name] = tokenize_and_count(examples, tokenizer, data.max_length, data.learn)
        # Held-out examples are only measured: enough that there is one.
        check_left_out(counts[name], data.max_dropped if name == "training" else 1.0, data.max_length)
        rows.append(kept)
    check_heldout(config, rows[1])
    resume.check_data(found, *rows, output_dir)
    check_batch(config)
    with disk.in_use():
        config = choose_weights(config, hf_config, rows[0], checkpoint)
        method = method_of(config, hf_config)
        config, tile = choose(config, hf_config, method, rows[0], checkpoint)
        method = tiled(method, config.reversible.tile_tokens)
        config, kept = choose_layers(config, hf_config, method, rows[0])
        method = keeping(method, config.reversible.kept_layers)
        answer = check_memory(config, hf_config, method, rows[0])
        check_disk(config, hf_config, method, output_dir)
    frozen = config.training.freeze_router is not False and has_routers(hf_config)
    return Run(
        config,
        method,
        frozen,
        output_dir,
        hf_config,
        tokenizer,
        *rows,
        split.sources,
        counts,
        found,
        answer,
        tile,
        kept,
    )


def check_batch(config: RunConfig) -> None:
    """Refuse a batch that several processes cannot share evenly.

    Raises:
        InputError: Names both numbers.
    """
    batch = config.training.batch_size
    size = number_of_processes()
    if batch % size:
        raise InputError(
            f"training.batch_size={batch} is of all {size} processes together, which must have the same number of "
            "sequences each. Give a multiple."
        )


def check_schedule(config: RunConfig) -> None:
    """Refuse a schedule that cannot be made with its arguments.

    Raises:
        InputError: With what transformers says.
    """
    optimizer, kwargs = config.optimizer, config.optimizer.schedule_arguments()
    rates = [optimizer.learning_rate] + [optimizer.stage1_learning_rate] * (config.training.stage1_steps > 0)
    for rate in rates:
        try:
            stepped = torch.optim.SGD([torch.zeros(1)], lr=rate)
            get_scheduler(optimizer.schedule, stepped, 1, 100, kwargs)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"optimizer.schedule {optimizer.schedule} does not go with optimizer.schedule_kwargs="
                f"{optimizer.schedule_kwargs} and a learning rate of {rate:g} ({reason(error)}). Correct "
                "optimizer.schedule_kwargs."
            ) from None


def check_folder(output_dir: Path) -> None:
    """Refuse a folder that cannot be made or written to, or that another run is writing to.

    Raises:
        InputError: What is in the way.
    """
    parent = existing_parent(output_dir)
    inside = output_dir.absolute().relative_to(parent).parts
    # The longest name that a run makes in there.
    longest = output_dir.absolute() / "stage2" / ".checkpoint-1000000.old.partial-1000000" / ("x" * 40)
    try:
        if any(len(os.fsencode(part)) > os.pathconf(parent, "PC_NAME_MAX") - 32 for part in inside):
            raise OSError("file name too long")
        if len(os.fsencode(longest)) >= os.pathconf(parent, "PC_PATH_MAX"):
            raise OSError("path too long")
        if inside and os.path.lexists(parent / inside[0]):
            raise OSError(f"{parent / inside[0]} is not a folder")
        for folder in (parent, *(() if inside else (output_dir / stage for stage in STAGES))):
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                raise OSError(f"{folder} cannot be written to")
    except (OSError, ValueError) as error:
        raise InputError(
            f"training.output_dir {str(output_dir)[:200]}: {reason(error)}. Name a folder that can be written to."
        ) from None
    check_free(output_dir)


def check_report_to(names: list[str]) -> None:
    """Refuse a name that transformers does not know, or whose package is not installed.

    Raises:
        InputError: Names it.
    """
    for name in names:
        try:
            installed = reports_to(name)
        except ValueError as error:
            raise InputError(f"training.report_to: {error}") from None
        if not installed:
            raise InputError(f"training.report_to: {name} is not installed here. Install it, or leave it out.")


def check_model(config: RunConfig, hf_config: PreTrainedConfig, reversible: ReversibleConfig | None) -> None:
    path, model_type = config.model.path, hf_config.model_type
    if model_type.startswith(PREFIX):
        raise InputError(f"{path}: the model is reversible already. Export it first: revffn export RUN {path}-plain.")
    text_config = hf_config.get_text_config()
    limit = next((getattr(text_config, name) for name in LENGTH_LIMITS if getattr(text_config, name, None)), None)
    if limit and config.data.max_length > limit:
        raise InputError(
            f"data.max_length={config.data.max_length} is longer than {path} allows "
            f"(max_position_embeddings={limit}). Set data.max_length to at most {limit}."
        )
    # A rehearsal without weights: whatever transformers or `convert` would refuse later is refused now.
    with rehearsal(path), torch.device("meta"):
        trust = config.model.trust_remote_code
        model = AutoModelForCausalLM.from_config(deepcopy(hf_config), trust_remote_code=trust)
    if reversible is not None:
        try:
            with torch.device("meta"):
                convert(model, reversible)
            check_strategy(model, config.parallel.strategy, number_of_processes())
        except ValueError as error:
            raise InputError(f"{path}: {error}") from None
        if config.training.stage1_steps and not any(p.requires_grad for _, p in coupling_parameters(model)):
            raise InputError(
                f"training.stage1_steps={config.training.stage1_steps}: nothing would train in stage 1, because "
                f"coupling {reversible.coupling!r} adds no parameters that train. Set training.stage1_steps: 0."
            )
    row = ARCHITECTURES.get(model_type)
    if config.data.packing and not (row and row.keeps_packed_apart):
        raise InputError(
            f"data.packing: true, but packed examples of model_type={model_type!r} "
            f"{'see each other in attention' if row else 'are not known to be kept apart in attention'}. Set "
            "data.packing: false."
        )
    if config.memory.linear_cross_entropy:
        try:
            check_plain_loss(model_type)
        except ValueError as error:
            raise InputError(f"{path}: {error} Or set memory.linear_cross_entropy: false.") from None
    if config.training.router_z_loss_coef and not has_routers(hf_config):
        raise InputError(
            f"training.router_z_loss_coef={config.training.router_z_loss_coef}, but {path} (model_type="
            f"{model_type!r}) has no router. Leave the key out."
        )
    if config.training.freeze_router and not has_routers(hf_config):
        raise InputError(
            f"training.freeze_router: true, but {path} (model_type={model_type!r}) is not a Mixture-of-Experts "
            "model and has no router. Leave the key out."
        )


def check_layers(path: str) -> None:
    """Refuse a number that no model has: a config, or the empty modules of its layers, would be made without end.

    Raises:
        InputError: More layers than that in a folder's config.json.
    """
    try:
        values = read_json(Path(path) / "config.json")
    except ValueError:
        return  # of the Hub, or `load_hf` says what is wrong
    values = values if isinstance(values, dict) else {}
    for section in (values, *(value for value in values.values() if isinstance(value, dict))):
        number = section.get("num_hidden_layers")
        if isinstance(number, int) and number > MOST_LAYERS:
            shown = str(number)[:20]
            raise InputError(f"{path}: config.json has num_hidden_layers={shown}. Accepted: to {MOST_LAYERS}.")


def calibration(run: Run, num_tokens: int, model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """The first batches of the training data, until they hold `num_tokens`."""
    size = run.config.training.batch_size
    for batch in batches(run.training, size, run.tokenizer.pad_token_id, model.device):
        yield batch
        num_tokens -= int(batch["attention_mask"].sum())
        if num_tokens <= 0:
            return
