"""Every way of training a step that is measured, behind one interface: `start(...)` gives a model and `step(batch)`.

What is the same for all: the weights (a parameter's values depend on its name and the seed alone), the batches, and,
wherever a method has no optimizer of its own, the optimizer: `OptimizerInBackward`, adafactor, stepping in backward.
transformers' own methods compute full logits, as they do by default; `hf_checkpointing_linear_ce` is the strongest
rival we can build from parts anybody can take, ours included. PEFT, LOMO and GaLore get activation checkpointing and
linear cross-entropy, so that what is compared is the method and not the logits.

Adding a method is adding a row to `METHODS`: how the plain model is changed, and what a step is.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import MethodType, ModuleType
from typing import Any, Literal

import torch
from models import plain_model, plain_model_on_host
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.activations import ACT2FN

from revffn import HostWeights, ReversibleConfig, convert, is_reversible
from revffn.memory.simulation import Method
from revffn.models.losses import use_linear_cross_entropy
from revffn.optim import OptimizerInBackward, parameter_groups

Batch = dict[str, Tensor]
SILU = type(ACT2FN["silu"])
EVERY_N = 2
"""`hf_checkpointing_n` recomputes every so many-th layer and stores the activations of the others."""


class NotAvailable(Exception):
    """This method cannot run here; the text says why and what would change that."""


@dataclass(kw_only=True, frozen=True)
class OptimizerSettings:
    """Of `OptimizerInBackward`. LOMO and GaLore bring rules of their own and read only `lr`."""

    rule: Literal["adafactor", "adamw", "adamw8bit", "sgd"] = "adafactor"
    lr: float = 1e-5
    rounding: Literal["stochastic", "nearest", "master"] = "stochastic"
    in_backward: bool = True
    """False keeps all gradients until backward has ended, as `Trainer` does."""
    seed: int = 0


@dataclass(kw_only=True)
class Training:
    """A model that is being trained."""

    model: nn.Module
    step: Callable[[Batch], Tensor]
    """Forward, loss, backward, update; returns the loss as a tensor, so that nothing waits for the device."""
    state_tensors: Callable[[], Iterator[Tensor]]
    """Of the optimizer."""
    set_lr: Callable[[float], None]
    """The learning rate of the steps to come."""
    optimizer: str
    """What makes the updates, in words."""
    stop: Callable[[], None] = lambda: None
    """Let go of the parameters and forget the optimizer's state."""
    method: Method | None = None
    """The same step as `simulation.run_step` knows it, which then tells its bytes apart; None for peers."""


Change = Callable[[PreTrainedModel, int | None], nn.Module]
Start = Callable[[nn.Module, OptimizerSettings], Training]


def package(name: str, attribute: str | None = None) -> ModuleType | Any:
    """An optional package, or something in it.

    Raises:
        NotAvailable: It cannot be imported.
    """
    known = {"lomo_optim": "lomo-optim", "galore_torch": "galore-torch", "liger_kernel": "liger-kernel"}
    pip = known.get(name.partition(".")[0], name)
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise NotAvailable(f"needs {pip}, which cannot be imported ({error}); pip install {pip}") from error
    return getattr(module, attribute) if attribute else module


# --- models ----------------------------------------------------------------------------------------------------------


def liger(model: PreTrainedModel) -> PreTrainedModel:
    """Liger's RMSNorm, SwiGLU and RoPE in a transformers model. `model.undo_liger()` gives its module back the RoPE it
    had, which all models of the class share; the rest goes with the model."""
    rms_norm = package("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    silu_mul = package("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
    rope = package("liger_kernel.transformers.rope", "liger_rotary_pos_emb")

    def norm(self: nn.Module, hidden_states: Tensor) -> Tensor:
        return rms_norm.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False)

    def mlp(self: nn.Module, x: Tensor) -> Tensor:
        return self.down_proj(silu_mul.apply(self.gate_proj(x), self.up_proj(x)))

    for part in model.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = MethodType(norm, part)
        elif type(part).__name__.endswith("MLP") and isinstance(getattr(part, "act_fn", None), SILU):
            part.forward = MethodType(mlp, part)
    module = sys.modules[type(model).__module__]
    model.undo_liger = partial(setattr, module, "apply_rotary_pos_emb", module.apply_rotary_pos_emb)
    module.apply_rotary_pos_emb = rope
    return model


def unchanged(model: PreTrainedModel, tile_tokens: int | None) -> PreTrainedModel:
    return model


def checkpointing(
    model: PreTrainedModel,
    tile_tokens: int | None,
    every: int = 1,
    offload: bool = False,
    linear_ce: bool = False,
    fused: bool = False,
) -> PreTrainedModel:
    """transformers' activation checkpointing, of every `every`-th layer, with its inputs on the host if asked; `fused`
    puts Liger's kernels in."""
    # The name changed between transformers 5.17 and 5.23; the old one goes with version 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    for index, layer in enumerate(model.model.layers):
        # What `every_n_layers` and `offload` do, which versions before 5.23 do not have.
        layer.gradient_checkpointing = index % every == 0
        if offload:
            layer._gradient_checkpointing_func = on_the_host(layer._gradient_checkpointing_func)
    model = liger(model) if fused else model
    return use_linear_cross_entropy(model) if linear_ce else model


def on_the_host(checkpoint: Callable) -> Callable:
    """What a checkpoint saves lies in (pinned) host memory until it is recomputed."""

    def checkpoint_on_the_host(function: Callable, *args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return checkpoint(function, *args, **kwargs)

    return checkpoint_on_the_host


def reversible(
    model: PreTrainedModel,
    tile_tokens: int | None,
    tiles: bool = False,
    host: str | torch.device | None = None,
    **settings: Any,
) -> nn.Module:
    """Ours; `host` keeps the weights in host memory for a model that runs on that device."""
    config = ReversibleConfig.from_dict(dict(tile_tokens=tile_tokens if tiles else None, **settings))
    model = use_linear_cross_entropy(convert(model, config))
    if host is not None:
        model.host_weights = HostWeights(model, host)
    return model


def peft(model: PreTrainedModel, tile_tokens: int | None, config_class: str, **settings: Any) -> nn.Module:
    """PEFT on the linear maps; the fused 3-D experts are none and stay frozen, as by PEFT's default."""
    config = package("peft", config_class)(task_type="CAUSAL_LM", **settings)
    model = checkpointing(model, tile_tokens, linear_ce=True)
    model.enable_input_require_grads()  # or checkpoints of frozen layers would have no gradient to pass
    # PEFT makes its matrices in float32 by default; bf16 is what the other methods train in.
    return package("peft").get_peft_model(model, config, autocast_adapter_dtype=False).train()


# --- steps -----------------------------------------------------------------------------------------------------------


def own_optimizer(
    model: nn.Module, settings: OptimizerSettings, of_simulation: dict[str, Any] | None = None
) -> Training:
    """`loss.backward()` with `OptimizerInBackward`."""
    optimizer = OptimizerInBackward(
        parameter_groups(model, 0.0),
        rule=settings.rule,
        lr=settings.lr,
        rounding=settings.rounding,
        in_backward=settings.in_backward,
        seed=settings.seed,
    )

    def step(batch: Batch) -> Tensor:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    store = getattr(model, "host_weights", None)
    if store is not None:
        store.keep_states_of(optimizer)

    def state_tensors() -> Iterator[Tensor]:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    def set_lr(lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr

    def stop() -> None:
        optimizer.detach()
        if store is not None:
            store.remove()  # `run_step` makes another
        getattr(model, "undo_liger", lambda: None)()
        optimizer.state.clear()

    method = None
    if of_simulation is not None:
        rules = dict(optimizer=settings.rule, rounding=settings.rounding, optimizer_in_backward=settings.in_backward)
        rules["reversible"] = getattr(model, "reversible_config", None)
        method = Method(**rules, **of_simulation, weights="host" if store else "device", dtype=model.dtype)
    where = "in" if settings.in_backward else "after"
    words = f"{settings.rule}, {settings.rounding} rounding, {where} backward"
    return Training(
        model=model,
        step=step,
        state_tensors=state_tensors,
        set_lr=set_lr,
        optimizer=words,
        stop=stop,
        method=method,
    )


def lomo(model: nn.Module, settings: OptimizerSettings) -> Training:
    """LOMO as its authors' trainer runs it with clipping: a backward for the norm, then a forward and backward that
    updates."""
    optimizer = package("lomo_optim", "Lomo")(model, lr=settings.lr, clip_grad_norm=1.0)
    rate = settings.lr

    def step(batch: Batch) -> Tensor:
        loss = model(**batch, use_cache=False).loss
        optimizer.grad_norm(loss)
        loss = model(**batch, use_cache=False).loss
        optimizer.fused_backward(loss, rate)
        return loss.detach()

    def set_lr(lr: float) -> None:
        nonlocal rate
        rate = lr

    return Training(
        model=model,
        step=step,
        state_tensors=lambda: iter(()),
        set_lr=set_lr,
        optimizer="lomo (sgd in backward, clipped at norm 1)",
    )


def one_for_each(model: nn.Module, make: Callable[[Tensor], torch.optim.Optimizer], lr: float, words: str) -> Training:
    """An optimizer for every parameter, which steps when backward has its gradient, as PyTorch's tutorial on fusing
    the step into backward does."""
    optimizers = {parameter: make(parameter) for parameter in model.parameters() if parameter.requires_grad}

    def update(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    handles = [parameter.register_post_accumulate_grad_hook(update) for parameter in optimizers]

    def step(batch: Batch) -> Tensor:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def state_tensors() -> Iterator[Tensor]:
        for optimizer in optimizers.values():
            for state in optimizer.state.values():
                matrix = getattr(state.get("projector"), "ortho_matrix", None)
                yield from (x for x in (*state.values(), matrix) if isinstance(x, Tensor))

    def set_lr(lr: float) -> None:
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = lr

    def stop() -> None:
        for handle in handles:
            handle.remove()
        optimizers.clear()

    set_lr(lr)
    words = f"{words}, in backward"
    return Training(model=model, step=step, state_tensors=state_tensors, set_lr=set_lr, optimizer=words, stop=stop)


def torch_adafactor(model: nn.Module, settings: OptimizerSettings) -> Training:
    """PyTorch's own; it rounds bf16 weights to nearest."""
    return one_for_each(
        model, lambda parameter: torch.optim.Adafactor([parameter]), settings.lr, "torch.optim.Adafactor"
    )


def galore(model: nn.Module, settings: OptimizerSettings, experts: bool) -> Training:
    """GaLore with one optimizer per parameter in backward, its rank and scale as in the paper.

    Args:
        experts: Project the fused experts too; False projects linear maps only, as transformers' `galore_adamw` does,
            and gives the experts plain AdamW.
    """
    adamw = package("galore_torch", "GaLoreAdamW")
    hidden_size = model.config.get_text_config().hidden_size
    low_rank = {"rank": hidden_size // 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    linear = {id(m.weight) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}

    def make(parameter: Tensor) -> torch.optim.Optimizer:
        projected = id(parameter) in linear or (experts and parameter.dim() == 3)
        return adamw([{"params": [parameter], **(low_rank if projected else {})}], no_deprecation_warning=True)

    return one_for_each(model, make, settings.lr, "galore_adamw")


def trl_defaults(model: nn.Module, settings: OptimizerSettings) -> Training:
    """TRL's `SFTTrainer` as `SFTConfig()` sets it up: its loss and metrics, checkpointing, fused AdamW after backward,
    clipping at norm 1. `settings` has no say but in the rate."""
    SFTConfig, SFTTrainer = package("trl", "SFTConfig"), package("trl", "SFTTrainer")
    rows = package("datasets", "Dataset").from_list([{"input_ids": [0, 1], "labels": [0, 1]}])
    words = {"[UNK]": 0, "[PAD]": 1, "[EOS]": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), pad_token="[PAD]", eos_token="[EOS]"
    )
    bf16 = model.dtype == torch.bfloat16
    # Tokens of the model's own choosing, not this stand-in's.
    special = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            learning_rate=settings.lr,
            bf16=bf16,
            report_to="none",
            max_steps=10**6,
            use_cpu=model.device.type == "cpu",
        )
        trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    for name, value in special.items():
        setattr(model.config, name, value)
    if args.gradient_checkpointing:
        checkpointing(model, None)  # as `trainer.train` does before the first step
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1

    def step(batch: Batch) -> Tensor:
        model.train()
        inputs = batch | {"attention_mask": torch.ones_like(batch["input_ids"])}
        loss = trainer.training_step(model, inputs, num_items_in_batch=batch["labels"][:, 1:].numel())
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def set_lr(lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr

    def state_tensors() -> Iterator[Tensor]:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))

    return Training(
        model=model,
        step=step,
        state_tensors=state_tensors,
        set_lr=set_lr,
        optimizer=f"{args.optim}, clipped at norm {args.max_grad_norm:g}, after backward",
    )


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True, frozen=True)
class BenchmarkMethod:
    """A row of `METHODS`."""

    description: str
    change: Change = unchanged
    """(plain model, tile_tokens) -> the model that trains."""
    start: Start = own_optimizer
    trains_everything: bool = True
    """False: most weights are frozen, and a step is less work than the model's."""
    layer_period: int = 1
    """Layers repeat with this period."""
    tiles: bool = False
    """The walk is cut into tiles."""
    host: bool = False
    """Weights are in host memory; `change` is told the device as `host`."""
    counted_as: str | None = None
    """The method whose matrix products it has, where its own step cannot run on fake tensors."""


def _transformers(description: str, name: str = "checkpointing", period: int = 1, **settings: Any) -> BenchmarkMethod:
    simulated = {"name": name, "linear_cross_entropy": settings.get("linear_ce", False)}
    return BenchmarkMethod(
        description=f"transformers{description}",
        change=partial(checkpointing, **settings) if name == "checkpointing" else unchanged,
        start=partial(own_optimizer, of_simulation=simulated),
        layer_period=period,
    )


def _one(description: str, tiles: bool = False, in_host_memory: bool = False, **settings: Any) -> BenchmarkMethod:
    return BenchmarkMethod(
        description=description,
        change=partial(reversible, tiles=tiles, **settings),
        start=partial(own_optimizer, of_simulation={"name": "reversible"}),
        tiles=tiles,
        host=in_host_memory,
    )


def _ours(words: str, **settings: Any) -> dict[str, BenchmarkMethod]:
    name = "_".join([settings["coupling"], *([settings["query_stream"]] if "query_stream" in settings else [])])
    name += "_maps" if settings.get("stream_maps") else ""
    return {
        f"ours_{name}{'_tiles' if tiles else ''}": _one(
            f"ours, {words}{', in tiles' if tiles else ''}", tiles=tiles, **settings
        )
        for tiles in (False, True)
    }


def _peft(description: str, config_class: str, **settings: Any) -> BenchmarkMethod:
    return BenchmarkMethod(
        description=description,
        change=partial(peft, config_class=config_class, **settings),
        trains_everything=False,
    )


# Like the grids that calibration chooses on SmolLM2 (these models have random weights): what they cost is timed too.
GRIDS = dict(fraction_bits=9, grid_growth=11, wide_channels=list(range(16)), wide_growth=5)
INNOVATION = dict(coupling="innovation", side_bits=2, **GRIDS)
ALL = 1000
"""Kept layers, of any model."""
INNOVATION_M1 = {**INNOVATION, "side_bits": 1}
LORA = dict(r=16, lora_alpha=32, target_modules="all-linear")
IA3 = dict(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
strongest = partial(checkpointing, linear_ce=True)

METHODS: dict[str, BenchmarkMethod] = {
    "hf_plain": _transformers("", name="plain"),
    "hf_checkpointing": _transformers(" + activation checkpointing"),
    "hf_checkpointing_n": _transformers(
        f" + activation checkpointing of every {EVERY_N}nd layer", every=EVERY_N, period=EVERY_N
    ),
    "hf_checkpointing_offload": _transformers(" + activation checkpointing, checkpoints on the host", offload=True),
    "hf_checkpointing_linear_ce": _transformers(" + activation checkpointing + linear cross-entropy", linear_ce=True),
    "hf_torch_adafactor": BenchmarkMethod(
        description="transformers + activation checkpointing, torch.optim.Adafactor",
        change=checkpointing,
        start=torch_adafactor,
    ),
    "hf_torch_adafactor_linear_ce": BenchmarkMethod(
        description="transformers + activation checkpointing + linear cross-entropy, torch.optim.Adafactor",
        change=strongest,
        start=torch_adafactor,
    ),
    "trl_defaults": BenchmarkMethod(
        description="TRL SFTTrainer, its defaults", start=trl_defaults, counted_as="hf_checkpointing"
    ),
    "lora": _peft("LoRA, rank 16 on all linear maps", "LoraConfig", **LORA),
    "dora": _peft("DoRA, rank 16 on all linear maps", "LoraConfig", use_dora=True, **LORA),
    "ia3": _peft("IA3", "IA3Config", **IA3),
    "lomo": BenchmarkMethod(description="LOMO + checkpointing + linear cross-entropy", change=strongest, start=lomo),
    "galore": BenchmarkMethod(
        description="GaLore + checkpointing + linear cross-entropy, experts projected",
        change=strongest,
        start=partial(galore, experts=True),
    ),
    "galore_linear": BenchmarkMethod(
        description="GaLore + checkpointing + linear cross-entropy, experts with plain AdamW",
        change=strongest,
        start=partial(galore, experts=False),
    ),
    **_ours("innovation, m = 2", **INNOVATION),
    "hf_same_kernels": _transformers(
        " + activation checkpointing + linear cross-entropy + Liger's norms, RoPE and SwiGLU",
        linear_ce=True,
        fused=True,
    ),
    "ours_innovation_m1": _one("ours, innovation, m = 1", **INNOVATION_M1),
    "ours_innovation_m1_tiles": _one("ours, innovation, m = 1, in tiles", tiles=True, **INNOVATION_M1),
    "ours_innovation_kept": _one("ours, innovation, m = 2, all layers kept", kept_layers=ALL, **INNOVATION),
    "ours_innovation_tiles_host": _one(
        "ours, innovation, m = 2, in tiles, weights in host memory", tiles=True, in_host_memory=True, **INNOVATION
    ),
    "ours_none_offload_tiles": _one(
        "ours, layer inputs in host memory, in tiles", tiles=True, coupling="none", offload_inputs=True
    ),
    "ours_none_offload_tiles_host": _one(
        "ours, layer inputs and weights in host memory, in tiles",
        tiles=True,
        in_host_memory=True,
        coupling="none",
        offload_inputs=True,
    ),
    **_ours("cross_branch, queries from the right", coupling="cross_branch", query_stream="right"),
    **_ours(
        "cross_branch, queries from the right, stream maps",
        coupling="cross_branch",
        query_stream="right",
        stream_maps=True,
    ),
    **_ours("cross_branch, queries from the left", coupling="cross_branch", query_stream="left"),
    **_ours("layer inputs stored", coupling="none"),
}


def start(
    name: str,
    hf_config: PreTrainedConfig,
    device: str | torch.device,
    dtype: torch.dtype,
    settings: OptimizerSettings | None = None,
    tile_tokens: int | None = 2048,
    seed: int | None = 0,
    kept_layers: int = 0,
) -> Training:
    """Make the model of a method and what trains it.

    Args:
        name: Of `METHODS`.
        hf_config: The model's; it is not changed.
        device, dtype: Where and in what weights are made.
        settings: Of the optimizer.
        tile_tokens: For the methods that walk in tiles.
        seed: Of the weights; None leaves them to transformers (fake tensors).
        kept_layers: The last so many decoder layers do not run again in backward: of ours by its own setting, of
            transformers' by being left out of its checkpointing.

    Raises:
        NotAvailable: The method needs a package that is not there.
    """
    row = METHODS[name]
    change = partial(row.change, host=device) if row.host else row.change
    elsewhere = row.host and torch.device(device).type == "cuda"
    make = plain_model_on_host if elsewhere else plain_model
    model = change(make(hf_config, device, dtype, seed), tile_tokens)
    if is_reversible(model):
        model.reversible_config.kept_layers = kept_layers or model.reversible_config.kept_layers
    elif kept_layers:
        for layer in model.model.layers[-kept_layers:]:
            layer.gradient_checkpointing = False
    return row.start(model, settings or OptimizerSettings())
