"""Linear cross-entropy: the language-model loss from hidden states and head weights, never the full logits.

    loss = scale * sum_n [ lse_n - logits_n[label_n] + z_loss * lse_n^2 ],   logits = hidden @ weight^T + bias

Tokens go through the head in chunks. Each chunk's gradients are taken at once, in forward, while its logits exist, so
the head is multiplied three times per token, not four, and backward only scales two finished gradients. The head's
gradient therefore lives from forward to the start of backward, which follows at once, and an optimizer in backward
then steps the head first. Recomputing the logits in backward instead would keep the hidden states *and* make their
gradient.

The head's gradient is summed over chunks in float32 and rounded once, into its own first half (no second copy). A sum
in bf16 would halve those bytes, at an error that grows with the number of chunks: relative error of the gradient
against float64 for 8,192 tokens, V = 2,048, D = 256, bf16, CPU: autograd on full logits 0.40 %; 64 chunks 0.43 % in
float32, 0.97 % in bf16 (16 chunks: 0.43 % and 0.60 %).

`use_linear_cross_entropy(model)` puts it under `model(input_ids, labels=labels)` of a Hugging Face causal LM. Not
supported: label smoothing, class weights, softcapped or scaled logits, float16 under a gradient scaler.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ..upstream import has_own_loss, remove_own_loss
from .architectures import ARCHITECTURES, plain_model_type

# N = tokens, C = tokens of one chunk, D = hidden size, V = vocabulary

CHUNK_LOGITS_BYTES = 256 * 2**20
"""float32 logits of one chunk when `chunk_tokens` is None; 1.5 times that with the copy for the matrix product."""
HEAD_BLOCK_BYTES = 64 * 2**20
"""float32 bytes of the block of head rows that is accumulated or rounded at a time."""


def chunk_size(num_tokens: int, vocab_size: int) -> int:
    """Tokens per chunk whose float32 logits take about `CHUNK_LOGITS_BYTES`: the nearest power of two, at least 16."""
    power = 2 ** max(round(math.log2(CHUNK_LOGITS_BYTES / (4 * vocab_size))), 4)
    return max(min(power, num_tokens), 1)


def chunk_starts(num_tokens: int, chunk: int) -> Sequence[int]:
    """Where the chunks begin. All but the last are alike: the planner runs a few of them only."""
    return range(0, num_tokens, chunk)


def _row_blocks(matrix: Tensor) -> list[slice]:
    rows = max(HEAD_BLOCK_BYTES // (4 * max(matrix.shape[1], 1)), 1)
    return [slice(start, start + rows) for start in range(0, matrix.shape[0], rows)]


def _accumulate(total_VD: Tensor, dlogits_CV: Tensor, hidden_CD: Tensor) -> None:
    """total += dlogits^T @ hidden, without a second (V, D) tensor."""
    if total_VD.dtype == dlogits_CV.dtype:
        total_VD.addmm_(dlogits_CV.T, hidden_CD)
        return
    for rows in _row_blocks(total_VD):
        total_VD[rows] += dlogits_CV[:, rows].T @ hidden_CD


def _round_in_place(total_VD: Tensor, dtype: torch.dtype) -> Tensor:
    """`total` in a dtype of half its width, written over its own first half: the write never passes the read."""
    if total_VD.dtype == dtype:
        return total_VD
    rounded_VD = total_VD.view(-1).view(dtype)[: total_VD.numel()].view(total_VD.shape)
    for rows in _row_blocks(total_VD):
        rounded_VD[rows] = total_VD[rows].to(dtype)
    return rounded_VD


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, bias_V, labels_N, scale, z_loss, ignore_index, chunk, grads):
        need_hidden, need_weight, need_bias = grads
        compute = torch.promote_types(hidden_ND.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden_ND) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=compute) if need_weight else None
        grad_bias = torch.zeros_like(bias_V, dtype=compute) if need_bias else None
        total = torch.zeros((), dtype=compute, device=hidden_ND.device)
        for start in chunk_starts(hidden_ND.shape[0], chunk):
            part = slice(start, start + chunk)
            hidden_CD, labels_C = hidden_ND[part], labels_N[part]
            valid_C = labels_C != ignore_index
            index_C1 = labels_C.masked_fill(~valid_C, 0).unsqueeze(1)
            # The softmax is float32 whatever the model's dtype, from logits rounded as the model itself rounds them.
            logits_CV = F.linear(hidden_CD, weight_VD, bias_V).to(compute)
            lse_C1 = logits_CV.logsumexp(-1, keepdim=True)
            loss_C1 = lse_C1 - logits_CV.gather(1, index_C1)
            if z_loss:
                loss_C1 = loss_C1 + z_loss * lse_C1.square()
            total = total + loss_C1.squeeze(1).masked_fill(~valid_C, 0.0).sum()
            if not any(grads):
                continue
            probs_CV = logits_CV.sub_(lse_C1).exp_()
            if z_loss:
                probs_CV.mul_(1 + 2 * z_loss * lse_C1)
            probs_CV.scatter_add_(1, index_C1, torch.full_like(lse_C1, -1.0))
            # where, not a product: with no valid label `scale` is infinite and the gradient still is zero.
            probs_CV.mul_(torch.where(valid_C, scale, 0.0).unsqueeze(1))
            if need_bias:
                grad_bias += probs_CV.sum(0)
            dlogits_CV = probs_CV.to(hidden_ND.dtype)
            del logits_CV, probs_CV
            if need_hidden:
                grad_hidden[part] = dlogits_CV @ weight_VD
            if need_weight:
                _accumulate(grad_weight, dlogits_CV, hidden_CD)
            del dlogits_CV
        if need_weight:
            grad_weight = _round_in_place(grad_weight, weight_VD.dtype)
        if need_bias:
            grad_bias = grad_bias.to(bias_V.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.consumed = False
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if ctx.consumed:
            raise RuntimeError(
                "linear_cross_entropy was differentiated a second time (retain_graph=True), but the first backward "
                "scaled its gradients in place. Call it again for a second backward."
            )
        grads = ctx.saved_tensors
        ctx.consumed = True
        return *(None if grad is None else grad.mul_(grad_loss) for grad in grads), *(None,) * 6


def _scale(labels_N: Tensor, ignore_index: int, reduction: str, num_items_in_batch, dtype: torch.dtype) -> Tensor:
    if num_items_in_batch is not None:
        return 1 / torch.as_tensor(num_items_in_batch, dtype=dtype, device=labels_N.device)
    if reduction == "mean":
        return 1 / (labels_N != ignore_index).sum().to(dtype)
    return torch.ones((), dtype=dtype, device=labels_N.device)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _choose(impl: str, is_cuda: bool, bias: Tensor | None, z_loss: float) -> str:
    cce_lacks = " and ".join(name for name, used in (("bias", bias is not None), ("z_loss", z_loss != 0)) if used)
    if impl == "auto":
        if is_cuda and _installed("liger_kernel"):
            return "liger"
        return "cce" if is_cuda and not cce_lacks and _installed("cut_cross_entropy") else "torch"
    if impl not in ("torch", "liger", "cce"):
        raise ValueError(f"impl must be 'auto', 'torch', 'liger' or 'cce', got {impl!r}.")
    if impl == "cce" and cce_lacks:
        raise ValueError(f"impl='cce' (cut-cross-entropy) has no {cce_lacks}. Use impl='liger' or impl='torch'.")
    package = {"liger": "liger_kernel", "cce": "cut_cross_entropy"}.get(impl)
    if package and not _installed(package):
        raise ImportError(f"impl={impl!r} needs {package.replace('_', '-')}: pip install it, or use impl='torch'.")
    return impl


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    num_items_in_batch: Tensor | int | None = None,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    shift: bool = False,
    impl: Literal["auto", "torch", "liger", "cce"] = "auto",
) -> Tensor:
    """Cross-entropy of `hidden_states @ weight.T + bias` against labels; at most one chunk of logits exists at a time.

    Args:
        hidden_states: (..., D); under autocast it, `weight` and `bias` are cast as a linear layer would cast them.
        weight: Head, (V, D), in the dtype of `hidden_states`. Without `requires_grad` no gradient is made for it. A
            tied head needs nothing special: autograd adds the embedding's part.
        labels: (...), integer; `ignore_index` marks positions without loss.
        bias: (V,).
        reduction: "mean" is over the labels that count, "sum" is the plain sum.
        num_items_in_batch: The sum is divided by this instead, as Hugging Face's Trainer asks.
        z_loss: Weight of `logsumexp(logits)^2`, added per token (PaLM, https://arxiv.org/abs/2204.02311, section 5).
        chunk_tokens: Tokens per chunk (torch only); None takes `chunk_size(N, V)`.
        shift: Position t predicts label t + 1 of the same row; nothing is copied for that.
        impl: "torch" runs anywhere, also on fake tensors. "liger" and "cce" call the GPU kernels of Liger-Kernel and
            cut-cross-entropy; "auto" takes them in this order on CUDA where installed, "torch" otherwise.

    Returns:
        The loss, a float32 (float64 for float64 input) scalar. With no label that counts: zero for "sum" and for
        `num_items_in_batch`, NaN for "mean" as in `F.cross_entropy`; the gradients are zero in every case.

    Raises:
        ValueError: Shapes or dtypes that do not fit, an unknown option, or one the chosen implementation lacks.
        RuntimeError: Differentiated twice.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}.")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be None (chosen by memory) or at least 1, got {chunk_tokens}.")
    if labels.shape != hidden_states.shape[:-1] or weight.shape[1:] != hidden_states.shape[-1:]:
        raise ValueError(
            f"Shapes do not fit: hidden_states {tuple(hidden_states.shape)}, weight {tuple(weight.shape)}, labels "
            f"{tuple(labels.shape)}. Accepted: (..., D), (V, D), (...)."
        )
    device = hidden_states.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if weight.dtype != hidden_states.dtype:
        raise ValueError(
            f"hidden_states are {hidden_states.dtype} and weight is {weight.dtype}. Cast one of them, or use autocast."
        )
    labels = labels.to(device)
    if shift:
        labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden_ND, labels_N = hidden_states.reshape(-1, hidden_states.shape[-1]), labels.reshape(-1)
    compute = torch.promote_types(hidden_ND.dtype, torch.float32)
    scale = _scale(labels_N, ignore_index, reduction, num_items_in_batch, compute)
    impl = _choose(impl, device.type == "cuda", bias, z_loss)
    # Autocast is settled above; left on, it would cast the whole head again for every chunk.
    with torch.autocast(device.type, enabled=False):
        if impl == "liger":
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            total = liger_fused_linear_cross_entropy(
                hidden_ND,
                weight,
                labels_N,
                bias=bias,
                ignore_index=ignore_index,
                lse_square_scale=z_loss,
                reduction="sum",
                accum_dtype=torch.float32,
            )
            return total.to(compute) * scale
        if impl == "cce":
            from cut_cross_entropy import linear_cross_entropy as cut_cross_entropy

            # filter_eps=None: its default leaves small gradients out.
            total = cut_cross_entropy(
                hidden_ND, weight, labels_N, ignore_index=ignore_index, reduction="sum", filter_eps=None
            )
            return total.to(compute) * scale
        grads = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden_ND, weight, bias))
        chunk = chunk_tokens or chunk_size(hidden_ND.shape[0], weight.shape[0])
        return _LinearCrossEntropy.apply(hidden_ND, weight, bias, labels_N, scale, z_loss, ignore_index, chunk, grads)


class _SquaredLogSumExp(torch.autograd.Function):
    """(N, E) -> (N,), keeping nothing of (N, E) but its argument."""

    @staticmethod
    def forward(ctx, logits_NE: Tensor):
        lse_N = logits_NE.to(torch.promote_types(logits_NE.dtype, torch.float32)).logsumexp(-1)
        ctx.save_for_backward(logits_NE, lse_N)
        return lse_N.square()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_N: Tensor):
        logits_NE, lse_N = ctx.saved_tensors
        return (logits_NE - lse_N[:, None]).exp_().mul_((2 * lse_N * grad_N)[:, None]).to(logits_NE.dtype)


def router_z_loss(router_logits: Sequence[Tensor], attention_mask: Tensor | None = None) -> Tensor:
    """Mean over layers and tokens of `logsumexp(router logits)^2`, which keeps the logits small (ST-MoE,
    https://arxiv.org/abs/2202.08906, equation 5; there it is summed over layers).

    Args:
        router_logits: One (B * T, E) tensor per sparse layer, as models return them.
        attention_mask: (B, T); tokens with 0 do not count.

    Returns:
        A float32 (float64 for float64 logits) scalar.
    """
    each = [_SquaredLogSumExp.apply(logits.reshape(-1, logits.shape[-1])) for logits in router_logits]
    squares = torch.stack(each)
    if attention_mask is None:
        return squares.mean()
    counts = attention_mask.reshape(-1).to(squares)
    return (squares * counts).sum() / (len(each) * counts.sum())


@contextmanager
def router_logits_of(model: PreTrainedModel) -> Iterator[list[tuple[Tensor, ...]]]:
    """While open, every forward of a causal LM adds its routers' logits, (B * T, E) a sparse layer, to the list.

    Its backbone alone is asked for them: a causal LM that is asked makes its load-balancing loss too.
    """
    found: list[tuple[Tensor, ...]] = []

    def ask(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, kwargs | {"output_router_logits": True}

    backbone = model.model
    handles = (
        backbone.register_forward_pre_hook(ask, with_kwargs=True),
        backbone.register_forward_hook(lambda module, args, output: found.append(output.router_logits)),
    )
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def check_plain_loss(model_type: str) -> None:
    """Raise ValueError where linear cross-entropy is not known to be a family's loss."""
    row = ARCHITECTURES.get(plain_model_type(model_type))
    if row is None or not row.plain_loss:
        known = ", ".join(name for name, other in ARCHITECTURES.items() if other.plain_loss)
        raise ValueError(
            f"linear cross-entropy is not known to fit model_type={model_type!r}. Known: {known}. Logits must reach "
            "the loss unscaled; then an architecture's row says so (docs/adding_an_architecture.md)."
        )


def use_linear_cross_entropy(
    model: PreTrainedModel,
    *,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    impl: Literal["auto", "torch", "liger", "cce"] = "auto",
    in_eval: bool = False,
) -> PreTrainedModel:
    """Let `model(input_ids, labels=labels)` compute its loss without logits; the output's `logits` is then None.

    The model's own `forward` still runs, with the head standing in for the loss: `lm_head` returns the loss and
    `loss_function` passes it on. So the router's auxiliary loss, `num_items_in_batch`, `shift_labels`, hooks on the
    head (FSDP2 gathers it there) and whatever a converted model overrides keep working, and conversion may come before
    or after. Calls without labels, with `logits_to_keep`, or in eval mode return logits as before. Apply it before
    building a trainer.

    TRL's `SFTTrainer` asks its own fused head for the loss (`fused_lm_head=True`) and reads token accuracy and entropy
    from it; a trainer that wants this loss overrides `compute_loss` and calls `model(**inputs)` without that flag.

    Args:
        model: A causal LM, changed in place: it gets a `forward` of its own.
        z_loss, chunk_tokens, impl: See `linear_cross_entropy`.
        in_eval: Also in eval mode, for held-out losses; False keeps the logits for metrics there.

    Returns:
        The same model.

    Raises:
        ValueError: The model's architecture has no plain loss, or the model has a loss function of its own.
    """
    check_plain_loss(model.config.model_type)
    if has_own_loss(model):
        raise ValueError(
            "The model has a loss_function of its own, which linear cross-entropy would bypass. Remove it "
            "(`del model._loss_function`) or do without use_linear_cross_entropy."
        )
    previous = model.__dict__.get("forward")
    # Asked for anew, with other settings perhaps: in place of what stands there.
    previous = getattr(previous, "stands_before", previous)

    # The signature is that of the class: Trainer and generate() read it.
    @functools.wraps(type(model).forward)
    def forward(self, *args: Any, **kwargs: Any):
        run = previous or MethodType(type(self).forward, self)
        labels = kwargs.get("labels")
        wanted = labels is not None and (self.training or in_eval)
        logits_to_keep = kwargs.get("logits_to_keep", 0)
        if not wanted or isinstance(logits_to_keep, Tensor) or logits_to_keep or kwargs.get("fused_lm_head"):
            return run(*args, **kwargs)
        shift_labels = kwargs.get("shift_labels")
        head = self.get_output_embeddings()

        def loss_from_head(hidden_states: Tensor) -> Tensor:
            return linear_cross_entropy(
                hidden_states,
                head.weight,
                labels if shift_labels is None else shift_labels.reshape(hidden_states.shape[:-1]),
                bias=head.bias,
                ignore_index=kwargs.get("ignore_index", -100),
                num_items_in_batch=kwargs.get("num_items_in_batch"),
                z_loss=z_loss,
                chunk_tokens=chunk_tokens,
                shift=shift_labels is None,
                impl=impl,
            )

        def pass_on(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
            return logits

        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        head_forward = head.__dict__.get("forward")
        head.forward, self.loss_function = loss_from_head, pass_on
        try:
            outputs = run(*args, **kwargs, return_dict=True)
        finally:
            remove_own_loss(self)
            if head_forward is None:
                del head.forward
            else:
                head.forward = head_forward
        outputs.logits = None
        return outputs if return_dict else outputs.to_tuple()

    forward.stands_before = previous
    model.forward = MethodType(forward, model)
    return model


@contextmanager
def forward_for_a_while(model: PreTrainedModel) -> Iterator[None]:
    """Afterwards the model has its class's `forward` again: `use_linear_cross_entropy` and SFTTrainer's fused head put
    theirs on the instance, and the next stage's would wrap them once more."""
    try:
        yield
    finally:
        model.__dict__.pop("forward", None)
