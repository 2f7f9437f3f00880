"""What inference servers take for granted of a checkpoint, and transformers does not.

Found by `benchmarks/serving.py`, which compares the tokens and log-probabilities of servers with transformers'. A
family's function changes a plain model in place where servers want something that no number depends on, and returns a
line for what was done or is left.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


def as_it_is(model: PreTrainedModel) -> list[str]:
    return []


def olmoe(model: PreTrainedModel) -> list[str]:
    """llama.cpp does not clip queries, keys and values."""
    if model.config.clip_qkv is None:
        return []
    return ["llama.cpp computes another function than this model: it does not support clip_qkv in olmoe."]


@torch.no_grad()
def qwen2_moe(model: PreTrainedModel) -> list[str]:
    """vLLM's class always has biases in q_proj, k_proj and v_proj, and leaves them undefined where the checkpoint has
    none (every log-probability is NaN then); missing ones are added as zeros. llama.cpp's graph has output weights of
    its own and does not divide the probabilities of the chosen experts by their sum."""
    config, said = model.config, []
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
