"""One training step at full size without its memory: fake tensors run the real code, and every storage is counted.

`FakeTensorMode` runs each operation on shapes alone, so the step of a model of any size takes a minute on a CPU and
allocates nothing. `LiveBytes` sees every operation, notes when a storage is born and when it dies, and after the step
says what was alive at the peak and what it was for. It counts tensors, as `torch.cuda.max_memory_allocated` does up to
rounding; kernels' workspaces, the allocator's fragmentation and the CUDA context are not tensors.

The operations are those of a CPU. A CUDA kernel that allocates other temporaries shows only on a GPU.
"""

# B = batch, T = tokens, D = hidden size, V = vocabulary, L = decoder layers

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..config import ReversibleConfig
from ..engine.dense import standing_for
from ..engine.host_weights import HostWeights
from ..models.conversion import convert, default_dtype, is_reversible
from ..models.losses import router_logits_of, router_z_loss, use_linear_cross_entropy
from ..optim import OptimizerInBackward, parameter_groups
from ..optim.rules import local_part
from ..parallel.shard import expert_modules, shard
from ..upstream import fake_tensors_as_real
from .live_bytes import FORWARD, LiveBytes, Storage, describe, no_garbage_collection, storage_of
from .ranks import one_of

METHODS = ("reversible", "checkpointing", "plain")


# --- what is trained, and how ----------------------------------------------------------------------------------------


@dataclass(kw_only=True, frozen=True)
class Method:
    """Everything about a training step that costs memory, except the model and the batch."""

    name: Literal["reversible", "checkpointing", "plain"] = "reversible"
    """`reversible`: converted by this library; `checkpointing`, `plain`: transformers with and without activation
    checkpointing."""
    reversible: ReversibleConfig | None = None
    """For `reversible`; None takes the default with tiles of 2,048 tokens."""
    optimizer: Literal["adafactor", "adamw", "adamw8bit", "sgd"] = "adafactor"
    """Rule of `OptimizerInBackward`."""
    rounding: Literal["stochastic", "nearest", "master"] = "stochastic"
    """See `OptimizerInBackward`."""
    optimizer_in_backward: bool = True
    """False keeps all gradients until backward has ended."""
    linear_cross_entropy: bool = True
    """False computes full logits."""
    router_aux_loss: bool = False
    """Add the load-balancing loss, as transformers makes it."""
    router_z_loss: bool = False
    """Add the routers' z-loss; see `losses.router_z_loss`."""
    lora_rank: int | None = None
    """Train only low-rank updates of the attention's linear maps, of this rank; the model's weights are frozen."""
    dtype: torch.dtype = torch.bfloat16
    """Of weights and computation."""
    padded: bool = False
    """Sequences are of several lengths. Counted in plans, of layers that are kept; a simulated step has one length."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What the step is to run on. On a GPU with Triton, fused dense parts keep less than the family's code."""
    weights: Literal["device", "host"] = "device"
    """`host`: decoder layers live in host memory, with the optimizer's states of them; see `HostWeights`."""
    gpus: int = 1
    """Ranks that share the work; all bytes are of one of them."""
    parallel: Literal["fsdp", "ep"] = "fsdp"
    """How several ranks share the parameters; see `parallel.shard`."""
    received: float = 1.0
    """ep: rows that a rank receives, of its even part; with W ranks at most W."""

    def __post_init__(self):
        if self.name not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}; got {self.name!r}.")
        if self.weights == "host" and not (self.name == "reversible" and self.optimizer_in_backward):
            raise ValueError(
                "Weights in host memory need a reversible model (coupling innovation, cross_branch or none) and the "
                "optimizer in backward (optimizer.in_backward: true)."
            )
        if self.weights == "host" and self.gpus > 1:
            raise ValueError("Weights in host memory are for one GPU. Several divide them (parallel fsdp, ep).")
        if self.name == "reversible" and self.reversible is None:
            object.__setattr__(self, "reversible", ReversibleConfig(tile_tokens=2048))

    def share(self, batch: int) -> int:
        """Sequences of one rank.

        Raises:
            ValueError: They cannot be divided.
        """
        if batch % self.gpus:
            raise ValueError(
                f"batch is of all {self.gpus} GPUs together, each with as many sequences as the others; got {batch}. "
                f"Give a multiple of {self.gpus}."
            )
        return batch // self.gpus


class LowRankLinear(nn.Module):
    """base(x) + up(down(x)), the base frozen."""

    def __init__(self, base: nn.Linear, rank: int):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def add_low_rank(model: PreTrainedModel, rank: int) -> None:
    """Freeze a model and put trainable low-rank updates beside the linear maps of its attention."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        attention = layer.self_attn
        for name, module in list(attention.named_children()):
            if isinstance(module, nn.Linear):
                with torch.device(module.weight.device), default_dtype(module.weight.dtype):
                    setattr(attention, name, LowRankLinear(module, rank))


def build(hf_config: PreTrainedConfig, method: Method, mesh: DeviceMesh | None = None) -> PreTrainedModel:
    """The model in training mode, on whatever kind of tensors is being made (fake, meta, real); with a mesh, one
    rank's shards of it."""
    hf_config = copy.deepcopy(hf_config)
    hf_config.use_cache = False
    model = AutoModelForCausalLM.from_config(hf_config, dtype=method.dtype)
    if method.lora_rank is not None:
        add_low_rank(model, method.lora_rank)
    if method.name == "reversible":
        convert(model, method.reversible)
    elif method.name == "checkpointing":
        # The name changed between transformers 5.17 and 5.23; the old one goes with version 6.
        new = hasattr(model, "activation_checkpointing_enable")
        (model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable)()
        if method.lora_rank is not None:
            model.enable_input_require_grads()
    if method.linear_cross_entropy:
        use_linear_cross_entropy(model)
    if mesh is not None:
        shard(model, method.parallel, mesh)
        for experts in expert_modules(model) if method.parallel == "ep" else ():
            experts.__dict__["exchange"].share = method.received
    return model.train()


# --- the step --------------------------------------------------------------------------------------------------------


def sorter(model: PreTrainedModel) -> Callable[[Storage], str]:
    """Tells what a storage is for that nobody has tagged; see `PARTS`."""
    config = model.config.get_text_config()
    vocabulary, widths = config.vocab_size, (config.hidden_size, config.hidden_size // 2)
    reversible = is_reversible(model)
    experts = [p for p in model.parameters() if p.dim() == 3 and p.requires_grad]
    shapes = {tuple(sorted(shape)) for p in experts for shape in (p.shape, local_part(p).shape)}
    stacks = {(shape, dtype) for shape in shapes for dtype in (experts[0].dtype, torch.float32, torch.uint8)}

    def sort(storage: Storage) -> str:
        shape = storage.shape
        in_backward = storage.phase not in FORWARD
        if in_backward and (tuple(sorted(shape)), storage.dtype) in stacks:
            return "gradients"
        if vocabulary in shape and storage.dtype.is_floating_point:
            return "loss"
        if reversible and len(shape) == 3 and shape[-1] in widths:
            if storage.dtype == torch.int32:
                return "streams"
            if storage.dtype == torch.float32 and in_backward:
                return "stream_gradients"
        if storage.dtype in (torch.uint8, torch.int16):
            return "side_bits_and_routing"
        return "stored_activations" if storage.stored and not in_backward else "working_set"

    return sort


def layer_of(name: str, num_layers: int) -> int:
    """Decoder layer of a parameter; `num_layers` for what lies above (final norm, head), -1 for the embedding."""
    pieces = name.split(".")
    if "layers" in pieces:
        return int(pieces[pieces.index("layers") + 1])
    return -1 if "embed_tokens" in pieces else num_layers


def position(index: int, number: int) -> str:
    return "last" if index == number - 1 else "first" if index == 0 else "inner"


class Hooks:
    """Follows a step: which phase it is in, which tensors are gradients, how often each parameter's was complete.

    A phase of backward begins where a sublayer runs again, `<where> mlp of first tile, inner chunk`, where a
    parameter's gradient is complete, `<where> after <parameter>`, and where the embedding's begins. `where` is how far
    the walk has come: `top` in the last decoder layer and above, `bottom` in the first ones (`num_special`) and in the
    embedding, between them `kept` in layers that do not run again (`num_kept`, the last) and `middle` in those that
    do. (Of a sharded model, gradients outside the layers are complete at the end.) So a phase does the same whatever
    the model's depth, and whatever the number of tiles and chunks, and its peak is a linear function of them.
    """

    def __init__(self, model: PreTrainedModel, counter: LiveBytes, num_special: int = 1, num_kept: int = 0):
        self.counter, self.num_special, self.num_kept = counter, num_special, num_kept
        self.completed: Counter[str] = Counter()
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        layers = model.model.layers
        self.num_layers = len(layers)
        self.waiting: Counter[int] = Counter(layer_of(name, self.num_layers) for name in self.names.values())
        self.reached = self.num_layers
        """Lowest layer of backward; -1 below all."""
        self.calls: Counter[tuple[int, str, bool]] = Counter()
        self.in_backward = False
        self.handles = [p.register_post_accumulate_grad_hook(self.on_gradient) for p in self.names]
        self.handles.append(model.get_input_embeddings().register_forward_hook(self.on_embedding))
        self.handles.append(model.get_output_embeddings().register_forward_pre_hook(self.on_head))
        for index, layer in enumerate(layers):
            self.handles.append(layer.register_forward_pre_hook(partial(self.on_layer, index)))
            for name in ("self_attn", "mlp"):
                hook = partial(self.on_sublayer, index, name)
                self.handles.append(getattr(layer, name).register_forward_pre_hook(hook))

    def where(self, layer: int) -> str:
        if layer >= self.num_layers - 1:
            return "top"
        if layer < self.num_special:
            return "bottom"
        return "kept" if layer >= self.num_layers - self.num_kept else "middle"

    def on_layer(self, index: int, *_: Any) -> None:
        if self.in_backward:
            return
        if index == 0:
            self.counter.begin("forward")
        self.counter.layer = index

    def on_sublayer(self, index: int, name: str, *_: Any) -> None:
        if not torch.is_grad_enabled():  # an iteration's evaluation (cross_branch), as many as it takes
            return
        self.calls[index, name, self.in_backward] += 1
        if not self.in_backward:
            return
        self.reached = min(self.reached, index)
        call, tiles = self.calls[index, name, True] - 1, self.calls[index, "self_attn", False]
        chunks = self.calls[index, name, False] // tiles
        tile, chunk = divmod(call, chunks)
        where = f"{self.where(index)} {name} of {position(tile, tiles)} tile, {position(chunk, chunks)} chunk"
        self.counter.begin(where)

    def on_embedding(self, module: nn.Module, given: Any, embedded: Tensor) -> None:
        if embedded.requires_grad:
            embedded.register_hook(self.on_embedding_gradient)

    def on_embedding_gradient(self, grad: Tensor) -> None:
        self.reached = -1
        self.counter.begin("bottom embedding")

    def on_head(self, *_: Any) -> None:
        self.counter.layer = self.num_layers
        self.counter.begin("loss")

    def on_gradient(self, parameter: nn.Parameter) -> None:
        self.completed[self.names[parameter]] += 1
        record = self.counter.storages.get(storage_of(parameter.grad)._cdata)
        # A head gradient that the loss made in forward stays a part of the loss.
        if record is not None and record.phase not in FORWARD:
            self.counter.tag(parameter.grad, "gradients")

    def on_stepped(self, parameter: nn.Parameter) -> None:
        """To be called when a parameter is done with: after its in-backward update, if there is one."""
        name = self.names[parameter]
        layer = layer_of(name, self.num_layers)
        self.waiting[layer] -= 1
        # With its last gradient the walk leaves the layer.
        left = self.waiting[layer] == 0 and layer < self.num_layers
        self.reached = min(self.reached, layer - left)
        self.counter.begin(
            f"{self.where(self.reached)} after {name.split('.', 3)[-1] if 'layers' in name else name}"
        )

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """While open, fake tensors take the paths that real ones take on a GPU where both differ in memory.

    PyTorch's fused attention on a CPU wants heads of one size, those on a GPU do not; multi-head latent attention has
    two, and would get scores of T x T.
    """
    attention = F.scaled_dot_product_attention

    def fused(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        missing = query.shape[-1] - value.shape[-1]
        if missing <= 0:
            return attention(query, key, value, *args, **kwargs)
        return attention(query, key, F.pad(value, (0, missing)), *args, **kwargs)[..., : value.shape[-1]]

    with fake_tensors_as_real(), patch.object(F, "scaled_dot_product_attention", fused):
        yield


def simulate_step(
    hf_config: PreTrainedConfig, batch: int, tokens: int, method: Method | None = None
) -> dict[str, Any]:
    """Run one full training step on fake tensors, of any size, on a CPU.

    The optimizer's state is there from the beginning, as it is from the second step of a run on.

    Args:
        hf_config: The model's; it is not changed.
        batch, tokens: B sequences of T tokens each, every position a label; of all ranks together.
        method: What is done; the default is this library's.

    Returns:
        `peak_bytes` and `parts` (bytes per part, adding up to it), `largest` (groups of tensors alive then), `phases`
        (the same for each phase of the step), `weight_bytes`, `optimizer_bytes`, `after_bytes` (alive after the step),
        `leaked_bytes` (`after_bytes` less weights and optimizer), `num_parameters`, `num_trainable`, `num_updated`
        (parameter tensors), `sent` (bytes by kind that go to other ranks), `seconds`.

    Raises:
        RuntimeError: A trainable parameter was not updated exactly once.
        ValueError: The batch or the model cannot be divided among the ranks.
    """
    method = method or Method()
    start = time.perf_counter()
    batch = method.share(batch)
    with one_of(method.gpus) as mesh, FakeTensorMode():
        model = build(hf_config, method, mesh)
        return run_step(model, batch, tokens, method) | {"seconds": time.perf_counter() - start}


class RealOptimizer:
    """`OptimizerInBackward` with its state made in advance, as the simulated step uses it."""

    def __init__(self, model: PreTrainedModel, method: Method):
        rule = dict(rule=method.optimizer, rounding=method.rounding, in_backward=method.optimizer_in_backward)
        self.optimizer = OptimizerInBackward(parameter_groups(model, 0.0), **rule)
        self.step, self.detach = self.optimizer.step, self.optimizer.detach
        self.state_tensors = self.optimizer.state_tensors
        list(self.state_tensors())


def run_step(
    model: PreTrainedModel,
    batch: int,
    tokens: int,
    method: Method,
    make_optimizer: Callable[[PreTrainedModel, Method], Any] = RealOptimizer,
    num_special: int = 1,
) -> dict[str, Any]:
    """`simulate_step` on a model that is there already, fake or real; its weights change.

    Args:
        make_optimizer: Makes an object with the interface of `RealOptimizer`.
        num_special: Leading decoder layers whose phases are named `bottom`; see `Hooks`.

    Returns:
        As `simulate_step`, and `stored_per_layer`: bytes per part that each decoder layer's forward kept for backward.
    """
    counter = LiveBytes(sorter(model))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    num_kept = method.reversible.kept_layers if method.reversible else 0
    hooks = Hooks(model, counter, num_special, num_kept)  # before the optimizer's, which takes the gradients away
    optimizer = make_optimizer(model, method)
    store, slots = None, []
    if method.weights == "host":
        # One kind of memory stands for both: what lies on the host counts nothing.
        store = HostWeights(model)
        store.keep_states_of(optimizer.optimizer)
        for tensor in store.host_tensors():
            counter.add(tensor, elsewhere=True)
        store.make_room_for_states()
        slots = store.slots
    for tensor in (*model.parameters(), *model.buffers(), *(slot.weights for slot in slots)):
        counter.add(tensor)
        counter.tag(tensor, "weights")
    weight_bytes = counter.live_bytes
    for tensor in (*optimizer.state_tensors(), *(slot.states for slot in slots)):
        counter.add(tensor)
        counter.tag(tensor, "optimizer")
    optimizer_bytes = counter.live_bytes - weight_bytes
    for parameter in trainable.values():
        hooks.handles.append(parameter.register_post_accumulate_grad_hook(hooks.on_stepped))
    versions = {name: p._version for name, p in trainable.items()}
    try:
        with as_on_a_gpu(), standing_for(method.device), no_garbage_collection(), counter:
            one_step(model, batch, tokens, method, counter, hooks, optimizer)
            counter.begin("after")
            after_bytes = counter.live_bytes
            remaining = [s for s in counter.storages.values() if s.part not in ("weights", "optimizer")]
    finally:
        hooks.remove()
        optimizer.detach()
        if store is not None:
            store.remove()
    wrong = {name: f"{n} gradients" for name in trainable if (n := hooks.completed[name]) != 1}
    wrong |= {name: "no update" for name, p in trainable.items() if p._version == versions[name]}
    if wrong:
        raise RuntimeError(
            f"{len(wrong)} of {len(trainable)} parameters were not updated exactly once: "
            f"{dict(list(wrong.items())[:5])}."
        )
    phases = [phase for phase in counter.at_peak if phase not in ("before", "after")]
    peaks = {phase: sum(counter.parts(phase).values()) for phase in phases}
    worst = max(phases, key=peaks.__getitem__)
    assert counter.peak_bytes == peaks[worst]
    return {
        "peak_bytes": peaks[worst],
        "parts": counter.parts(worst),
        "phase": worst,
        "largest": counter.largest(worst),
        "phases": {phase: counter.parts(phase) for phase in phases},
        "stored_per_layer": [counter.stored_parts(layer) for layer in range(hooks.num_layers)],
        "weight_bytes": weight_bytes,
        "optimizer_bytes": optimizer_bytes,
        "after_bytes": after_bytes,
        "leaked_bytes": after_bytes - weight_bytes - optimizer_bytes,
        "leaked": describe(s for s in remaining if s.num_bytes),
        "sent": dict(counter.sent),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_trainable": sum(p.numel() for p in trainable.values()),
        "num_updated": len(trainable),
    }


def one_step(
    model: PreTrainedModel, batch: int, tokens: int, method: Method, counter: LiveBytes, hooks: Hooks, optimizer: Any
) -> None:
    """Forward, loss, backward, optimizer; what it makes dies with it."""
    counter.begin("embedding")
    input_ids = torch.randint(0, model.config.get_text_config().vocab_size, (batch, tokens))
    asked = {"output_router_logits": True} if method.router_aux_loss else {}
    wanted = router_logits_of(model) if method.router_z_loss else nullcontext()
    with wanted as router_logits:
        loss = model(input_ids=input_ids, labels=input_ids, use_cache=False, **asked).loss
    if router_logits:
        loss = loss + router_z_loss(router_logits.pop())
    counter.mark_stored()
    counter.begin("top")
    hooks.in_backward = True
    loss.backward()
    hooks.in_backward = False
    counter.begin("optimizer")
    optimizer.step()
