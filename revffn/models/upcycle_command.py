"""`revffn upcycle`: make the model, specialise its experts, measure it, write it."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..data import Example, load_conversations
from ..data.conversations import is_plain
from ..files import new_folder
from ..options import UpcycleConfig
from ..quiet import without_bars
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


@without_bars()
def upcycle_command(config: UpcycleConfig) -> dict[str, Any]:
    """Upcycle a dense model into a Qwen2-MoE folder, measure it, and print what was measured.

    Returns:
        What was measured: losses in nats per token (`loss_dense`, `loss_upcycled`, `loss_noise`, `loss_specialised`,
        `loss_permuted`), `routing_gap` (permuted less specialised) with its standard error over rows, parameters,
        smallest and largest share of an expert in its layer, seconds.

    Raises:
        ValueError: The folder is not empty or cannot be written, or the source or the text cannot be used. Nothing is
        left behind.
    """
    start = time.perf_counter()
    _check_top_k(config.num_experts, config.top_k)
    data = DataConfig(heldout=config.num_heldout, path=config.text or DataConfig.path)
    folder = _check_output(config.output)
    training, held_out = load_conversations(data)
    dense, tokenizer = load_dense(config.source)
    steps, size = config.steps, config.batch_size
    rows = pack(map(_plain_text, training), tokenizer, steps * size, ROW_TOKENS)
    held_rows = pack(map(_plain_text, held_out), tokenizer, HELDOUT_ROWS, ROW_TOKENS)
    # Too little text for all steps: go round.
    batches = [rows[torch.arange(i * size, (i + 1) * size) % len(rows)] for i in range(steps)]

    model = upcycle(
        dense,
        num_experts=config.num_experts,
        top_k=config.top_k,
        moe_intermediate_size=config.moe_intermediate_size,
        seed=config.seed,
    )
    loss_dense = measure(dense, held_rows)[0].mean().item()
    loss_upcycled = measure(model, held_rows)[0].mean().item()
    if not abs(loss_upcycled - loss_dense) < PRESERVED_NATS:
        raise ValueError(
            f"source {config.source!r}: equal experts must give the dense model's loss, {loss_dense:.6f}, and give "
            f"{loss_upcycled:.6f}. This model computes something that Qwen2-MoE does not; take a Llama or a Qwen2."
        )
    del dense
    perturb_experts(model, config.noise, seed=config.seed)
    loss_noise = measure(model, held_rows)[0].mean().item()
    training_seconds = specialise(
        model, tqdm(batches, desc="specialise", unit="step"), learning_rate=config.learning_rate, seed=config.seed
    )["seconds"]

    # Measured with the weights as they are saved, computed in fp32 like all other rows of the table.
    dtype = getattr(torch, config.dtype)
    model.to(dtype).float()
    losses, load = measure(model, held_rows)
    permuted, _ = measure(model, held_rows, permute_routing=True, seed=config.seed)
    with new_folder(folder) as partial:
        model.to(dtype).save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    gap = permuted - losses
    parameters, active = count_parameters(model)
    report = {
        "output": config.output,
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
    print(_table(report, config, held_rows.numel()))
    return report


def _plain_text(example: Example) -> str:
    if is_plain(example):
        return example["text"] if "text" in example else example["prompt"] + example["completion"]
    return "\n\n".join(message["content"] for message in example["prompt"] + example["completion"])


def _table(report: dict[str, Any], config: UpcycleConfig, num_tokens: int) -> str:
    r = report
    dense = r["loss_dense"]
    losses = (
        ("dense model", dense, ""),
        ("upcycled, experts equal", r["loss_upcycled"], f"{r['loss_upcycled'] - dense:+.1e}"),
        (f"experts with noise {config.noise:g}", r["loss_noise"], f"{r['loss_noise'] - dense:+.4f}"),
        (
            f"after {config.steps} steps, as saved",
            r["loss_specialised"],
            f"{r['loss_specialised'] - dense:+.4f}; routing permuted {r['loss_permuted']:.4f}, "
            f"{r['routing_gap']:+.4f} ± {r['routing_gap_error']:.4f}",
        ),
    )
    lines = [f"held-out loss, nats per token ({num_tokens:,} tokens)"]
    lines += [f"  {name:<28}{loss:.4f}  {remark}".rstrip() for name, loss, remark in losses]
    return "\n".join(
        [
            *lines,
            f"{config.num_experts} experts, load in a layer {100 * r['load_min']:.1f} to {100 * r['load_max']:.1f} %",
            f"{r['parameters'] / 1e6:.1f} M parameters, {r['active_parameters'] / 1e6:.1f} M active per token; "
            f"{r['seconds']:.0f} s, {r['training_seconds']:.0f} of them training",
            f"model and tokenizer: {r['output']}",
        ]
    )


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
