"""The Hugging Face architectures the library knows: one row per `model_type`.

All of them share one decoder layer body (`input_layernorm`, `self_attn`, add, `post_attention_layernorm`, `mlp`, add)
under `model.model.layers`; a row says only where they differ. docs/adding_an_architecture.md tells how to add one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from . import serving


@dataclass(frozen=True)
class Architecture:
    """Where one `model_type` keeps what the library needs."""

    class_stem: str
    """`<stem>ForCausalLM`, `<stem>Model`, `<stem>Config`, `<stem>DecoderLayer` are the family's classes."""
    query_modules: tuple[str, ...] = ("q_proj",)
    """Names inside `self_attn` of the linear maps that read the hidden states to make queries; the first that exists
    is used."""
    key_value_modules: tuple[str, ...] = ("k_proj", "v_proj")
    """Names of those from the hidden states to keys and values; what they give does not depend on the queries."""
    router: str | None = "gate"
    """Name inside a sparse `mlp` of the router; None for dense architectures."""
    num_dense_layers: str | None = None
    """Name in the config of the number of leading layers without experts."""
    makes_unused_mask: bool = False
    """Whether `<stem>Model` makes a sliding-window mask that no layer uses."""
    plain_loss: bool = True
    """Whether the loss is `loss_function(lm_head(hidden_states), labels)` and nothing between: linear cross-entropy
    can take its place."""
    keeps_packed_apart: bool = True
    """Whether examples in one sequence, told apart by position ids that begin anew, do not see each other."""
    fit_for_servers: Callable[[PreTrainedModel], list[str]] = serving.as_it_is
    """See serving.py."""
    package: str | None = None
    """Module that has the family's classes; None is `transformers.models.<model_type>`."""

    def load(self, model_type: str, suffix: str) -> type:
        package = importlib.import_module(self.package or f"transformers.models.{model_type}")
        return getattr(package, self.class_stem + suffix)


_DEEPSEEK = dict(
    query_modules=("q_proj", "q_a_proj"),
    key_value_modules=("kv_a_proj_with_mqa", "kv_b_proj"),
    num_dense_layers="first_k_dense_replace",
)

ARCHITECTURES: dict[str, Architecture] = {
    "qwen2_moe": Architecture("Qwen2Moe", makes_unused_mask=True, fit_for_servers=serving.qwen2_moe),
    "qwen3_moe": Architecture("Qwen3Moe"),
    "olmoe": Architecture("Olmoe", fit_for_servers=serving.olmoe),
    "mixtral": Architecture("Mixtral"),
    "deepseek_v2": Architecture("DeepseekV2", **_DEEPSEEK),
    "deepseek_v3": Architecture("DeepseekV3", **_DEEPSEEK),
    "glm4_moe": Architecture("Glm4Moe", num_dense_layers="first_k_dense_replace"),
    # It makes its masks without looking at the position ids.
    "gpt_oss": Architecture("GptOss", router="router", keeps_packed_apart=False),
    "llama": Architecture("Llama", router=None),
    "qwen3": Architecture("Qwen3", router=None),
}

PREFIX = "revffn_"


def plain_model_type(model_type: str) -> str:
    """`revffn_qwen2_moe` -> `qwen2_moe`; plain names stay."""
    return model_type.removeprefix(PREFIX)


def num_dense_layers(hf_config: PreTrainedConfig) -> int:
    """Leading decoder layers without experts, of a family whose config counts them; 0 elsewhere."""
    row = ARCHITECTURES.get(plain_model_type(hf_config.model_type))
    name = None if row is None else row.num_dense_layers
    return (getattr(hf_config, name, 0) or 0) if name else 0


def has_routers(hf_config: PreTrainedConfig) -> bool:
    row = ARCHITECTURES.get(plain_model_type(hf_config.model_type))
    if row is not None:
        return row.router is not None
    return any(getattr(hf_config.get_text_config(), name, None) for name in ("num_experts", "num_local_experts"))


def find_architecture(model: PreTrainedModel) -> Architecture:
    """The row of a causal language model.

    Raises:
        ValueError: The model's type or class is not in the table; the message lists what is.
    """
    model_type = plain_model_type(model.config.model_type)
    row = ARCHITECTURES.get(model_type)
    if row is None:
        raise ValueError(
            f"No reversible layout for model_type={model_type!r}. Known: {', '.join(sorted(ARCHITECTURES))}. "
            "docs/adding_an_architecture.md shows how to add one."
        )
    expected = row.class_stem + "ForCausalLM"
    # fully_shard makes subclasses, and calls them so.
    if type(model).__name__.removeprefix("FSDP").removeprefix("RevFFN") != expected:
        raise ValueError(
            f"Only {expected} can be made reversible for model_type={model_type!r}, got {type(model).__name__}."
        )
    return row


def fit_for_servers(model: PreTrainedModel) -> list[str]:
    """Change a plain model, as `export` returns it, in place where servers want something else that no number depends
    on; a line each for what was done or is left."""
    return find_architecture(model).fit_for_servers(model)


def routers(model: PreTrainedModel) -> list[nn.Module]:
    """The router module of every sparse layer, in order; empty for a dense model."""
    name = find_architecture(model).router
    found = [getattr(layer.mlp, name, None) for layer in model.model.layers] if name else []
    # In dense layers among sparse ones `mlp` is a plain MLP: it has experts nowhere.
    return [
        r
        for r, layer in zip(found, model.model.layers, strict=bool(found))
        if r is not None and hasattr(layer.mlp, "experts")
    ]


def router_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """The parameters of every router: what the paper freezes in its second stage."""
    return [parameter for router in routers(model) for parameter in router.parameters()]
