"""Supervised fine-tuning in the paper's two stages, on TRL's `SFTTrainer`.

Stage 1 trains what the coupling added (projection adapters, predictors), stage 2 everything but the routers. For
innovation the predictors are fitted in closed form when the model is converted, so stage 1 may be left out.

preflight.py has looked at everything a user can get wrong before weights are loaded and anything is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from ..engine.host_weights import HostWeights
from ..files import append_line, new_folder, write_text
from ..interrupts import Interrupts
from ..memory.live_bytes import LiveBytes
from ..models.conversion import is_reversible, reversible_report
from ..models.losses import router_logits_of, router_z_loss, use_linear_cross_entropy
from ..models.router_choices import counted_tokens
from ..optim import OptimizerInBackward
from ..parallel.processes import largest, rank, size, totals
from ..parallel.shard import is_sharded
from ..parallel.states import has_shards, load_optimizer
from .best import best_checkpoint, heldout_losses, is_exhausted
from .checkpoint import delete_old, read_manifest, readable_lines, write_manifest
from .heldout import mode, peak_bytes
from .progress import Progress
from .router_health import RouterLoad
from .several import save_checkpoint, train_batches


class RevFFNTrainer(SFTTrainer):
    """`SFTTrainer` for reversible models (and plain ones).

    Activation checkpointing is off for a reversible model, which rebuilds its activations already. With an
    `OptimizerInBackward` given as `optimizers=(optimizer, None)`, `max_grad_norm` is left to it and `grad_norm` is the
    one it measured. In one process a checkpoint is written beside its name and closed with a manifest
    (checkpoint.py). Every log also has `tokens_per_second` since the last one, `peak_bytes` of the process (allocated
    on a GPU, resident on a CPU), for a Mixture of Experts how evenly its routers spread the tokens
    (`RouterLoad.take`), and for a reversible model the counts of `reversible_report`.

    Args:
        linear_cross_entropy: The model makes its own loss (see `losses.use_linear_cross_entropy`); TRL's token
            accuracy and entropy are not logged then.
        router_z_loss_coef: Weight of `losses.router_z_loss`.
        measure_step: Count live tensors during one step; on a CPU, where nobody else does. `measured` has them then.
        loaded_from: A checkpoint that `model` has been loaded from already; resuming from it does not read it again.
        host_weights: Where the model's layers live, if in host memory; `measure_step` leaves that out.
        seconds: How long the run has taken until now, for the manifest.
        router_load: Counts what the routers choose; made for the model if None.
        on_the_way: What `evaluate` measures in place of `Trainer`'s loop over an `eval_dataset`: a line for
            metrics.jsonl, which `on_evaluate` gets. Its `heldout_loss` is logged as `eval_loss`.
        keep_best: The checkpoint with the lowest `eval_loss` is not deleted.
        in_parts: This is one of the processes of a run (several.py): it takes its part of every batch, and writes its
            shards of checkpoints. Otherwise several processes are what they are to `Trainer`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        *,
        linear_cross_entropy: bool = False,
        router_z_loss_coef: float = 0.0,
        measure_step: bool = False,
        loaded_from: str | Path | None = None,
        host_weights: HostWeights | None = None,
        seconds: Callable[[], float] | None = None,
        router_load: RouterLoad | None = None,
        on_the_way: Callable[[], dict[str, Any]] | None = None,
        keep_best: bool = False,
        in_parts: bool = False,
        **kwargs: Any,
    ):
        if is_reversible(model):
            args.gradient_checkpointing = args.activation_checkpointing = False
        self.last_log: tuple[float, float] | None = None
        self.linear_cross_entropy, self.measure_step = linear_cross_entropy, measure_step
        self.router_z_loss_coef = router_z_loss_coef
        self.loaded_from, self.host_weights, self.seconds = loaded_from, host_weights, seconds
        self.router_load = RouterLoad(model) if router_load is None else router_load
        self.on_the_way, self.keep_best, self.in_parts = on_the_way, keep_best, in_parts
        self.optimizer_of_run: OptimizerInBackward | None = None
        self.saving_to: Path | None = None
        """Where a checkpoint is being written, instead of the output folder."""
        self.measured: tuple[tuple[int, ...], int] | None = None
        """Shape (B, T) of the step that was measured, and the bytes of tensors at its peak."""
        self.in_backward: OptimizerInBackward | None = None
        optimizer = kwargs.get("optimizers", (None, None))[0]
        if isinstance(optimizer, OptimizerInBackward):
            self.optimizer_of_run = optimizer
        if isinstance(optimizer, OptimizerInBackward) and optimizer.param_groups[0]["in_backward"]:
            # Clipping after backward would find no gradients.
            self.in_backward, args.max_grad_norm = optimizer, 0.0
            if args.gradient_accumulation_steps > 1:
                raise ValueError(
                    f"gradient_accumulation_steps={args.gradient_accumulation_steps} adds gradients up, and "
                    "OptimizerInBackward steps at the first. Put the whole batch into per_device_train_batch_size, or "
                    "make the optimizer with in_backward=False."
                )
        if linear_cross_entropy:
            check_loss(args, kwargs.get("compute_loss_func"))
            use_linear_cross_entropy(model)
        super().__init__(model, args, **kwargs)
        if is_sharded(model):
            # It would be wrapped in DistributedDataParallel.
            self.accelerator.prepare_model = lambda model, *args, **kwargs: model
        if self.in_backward is not None:
            self.in_backward.attach()  # the model has been moved to its device, wherever it was
        if hasattr(model, "router_aux_loss_coef"):
            model.router_aux_loss_coef = self.router_aux_loss_coef  # what the model weighs the loss by

    def get_train_dataloader(self) -> DataLoader:
        loader = super().get_train_dataloader()
        return train_batches(self, loader) if self.in_parts and size() > 1 else loader

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if not self.router_z_loss_coef or not self.model.training:
            return self.language_model_loss(model, inputs, return_outputs, num_items_in_batch)
        with router_logits_of(self.model) as seen:
            found = self.language_model_loss(model, inputs, return_outputs, num_items_in_batch)
        # For other outputs TRL runs the model once more.
        z_loss = router_z_loss(seen[0], inputs.get("attention_mask"))
        self._metrics["train"]["router_z_loss"].append(z_loss.item())
        weighted = self.router_z_loss_coef * self.share_of_step(num_items_in_batch) * z_loss
        return (found[0] + weighted, *found[1:]) if return_outputs else found + weighted

    def share_of_step(self, num_items_in_batch: Any) -> float:
        """Of a loss that is a mean over the tokens of a forward pass: of several passes the mean is taken too."""
        return 1 / self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1.0

    def language_model_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool, num_items_in_batch: Any
    ) -> Any:
        if not self.linear_cross_entropy or return_outputs or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        asked = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**inputs, **asked, use_cache=False, num_items_in_batch=num_items_in_batch)
        loss = outputs.loss
        balance = self.router_aux_loss_coef * outputs.aux_loss if self.aux_loss_enabled else 0.0
        loss = loss - balance
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # averaged over processes, and a share of the sum already
        if self.aux_loss_enabled:
            loss = loss + self.share_of_step(num_items_in_batch) * balance
            mean = self.accelerator.gather_for_metrics(outputs.aux_loss.detach()).mean()
            self._metrics["train"]["aux_loss"].append(mean.item())
        counted = counted_tokens(inputs.get("attention_mask"), inputs.get("position_ids"))
        tokens = torch.ones_like(inputs["input_ids"]).sum() if counted is None else counted.sum()
        self._total_train_tokens += int(self.accelerator.gather(tokens).sum())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        with self.router_load.counting():
            return self.measured_step(model, inputs, *args, **kwargs)

    def measured_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        # The second step has the optimizer's state from the beginning, as all later ones do.
        if not self.measure_step or self.state.global_step != min(1, self.state.max_steps - 1):
            return super().training_step(model, inputs, *args, **kwargs)
        counter = LiveBytes()
        if self.host_weights is not None:
            for tensor in self.host_weights.host_tensors():
                counter.add(tensor, elsewhere=True)
            for slot in self.host_weights.slots:
                counter.add(slot.weights)
                counter.add(slot.states)
        optimizer_state = self.optimizer.state.values()
        state = (value for values in optimizer_state for value in values.values() if isinstance(value, Tensor))
        for tensor in (*self.model.parameters(), *self.model.buffers(), *state):
            counter.add(tensor)
        counter.begin("step")
        shape = tuple(inputs["input_ids"].shape)
        with counter:
            loss = super().training_step(model, inputs, *args, **kwargs)
        if self.measured is None or counter.peak_bytes_of_phase > self.measured[1]:
            self.measured = shape, counter.peak_bytes_of_phase
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.on_the_way is None:
            return super().evaluate(*args, **kwargs)
        # In training mode TRL would log what it has gathered of the training steps here, and forget it.
        with mode(self.model, training=False):
            line = self.on_the_way()
            numbers = {name: value for name, value in line.items() if isinstance(value, float)}
            if "heldout_loss" in numbers:
                numbers["eval_loss"] = numbers.pop("heldout_loss")
            if numbers:
                self.log(dict(numbers))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, line)
        return numbers

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        try:
            self._total_train_tokens = read_manifest(Path(resume_from_checkpoint)).get("num_tokens", 0)
        except ValueError:
            pass  # another trainer's
        if str(resume_from_checkpoint) == str(self.loaded_from):
            return
        self.load_weights(resume_from_checkpoint)

    def load_weights(self, checkpoint: str | Path) -> None:
        """`Trainer` reads weights by the names in the file, which are not those of fused experts: it would warn, and
        leave the experts as they are. `from_pretrained` converts them. Grids are no weights, and decide the function
        that is trained."""
        saved = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())
        if is_reversible(self.model) and is_reversible(saved):
            self.model.config.revffn["grids"] = saved.reversible_config.to_dict()["grids"]

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """`Trainer` loads both or neither, silently: here each that is there. The learning rate is that of the present
        schedule, which ends elsewhere if the run is longer now, and not that of the one before."""
        if checkpoint is not None and (self.in_parts or has_shards(Path(checkpoint))):
            self.load_states(Path(checkpoint))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or self.args.world_size > 1 and not self.in_parts:
            return
        optimizer, scheduler = (Path(checkpoint) / f"{name}.pt" for name in ("optimizer", "scheduler"))
        if optimizer.is_file() and not scheduler.is_file() and not self.in_parts:
            self.optimizer.load_state_dict(torch.load(optimizer, map_location="cpu", weights_only=True))
        schedule, step = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler), self.state.global_step
        if not hasattr(schedule, "lr_lambdas"):
            return
        schedule.last_epoch = step
        schedule._last_lr = [
            base * rule(step) for base, rule in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate

    def load_states(self, checkpoint: Path) -> None:
        """The optimizer's, of shards or for shards, and the schedule's."""
        if self.optimizer_of_run is not None and (has_shards(checkpoint) or (checkpoint / "optimizer.pt").is_file()):
            load_optimizer(checkpoint, self.optimizer_of_run)
        if (checkpoint / "scheduler.pt").is_file():
            self.lr_scheduler.load_state_dict(torch.load(checkpoint / "scheduler.pt", weights_only=True))

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self.saving_to is None else str(self.saving_to)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Not with every checkpoint, as `SFTTrainer` does: there it would be written straight under its final name."""
        if self.saving_to is None:
            super().create_model_card(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Beside its name, with a manifest, or not at all."""
        if self.args.push_to_hub or self.args.world_size > 1 and not self.in_parts:
            return super()._save_checkpoint(model, trial)
        final = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        if self.in_parts:
            save_checkpoint(self, final, lambda folder: self.close_checkpoint(folder, final))
        else:
            self.save_alone(model, trial, final)
        if self.in_backward is not None:
            self.in_backward.last_checkpoint = str(final)
        if rank():
            return
        best = self.state.best_model_checkpoint
        if self.keep_best:
            best = best_checkpoint(final.parent, heldout_losses(self.state.log_history))
        delete_old(final.parent, self.args.save_total_limit, best)

    def save_alone(self, model: Any, trial: Any, final: Path) -> None:
        with new_folder(final) as partial:
            self.saving_to = partial
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.saving_to = None
            written = partial / final.name
            if self.state.best_model_checkpoint == str(written):
                self.state.best_model_checkpoint = str(final)
                self.state.save_to_json(str(written / "trainer_state.json"))
            for path in sorted(written.iterdir()):
                path.rename(partial / path.name)
            written.rmdir()
            self.close_checkpoint(partial, final)

    def close_checkpoint(self, folder: Path, final: Path) -> None:
        about = {} if self.seconds is None else {"seconds": self.seconds()}
        about["name"] = f"{final.absolute().parent.name}/{final.name}"
        write_manifest(folder, num_tokens=self.num_tokens, **about)

    @property
    def num_tokens(self) -> int:
        """Seen in training, before a resume too."""
        return int(self._total_train_tokens)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            now, tokens = time.perf_counter(), self._total_train_tokens
            if self.last_log is not None:
                logs["tokens_per_second"] = (tokens - self.last_log[1]) / (now - self.last_log[0])
            self.last_log = now, tokens
            logs["peak_bytes"] = int(largest(peak_bytes()))
            if self.in_backward is not None:
                logs["grad_norm"] = self.in_backward.grad_norm
            logs |= self.router_load.take()
            if is_reversible(self.model):
                report = reversible_report(self.model)
                names = ("verified_states", "mismatched_states", "mismatched_states_total")
                logs |= dict(zip(names, map(int, totals(*(report[name] for name in names))), strict=True))
                logs["saturated"] = bool(largest(report["saturated"]))
                logs |= fixed_point(report)
        super().log(logs, start_time)


def check_loss(args: SFTConfig, compute_loss_func: Any) -> None:
    """Refuse what asks for another loss than linear cross-entropy is, and would be without effect.

    Raises:
        ValueError: Names the option.
    """
    others = {"label_smoothing_factor": 0.0, "loss_type": "nll"}
    given = [
        f"{name}={getattr(args, name)!r}" for name, plain in others.items() if getattr(args, name, plain) != plain
    ]
    given += ["compute_loss_func"] if compute_loss_func is not None else []
    if given:
        raise ValueError(
            f"linear_cross_entropy=True computes the plain loss, and {', '.join(given)} asks for another. Leave one "
            "of the two out."
        )


def fixed_point(report: dict[str, Any]) -> dict[str, float]:
    """For metrics.jsonl: how the layers of the last step were inverted (cross_branch, queries from the left)."""
    solved = [layer for layer in report["layers"].values() if "kept_bits" in layer]
    if not solved:
        return {}
    worst = {f"{name}_at_most": max(layer[name] for layer in solved) for name in FIXED_POINT}
    return {"num_anchors": sum(layer["kept_bits"] == 32 for layer in solved), **worst}


FIXED_POINT = ("iterations", "contraction", "kept_bits", "kept_rows")
"""Of `reversible_report`, by layer."""


class RunCallback(TrainerCallback):
    """How far it is, metrics.jsonl, when to evaluate and to stop, and interruptions that wait for a step's end.

    Args:
        every_steps: Evaluate every so many optimizer steps.
        at_end: Evaluate after the last step too.
        patience: Stop after so many evaluations without a lower held-out loss.
    """

    def __init__(
        self,
        stage: int,
        metrics: Path,
        interrupts: Interrupts,
        router_load: RouterLoad,
        *,
        every_steps: int | None = None,
        at_end: bool = False,
        patience: int | None = None,
    ):
        self.stage, self.metrics, self.interrupts, self.router_load = stage, metrics, interrupts, router_load
        self.every_steps, self.at_end, self.patience = every_steps, at_end, patience
        self.progress: Progress | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.interrupts.in_step = True
        # A checkpoint brings its own, but the run may have been told others now.
        state.compute_steps(args, state.max_steps)
        if state.is_world_process_zero:
            self.progress = Progress(f"stage {self.stage}", state.global_step, state.max_steps)
            self.forget_after(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupts.after_step:
            # A signal reaches several processes in different steps.
            self.interrupts.received = int(largest(self.interrupts.received))
        if self.interrupts.received and self.interrupts.after_step:
            control.should_save = True
        else:
            self.interrupts.between_steps()
        if self.progress is not None:
            self.progress.advance(state.global_step)
        if self.every_steps:
            is_last, is_due = state.global_step >= state.max_steps, state.global_step % self.every_steps == 0
            control.should_evaluate = self.at_end if is_last else is_due

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.write(state, metrics)
        if is_exhausted(self.patience, heldout_losses(state.log_history)):
            control.should_training_stop = True
            control.should_save |= args.save_strategy != "no"

    def on_save(self, args, state, control, **kwargs):
        self.interrupts.between_steps()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        self.write(state, logs)
        if state.is_world_process_zero:
            self.router_load.write_row(self.stage, state.global_step, state.max_steps)
        if self.progress is not None:
            self.progress.log(state.global_step, logs)

    def on_train_end(self, args, state, control, **kwargs):
        self.interrupts.in_step = False
        self.interrupts.between_steps()

    def close(self) -> None:
        """Whatever ends the training: what follows begins on a line of its own."""
        if self.progress is not None:
            self.progress.close()

    def forget_after(self, step: int) -> None:
        """Steps after the checkpoint that a run resumes from are made again."""
        for file in filter(None, (self.metrics, self.router_load.file)):
            if file.exists() and rank() == 0:
                kept = [line for line in readable_lines(file) if (line["stage"], line["step"]) <= (self.stage, step)]
                write_text(file, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, state: Any, values: dict[str, Any]) -> None:
        if state.is_world_process_zero:
            append_line(self.metrics, json.dumps({"stage": self.stage, "step": state.global_step, **values}))
