"""How a run gets its model: loaded, measured and converted, or as a checkpoint has it; in shards for several
processes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..engine.host_weights import HostWeights
from ..models.conversion import convert
from ..models.loading import load_causal_lm
from ..parallel import shard, states
from ..parallel.processes import device, once, together
from .preflight import Run, calibration
from .results import Results
from .resume import METRICS, ROUTERS


def begin(run: Run) -> tuple[PreTrainedModel, Results, HostWeights | None]:
    """The model to train, and what has been measured of it."""
    if together():
        return (*begin_together(run), None)
    model = load(run, run.checkpoint)
    store = None
    if run.config.memory.weights == "host":
        store = HostWeights(model, device())
    else:
        model.to(device())
    results = Results(run, model)
    if run.checkpoint is None:
        begin_anew(run, model, results, store)
    else:
        results.read()
    return model, results, store


def begin_together(run: Run) -> tuple[PreTrainedModel, Results]:
    """The same in shards. One process loads, measures and converts, with the weights in its host memory, as it would
    alone; then every process gets its part."""
    whole: dict[str, torch.Tensor] = {}

    def alone() -> tuple[PreTrainedConfig, dict, dict, dict]:
        model = load(run, run.checkpoint)
        results = Results(run, model)
        if run.checkpoint is None:
            store = HostWeights(model, device()) if device().type == "cuda" else None
            begin_anew(run, model, results, store)
            if store is not None:
                store.remove()
                model.cpu()
        whole.update(model.state_dict())
        dtypes = {name: tensor.dtype for name, tensor in whole.items()}
        return model.config, dtypes, results.losses, results.answers

    from_shards = run.checkpoint is not None and states.has_shards(run.checkpoint)
    if from_shards:
        config, dtypes = AutoConfig.from_pretrained(run.checkpoint), states.dtypes_of(run.checkpoint)
        losses, answers = {}, {}
    else:
        config, dtypes, losses, answers = once(alone)
    model = shard.skeleton(config, dtypes, run.config.model.trust_remote_code)
    strategy = run.config.parallel.strategy
    if strategy != "ddp":
        shard.shard(model, strategy, shard.all_ranks(device().type))
    shard.make_room(model, device())
    if from_shards:
        states.load_weights(run.checkpoint, model)
    else:
        shard.spread(model, whole)
        whole.clear()
    results = Results(run, model, shared=True)
    results.losses, results.answers = losses, answers
    if run.checkpoint is not None:
        results.read()
    return model, results


def load(run: Run, checkpoint: Path | None) -> PreTrainedModel:
    """The pretrained model, or a checkpoint's, on the CPU."""
    source, settings = checkpoint or run.config.model.path, run.config.model
    print(f"Loading {source}", flush=True)
    trust = settings.trust_remote_code
    if checkpoint is None or not states.has_shards(checkpoint):
        return load_causal_lm(source, getattr(torch, settings.dtype), trust_remote_code=trust)
    model = shard.skeleton(AutoConfig.from_pretrained(checkpoint), states.dtypes_of(checkpoint), trust)
    shard.make_room(model, torch.device("cpu"))
    states.load_weights(checkpoint, model)
    return model


def begin_anew(run: Run, model: PreTrainedModel, results: Results, store: HostWeights | None) -> None:
    """Measure the pretrained model, and convert it."""
    results.measure("before", ask=True)
    prepare(run, model, results)
    if store is not None:
        store.refresh()
    for name in (METRICS, ROUTERS):
        (run.output_dir / name).unlink(missing_ok=True)


def prepare(run: Run, model: PreTrainedModel, results: Results) -> None:
    """Convert the model in place, as the recipe says, and measure what that is worth."""
    config, reversible = run.config, run.method.reversible
    if config.evaluation.compare_checkpointing:
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{kind}_checkpointing_enable")()
        results.measure_steps("activation checkpointing")
        getattr(model, f"{kind}_checkpointing_disable")()
    if reversible is None:
        return
    given = config.training.calibration_tokens
    convert(model, reversible, calibration=calibration(run, given, model) if given else None)
    if config.evaluation.compare_checkpointing:
        results.measure_steps(reversible.coupling)
    if not reversible.find_coupling().keeps_function:
        results.measure("converted")
