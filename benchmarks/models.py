"""The transformers models that are measured, full size and with random weights, made where they are to be."""

from __future__ import annotations

import copy
import zlib

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Random weights that depend on a parameter's name, the seed and the device only, never on the method."""
    std = model.config.get_text_config().initializer_range
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            parameter.normal_(0.0, std, generator=generator)
        else:
            parameter.fill_(1.0 if "norm" in name else 0.0)


def plain_model(
    hf_config: PreTrainedConfig, device: str | torch.device, dtype: torch.dtype, seed: int | None = 0
) -> PreTrainedModel:
    """The transformers model, made on its device; with `seed=None` (fake tensors) its weights are left as they are."""
    hf_config = copy.deepcopy(hf_config)
    hf_config.use_cache = False
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    if seed is not None:
        fill(model, seed)
    return model.train()


@torch.no_grad()
def plain_model_on_host(
    hf_config: PreTrainedConfig, device: str | torch.device, dtype: torch.dtype, seed: int = 0
) -> PreTrainedModel:
    """The same model and values in host memory, one parameter at a time drawn on the device: it need not fit there."""
    hf_config = copy.deepcopy(hf_config)
    hf_config.use_cache = False
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    std = model.config.get_text_config().initializer_range
    for prefix, module in list(model.named_modules()):
        if any(buffer is not None for buffer in module._buffers.values()):  # rotary frequencies
            parent, _, name = prefix.rpartition(".")
            setattr(model.get_submodule(parent), name, type(module)(config=model.config))
        for name, parameter in module.named_parameters(recurse=False):
            made = torch.empty(parameter.shape, dtype=parameter.dtype)
            full = f"{prefix}.{name}" if prefix else name
            if parameter.dim() > 1:
                generator = torch.Generator(device).manual_seed(zlib.crc32(f"{seed} {full}".encode()))
                made.copy_(torch.empty_like(made, device=device).normal_(0.0, std, generator=generator))
            else:
                made.fill_(1.0 if "norm" in full else 0.0)
            setattr(module, name, nn.Parameter(made))
    model.tie_weights()
    return model.train()
