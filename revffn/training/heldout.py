"""What a run measures on a model: held-out loss, one answer, and the bytes of one training step.

The loss is in nats per response token, of the function the model has in eval mode (innovation: the one that is
exported).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data import IGNORED, batches
from ..memory.live_bytes import LiveBytes
from ..models.losses import linear_cross_entropy
from ..parallel.processes import rank, size, totals


@contextlib.contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in training or eval mode for a while."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


@contextlib.contextmanager
def coupled(model: PreTrainedModel, seed: int = 0) -> Iterator[None]:
    """For a while eval mode is the coupled function that was trained, not the exported one (innovation).

    Args:
        seed: Of the signs that are drawn meanwhile; the random state is put back afterwards.
    """
    before, model.model.walks_in_eval = model.model.walks_in_eval, True
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        model.model.walks_in_eval = before


def response_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Sum of the next-token losses in nats over the response tokens of a batch, and their number.

    The head runs on the positions that count only: full logits would be most of the memory. It does so within the
    model's own forward, whose call it is that gathers what is in shards.
    """
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["labels"][:, 1:]
    counts = labels != IGNORED
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: (args[0][:, :-1][counts],))
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
    return F.cross_entropy(logits.float(), labels[counts], reduction="sum"), int(counts.sum())


def part_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A process's rows of a batch, as many as any other has: filled up with rows of which no token counts."""
    number = -(-len(batch["input_ids"]) // size())
    start, fill = number * rank(), {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    mine = {name: tensor[start : start + number] for name, tensor in batch.items()}
    return {name: F.pad(mine[name], (0, 0, 0, number - len(mine[name])), value=value) for name, value in fill.items()}


@torch.no_grad()
def heldout_loss(
    model: PreTrainedModel, rows: list[dict[str, list[int]]], batch_size: int, pad_token_id: int, shared: bool = False
) -> dict[str, float | int]:
    """Mean loss over all response tokens of tokenized examples, in eval mode.

    Args:
        shared: Each process takes its part of every batch; otherwise this one takes all.

    Returns:
        `loss` in nats per token, and `tokens`, how many were counted.
    """
    # By length, so that little is padded; a sum does not mind the order.
    rows = sorted(rows, key=lambda row: -len(row["input_ids"]))
    total, tokens = 0.0, 0
    with mode(model, training=False):
        for batch in batches(rows, batch_size, pad_token_id, model.device):
            loss, count = response_loss(model, part_of(batch) if shared else batch)
            total, tokens = total + loss.item(), tokens + count
    if shared:
        total, tokens = totals(total, tokens)
    return {"loss": total / max(tokens, 1), "tokens": int(tokens)}


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The most likely answer to one question, token by token."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False).to(
        model.device
    )
    with mode(model, training=False):
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


# --- bytes -----------------------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    """The process's largest memory so far: allocated by PyTorch on a GPU, resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    # Kibibytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def step_bytes(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, int]:
    """Memory of one forward and backward pass in training mode, beyond weights and the gradients that are its result.

    The loss is linear cross-entropy, whose bytes do not hide those of the layers. Gradients are dropped as soon as
    they are complete, and the model's own are left as they were. Random state does not move.

    Args:
        model: Any causal language model.
        batch: `input_ids`, `labels`, `attention_mask`, (B, T) int64, on the model's device.

    Returns:
        `kept_bytes`, what the decoder layers keep from forward for backward (every storage that a saved-tensors hook
        sees, once, without parameters); `peak_bytes`, the most that lived at once.
    """
    device = model.device
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in parameters]
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(drop) for p in parameters]
    # Resident memory would blur this: allocators give back late, and earlier peaks hide later ones.
    counter = LiveBytes() if device.type != "cuda" else None
    if counter is None:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        for tensor in (*model.parameters(), *model.buffers(), *batch.values()):
            counter.add(tensor)
        before = counter.live_bytes
        counter.begin("step")
    try:
        for parameter in parameters:
            parameter.grad = None
        forked = [device] if device.type == "cuda" else []
        with mode(model, training=True), torch.random.fork_rng(forked), counter or contextlib.nullcontext():
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                hidden_states = model.model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                ).last_hidden_state
            head = model.get_output_embeddings().weight
            loss = linear_cross_entropy(hidden_states, head, batch["labels"], shift=True)
            del hidden_states
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    peak = torch.cuda.max_memory_allocated(device) if counter is None else counter.peak_bytes_of_phase
    return {"kept_bytes": sum(kept.values()), "peak_bytes": peak - before}
