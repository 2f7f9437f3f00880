"""A pretrained Hugging Face model -> a reversible model, and back.

`convert` changes a model in place: its class, its decoder layers' classes and its config's class become subclasses of
what they were, and every layer gets a `coupling` module. Weights, parameter names and hooks stay, so the result is an
ordinary `PreTrainedModel` with a `model_type` of its own (`revffn_qwen2_moe`) that `save_pretrained` and the Auto
classes handle.
"""

# N = tokens seen, D = hidden size, L = decoder layers

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..config import ReversibleConfig
from ..couplings import Added
from ..engine.dense import fuse_parts, fused_classes
from ..engine.experts import choose_implementation
from ..engine.recompute import zeros_like_carrier
from ..engine.routing import choosing_classes, intercept
from ..engine.sublayers import TiledExperts
from ..engine.walk import Report, Walk
from ..upstream import (
    copy_implementations,
    create_causal_mask,
    experts_implementation,
    get_checkpoint_conversion_mapping,
    implementation_flags,
    layer_class,
    note_classes,
    register_checkpoint_conversion_mapping,
)
from .architectures import ARCHITECTURES, PREFIX, Architecture, find_architecture, plain_model_type
from .layers import ReversibleLayer, ReversibleNorm
from .modules import check_modules, own_class, remove_idle_patches

logger = logging.getLogger(__name__)


class ReversibleBackbone(PreTrainedModel):
    """Mixed in front of `<stem>Model`: opens a walk for every forward call that is to be reversible."""

    walks_in_eval = False
    """Eval mode computes what was trained, also where that is another function (innovation)."""

    @property
    def reversible_config(self) -> ReversibleConfig:
        return ReversibleConfig.from_dict(self.config.revffn)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            # A compiled model runs its layers as they are: what they save is dropped and made again, which a
            # compiler would not see. What stands around them is compiled.
            return torch.compiler.disable(self.run)(*args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        config = self.reversible_config
        coupling = config.find_coupling()
        if not coupling.runs(self.training or self.walks_in_eval) or kwargs.get("past_key_values") is not None:
            if not self.training and torch.is_grad_enabled() and coupling.has_streams:
                warnings.warn(
                    "A reversible model in eval mode is the plain model and stores its activations. Call "
                    "model.train() before training; for evaluation use torch.no_grad().",
                    stacklevel=2,
                )
            return super().forward(*args, **kwargs)
        if kwargs.get("output_hidden_states", self.config.output_hidden_states) and coupling.has_streams:
            raise ValueError(
                "output_hidden_states=True needs stored hidden states, which a reversible forward does not have. "
                "Call model.eval() first, or leave it out."
            )
        # A cache would keep every layer's keys and values, which is what is being avoided.
        kwargs["use_cache"] = False
        if ARCHITECTURES[plain_model_type(self.config.model_type)].makes_unused_mask:
            self.leave_out_unused_mask(kwargs)
        walk = Walk(config, len(self.layers), self.reversible_report)
        self.norm.walk = walk if coupling.has_streams else None
        try:
            outputs = super().forward(*args, walk=walk, **kwargs)
            if walk.layers_run != len(self.layers) or self.norm.walk is not None:
                raise RuntimeError(self.not_run(walk))
            return outputs
        except BaseException:
            self.norm.walk = None
            walk.discard()
            raise

    def not_run(self, walk: Walk) -> str:
        patched = [name for name, module in self.named_modules() if "forward" in module.__dict__]
        return (
            f"The model is reversible, but {len(self.layers) - walk.layers_run} of its {len(self.layers)} layers did "
            "not run so: something was put in place of their forward after the conversion"
            f"{' (' + ', '.join(patched[:4]) + ')' if patched else ''}. Take it away, or convert after it."
        )

    def leave_out_unused_mask(self, kwargs: dict[str, Any]) -> None:
        """The family makes a sliding-window mask (B, 1, T, T) also when no layer uses one: 16 GiB at T = 131,072."""
        given = kwargs.get("attention_mask")
        if isinstance(given, dict) or "sliding_attention" in self.config.layer_types:
            return
        tokens = kwargs.get("inputs_embeds") if kwargs.get("input_ids") is None else kwargs["input_ids"]
        if tokens is None:
            return
        weight = self.embed_tokens.weight
        # Only shape, dtype and device of the embedding count.
        embeddings = zeros_like_carrier(torch.Size((*tokens.shape[:2], 1)), tokens.device, weight.dtype)
        # By position: the fourth parameter, the cache, has had several names. Without position ids nothing is packed;
        # transformers would make them and wait for the device to say so.
        mask = create_causal_mask(self.config, embeddings, given, None, kwargs.get("position_ids"))
        kwargs["attention_mask"] = {"full_attention": mask}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Added):
            module.reset_parameters()


class ReversibleForCausalLM(PreTrainedModel):
    """Mixed in front of `<stem>ForCausalLM`."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        asked_for = experts_implementation(config)
        super().__init__(config, *args, **kwargs)
        if not asked_for:
            choose_implementation(self)
        settings = ReversibleConfig.from_dict(config.revffn)
        config.revffn = settings.to_dict()  # in the groups of today
        attach(self, settings, make_added(self, settings))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(*args, **kwargs)
        # Loading replaces parameters, and with them what said that they do not train.
        freeze_what_is_fixed(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    @property
    def reversible_config(self) -> ReversibleConfig:
        return self.model.reversible_config

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        logger.warning("Activation checkpointing is ignored: a reversible model rebuilds its activations already.")

    activation_checkpointing_enable = gradient_checkpointing_enable

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Added):
            module.reset_parameters()


def register_architecture(model_type: str, row: Architecture) -> dict[str, type]:
    """Make a family known to `convert`, and its reversible classes to the Auto classes
    (docs/adding_an_architecture.md).

    Returns:
        The classes: `config`, `backbone`, `causal`, `layer`, `norm`, and `experts` of a sparse family.
    """
    ARCHITECTURES[model_type] = row
    name = f"RevFFN{row.class_stem}"
    config = type(
        f"{name}Config", (row.load(model_type, "Config"),), {"model_type": PREFIX + model_type, "__module__": __name__}
    )
    causal, backbone = row.load(model_type, "ForCausalLM"), row.load(model_type, "Model")
    shared = {
        "config_class": config,
        "config": config,
        "__module__": __name__,
        "supports_gradient_checkpointing": True,
        **implementation_flags(causal),
    }
    layer = layer_class(row.load(model_type, "PreTrainedModel"))
    classes = {
        "config": config,
        "backbone": type(f"{name}Model", (ReversibleBackbone, backbone), dict(shared)),
        "causal": type(f"{name}ForCausalLM", (ReversibleForCausalLM, causal), dict(shared)),
        "layer": type(f"{name}DecoderLayer", (ReversibleLayer, layer), {"__module__": __name__}),
        "norm": type(f"{name}FinalNorm", (ReversibleNorm, family_class(causal, "RMSNorm")), {"__module__": __name__}),
    }
    if row.router is not None:
        experts = family_class(causal, "Experts")
        classes["experts"] = type(f"{name}Experts", (TiledExperts, experts), {"__module__": __name__})
        CHOOSING[model_type] = choosing_classes(sys.modules[causal.__module__])
    DENSE[model_type] = fused_classes(sys.modules[causal.__module__])
    for cls in (*classes.values(), *CHOOSING.get(model_type, {}).values(), *DENSE[model_type].values()):
        cls.__module__ = __name__
        globals()[cls.__name__] = cls  # so that models can be pickled
    AutoConfig.register(PREFIX + model_type, config)
    AutoModelForCausalLM.register(config, classes["causal"])
    mapping = get_checkpoint_conversion_mapping(model_type)
    if mapping is not None:
        register_checkpoint_conversion_mapping(PREFIX + model_type, mapping, overwrite=True)
    CLASSES[model_type] = classes
    return classes


def family_class(causal: type[PreTrainedModel], suffix: str) -> type[nn.Module]:
    """A class of the module that a family's causal language model is written in."""
    return getattr(sys.modules[causal.__module__], causal.__name__.removesuffix("ForCausalLM") + suffix)


CHOOSING: dict[str, dict[type, type]] = {}
"""By model type: the classes that choose experts, and those of a converted model."""
DENSE: dict[str, dict[type, type]] = {}
"""By model type: the classes of dense parts, and those of a converted model."""
CLASSES: dict[str, dict[str, type]] = {}
"""By model type: what `register_architecture` returned."""
for _model_type, _row in list(ARCHITECTURES.items()):
    register_architecture(_model_type, _row)


def is_reversible(model: nn.Module) -> bool:
    """Whether `convert` has been here."""
    return isinstance(model, ReversibleForCausalLM)


def convert(
    model: PreTrainedModel,
    config: ReversibleConfig | None = None,
    *,
    calibration: Iterable[dict[str, Tensor]] | None = None,
) -> PreTrainedModel:
    """Make a pretrained causal language model reversible, in place.

    Args:
        model: A `<stem>ForCausalLM` of one of `ARCHITECTURES`, on any device, also meta or fake.
        config: How; the default is the innovation coupling with two side bits.
        calibration: Batches (`input_ids` (B, T), optional `attention_mask`) that the plain model is run on once,
            without gradients: the grids are chosen from the hidden states, and predictors (cross_branch: adapters)
            are fitted in closed form (ridge regression). Without it predictors and adapters start as the identity or
            its halves, and `config.grids` holds. Of several processes all need the
            same batches: grids decide the function that is trained.

    Returns:
        `model`, now a `RevFFN<stem>ForCausalLM`. Training mode runs reversibly; eval mode runs the plain function
        (cross_branch: the coupled one).

    Raises:
        ValueError: Unknown architecture, already reversible, or settings that do not fit; nothing has been changed
            then.
    """
    config = config or ReversibleConfig()
    if is_reversible(model):
        raise ValueError("The model is reversible already. Call revffn.export(model) first to convert it anew.")
    find_architecture(model)
    if isinstance(model, FSDPModule):
        raise ValueError("The model is sharded already. Convert it first, then call fully_shard.")
    layers = model.model.layers
    if isinstance(config.side_bits, list) and len(config.side_bits) != len(layers):
        raise ValueError(f"side_bits has {len(config.side_bits)} entries; the model has {len(layers)} decoder layers.")
    wrong = [c for c in config.grids.wide_channels if not 0 <= c < model.config.hidden_size]
    if wrong:
        raise ValueError(f"wide_channels {wrong} do not exist; the model has {model.config.hidden_size} channels.")
    coupling = config.find_coupling()
    coupling.validate(config, model.config)
    plain_type = model.config.model_type
    check_modules(model, CLASSES[plain_type])
    config = config.resolve(calibrated=calibration is not None)
    observed = None
    if calibration is not None:
        config, observed = coupling.observe(model, config, calibration)
    if config.grids.grid_growth is None:
        config = replace(config, grids=replace(config.grids, grid_growth=0))
    added = make_added(model, config)  # may fail for want of memory: nothing has been changed yet
    remove_idle_patches(model)
    model.config.__class__ = CLASSES[plain_type]["config"]
    model.config.model_type = PREFIX + plain_type
    model.config.revffn = config.to_dict()
    model.__class__ = CLASSES[plain_type]["causal"]
    choose_implementation(model)
    attach(model, config, added)
    notes = None if observed is None else coupling.fit(model, observed)
    if notes is not None:
        model.config.revffn_calibration = notes
    return model


def make_added(model: PreTrainedModel, config: ReversibleConfig) -> tuple[list[nn.Module], nn.Module | None]:
    """What the coupling adds to every layer, and to the model."""
    coupling, hidden_size = config.find_coupling(), model.config.hidden_size
    of_layers = []
    for index, layer in enumerate(model.model.layers):
        weight = next(p for p in layer.self_attn.parameters() if p.is_floating_point())
        with torch.device(weight.device), default_dtype(weight.dtype):
            of_layers.append(coupling.layer_module(hidden_size, index, config))
    weight = model.model.norm.weight
    with torch.device(weight.device), default_dtype(weight.dtype):
        return of_layers, coupling.model_module(hidden_size, config)


def attach(model: PreTrainedModel, config: ReversibleConfig, added: tuple[list[nn.Module], nn.Module | None]) -> None:
    """Give a plain model's backbone and layers their reversible classes, and what `make_added` made."""
    row, model_type = find_architecture(model), plain_model_type(model.config.model_type)
    classes, coupling, hidden_size = CLASSES[model_type], config.find_coupling(), model.config.hidden_size
    layers, norm = model.model.layers, model.model.norm
    of_layers, maps = added
    model.model.__class__ = own_class(classes["backbone"], model.model)
    model.model.reversible_report = Report()
    norm.__class__ = own_class(classes["norm"], norm)
    for index, layer in enumerate(layers):
        layer.__class__ = own_class(classes["layer"], layer)
        layer.behaviour, layer.layer_index = coupling, index
        layer.query_modules, layer.key_value_modules = row.query_modules, row.key_value_modules
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts.__class__ = own_class(classes["experts"], layer.mlp.experts)
            intercept(layer.mlp, getattr(layer.mlp, row.router), CHOOSING[model_type])
        fuse_parts(layer, sys.modules[classes["layer"].__bases__[1].__module__], DENSE[model_type])
        layer.coupling = of_layers[index].train(layer.training)
    for part in (model, model.model):
        note_classes(part, layers)
    if maps is not None:
        model.model.coupling = maps.train(model.training)
        # Those who use them do not own them.
        for user in (model.model.layers[0], model.model.norm):
            user.__dict__["stream_maps"] = maps
    # Made here rather than in the first step, whose memory is then that of all others.
    weight = model.get_input_embeddings().weight
    width = coupling.stream_width(hidden_size)
    model.model.reversible_report.grids_of(config, len(model.model.layers), weight.detach()[..., :width])
    freeze_what_is_fixed(model)


def freeze_what_is_fixed(model: PreTrainedModel) -> None:
    """What the coupling added and does not train."""
    config = model.reversible_config
    if not config.find_coupling().trains_what_it_adds(config):
        for _, parameter in coupling_parameters(model):
            parameter.requires_grad_(False)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New modules are made in `dtype`. (`module.to(dtype)` afterwards fails on fake tensors.)"""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def export(model: PreTrainedModel) -> PreTrainedModel:
    """The plain Hugging Face model of a reversible one, sharing its weights.

    For `innovation` this is the model at gain 0, for `none` the model itself: the original architecture, in eval mode
    the same function bit for bit.

    Raises:
        ValueError: The coupling is `cross_branch`: its function is not that of the original architecture.
    """
    if not is_reversible(model):
        raise ValueError(
            f"{type(model).__name__} is a plain model already; export takes what revffn.convert returned."
        )
    problem = model.reversible_config.find_coupling().export_problem
    if problem is not None:
        raise ValueError(problem)
    plain_type = plain_model_type(model.config.model_type)
    row = ARCHITECTURES[plain_type]
    values = {
        k: v
        for k, v in model.config.to_dict().items()
        if k not in ("model_type", "revffn", "revffn_calibration", "architectures")
    }
    config = row.load(plain_type, "Config").from_dict(values)
    copy_implementations(model.config, config)
    with torch.device("meta"):
        plain = row.load(plain_type, "ForCausalLM")(config)
    for name, module in plain.named_modules():
        source = model.get_submodule(name)
        for key in module._parameters:
            module._parameters[key] = source._parameters[key]
        for key in module._buffers:
            module._buffers[key] = source._buffers[key]
        # Some modules keep plain tensors or numbers made in __init__ (rotary tables); they belong to the values above.
    plain.generation_config = model.generation_config
    return plain.train(model.training)


def reversible_report(model: PreTrainedModel) -> dict[str, Any]:
    """What the model's last backward walk measured.

    Returns:
        `walks` (so far), `verified_states`, `mismatched_states`, `mismatched` (names) of the last walk,
        `mismatched_states_total`; `largest_grid_value` and `saturated` (within a factor two of int32's end);
        `layers`: per layer, where the fixed point of cross_branch with queries from the left is solved for:
        `iterations`, `contraction` (by how much one shrinks a token's step), `kept_bits` of each element (32: the
        layer's left input is kept) and `kept_rows`, the share of tokens that are kept whole.
    """
    return model.model.reversible_report.as_dict()


def coupling_parameters(model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that the coupling added: predictors or projection adapters."""
    return [(name, parameter) for name, parameter in model.named_parameters() if ".coupling." in name]


__all__ = ["convert", "coupling_parameters", "export", "is_reversible", "register_architecture", "reversible_report"]
