"""Supervised fine-tuning in the paper's two stages, on TRL's `SFTTrainer`.

Stage 1 trains what the coupling added (projection adapters, predictors), stage 2 everything but the routers. For
innovation the predictors are fitted in closed form when the model is converted, so stage 1 may be left out.

preflight.py has looked at everything a user can get wrong before weights are loaded and anything is written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from ..config import GRID_SETTINGS
from ..data import batches
from ..engine.host_weights import HostWeights
from ..memory.plan import plan
from ..memory.predict import gib
from ..memory.simulation import LiveBytes
from ..models.architectures import router_parameters
from ..models.conversion import convert, coupling_parameters, is_reversible, reversible_report
from ..models.losses import use_linear_cross_entropy
from ..ops import dispatch
from ..optim import OptimizerInBackward, parameter_groups
from ..recipe import RunConfig
from .heldout import answer, coupled, heldout_loss, peak_bytes, step_bytes
from .preflight import Run, check, has_routers, method_of

MODEL, METRICS, SUMMARY = "model", "metrics.jsonl", "run.json"


class RevFFNTrainer(SFTTrainer):
    """`SFTTrainer` for reversible models (and plain ones).

    Activation checkpointing is off for a reversible model, which rebuilds its activations already. With an
    `OptimizerInBackward` given as `optimizers=(optimizer, None)`, `max_grad_norm` is left to it and `grad_norm` is the
    one it measured. Every log also has `tokens_per_second` since the last one, `peak_bytes` of the process (allocated
    on a GPU, resident on a CPU) and, for a reversible model, the counts of `reversible_report`.

    Args:
        linear_cross_entropy: The model makes its own loss (see `losses.use_linear_cross_entropy`); TRL's token
            accuracy and entropy are not logged then.
        measure_step: Count live tensors during one step; on a CPU, where nobody else does. `measured` has them then.
        loaded_from: A checkpoint that `model` has been loaded from already; resuming from it does not read it again.
        host_weights: Where the model's layers live, if in host memory; `measure_step` leaves that out.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: SFTConfig,
        *,
        linear_cross_entropy: bool = False,
        measure_step: bool = False,
        loaded_from: str | Path | None = None,
        host_weights: HostWeights | None = None,
        **kwargs: Any,
    ):
        if is_reversible(model):
            args.gradient_checkpointing = args.activation_checkpointing = False
        self.last_log: tuple[float, float] | None = None
        self.linear_cross_entropy, self.measure_step = linear_cross_entropy, measure_step
        self.loaded_from, self.host_weights = loaded_from, host_weights
        self.measured: tuple[tuple[int, ...], int] | None = None
        """Shape (B, T) of the step that was measured, and the bytes of tensors at its peak."""
        self.in_backward: OptimizerInBackward | None = None
        optimizer = kwargs.get("optimizers", (None, None))[0]
        if isinstance(optimizer, OptimizerInBackward) and optimizer.param_groups[0]["in_backward"]:
            # Clipping after backward would find no gradients.
            self.in_backward, args.max_grad_norm = optimizer, 0.0
        if linear_cross_entropy:
            use_linear_cross_entropy(model)
        super().__init__(model, args, **kwargs)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # With a load-balancing loss TRL decides how the two are weighed.
        if not self.linear_cross_entropy or return_outputs or self.aux_loss_enabled or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch).loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages what is a share of the sum already
        tokens = (
            inputs["attention_mask"].sum()
            if "attention_mask" in inputs
            else inputs["input_ids"].new_tensor(inputs["input_ids"].numel())
        )
        self._total_train_tokens += int(self.accelerator.gather_for_metrics(tokens).sum())
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return loss

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """`Trainer` reads weights by the names in the file, which are not those of fused experts: it would warn, and
        leave the experts as they are. `from_pretrained` converts them. Grids are no weights, and decide the function
        that is trained."""
        if str(resume_from_checkpoint) == str(self.loaded_from):
            return
        saved = AutoModelForCausalLM.from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())
        if is_reversible(self.model) and is_reversible(saved):
            self.model.config.revffn |= {name: saved.config.revffn[name] for name in GRID_SETTINGS}

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        if self.in_backward is not None:
            self.in_backward.last_checkpoint = get_last_checkpoint(self.args.output_dir)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and "loss" in logs:
            now, tokens = time.perf_counter(), self._total_train_tokens
            if self.last_log is not None:
                logs["tokens_per_second"] = (tokens - self.last_log[1]) / (now - self.last_log[0])
            self.last_log = now, tokens
            logs["peak_bytes"] = peak_bytes()
            if self.in_backward is not None:
                logs["grad_norm"] = self.in_backward.grad_norm
            if is_reversible(self.model):
                report = reversible_report(self.model)
                names = ("verified_states", "mismatched_states", "mismatched_states_total", "saturated")
                logs |= {name: report[name] for name in names}
                logs |= fixed_point(report)
        super().log(logs, start_time)


def fixed_point(report: dict[str, Any]) -> dict[str, float]:
    """For metrics.jsonl: how the layers of the last step were inverted (cross_branch, queries from the left)."""
    solved = [layer for layer in report["layers"].values() if "kept_bits" in layer]
    if not solved and not report["anchor_layers"]:
        return {}
    worst = {name: max((layer.get(name, 0.0) for layer in solved), default=0.0) for name in FIXED_POINT}
    return {"num_anchors": len(report["anchor_layers"]), **{f"{name}_at_most": value for name, value in worst.items()}}


FIXED_POINT = ("iterations", "contraction", "unconverged", "canary_error", "kept_bits")
"""Of `reversible_report`, by layer."""


class RunCallback(TrainerCallback):
    """The progress bar, metrics.jsonl, and the held-out loss on the way."""

    def __init__(self, stage: int, metrics: Path, evaluate: Any, every_steps: int | None):
        self.stage, self.metrics, self.evaluate, self.every_steps = stage, metrics, evaluate, every_steps
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=f"stage {self.stage}", unit="step")
            self.forget_after(state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        if self.every_steps and state.global_step % self.every_steps == 0 and state.global_step < state.max_steps:
            self.write(state, {"heldout_loss": self.evaluate()["loss"]})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        self.write(state, logs)
        if self.bar is not None:
            memory = f"{logs['peak_bytes'] / 2**30:.1f} GiB"
            speed = f"{logs['tokens_per_second']:.0f}" if "tokens_per_second" in logs else "-"
            self.bar.set_postfix_str(f"loss {logs['loss']:.3f}, {speed} tokens/s, {memory}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()

    def forget_after(self, step: int) -> None:
        """Steps after the checkpoint that a run resumes from are made again."""
        if not self.metrics.exists():
            return
        lines = [json.loads(line) for line in self.metrics.read_text().splitlines()]
        kept = [line for line in lines if (line["stage"], line["step"]) <= (self.stage, step)]
        self.metrics.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def write(self, state: Any, values: dict[str, Any]) -> None:
        if state.is_world_process_zero:
            with self.metrics.open("a") as file:
                file.write(json.dumps({"stage": self.stage, "step": state.global_step, **values}) + "\n")


def train(config: RunConfig, recipe: Path | None = None) -> Path:
    """Fine-tune a pretrained model.

    Args:
        config: The run. `config.training.output_dir` receives `model/` (loadable with `from_pretrained` after
            `import revffn`), `metrics.jsonl` (one JSON object per logged step) and `run.json` (settings, versions,
            results).
        recipe: Where `config` came from; data is looked for beside it too.

    Returns:
        The run's folder.

    Raises:
        InputError: The settings, the data or the model do not fit. Nothing has been written then.
    """
    run = check(config, recipe)
    config = run.config
    if run.tile is not None:
        print(run.tile, flush=True)
    # The trainer passes over the tokenized data several times; a bar each says nothing.
    disable_progress_bars()
    set_seed(config.training.seed)
    print(f"Loading {run.checkpoint or config.model.path}", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        run.checkpoint or config.model.path, dtype=getattr(torch, config.model.dtype)
    )
    store = None
    if config.memory.weights == "host":
        store = HostWeights(model, "cuda" if torch.cuda.is_available() else "cpu")
    elif torch.cuda.is_available():
        model.cuda()
    results = Results(run, model)
    if run.checkpoint is None:
        results.measure("before", ask=True)
        prepare(run, model, results)
        if store is not None:
            store.refresh()
        run.output_dir.mkdir(parents=True, exist_ok=True)
        results.write()
    else:
        results.read()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    stages = [2] if config.training.num_steps != 0 else []
    if config.training.stage1_steps and not (run.checkpoint and run.checkpoint.parent.name == "stage2"):
        stages.insert(0, 1)
    for stage in stages:
        train_stage(run, model, stage, trained, results, store)
        if stage == 1:
            results.measure("after_stage1")
            results.write()
    results.measure("after", ask=True)
    model.save_pretrained(run.output_dir / MODEL)
    run.tokenizer.save_pretrained(run.output_dir / MODEL)
    results.write()
    print(results.table(), flush=True)
    return run.output_dir


def prepare(run: Run, model: PreTrainedModel, results: Results) -> None:
    """Convert the model in place, as the recipe says, and measure what that is worth."""
    config = run.config
    reversible = config.reversible.resolve(config.training.calibration_tokens > 0)
    sample = next(calibration(run, 1, model))
    if config.evaluation.compare_checkpointing:
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{kind}_checkpointing_enable")()
        results.bytes["activation checkpointing"] = step_bytes(model, sample)
        getattr(model, f"{kind}_checkpointing_disable")()
    if reversible is None:
        return
    given = config.training.calibration_tokens
    convert(model, reversible, calibration=calibration(run, given, model) if given else None)
    if config.evaluation.compare_checkpointing:
        results.bytes[reversible.coupling] = step_bytes(model, sample)
    if not reversible.find_coupling().keeps_function:
        results.measure("converted")


def calibration(run: Run, num_tokens: int, model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """The first batches of the training data, until they hold `num_tokens`."""
    size = run.config.training.batch_size
    for batch in batches(run.training, size, run.tokenizer.pad_token_id, model.device):
        yield batch
        num_tokens -= int(batch["attention_mask"].sum())
        if num_tokens <= 0:
            return


def train_stage(
    run: Run, model: PreTrainedModel, stage: int, trained: set[str], results: Results, store: HostWeights | None
) -> None:
    """Stage 1: the coupling's parameters. Stage 2: everything in `trained` but the routers."""
    config = run.config.training
    frozen = set()
    if config.freeze_router is not False and has_routers(run.hf_config) and stage == 2:
        frozen = {id(parameter) for parameter in router_parameters(model)}
    chosen = {name for name, _ in coupling_parameters(model)} & trained if stage == 1 else trained
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen and id(parameter) not in frozen)
    aux_loss = config.router_aux_loss_coef
    if aux_loss is None and (stage == 1 or frozen):
        aux_loss = 0.0
    arguments = sft_arguments(run, stage, aux_loss)
    callback = RunCallback(stage, run.output_dir / METRICS, results.heldout, run.config.evaluation.every_steps)
    resumed = run.checkpoint if run.checkpoint and run.checkpoint.parent.name == f"stage{stage}" else None
    optimizer = make_optimizer(run.config, model)
    optimizer.last_checkpoint = str(resumed) if resumed else None
    if store is not None:
        store.keep_states_of(optimizer)
    with default_forward(model):
        trainer = RevFFNTrainer(
            model,
            arguments,
            linear_cross_entropy=run.config.memory.linear_cross_entropy,
            measure_step=stage == 2 and not torch.cuda.is_available(),
            host_weights=store,
            loaded_from=run.checkpoint,
            optimizers=(optimizer, None),
            train_dataset=Dataset.from_list(run.training),
            processing_class=run.tokenizer,
            callbacks=[callback],
        )
        trainer.remove_callback(PrinterCallback)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    optimizer.detach()
    results.num_tokens[f"stage{stage}"] = int(trainer._total_train_tokens)
    if stage == 2:
        results.note_memory(trainer)


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


@contextmanager
def default_forward(model: PreTrainedModel) -> Iterator[None]:
    """SFTTrainer puts a forward with a fused head on the instance; the next stage's trainer would wrap it once
    more."""
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)


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
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        learning_rate=optimizer.stage1_learning_rate if stage == 1 else optimizer.learning_rate,
        warmup_steps=optimizer.warmup_ratio,
        lr_scheduler_type=optimizer.schedule,
        max_grad_norm=optimizer.max_grad_norm,
        router_aux_loss_coef=aux_loss,
        # Weights, gradients and computation are all in the model's dtype.
        bf16=False,
        max_length=data.max_length,
        packing=data.packing,
        seed=training.seed,
        logging_steps=training.log_steps,
        save_strategy="no" if training.save_steps is None else "steps",
        save_steps=training.save_steps or 500,
        save_total_limit=2,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **{checkpointing: training.activation_checkpointing},
    )


class Results:
    """What is measured around training: printed at the end and written to run.json."""

    def __init__(self, run: Run, model: PreTrainedModel):
        self.run, self.model = run, model
        self.losses: dict[str, dict[str, float | int]] = {}
        self.answers: dict[str, str] = {}
        self.bytes: dict[str, dict[str, int]] = {}
        self.num_tokens: dict[str, int] = {}
        self.memory: dict[str, Any] = {}
        self.start = time.perf_counter()

    def heldout(self) -> dict[str, float | int]:
        evaluation = self.run.config.evaluation
        return heldout_loss(self.model, self.run.heldout, evaluation.batch_size, self.run.tokenizer.pad_token_id)

    def measure(self, when: str, ask: bool = False) -> None:
        """Held-out loss, and the answer to the recipe's question."""
        evaluation = self.run.config.evaluation
        if self.run.heldout:
            self.losses[when] = self.heldout()
            print(
                f"Held-out loss {when.replace('_', ' ')}: {self.losses[when]['loss']:.4f} nats per response token",
                flush=True,
            )
            if when == "after" and trains_another(self.model):
                with coupled(self.model):
                    self.losses["after, as trained"] = self.heldout()
        if ask and evaluation.prompt:
            self.answers[when] = answer(self.model, self.run.tokenizer, evaluation.prompt, evaluation.max_new_tokens)

    def note_memory(self, trainer: RevFFNTrainer) -> None:
        """Predicted against measured: of one step on a CPU, of the largest on a GPU."""
        if self.run.plan is None:
            return
        predicted = self.run.plan
        if trainer.measured is not None:
            (batch, tokens), measured = trainer.measured
            config = self.run.config
            predicted = plan(self.run.hf_config, batch, tokens, method_of(config), with_alternatives=False)
        elif torch.cuda.is_available():
            measured = torch.cuda.max_memory_allocated()
        else:
            return
        self.memory = {
            "batch": predicted.batch,
            "tokens": predicted.tokens,
            "predicted_bytes": predicted.peak_bytes,
            "predicted_parts": predicted.parts,
            "measured_bytes": measured,
        }

    def summary(self) -> dict[str, Any]:
        packages = ("revffn", "torch", "transformers", "trl", "datasets", "accelerate")
        return {
            "model_type": self.model.config.model_type,
            "num_parameters": self.model.num_parameters(),
            "config": asdict(self.run.config),
            "tile": None if self.run.tile is None else asdict(self.run.tile),
            "versions": {name: installed(name) for name in packages},
            "kernels": dispatch.describe(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "resumed_from": str(self.run.checkpoint) if self.run.checkpoint else None,
            "heldout": self.losses,
            "answers": self.answers,
            "step_bytes": self.bytes,
            "memory": self.memory,
            "peak_bytes": peak_bytes(),
            "seconds": time.perf_counter() - self.start,
            "num_tokens": self.num_tokens,
            "reversible_report": reversible_report(self.model) if is_reversible(self.model) else None,
        }

    def write(self) -> None:
        (self.run.output_dir / SUMMARY).write_text(json.dumps(self.summary(), indent=2) + "\n")

    def read(self) -> None:
        """Take over what the run had measured before it was interrupted."""
        before = json.loads((self.run.output_dir / SUMMARY).read_text())
        self.losses, self.answers, self.bytes = before["heldout"], before["answers"], before["step_bytes"]
        self.num_tokens, self.memory = before["num_tokens"], before["memory"]

    def table(self) -> str:
        """The results in a few lines for a terminal."""
        summary = self.summary()
        rows = [
            (f"held-out loss {when.replace('_', ' ')}", f"{loss['loss']:.4f} nats")
            for when, loss in self.losses.items()
        ]
        layers, sample = self.model.config.num_hidden_layers, next(calibration(self.run, 1, self.model))["input_ids"]
        for name, step in self.bytes.items():
            each = step["kept_bytes"] / layers / sample.numel()
            rows.append((f"kept for backward, {name}", f"{each:,.0f} bytes per layer and token"))
            rows.append(
                (f"peak of one step, {name}", f"{step['peak_bytes'] / 2**20:,.0f} MiB beyond weights and gradients")
            )
        if self.memory:
            shape = f"a step of {self.memory['batch']} x {self.memory['tokens']} tokens"
            rows.append(("tensors at the peak, predicted", f"{gib(self.memory['predicted_bytes'])} for {shape}"))
            rows.append(("tensors at the peak, measured", gib(self.memory["measured_bytes"])))
        rows.append(("peak memory of the run", f"{summary['peak_bytes'] / 2**30:.2f} GiB"))
        report = summary["reversible_report"]
        if report:
            rows.append(
                (
                    "rebuilt states, last step",
                    f"{report['mismatched_states']} of {report['verified_states']} differ from forward's",
                )
            )
        rows.append(("model", str(self.run.output_dir / MODEL)))
        if self.answers:
            rows.append(("question", self.run.config.evaluation.prompt))
            rows += [(f"answer {when}", " ".join(text.split())) for when, text in self.answers.items()]
        width = max(len(name) for name, _ in rows)
        return "\n" + "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def trains_another(model: PreTrainedModel) -> bool:
    """Whether what is trained is not what eval mode computes."""
    return is_reversible(model) and model.reversible_config.find_coupling().trains_another


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
