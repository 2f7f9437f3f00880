"""A run, from the pretrained model to the saved one: conversion, two stages, results."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import torch
from datasets import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    set_seed,
)
from trl import SFTConfig

from ..engine.host_weights import HostWeights
from ..files import remove_partials
from ..interrupts import Interrupts
from ..models.architectures import router_parameters
from ..models.conversion import coupling_parameters
from ..models.losses import forward_for_a_while
from ..optim import OptimizerInBackward, parameter_groups
from ..parallel.launch import is_first
from ..parallel.processes import joined, once, rank, settled, size, together
from ..parallel.shard import gathered, is_sharded
from ..quiet import without_bars
from ..recipe import RunConfig
from .beginning import begin
from .best import best_checkpoint, heldout_losses, is_exhausted
from .checkpoint import KEPT, STAGES, step_of
from .ending import in_one_line, save, way_on
from .introduction import introduction
from .lock import locked
from .preflight import Run, check
from .results import Results
from .resume import METRICS, ROUTERS, read_state
from .router_health import RouterLoad
from .several import check_shared, several_arguments
from .trainer import RevFFNTrainer, RunCallback


def train(config: RunConfig, recipe: Path | None = None) -> Path:
    """Fine-tune a pretrained model.

    Args:
        config: The run. `config.training.output_dir` receives `model/` (loadable with `from_pretrained` after
            `import revffn`), `metrics.jsonl` (one JSON object per logged step), `router.jsonl` (now and then the load
            of every expert) and `run.json` (settings, versions, results).
        recipe: Where `config` came from; data is looked for beside it too.

    Returns:
        The run's folder.

    Raises:
        InputError: The settings, the data or the model do not fit. Nothing has been written then.
        Interrupted: Ctrl-C or SIGTERM; a KeyboardInterrupt. The message is one line, and says how to go on.
        StorageError: Something could not be written or read; an OSError. The message is one line, and names the last
            complete checkpoint.
    """
    after_step, output_dir = config.training.save_on_interrupt, output_dir_of(config)
    with without_bars(), in_one_line(output_dir), contextlib.ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts(after_step))
        # Before there is a group of processes: planning one of several needs a group of its own.
        checked = settled(lambda: check(config, recipe)) if is_first() else None
        stack.enter_context(joined(config.parallel.strategy, lambda: way_on(output_dir)))
        run = once(checked)
        for line in run.resume.says:
            print(line, flush=True)
        if run.resume.finished:
            return run.output_dir
        once(lambda: stack.enter_context(locked(run.output_dir)))
        check_shared(run.output_dir)
        carry_out(run, interrupts)
    return run.output_dir


def output_dir_of(config: RunConfig) -> Path:
    return Path(config.training.output_dir or ".")


def carry_out(run: Run, interrupts: Interrupts) -> None:
    """A run that has been checked, in a folder that is held."""
    config = run.config
    if rank() == 0:
        for folder in (run.output_dir, *(run.output_dir / stage for stage in STAGES)):
            remove_partials(folder)
    for line in introduction(run):
        print(line, flush=True)
    set_seed(config.training.seed)
    model, results, store = begin(run)
    results.write(run.output_dir)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    stages = [2] if config.training.num_steps != 0 else []
    if config.training.stage1_steps and not (run.checkpoint and run.checkpoint.parent.name == "stage2"):
        stages.insert(0, 1)
    for stage in stages:
        train_stage(run, model, stage, trained, results, store, interrupts)
        if stage == 1:
            results.measure("after_stage1")
            results.write(run.output_dir)
    finish(run, model, results)
    print(results.table(), flush=True)


def finish(run: Run, model: PreTrainedModel, results: Results) -> None:
    """Save what was trained, then measure it: what goes wrong in measuring costs no training."""

    whole = gathered(model) if is_sharded(model) else None

    def write_model(folder: Path) -> None:
        model.save_pretrained(folder, state_dict=whole)
        run.tokenizer.save_pretrained(folder)

    def write_record(folder: Path) -> None:
        results.finished = True
        results.write(folder)

    once(lambda: save(run.output_dir, write_model, write_record))
    results.measure("after", ask=True)
    write_record(run.output_dir)


def train_stage(
    run: Run,
    model: PreTrainedModel,
    stage: int,
    trained: set[str],
    results: Results,
    store: HostWeights | None,
    interrupts: Interrupts,
) -> None:
    """Stage 1: the coupling's parameters. Stage 2: everything in `trained` but the routers."""
    config = run.config.training
    frozen = set()
    if run.freezes_routers and stage == 2:
        frozen = {id(parameter) for parameter in router_parameters(model)}
    chosen = {name for name, _ in coupling_parameters(model)} & trained if stage == 1 else trained
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen and id(parameter) not in frozen)
    aux_loss = config.router_aux_loss_coef
    if aux_loss is None and (stage == 1 or frozen):
        aux_loss = 0.0
    arguments = sft_arguments(run, stage, aux_loss)
    router_load = RouterLoad(model, run.output_dir / ROUTERS)
    patience = run.config.evaluation.patience if stage == 2 else None
    callback = RunCallback(
        stage,
        run.output_dir / METRICS,
        interrupts,
        router_load,
        every_steps=run.config.evaluation.every_steps,
        at_end=config.load_best_model_at_end and stage == 2,
        patience=patience,
    )
    resumed = run.checkpoint if run.checkpoint and run.checkpoint.parent.name == f"stage{stage}" else None
    optimizer = make_optimizer(run.config, model)
    optimizer.last_checkpoint = str(resumed) if resumed else None
    if store is not None:
        store.keep_states_of(optimizer)
    with forward_for_a_while(model):
        trainer = RevFFNTrainer(
            model,
            arguments,
            linear_cross_entropy=run.config.memory.linear_cross_entropy,
            router_z_loss_coef=config.router_z_loss_coef if stage == 2 else 0.0,
            measure_step=stage == 2 and not torch.cuda.is_available(),
            host_weights=store,
            loaded_from=run.checkpoint,
            optimizers=(optimizer, None),
            train_dataset=Dataset.from_list(run.training),
            processing_class=run.tokenizer,
            callbacks=[callback],
            seconds=results.seconds,
            router_load=router_load,
            on_the_way=results.on_the_way,
            keep_best=config.load_best_model_at_end and stage == 2,
            in_parts=together(),
        )
        trainer.remove_callback(PrinterCallback)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        num_steps = number_of_steps(trainer)
        step, losses = (step_of(resumed), heldout_losses(read_state(resumed)["log_history"])) if resumed else (0, {})
        # A checkpoint of the last step leaves nothing to train: `Trainer` would take one more step.
        if step < num_steps and not is_exhausted(patience, losses):
            try:
                trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
            finally:
                callback.close()
            results.num_tokens[f"stage{stage}"] = trainer.num_tokens
            if stage == 2:
                results.note_memory(trainer)
            step, losses = trainer.state.global_step, heldout_losses(trainer.state.log_history)
        else:
            callback.forget_after(step)
            results.num_tokens[f"stage{stage}"] = run.resume.num_tokens
    optimizer.detach()
    if stage == 2:
        results.note_stop(losses, step, num_steps)
        if config.load_best_model_at_end:
            results.note_best(losses, load_best(trainer, losses, step))


def load_best(trainer: RevFFNTrainer, losses: dict[int, float], step: int) -> int | None:
    """Give the model, which is that of `step`, the best checkpoint's weights; returns that one's step, if there is
    one."""
    best = best_checkpoint(Path(trainer.args.output_dir), losses, contents=True)
    if best is None:
        return None
    if step_of(best) != step:
        trainer.load_weights(best)
    return step_of(best)


def number_of_steps(trainer: RevFFNTrainer) -> int:
    """Optimizer steps of the whole stage."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    steps = math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps)
    return math.ceil(trainer.args.num_train_epochs * steps)


def make_optimizer(config: RunConfig, model: PreTrainedModel) -> OptimizerInBackward:
    """Of the parameters that train now."""
    optimizer = config.optimizer
    return OptimizerInBackward(
        parameter_groups(model, optimizer.weight_decay),
        rule=optimizer.name,
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        momentum=optimizer.momentum,
        # After backward the trainer clips, by the norm of this very step.
        max_grad_norm=(optimizer.max_grad_norm or None) if optimizer.in_backward else None,
        rounding=optimizer.rounding,
        seed=config.training.seed,
        in_backward=optimizer.in_backward,
    )


def sft_arguments(run: Run, stage: int, aux_loss: float | None) -> SFTConfig:
    """A recipe in the words of TRL and transformers."""
    training, optimizer, data = run.config.training, run.config.optimizer, run.config.data
    steps = training.stage1_steps if stage == 1 else training.num_steps
    # Renamed between transformers 5.17 and 5.23; the old name goes with version 6.
    checkpointing = "activation_checkpointing"
    if checkpointing not in SFTConfig.__dataclass_fields__:
        checkpointing = "gradient_checkpointing"
    return SFTConfig(
        output_dir=str(run.output_dir / f"stage{stage}"),
        max_steps=-1 if steps is None else steps,
        num_train_epochs=training.num_epochs,
        per_device_train_batch_size=training.batch_size // size(),
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=optimizer.stage1_learning_rate if stage == 1 else optimizer.learning_rate,
        warmup_steps=optimizer.warmup_ratio,
        lr_scheduler_type=optimizer.schedule,
        lr_scheduler_kwargs=optimizer.schedule_arguments(),
        max_grad_norm=optimizer.max_grad_norm,
        router_aux_loss_coef=aux_loss,
        # Weights, gradients and computation are all in the model's dtype.
        bf16=False,
        max_length=data.max_length,
        packing=data.packing,
        packing_strategy="bfd",  # the best fit first, the longest example first; nothing is longer than max_length
        seed=training.seed,
        logging_steps=training.log_steps,
        save_strategy="no" if training.save_steps is None else "steps",
        save_steps=training.save_steps or 500,
        save_total_limit=KEPT,
        disable_tqdm=True,
        report_to=training.report_to or "none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **{checkpointing: training.activation_checkpointing},
        **several_arguments(),
    )
