"""A model's parameters as shards of several processes.

`fsdp`: PyTorch's FSDP2 (https://arxiv.org/abs/2304.11277), a decoder layer at a time: its parameters are gathered
when a walk enters the layer and dropped when it leaves, and gradients are reduced in float32. `ep`: the same, but
experts are never gathered; each rank holds its part of every layer's experts, and tokens travel (engine/exchange.py).
Both keep the same shards, along dimension 0 of every parameter, so that a checkpoint of one is one of the other.
"""

# W = ranks, E = experts

from __future__ import annotations

from collections import Counter
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..engine.exchange import Exchange
from ..engine.experts import IMPLEMENTATION, gate_of
from ..upstream import experts_implementation

Strategy = Literal["fsdp", "ep", "ddp"]


def check_strategy(model: PreTrainedModel, strategy: Strategy | None, size: int) -> None:
    """Refuse a model that cannot be divided so.

    Args:
        model: On any device, meta too.
        size: Ranks.

    Raises:
        ValueError: Experts cannot be divided among the ranks, or their layer has no fused form.
    """
    if strategy != "ep":
        return
    found = expert_modules(model)
    if not found:
        raise ValueError("strategy ep divides experts among processes, and the model has none. Use fsdp.")
    for experts in found:
        number = next(experts.parameters(recurse=False)).shape[0]
        if number % size:
            raise ValueError(
                f"strategy ep needs a number of processes that divides the {number} experts of a layer, got {size}. "
                "Start another number, or use fsdp."
            )
        if gate_of(experts) is None or experts_implementation(model.config) != IMPLEMENTATION:
            raise ValueError(
                f"strategy ep runs experts by experts_implementation={IMPLEMENTATION!r}, and {type(experts).__name__} "
                "has no such form or was asked for another. Use fsdp."
            )


def expert_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Those of all sparse layers."""
    return [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]


def shard(model: PreTrainedModel, strategy: Literal["fsdp", "ep"], mesh: DeviceMesh) -> PreTrainedModel:
    """Make every parameter a shard, in place, on any device, also meta.

    Args:
        model: A converted model; for `fsdp` also a plain one.
        mesh: Of one dimension.

    Raises:
        ValueError: See `check_strategy`.
    """
    check_strategy(model, strategy, mesh.size())
    apart: set[nn.Parameter] = set()
    if strategy == "ep":
        group = dist.new_group(backend=None)  # its own: exchanges and gathers do not wait for each other
        for experts in expert_modules(model):
            for name, parameter in list(experts.named_parameters(recurse=False)):
                experts.register_parameter(name, first_dimension(parameter, mesh))
            experts.__dict__["exchange"] = Exchange(group, next(experts.parameters(recurse=False)).shape[0])
            apart |= set(experts.parameters(recurse=False))
    dtype = model.get_input_embeddings().weight.dtype
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if dtype == torch.bfloat16 else None)
    for module in of_another_dtype(model, dtype):
        fully_shard(module, mesh=mesh, ignored_params=apart)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, ignored_params=apart)
    head = model.get_output_embeddings()
    if model.get_input_embeddings().weight is not head.weight:
        for unit in (head, model.model):
            fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=apart)
    # A tied weight is the root's: a unit of its own would reduce its gradient in parts.
    return fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=True, ignored_params=apart)


def of_another_dtype(model: PreTrainedModel, dtype: torch.dtype) -> list[nn.Module]:
    """Modules with parameters of their own that are not in the model's dtype (routers in float32): a unit of FSDP2
    reduces gradients of one."""
    return [
        module
        for module in model.modules()
        if any(parameter.dtype != dtype for parameter in module.parameters(recurse=False))
    ]


def first_dimension(parameter: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """This rank's part of a parameter along dimension 0."""
    local = parameter.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
    sharded = DTensor.from_local(
        local, mesh, [Shard(0)], run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return nn.Parameter(sharded, requires_grad=parameter.requires_grad)


def skeleton(
    config: PreTrainedConfig, dtypes: dict[str, torch.dtype], trust_remote_code: bool = False
) -> PreTrainedModel:
    """A model without weights; what is no weight (rotary tables) is there.

    Args:
        dtypes: Of everything in its state dict. What a loaded model keeps in float32, one that is made from its config
            need not.
    """
    from accelerate import init_empty_weights  # comes with the trainer

    dtype = Counter(dtypes.values()).most_common(1)[0][0]
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()  # each module got parameters of its own
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.dtype != dtypes[name]:
            tensor.data = tensor.data.to(dtypes[name])
    return model


def make_room(model: PreTrainedModel, device: torch.device) -> None:
    """Memory for the shards of a skeleton, on the device; their values are undefined."""
    buffers = {name: buffer for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    for name, buffer in buffers.items():
        module, _, last = name.rpartition(".")
        model.get_submodule(module)._buffers[last] = buffer.to(device)
    model.tie_weights()  # and memory of its own


def spread(model: PreTrainedModel, whole: dict[str, torch.Tensor]) -> None:
    """Fill the shards of all ranks from the first rank's state dict; the others give an empty one."""
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def gathered(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The whole state dict, a tied weight once, in the first rank's host memory; empty on the others. All ranks take
    part."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    names = (dict(model.named_parameters(remove_duplicate=once)) for once in (False, True))
    again = set.difference(*map(set, names))
    return {name: tensor for name, tensor in whole.items() if name not in again}


def is_sharded(model: PreTrainedModel) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def all_ranks(device_type: str) -> DeviceMesh:
    return init_device_mesh(device_type, (dist.get_world_size(),))
