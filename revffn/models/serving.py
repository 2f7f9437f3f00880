"""What inference servers take for granted of a checkpoint, and transformers does not.

Found by `benchmarks/serving.py`, which compares the tokens and log-probabilities of servers with transformers'.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


@torch.no_grad()
def fit_for_servers(model: PreTrainedModel) -> list[str]:
    """Change in place what servers want otherwise and no number depends on; a line each for what was done or is left.

    qwen2_moe: vLLM's class always has biases in q_proj, k_proj and v_proj, and leaves them undefined where the
    checkpoint has none (every log-probability is NaN then); missing ones are added as zeros. llama.cpp's graph has
    output weights of its own and does not divide the probabilities of the chosen experts by their sum.
    olmoe: llama.cpp does not clip queries, keys and values.

    Args:
        model: A plain model, as `revffn.export` returns it.
    """
    config, said = model.config, []
    if config.model_type == "olmoe" and config.clip_qkv is not None:
        said.append("llama.cpp computes another function than this model: it does not support clip_qkv in olmoe.")
    if config.model_type != "qwen2_moe":
        return said
    if not config.qkv_bias:
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))
        config.qkv_bias = True
        said.append("q_proj, k_proj and v_proj got biases of zero: vLLM expects them of qwen2_moe.")
    refused = {"norm_topk_prob: true": config.norm_topk_prob, "tied embeddings": config.tie_word_embeddings}
    if any(refused.values()):
        reasons = " and ".join(name for name, given in refused.items() if given)
        said.append(f"llama.cpp cannot serve this model: it does not support {reasons} in qwen2_moe. vLLM does.")
    return said


__all__ = ["fit_for_servers"]
