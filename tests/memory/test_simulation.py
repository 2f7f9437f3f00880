"""Counting on fake tensors: storages from birth to death, the same peak as on real tensors, and faults that show.

Run: pytest tests/memory/test_simulation.py
"""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import COMMON, MOE, SETTINGS
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from revffn import ReversibleConfig
from revffn.engine import dense
from revffn.memory import simulation
from revffn.memory.live_bytes import LiveBytes
from revffn.memory.simulation import Method, RealOptimizer, build, run_step, simulate_step

KIB = 1024


def config(**overrides):
    sizes = dict(num_hidden_layers=3, vocab_size=64, mlp_only_layers=[], shared_expert_intermediate_size=24)
    return AutoConfig.for_model("qwen2_moe", **{**COMMON, **MOE, **sizes, **overrides})


def reversible(**settings) -> Method:
    return Method(reversible=ReversibleConfig.from_dict(dict(tile_tokens=32, **settings)), optimizer="sgd")


# --- the counter -----------------------------------------------------------------------------------------------------


def test_a_storage_counts_once_and_until_it_dies():
    with FakeTensorMode(), LiveBytes() as counter:
        a = torch.empty(KIB, dtype=torch.uint8)
        views = a.view(4, 256), a[3:], a.detach()
        a.add_(1)
        assert counter.live_bytes == KIB
        b = a + 1
        assert counter.live_bytes == 2 * KIB
        del a
        assert counter.live_bytes == 2 * KIB  # its views keep it
        del views
        assert counter.live_bytes == KIB
        del b
        assert counter.live_bytes == 0


def test_every_phase_has_its_peak():
    with FakeTensorMode(), LiveBytes() as counter:
        counter.begin("small")
        kept = torch.empty(KIB, dtype=torch.uint8)
        counter.begin("large")
        gone = torch.empty(3 * KIB, dtype=torch.uint8)
        del gone
        counter.tag(kept, "streams")  # said after the peak, known for it
        counter.begin("small")
        more = torch.empty(KIB // 2, dtype=torch.uint8)
        counter.begin("after")
    assert sum(counter.parts("small").values()) == KIB + KIB // 2
    assert counter.parts("large")["streams"] == KIB
    assert sum(counter.parts("large").values()) == counter.peak_bytes == 4 * KIB
    assert counter.largest("large")[0]["bytes"] == 3 * KIB
    del kept, more


# --- the step --------------------------------------------------------------------------------------------------------

COUPLINGS = {
    "innovation": dict(),
    "cross_branch": dict(coupling="cross_branch", query_stream="right"),
    "none": dict(coupling="none"),
}


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_fake_tensors_take_what_real_ones_take(coupling):
    """The same step on real tensors, in float32, has the same bytes alive at the peak of every phase."""
    method = Method(
        reversible=ReversibleConfig.from_dict(dict(tile_tokens=32, **COUPLINGS[coupling])), dtype=torch.float32
    )
    fake = simulate_step(config(), 3, 32, method)
    real = run_step(build(config(), method), 3, 32, method)
    assert fake["leaked_bytes"] == real["leaked_bytes"] == 0
    for phase, parts in fake["phases"].items():
        assert sum(parts.values()) == pytest.approx(sum(real["phases"][phase].values()), abs=4 * KIB), phase


@pytest.mark.parametrize("coupling", ["innovation", "none"])
def test_a_step_is_simulated_for_its_device(coupling, monkeypatch):
    """With kernels a dense feed-forward keeps no activation, and backward is done with it before the experts begin."""
    monkeypatch.setattr(dense, "dispatch", SimpleNamespace(implementation={"cuda": "triton", "cpu": "torch"}.get))
    settings = dict(coupling=coupling, tile_tokens=None)
    wide, peaks = config(shared_expert_intermediate_size=512), {}
    for device in ("cuda", "cpu"):
        method = Method(device=device, reversible=ReversibleConfig.from_dict(settings))
        peaks[device] = simulate_step(wide, 8, 256, method)["peak_bytes"]
    kept = 3 * 8 * 256 * 512 * 2  # gate, up and activation in bf16
    assert peaks["cpu"] - peaks["cuda"] > 0.3 * kept


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_what_a_step_says(coupling):
    """Parts add up to the peak, every parameter is updated once, and weights and optimizer state are what is left."""
    result = simulate_step(config(), 3, 32, reversible(**COUPLINGS[coupling]))
    assert sum(result["parts"].values()) == result["peak_bytes"] == sum(result["phases"][result["phase"]].values())
    assert result["after_bytes"] == result["weight_bytes"] + result["optimizer_bytes"]
    assert result["leaked_bytes"] == 0 and result["leaked"] == []
    assert result["num_updated"] > 0 and result["num_trainable"] <= result["num_parameters"]


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v2"])
def test_no_masks_or_scores_where_a_gpu_makes_none(model_type, monkeypatch):
    """Four times the length takes four times the memory, not sixteen; without the patches it takes more."""
    method = Method(name="checkpointing", optimizer="sgd")
    sizes = {**COMMON, **SETTINGS[model_type], "vocab_size": 8, "num_hidden_layers": 2, "pad_token_id": None}
    small = AutoConfig.for_model(model_type, **sizes)

    def growth() -> float:
        short, long = (simulate_step(small, 1, tokens, method) for tokens in (512, 2048))
        return (long["peak_bytes"] - long["weight_bytes"]) / (short["peak_bytes"] - short["weight_bytes"])

    assert growth() < 4.1
    monkeypatch.setattr(simulation, "as_on_a_gpu", nullcontext)
    assert growth() > 5


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw", "adamw8bit", "sgd"])
def test_no_rule_leaves_anything_but_its_state(optimizer):
    method = Method(reversible=ReversibleConfig(), optimizer=optimizer)
    assert simulate_step(config(hidden_size=64), 1, 32, method)["leaked_bytes"] == 0


class LazyOptimizer(RealOptimizer):
    """Forgets one parameter."""

    def __init__(self, model, method):
        super().__init__(model, method)
        self.optimizer._handles.pop(model.get_output_embeddings().weight)[0].remove()
        self.step = lambda: None


class HoardingOptimizer(RealOptimizer):
    """Keeps one gradient."""

    def __init__(self, model, method):
        head = model.get_output_embeddings().weight
        head.register_post_accumulate_grad_hook(lambda parameter: setattr(self, "kept", parameter.grad))
        super().__init__(model, method)


def test_a_parameter_without_update_is_found():
    with FakeTensorMode():
        model = build(config(), reversible())
        with pytest.raises(RuntimeError, match="lm_head.weight': 'no update'"):
            run_step(model, 2, 32, reversible(), LazyOptimizer)


def test_a_gradient_that_stays_is_found():
    with FakeTensorMode():
        model = build(config(), reversible())
        head: nn.Parameter = model.get_output_embeddings().weight
        result = run_step(model, 2, 32, reversible(), HoardingOptimizer)
    # Its storage is the float32 sum that was rounded in place.
    assert result["leaked_bytes"] == 4 * head.numel()
    assert "lm_head" in str(result["phases"].keys()) and result["leaked"]
