"""What a run measured: run.json, and the table at its end."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
)

from ..data import batches
from ..files import write_text
from ..memory.amounts import gib
from ..memory.plan import plan
from ..models.conversion import is_reversible, reversible_report
from ..ops import dispatch
from ..parallel.processes import rank, size
from .best import evaluations_since_lowest, is_exhausted, lowest
from .heldout import answer, coupled, heldout_loss, peak_bytes, step_bytes
from .preflight import Run
from .resume import MODEL, SUMMARY, digest
from .router_health import RouterDrift
from .trainer import RevFFNTrainer

BASE_CHOICES = "base_choices.safetensors"


class Results:
    """What is measured around training: printed at the end and written to run.json.

    Args:
        shared: All processes measure together; otherwise this one alone.
    """

    def __init__(self, run: Run, model: PreTrainedModel, shared: bool = False):
        self.shared = shared
        self.run, self.model = run, model
        self.losses: dict[str, dict[str, float | int]] = {}
        self.answers: dict[str, str] = {}
        self.bytes: dict[str, list[dict[str, int]]] = {}
        self.num_tokens: dict[str, int] = {}
        self.memory: dict[str, Any] = {}
        self.stopped_early: dict[str, Any] | None = None
        self.best: dict[str, Any] | None = None
        self.start = time.perf_counter() - run.resume.seconds
        self.finished = False
        self.data_sha256, self.heldout_sha256 = digest(run.training), digest(run.heldout)
        self.drift = RouterDrift(model, run.output_dir / BASE_CHOICES, shared)

    def seconds(self) -> float:
        """Of the run until now: of all its sessions, each from the checkpoint that it began with."""
        return time.perf_counter() - self.start

    def heldout(self) -> dict[str, float | int]:
        evaluation = self.run.config.evaluation
        pad, shared = self.run.tokenizer.pad_token_id, self.shared
        return heldout_loss(self.model, self.run.heldout, evaluation.batch_size, pad, shared)

    def on_the_way(self) -> dict[str, Any]:
        """For metrics.jsonl, while training: held-out loss, router drift, the answer to the recipe's question."""
        line: dict[str, Any] = {}
        if self.run.heldout:
            with self.drift.comparing():
                line = {"heldout_loss": self.heldout()["loss"]}
            line |= self.drift.values()
        return line | self.asked()

    def asked(self) -> dict[str, str]:
        evaluation = self.run.config.evaluation
        if not evaluation.prompt:
            return {}
        return {"answer": answer(self.model, self.run.tokenizer, evaluation.prompt, evaluation.max_new_tokens)}

    def measure(self, when: str, ask: bool = False) -> None:
        """Held-out loss, and the answer to the recipe's question."""
        if self.run.heldout:
            with self.drift.keep_base() if when == "before" else self.drift.comparing():
                self.losses[when] = self.heldout()
            print(
                f"Held-out loss {when.replace('_', ' ')}: {self.losses[when]['loss']:.4f} nats per response token",
                flush=True,
            )
            if when == "after" and trains_another(self.model):
                with coupled(self.model):
                    self.losses["after, as trained"] = self.heldout()
        if ask and self.run.config.evaluation.prompt:
            self.answers[when] = self.asked()["answer"]

    def measure_steps(self, name: str) -> None:
        """Bytes of a forward and backward of the model as it is now, for each size that the recipe asks for."""
        self.bytes[name] = []
        pad, device = self.run.tokenizer.pad_token_id, self.model.device
        for number in self.run.config.evaluation.compare_checkpointing:
            batch = next(batches(self.run.training[:number], number, pad, device))
            sequences, tokens = batch["input_ids"].shape
            shape = {"batch": sequences, "tokens": tokens}
            self.bytes[name].append(shape | step_bytes(self.model, batch))

    def note_stop(self, losses: dict[int, float], step: int, num_steps: int) -> None:
        """Whether the stage ended before its last step, and why.

        Args:
            losses: Held-out losses by step.
            step: The one that it ended with.
            num_steps: Of the whole stage.
        """
        if step >= num_steps or not is_exhausted(self.run.config.evaluation.patience, losses):
            return
        number, best = evaluations_since_lowest(losses), lowest(losses)
        self.stopped_early = {"step": step, "evaluations": number, "lowest_at": best}
        since = "" if best is None else f" since step {best} ({losses[best]:.4f} nats)"
        why = f"no {'finite' if best is None else 'lower'} held-out loss{since}"
        times = f"{number} evaluation{'s' * (number > 1)}"
        print(f"Stopped at step {step} of {num_steps}: {why}, in {times}.", flush=True)

    def note_best(self, losses: dict[int, float], step: int | None) -> None:
        """Which checkpoint's weights are the model's; None if none has a finite held-out loss."""
        if step is None:
            print("No checkpoint has a finite held-out loss: the model is that of the last step.", flush=True)
            return
        self.best = {"step": step, "heldout_loss": losses[step]}
        print(f"Model of step {step}, the lowest held-out loss of a checkpoint: {losses[step]:.4f} nats.", flush=True)

    def note_memory(self, trainer: RevFFNTrainer) -> None:
        """Predicted against measured: of one step on a CPU, of the largest on a GPU. What several processes take is
        planned before there is a group of them, for the longest step."""
        if self.run.plan is None:
            return
        predicted = self.run.plan
        if trainer.measured is not None:
            (batch, tokens), measured = trainer.measured
            if size() == 1:
                predicted = plan(self.run.hf_config, batch, tokens, self.run.method, with_alternatives=False)
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
            "finished": self.finished,
            "model_type": self.model.config.model_type,
            "num_parameters": self.model.num_parameters(),
            "config": asdict(self.run.config),
            "data": {name: counts.summary() for name, counts in self.run.counts.items()},
            "sources": [asdict(source) for source in self.run.sources],
            "data_sha256": self.data_sha256,
            "heldout_sha256": self.heldout_sha256,
            "tile": None if self.run.tile is None else asdict(self.run.tile),
            "kept": None if self.run.kept is None else asdict(self.run.kept),
            "versions": {name: installed(name) for name in packages},
            "kernels": dispatch.describe(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "resumed_from": str(self.run.checkpoint) if self.run.checkpoint else None,
            "heldout": self.losses,
            "stopped_early": self.stopped_early,
            "best": self.best,
            "answers": self.answers,
            "step_bytes": self.bytes,
            "memory": self.memory,
            "router": self.drift.summary(),
            "peak_bytes": max(peak_bytes(), self.run.resume.summary.get("peak_bytes", 0)),
            "seconds": self.seconds(),
            "num_tokens": self.num_tokens,
            "reversible_report": reversible_report(self.model) if is_reversible(self.model) else None,
        }

    def write(self, folder: Path) -> None:
        """run.json, there; of several processes one writes it."""
        if rank() == 0:
            write_text(folder / SUMMARY, json.dumps(self.summary(), indent=2) + "\n")

    def read(self) -> None:
        """Take over what the run had measured before it was interrupted."""
        before = self.run.resume.summary
        self.losses, self.answers, self.bytes = before["heldout"], before["answers"], before["step_bytes"]
        self.num_tokens, self.memory = before["num_tokens"], before["memory"]

    def table(self) -> str:
        """The results in a few lines for a terminal."""
        summary = self.summary()
        rows = [
            (f"held-out loss {when.replace('_', ' ')}", f"{loss['loss']:.4f} nats")
            for when, loss in self.losses.items()
        ]
        if self.memory:
            measured, predicted = (gib(self.memory[f"{name}_bytes"]) for name in ("measured", "predicted"))
            shape = f"a step of {self.memory['batch']} x {self.memory['tokens']} tokens"
            rows.append(("tensors at the peak", f"{measured} for {shape}, predicted {predicted}"))
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
        return self.table_of_steps() + "\n" + "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

    def table_of_steps(self) -> str:
        """Ways to train by tokens a step: MiB at the peak and, in brackets, kept from forward for backward."""
        if not any(self.bytes.values()):
            return ""
        columns = [f"{step['batch'] * step['tokens']:,}" for step in next(iter(self.bytes.values()))]
        lines = [["tokens a step", *columns]]
        for name, steps in self.bytes.items():
            lines.append([name, *(f"{s['peak_bytes'] / 2**20:,.0f} ({s['kept_bytes'] / 2**20:,.0f})" for s in steps)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = []
        for name, *cells in lines:
            aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
            rows.append("  ".join([name.ljust(widths[0]), *aligned]))
        head = "MiB at the peak of a training step beyond weights and gradients (kept from forward for backward)"
        return "\n" + "\n".join([head, *rows]) + "\n"


def trains_another(model: PreTrainedModel) -> bool:
    """Whether what is trained is not what eval mode computes."""
    return is_reversible(model) and model.reversible_config.find_coupling().trains_another


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
