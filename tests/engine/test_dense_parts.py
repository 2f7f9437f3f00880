"""Dense parts as fused operations: recognised in every family, exact in recomputation, right against float64.

On a CPU the family's own code runs; here the fused operations are made to run, by their reference.
"""

from types import SimpleNamespace

import pytest
import torch
from helpers import SETTINGS, coupled, run, run_truth, tiny_batch

import revffn
from revffn.engine import dense


@pytest.fixture
def fused(monkeypatch):
    """Dense parts run as fused operations; counts which."""
    counts = dict.fromkeys(("rms_norm", "rotate", "gated_mlp", "add_gated"), 0)

    def counting(name, function):
        def call(*args):
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(dense, "dispatch", SimpleNamespace(implementation=lambda device_type: "triton"))
    for name in counts:
        monkeypatch.setattr(dense, name, counting(name, getattr(dense, name)))
    return counts


# What of a family is not one of the functions: gpt-oss and deepseek turn in other ways, glm4_moe a part of a
# head, mixtral and gpt-oss have no dense feed-forward.
WITHOUT_ROTATE = {"gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe"}
WITHOUT_MLP = {"mixtral", "gpt_oss", "olmoe", "qwen3_moe"}
WITH_SHARED_GATE = {"qwen2_moe"}


@pytest.mark.parametrize("coupling", ["innovation", "none"])
@pytest.mark.parametrize("model_type", SETTINGS)
def test_fused_parts_in_a_walk(fused, model_type, coupling):
    model, inputs = coupled(model_type, coupling=coupling), tiny_batch(padded=True)
    _, grads = run(model, inputs)
    report = revffn.reversible_report(model)
    assert report["mismatched_states_total"] == 0 and (report["verified_states"] > 0) == (coupling != "none")
    assert (fused["rotate"] > 0) == (model_type not in WITHOUT_ROTATE)
    assert (fused["gated_mlp"] > 0) or model_type in WITHOUT_MLP
    assert (fused["add_gated"] > 0) == (model_type in WITH_SHARED_GATE)
    if coupling == "none":
        assert fused["rms_norm"] > 0
    # Another rounding in front of a grid moves some states by a unit: their gradients then differ by more than digits.
    limit = 1e-5 if coupling == "none" else 1e-3
    for name, exact in run_truth(model, inputs).items():
        error = (grads[name].double() - exact).norm() / exact.norm().clamp_min(1e-9)
        assert error < limit, f"{name}: {error:.2e}"


def test_outside_walks_the_familys_code_runs(fused):
    model, inputs = coupled("qwen2_moe", coupling="innovation"), tiny_batch()
    plain = revffn.export(model).eval()
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert not any(fused.values())


def test_another_function_of_the_same_name_is_left_alone():
    def scaled_norm(self, x):
        return self.weight * (x + 1)

    assert dense.rounds_before_weight(scaled_norm) is None
    assert not dense.is_gated(lambda self, x: self.down_proj(self.up_proj(x) * self.gate_proj(x)))
    assert not dense.turns_halves(lambda q, k, cos, sin: (q * cos.unsqueeze(1), k))
    assert dense.turns_halves(lambda q, k: q) is None

    def block(self, hidden_states, swapped=False, scale=1.0):
        x = hidden_states.flatten(0, 1)
        _, weights, chosen = self.gate(x)
        routed = self.experts(x, *((weights, chosen) if swapped else (chosen, weights)))
        return (routed + scale * torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)).view(2, 5, 6)

    assert dense.joins_by_gate(block)
    assert not dense.joins_by_gate(lambda self, x: block(self, x, swapped=True))
    assert not dense.joins_by_gate(lambda self, x: block(self, x, scale=2.0))
    assert dense.joins_by_gate(lambda self, x: self.router(x)) is None


def test_a_linear_map_with_more_to_it_is_called():
    """A bias, a hook, another class (PEFT's, a quantised one), autocast."""
    x, plain = torch.randn(2, 4), torch.nn.Linear(4, 3, bias=False)
    assert dense.plain_weight(plain, x) is plain.weight
    assert dense.plain_weight(torch.nn.Linear(4, 3), x) is None
    assert dense.plain_weight(type("Other", (torch.nn.Linear,), {})(4, 3, bias=False), x) is None
    assert dense.plain_weight(plain, x.double()) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert dense.plain_weight(plain, x) is None
    plain.register_forward_hook(lambda *_: None)
    assert dense.plain_weight(plain, x) is None
