"""Held-out perplexity of any text.

The text is one sequence of tokens t_1 ... t_n after the tokenizer's start token (its end token if it has none).
Windows of W tokens move on by S, and a token is scored in the first window it is in, given what that has before it:

    nats = sum_i -log p(t_i | t_j, j < i, in the window), per token / n, per byte / bytes of the text

The interval is that of a ratio of sums over windows (normal, linearised). Windows that follow each other are not quite
independent, so it is a little too narrow.
"""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..recipe import InputError
from ..training.heldout import mode


def read_text(path: str) -> str:
    """A UTF-8 text file, or the .gz of one."""
    file = Path(path)
    if not file.is_file():
        raise InputError(f"text {path!r}: no such file. Give a text file, or a .gz of one.")
    try:
        text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}). Give UTF-8 text, with gzip for .gz.") from None
    if not text.strip():
        raise InputError(f"{file}: no text in it. Give a file with some.")
    return text


@dataclass
class Window:
    """Tokens `start` to `end` of the text, of which those from `first` on are scored."""

    start: int
    first: int
    end: int


def windows(num_tokens: int, window: int, stride: int) -> list[Window]:
    """Every token is scored once, in the first window it is in."""
    found = []
    scored = 0
    for start in range(0, num_tokens, stride):
        end = min(start + window, num_tokens)
        found.append(Window(start, scored, end))
        scored = end
        if end == num_tokens:
            break
    return found


def check(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, window: int) -> None:
    """Refuse what cannot be measured, before weights are loaded.

    Raises:
        InputError: The model cannot see as many tokens, or the tokenizer lacks something.
    """
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise InputError(
            f"window {window} is more than the model's max_position_embeddings={longest}. Lower --window."
        )
    if not tokenizer.is_fast:
        raise InputError(f"perplexity needs a fast tokenizer (tokenizer.json), got {type(tokenizer).__name__}.")
    if find_start(tokenizer) is None:
        raise InputError("perplexity needs a tokenizer with a start token or an end token.")


def find_start(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """What the first token of the text is predicted from."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Token ids of a text, and at which character each token ends."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    window: int,
    stride: int,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Loss of a text in nats per token and per byte.

    Args:
        limit: Only the first so many windows.

    Returns:
        `metrics` (nats_per_token, nats_per_byte, perplexity), each with `value` and `stderr`; `tokens`, `bytes` and
        `windows`. The standard error of the perplexity is its value times that of nats per token.
    """
    ids, ends = tokenize(tokenizer, text)
    start_id = find_start(tokenizer)
    chosen = windows(len(ids), window, stride)[:limit]
    losses: list[float] = []
    with mode(model, training=False):
        for at in range(0, len(chosen), batch_size):
            losses += window_losses(model, [start_id, *ids], chosen[at : at + batch_size])
    tokens = [w.end - w.first for w in chosen]
    # A character that several tokens share counts once, with the first of them.
    edges = [0, *(ends[w.end - 1] for w in chosen)]
    num_bytes = [len(text[a:b].encode()) for a, b in zip(edges, edges[1:], strict=False)]
    per_token, per_byte = ratio(losses, tokens), ratio(losses, num_bytes)
    value = math.exp(per_token["value"])
    stderr = None if per_token["stderr"] is None else value * per_token["stderr"]
    return {
        "metrics": {
            "nats_per_token": per_token,
            "nats_per_byte": per_byte,
            "perplexity": {"value": value, "stderr": stderr},
        },
        "tokens": sum(tokens),
        "bytes": sum(num_bytes),
        "windows": len(chosen),
    }


def window_losses(model: PreTrainedModel, ids: list[int], chosen: list[Window]) -> list[float]:
    """Sum of the losses of each window's scored tokens.

    Args:
        ids: The text's tokens after a start token, so that token i of the text stands at i + 1 and is predicted at i.
    """
    longest = max(w.end - w.start for w in chosen)
    # Shorter windows are padded on the right, where nothing scored looks.
    rows = [ids[w.start : w.end] + [ids[0]] * (longest - (w.end - w.start)) for w in chosen]
    input_ids = torch.tensor(rows, device=model.device)
    lengths = torch.tensor([w.end - w.start for w in chosen], device=model.device)
    attention_mask = (torch.arange(longest, device=model.device) < lengths[:, None]).long()
    logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
    losses = []
    for row, w in enumerate(chosen):
        scored = logits[row, w.first - w.start : w.end - w.start].float()
        labels = torch.tensor(ids[w.first + 1 : w.end + 1], device=model.device)
        losses.append(F.cross_entropy(scored, labels, reduction="sum").item())
    return losses


def ratio(numerators: list[float], denominators: list[int]) -> dict[str, float | None]:
    """Sum over sum, with the standard error of a ratio estimate; None from one window alone."""
    total, n = sum(denominators), len(numerators)
    value = sum(numerators) / total
    if n < 2:
        return {"value": value, "stderr": None}
    residuals = sum((x - value * y) ** 2 for x, y in zip(numerators, denominators, strict=True))
    return {"value": value, "stderr": math.sqrt(n / (n - 1) * residuals) / total}
