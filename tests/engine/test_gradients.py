"""Three-way gradients: float64 truth, plain autograd of the same coupled function, and the engine.

Every architecture, coupling and dtype; every parameter. For the exact couplings every rebuilt state is compared bit
for bit with a copy taken in forward, independently of the engine's own checksums.
"""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    SETTINGS,
    captured_states,
    coupled,
    run,
    run_reference,
    three_way,
    tiny_batch,
    tiny_model,
)

import revffn

EXACT = {
    "innovation": dict(coupling="innovation"),
    "cross_right": dict(coupling="cross_branch", query_stream="right", stream_maps=False),
    "cross_right_maps": dict(coupling="cross_branch", query_stream="right", stream_maps=True),
    "cross_left": dict(coupling="cross_branch", query_stream="left"),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def check_exact(model, inputs, **kwargs) -> dict:
    """Every state bit for bit, then every gradient; returns the report."""
    with captured_states() as states:
        run(model, inputs)
    states.assert_exact()
    report = three_way(model, inputs, **kwargs)
    assert report["mismatched_states"] == 0 and report["verified_states"] >= len(model.model.layers)
    return report


# --- every architecture ----------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("coupling", EXACT)
@pytest.mark.parametrize("model_type", SETTINGS)
def test_exact_couplings(model_type, coupling, dtype):
    # Maps fitted on 52 tokens have small components in them that bf16 resolves badly, by any way to differentiate.
    rough = dtype == torch.bfloat16 and coupling == "cross_right_maps"
    check_exact(coupled(model_type, dtype, **EXACT[coupling]), tiny_batch(padded=True), ill_conditioned=rough)


@dtypes
@pytest.mark.parametrize("model_type", SETTINGS)
def test_fixed_point(model_type, dtype):
    """cross_branch left on a model whose attention contracts: tokens converge, little is kept, and gradients are
    right."""
    overrides = dict(gain=1.0, embedding_gain=10.0)
    model = coupled(model_type, dtype, overrides=overrides, coupling="cross_branch", num_iterations=20)
    report = check_exact(model, tiny_batch(padded=True))
    assert sorted(report["layers"]) == [0, 1, 2, 3]
    for layer in report["layers"].values():
        assert 1 < layer["iterations"] < 20 and layer["kept_bits"] <= 8 and layer["kept_rows"] < 0.2


@dtypes
@pytest.mark.parametrize("model_type", SETTINGS)
def test_none(model_type, dtype):
    """The order of summation is the plain model's: gradients are its gradients bit for bit."""
    model, inputs = coupled(model_type, dtype, coupling="none"), tiny_batch(padded=True)
    three_way(model, inputs)
    (_, ours), (_, plain) = run(model, inputs), run_reference(model, inputs)
    for name in ours:
        assert torch.equal(ours[name], plain[name]), name


@pytest.mark.parametrize("coupling", [*EXACT, "none"])
def test_float64(coupling):
    """The engine in float64 equals plain autograd to float64's digits."""
    settings = EXACT.get(coupling, dict(coupling="none"))
    model = coupled("qwen2_moe", torch.float64, **settings)
    three_way(model, tiny_batch(padded=True))


# --- settings of the innovation coupling -----------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize(
    "settings",
    [
        dict(side_bits=0),
        dict(side_bits=1),
        dict(side_bits=3),
        dict(side_bits=4),
        dict(side_bits=[0, 4, 1, 3]),
        dict(random_sign=False),
        dict(predictor_rank=0),
        dict(predictor_rank=5),
        dict(predictor_rank=0, side_bits=0, random_sign=False),
        dict(plain_layers=2),
        dict(plain_layers=3),
        dict(fraction_bits=6, calibrate=False),
        dict(grid_growth=0),
        dict(grid_growth=7, fraction_bits=8, wide_channels=[0, 17], calibrate=False),
        dict(grid_growth=7, wide_growth=3, fraction_bits=8, wide_channels=[0, 17], side_bits=2, calibrate=False),
        dict(grid_growth=7, wide_growth=3, fraction_bits=8, wide_channels=[0, 17], calibrate=False, tile_tokens=4),
        dict(grid_growth=12, fraction_bits=6, side_bits=0, calibrate=False, tile_tokens=4),
        dict(calibrate=False),
        dict(tile_tokens=11),
        dict(tile_tokens=22),
        dict(tile_tokens=4),
        dict(tile_tokens=4, plain_layers=3, side_bits=[0, 4, 1, 3]),
    ],
    ids=str,
)
def test_innovation_settings(settings, dtype):
    check_exact(coupled("qwen2_moe", dtype, **settings), tiny_batch(padded=True))


def test_frozen_predictors():
    model = coupled(train_predictor=False)
    check_exact(model, tiny_batch())
    assert not any(parameter.requires_grad for _, parameter in revffn.coupling_parameters(model))


@dtypes
def test_trained_predictor_does_not_stay_the_identity(dtype):
    """Uncalibrated predictors start at zero; their gradient is not zero."""
    model = coupled(dtype=dtype, calibrate=False)
    _, grads = run(model, tiny_batch())
    for name, _ in revffn.coupling_parameters(model):
        assert grads[name].abs().max() > 0, name


# --- hard conditions for exactness -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "coupling, dtype",
    [
        ("innovation", torch.bfloat16),
        pytest.param("cross_right", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("innovation", torch.float32, marks=pytest.mark.slow),
        pytest.param("cross_right", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_after_a_hundred_training_steps(coupling, dtype):
    """Reconstruction errors of floating-point schemes appear after training."""
    model = coupled("qwen2_moe", dtype, **EXACT[coupling])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(100):
        loss = model(**tiny_batch(2, 9, seed=step % 4)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], "the model has not learnt anything"
    assert revffn.reversible_report(model)["mismatched_states_total"] == 0
    check_exact(model, tiny_batch())


@dtypes
@pytest.mark.parametrize("coupling", EXACT)
def test_residual_channel_of_30000(coupling, dtype):
    model = tiny_model("qwen2_moe", dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = 30_000.0
    calibration = [tiny_batch(4, 13, seed=7)]
    model = revffn.convert(model, revffn.ReversibleConfig.from_dict(EXACT[coupling]), calibration=calibration).train()
    grids = model.reversible_config.grids
    if coupling == "innovation":  # the grid becomes finer everywhere but there
        assert grids.grid_growth > 0 and grids.wide_channels == [5]
        assert grids.fraction_bits + grids.wide_growth <= 29 - 15 < grids.fraction_bits + grids.grid_growth
    elif coupling == "cross_right_maps":  # the components of all channels together are of one size
        assert grids.fraction_bits > 27 - 15 and not grids.grid_growth
    else:
        assert grids.fraction_bits == 27 - 15 and not grids.grid_growth
    report = check_exact(model, tiny_batch(), ill_conditioned=True)
    assert not report["saturated"]


@dtypes
@pytest.mark.parametrize("coupling", ["innovation", "cross_right"])
def test_wrap_around(coupling, dtype, caplog):
    """A grid far too fine: streams leave int32 in the middle layers, are rebuilt all the same, and the report says
    so."""
    model = coupled("qwen2_moe", dtype, calibrate=False, fraction_bits=24, **EXACT[coupling])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = 120.0
        model.model.embed_tokens.weight[:, 21] = -120.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[5] = 0.5
            layer.self_attn.o_proj.weight[21] = -0.5
            layer.self_attn.v_proj.bias.fill_(3.0)
    report = check_exact(model, tiny_batch(), ill_conditioned=True)
    assert report["saturated"]
    assert report["largest_grid_value"] >= 2**30
    run(model, tiny_batch())
    assert sum("wrap around" in record.message for record in caplog.records) == 1, "said once"


def test_wrap_around_happens():
    """The model of `test_wrap_around` really wraps: in plain numbers its streams are beyond int32."""
    model = coupled("qwen2_moe", calibrate=False, fraction_bits=24)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 5] = 120.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[5] = 0.5
            layer.self_attn.v_proj.bias.fill_(3.0)
    with captured_states() as states:
        model(**tiny_batch())
    channel = [copies[1][..., 5] for copies in states.of_forward.values()]
    assert (channel[0] > 0).all() and any((c < 0).any() for c in channel[1:])


# --- inputs ----------------------------------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("coupling", ["innovation", "cross_right", "none"])
@pytest.mark.parametrize("shape", [(1, 63), (1, 127), (5, 3)], ids=str)
def test_shapes(shape, coupling, dtype):
    settings = EXACT.get(coupling, dict(coupling="none"))
    model, inputs = coupled("qwen2_moe", dtype, **settings), tiny_batch(*shape)
    three_way(model, inputs) if coupling == "none" else check_exact(model, inputs)


def packed_batch() -> dict[str, torch.Tensor]:
    """Two rows, each of two documents, told apart by restarting positions alone."""
    inputs = tiny_batch(2, 12)
    inputs["position_ids"] = torch.tensor([[*range(5), *range(7)], [*range(8), *range(4)]])
    # With a cache transformers does not look for packed sequences; a reversible forward never has one.
    inputs["use_cache"] = False
    return inputs


@pytest.mark.parametrize("coupling", ["innovation", "cross_right", "none"])
def test_packed_sequences(coupling):
    settings = EXACT.get(coupling, dict(coupling="none"))
    model, inputs = coupled("qwen2_moe", **settings), packed_batch()
    three_way(model, inputs) if coupling == "none" else check_exact(model, inputs)
    # The mask matters: another first document leaves the second one's logits alone.
    # An expert's tokens are one matrix of grouped_mm, whose rounding on some CPUs depends on the number of rows.
    model.eval().set_experts_implementation("batched_mm")
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, :5] = 50
    with torch.no_grad():
        logits, changed = model(**inputs).logits[0], model(**other).logits[0]
    assert torch.equal(logits[5:], changed[5:]) and not torch.equal(logits[:5], changed[:5])


@pytest.mark.parametrize("coupling", ["innovation", "cross_right", "none"])
@pytest.mark.parametrize(
    "model_type, overrides",
    [
        ("qwen2_moe", dict(use_sliding_window=True, sliding_window=4, max_window_layers=2)),
        ("gpt_oss", dict(sliding_window=3)),
        ("mixtral", dict(sliding_window=4)),
    ],
    ids=["qwen2_moe", "gpt_oss", "mixtral"],
)
def test_sliding_window(model_type, overrides, coupling):
    settings = EXACT.get(coupling, dict(coupling="none"))
    model, inputs = coupled(model_type, overrides=overrides, **settings), tiny_batch(2, 17, padded=True)
    three_way(model, inputs) if coupling == "none" else check_exact(model, inputs)
    wide = copy.deepcopy(model)
    wide.config.sliding_window = 100
    for layer in wide.model.layers:
        if getattr(layer.self_attn, "sliding_window", None) is not None:
            layer.self_attn.sliding_window = 100
    torch.manual_seed(5)
    narrow_loss = model(**inputs).loss
    torch.manual_seed(5)
    assert narrow_loss != wide(**inputs).loss, "the window is wider than the sequence"


@dtypes
@pytest.mark.parametrize("coupling", ["innovation", "cross_right", "none"])
def test_all_tokens_on_one_expert(coupling, dtype):
    """A router that sends every token to the same two experts, and none to the others."""
    settings = EXACT.get(coupling, dict(coupling="none"))
    model, inputs = coupled("qwen2_moe", dtype, **settings), tiny_batch()
    with torch.no_grad():
        for router in revffn.models.architectures.routers(model):
            router.weight.zero_()  # all scores tie: top-k takes the same two for every token
    three_way(model, inputs) if coupling == "none" else check_exact(model, inputs)
    _, grads = run(model, inputs)
    experts = grads["model.layers.0.mlp.experts.down_proj"]
    used = {e for e in range(6) if experts[e].abs().max() > 0}
    assert len(used) == 2


@pytest.mark.parametrize("coupling", ["innovation", "cross_right", "none"])
def test_an_expert_without_tokens(coupling):
    settings = EXACT.get(coupling, dict(coupling="none"))
    model, inputs = coupled("qwen2_moe", overrides=dict(num_experts=40), **settings), tiny_batch(1, 5)
    three_way(model, inputs) if coupling == "none" else check_exact(model, inputs)
    _, grads = run(model, inputs)
    experts = grads["model.layers.0.mlp.experts.gate_up_proj"]
    assert (experts.flatten(1).abs().amax(1) == 0).any() and (experts.flatten(1).abs().amax(1) > 0).any()


def test_gradients_through_an_expanding_layer():
    """cross_branch left: forward sees that tokens of a layer that was made to expand end elsewhere, and keeps them in
    this very step (the grid is so fine that low bits would not do)."""
    fine = dict(calibrate=False, fraction_bits=22)
    model = coupled(overrides=dict(gain=1.0, embedding_gain=10.0), coupling="cross_branch", **fine)
    with torch.no_grad():
        model.model.layers[2].self_attn.q_proj.weight.mul_(100)
        model.model.layers[2].self_attn.k_proj.weight.mul_(100)
    report = check_exact(model, tiny_batch(padded=True))
    assert [report["layers"][k]["kept_rows"] > 0 for k in range(4)] == [False, False, True, False]
