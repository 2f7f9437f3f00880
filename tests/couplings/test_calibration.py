"""What calibration finds out: grids, predictors by ridge regression, cross_branch's adapters and stream maps; what it
refuses, and what it leaves alone."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import snapshot, tiny_batch, tiny_model
from torch import nn

import revffn
from revffn import ReversibleConfig
from revffn.couplings.cross_branch.fit import EXIT_RIDGE
from revffn.couplings.innovation.fit import choose_grids
from revffn.couplings.observe import RIDGE, one_grid
from revffn.recipe import RunReversibleConfig

CALIBRATION = [tiny_batch(4, 13, seed=7), tiny_batch(4, 13, seed=8, padded=True)]

# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "no token"),
        ([dict.fromkeys(("input_ids", "attention_mask"), torch.zeros(1, 4, dtype=torch.long))], "no token"),
    ],
    ids=["empty", "all padding"],
)  # fmt: skip
@pytest.mark.parametrize("coupling", ["innovation", "cross_branch"])
def test_useless_calibration_is_refused(batches, message, coupling):
    model = tiny_model().train()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        revffn.convert(
            model, ReversibleConfig.from_dict(dict(coupling=coupling, stream_maps=True)), calibration=batches
        )
    assert snapshot(model) == before


@pytest.mark.parametrize("coupling", ["innovation", "cross_branch"])
def test_calibration_that_is_not_finite_is_refused(coupling):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.shared_expert.down_proj.weight[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match="not finite"):
        revffn.convert(
            model, ReversibleConfig.from_dict(dict(coupling=coupling, stream_maps=True)), calibration=CALIBRATION
        )
    assert snapshot(model) == before


# --- grids and predictors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "gpt_oss", "llama"])
def test_calibration_measures_the_plain_model(model_type):
    original = tiny_model(model_type).eval()
    with torch.no_grad():
        states = [
            s
            for b in CALIBRATION
            for s in original.model(b["input_ids"], b.get("attention_mask"), output_hidden_states=True).hidden_states[
                :-1
            ]
        ]
    largest = max(s.abs().max().item() for s in states)
    model = revffn.convert(tiny_model(model_type), calibration=CALIBRATION)
    found = model.config.revffn_calibration
    assert found["num_tokens"] == sum(int(b.get("attention_mask", b["input_ids"] * 0 + 1).sum()) for b in CALIBRATION)
    assert found["largest_hidden_state"] >= largest * 0.999
    assert sorted(found["explained"], key=int) == ["1", "2", "3"]
    assert all(0 <= share <= 1 for share in found["explained"].values())
    # The first grid rounds by about one per cent of what is typical of the smallest state, over tokens that count.
    padded = [b.get("attention_mask", b["input_ids"] * 0 + 1).bool().reshape(-1) for b in CALIBRATION]
    with torch.no_grad():
        runs = [
            original.model(b["input_ids"], b.get("attention_mask"), output_hidden_states=True).hidden_states[:-1]
            for b in CALIBRATION
        ]
    smallest = min(
        torch.cat([s.flatten(0, 1)[mask] for s, mask in zip(state, padded, strict=True)]).square().mean(0).median()
        for state in zip(*runs, strict=True)
    )
    settings = model.reversible_config
    assert settings.grids.fraction_bits == 5 + math.ceil(-math.log2(math.sqrt(smallest)))
    assert settings.grids.fraction_bits + settings.grids.grid_growth == 24  # the values are small: as fine as float32


def test_calibration_chooses_the_grids():
    """Eight times the largest value fits, in wide channels four times; the digits to spare are all taken."""
    largest = torch.tensor([60.0] * 90 + [250.0] * 6 + [26_000.0] * 4, dtype=torch.float64)
    found = ReversibleConfig(grids=choose_grids(None, largest, typical=0.1))
    assert found.grids.wide_channels == list(range(90, 100)) and found.grids.fraction_bits == 9
    assert found.grids.fraction_bits + found.grids.grid_growth == 31 - 3 - 6
    assert found.grids.fraction_bits + found.grids.wide_growth == 31 - 2 - 15
    assert [found.fraction_bits_of(k, 26) for k in (0, 1, 2, 13, 26)] == [9, 9, 10, 15, 22]
    few = choose_grids(6, largest, typical=0.1)
    assert (few.grid_growth, few.wide_channels, few.wide_growth) == (6, [96, 97, 98, 99], 31 - 2 - 15 - 9)
    large = choose_grids(None, torch.full((4,), 2.0**13), typical=100.0)
    assert (large.fraction_bits, large.grid_growth, large.wide_channels) == (0, 31 - 3 - 13, [])
    for none, margin in ((choose_grids(0, largest, 0.1), 2), (one_grid(26e3, 4), 4)):
        assert (none.fraction_bits, none.grid_growth, none.wide_channels) == (31 - margin - 15, 0, [])


@pytest.mark.parametrize(
    "settings", [dict(grid_growth=-1), dict(grid_growth=17), dict(wide_growth=1), dict(grid_growth=2, wide_growth=3)]
)
def test_grids_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match="grid_growth"):
        ReversibleConfig.from_dict(settings)


def test_without_calibration_the_grid_stays_as_it_is():
    model = revffn.convert(tiny_model())
    assert (model.reversible_config.grids.fraction_bits, model.reversible_config.grids.grid_growth) == (14, 0)


def test_calibration_leaves_mode_hooks_and_gradients_alone():
    model = tiny_model().train()
    revffn.convert(model, calibration=CALIBRATION)
    assert model.training
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("settings", [dict(), dict(coupling="cross_branch", stream_maps=True)], ids=str)
def test_padding_does_not_enter_the_fit(settings):
    padded = tiny_batch(4, 13, seed=8, padded=True)
    other = {**padded, "input_ids": padded["input_ids"].clone()}
    other["input_ids"][padded["attention_mask"] == 0] = 77
    config = ReversibleConfig.from_dict(settings)
    one, two = (revffn.convert(tiny_model(), config, calibration=[batch]) for batch in (padded, other))
    for (name, a), (_, b) in zip(revffn.coupling_parameters(one), revffn.coupling_parameters(two), strict=True):
        torch.testing.assert_close(a, b, msg=name)


def explained(rank: int | None) -> list[float]:
    config = revffn.ReversibleConfig.from_dict(dict(predictor_rank=rank))
    calibration = [tiny_batch(8, 40, seed=seed) for seed in range(3)]
    model = revffn.convert(tiny_model(), config, calibration=calibration)
    return list(model.config.revffn_calibration["explained"].values())


def test_higher_rank_explains_more():
    shares = [explained(rank) for rank in (1, 4, 12, 32, None)]
    for lower, higher in zip(shares, shares[1:], strict=False):
        assert all(a <= b + 1e-3 for a, b in zip(lower, higher, strict=True))
    assert all(a < b - 0.05 for a, b in zip(shares[0], shares[-1], strict=True))
    assert shares[-2] == pytest.approx(shares[-1], abs=1e-3)


def test_fit_is_the_ridge_regression():
    """Against `lstsq` on the same states, with a row for the ridge of each standardised channel."""
    batches = [tiny_batch(8, 40, seed=seed) for seed in range(3)]
    model = tiny_model().double().eval()
    model.set_experts_implementation("eager")
    with torch.no_grad():
        per_batch = [model.model(b["input_ids"], output_hidden_states=True).hidden_states for b in batches]
    x, past = (torch.cat([states[k].reshape(-1, 32) for states in per_batch]) for k in (2, 1))
    update = past - x
    centred = x - x.mean(0)
    penalty = torch.diag(centred.std(0, correction=0)) * (RIDGE * len(x)) ** 0.5
    rows = torch.cat([centred, penalty])
    solution = torch.linalg.lstsq(rows, torch.cat([update - update.mean(0), torch.zeros_like(penalty)])).solution
    expected = centred @ solution + update.mean(0)
    revffn.convert(model, calibration=batches)
    predictor = model.model.layers[2].coupling.predictor
    with torch.no_grad():
        assert torch.allclose(predictor(x), expected, rtol=0, atol=1e-6 * expected.abs().max().item())
    explained = 1 - (update - expected).square().sum() / update.square().sum()
    assert model.config.revffn_calibration["explained"]["2"] == pytest.approx(explained.item(), abs=1e-3)


def test_fitted_predictors_bring_the_coupled_model_nearer_to_the_plain_one():
    inputs = tiny_batch(8, 40, seed=11)
    calibration = [tiny_batch(8, 40, seed=seed) for seed in range(6)]
    with torch.no_grad():
        plain = tiny_model().eval()(**inputs).logits
        distances = []
        for settings, batches in ((dict(), calibration), (dict(predictor_rank=0), None)):
            model = revffn.convert(
                tiny_model(), revffn.ReversibleConfig.from_dict(settings), calibration=batches
            ).train()
            torch.manual_seed(5)
            distances.append((model(**inputs).logits - plain).norm().item())
    assert distances[0] < 0.8 * distances[1]


# --- cross_branch's adapters and maps --------------------------------------------------------------------------------

FITTED = {stream: dict(coupling="cross_branch", query_stream=stream, stream_maps=True) for stream in ("left", "right")}


@pytest.mark.parametrize("query_stream", FITTED)
def test_fitted_adapters_bring_cross_branch_nearer_to_the_plain_model(query_stream):
    inputs = tiny_batch(8, 40, seed=11)
    batches = [tiny_batch(8, 40, seed=seed) for seed in range(6)]
    with torch.no_grad():
        plain = tiny_model().eval()(**inputs).logits.log_softmax(-1)
        divergences = []
        for stream_maps in (True, False):
            config = ReversibleConfig.from_dict({**FITTED[query_stream], "stream_maps": stream_maps})
            model = revffn.convert(tiny_model(), config, calibration=batches).eval()
            found = model(**inputs).logits.log_softmax(-1)
            divergences.append(nn.functional.kl_div(found, plain, log_target=True, reduction="sum").item())
    assert divergences[0] < 0.8 * divergences[1], divergences


def weighted_ridge(x, y, state, ridge: float):
    """Against `lstsq`: rows weighted by 1 / the root mean square of the state, and a row for the ridge of each channel
    of x."""
    weight = state.square().mean(1, keepdim=True).rsqrt()
    penalty = torch.diag((weight * x).square().sum(0).sqrt()) * ridge**0.5
    rows, target = torch.cat([weight * x, penalty]), torch.cat([weight * y, x.new_zeros(x.shape[1], y.shape[1])])
    return torch.linalg.lstsq(rows, target).solution.T


@pytest.mark.parametrize("query_stream", FITTED)
def test_adapters_are_the_ridge_regressions_on_the_models_own_streams(query_stream):
    """In front of, behind and after every sublayer, from what hooks see in the model that came out."""
    batches = [tiny_batch(8, 40, seed=seed) for seed in range(3)]

    def seen(model) -> dict[str, torch.Tensor]:
        found: dict[str, list] = {}
        hooks = [
            module.register_forward_hook(
                lambda _, args, output, name=name: found.setdefault(name, []).append((args[0], output))
            )
            for name, module in model.model.named_modules()
            if name.endswith(("layernorm", "embed_tokens", "_up", "_down", "entry", "exit")) or name == "norm"
        ]
        with torch.no_grad():
            for batch in batches:
                model(batch["input_ids"])
        for hook in hooks:
            hook.remove()
        return {
            f"{name} {side}": torch.cat([pair[i].reshape(-1, pair[i].shape[-1]) for pair in pairs])
            for name, pairs in found.items()
            for i, side in enumerate(("in", "out"))
            if pairs[0][i].is_floating_point()
        }

    model = tiny_model().double().eval()
    model.set_experts_implementation("eager")
    plain = seen(model)
    revffn.convert(model, ReversibleConfig.from_dict(FITTED[query_stream]), calibration=batches)
    ours, layers = seen(model), model.model.layers
    code = model.model.coupling.entry.weight[:16]
    assert torch.equal(code, model.model.coupling.entry.weight[16:])

    def check(module, x, y, state, ridge=RIDGE):
        expected = weighted_ridge(x, y, state, ridge)
        torch.testing.assert_close(module.weight.detach(), expected, rtol=0, atol=1e-6 * expected.abs().max().item())

    for k, layer in enumerate(layers):
        adapters, name = layer.coupling, f"layers.{k}."
        before, middle = plain[name + "input_layernorm in"], plain[name + "post_attention_layernorm in"]
        after = plain[f"layers.{k + 1}.input_layernorm in" if k + 1 < len(layers) else "norm in"]
        read = {part: ours[f"{name}coupling.{part} in"] for part in ("query_up", "key_value_up", "feed_up")}
        for part in ("query_up", "key_value_up"):
            check(getattr(adapters, part), read[part], before, before)
        left = read["feed_up"] - ours[name + "coupling.attention_down out"]
        if query_stream == "left":
            torch.testing.assert_close(left, read["query_up"])
        check(adapters.attention_down, ours[name + "coupling.attention_down in"], middle @ code.T - left, before)
        check(adapters.feed_up, read["feed_up"], middle, middle)
        lacking = after @ code.T - read["key_value_up"]
        check(adapters.feed_down, ours[name + "coupling.feed_down in"], lacking, middle)
    check(model.model.coupling.exit, ours["coupling.exit in"], after, after, EXIT_RIDGE)


def test_the_streams_carry_the_principal_components_of_what_is_read():
    """The code's rows span the directions with the most energy behind norm and norm weights."""
    batches = [tiny_batch(8, 40, seed=seed) for seed in range(3)]
    model = tiny_model().double().eval()
    model.set_experts_implementation("eager")
    norms = [norm for layer in model.model.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    scale = torch.stack([norm.weight for norm in norms]).square().mean(0).sqrt().detach()
    with torch.no_grad():
        states = [model.model(b["input_ids"], output_hidden_states=True).hidden_states for b in batches]
        last = []
        hook = model.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
        for batch in batches:
            model.model(batch["input_ids"])
        hook.remove()
    rows = torch.cat([s.reshape(-1, 32) for found in states for s in found[1:-1]] + [s.reshape(-1, 32) for s in last])
    rows = nn.functional.normalize(rows * scale, dim=1)
    _, _, directions = torch.linalg.svd(rows, full_matrices=False)
    revffn.convert(model, ReversibleConfig.from_dict(FITTED["right"]), calibration=batches)
    code = model.model.coupling.entry.weight[:16].detach() / scale
    basis = torch.linalg.qr(code.T).Q
    torch.testing.assert_close(basis @ basis.T, directions[:16].T @ directions[:16], rtol=0, atol=1e-6)
    rows *= 32**0.5  # a mean square of 1
    torch.testing.assert_close((rows @ code.T).square().mean(0), torch.ones(16, dtype=torch.float64))


def test_stream_maps_come_with_calibration_and_queries_from_the_right():
    for stream, calibration, expected in (
        ("right", CALIBRATION, True),
        ("right", None, False),
        ("left", CALIBRATION, False),
    ):
        config = ReversibleConfig.from_dict(dict(coupling="cross_branch", query_stream=stream))
        model = revffn.convert(tiny_model(), config, calibration=calibration)
        assert model.reversible_config.cross_branch.stream_maps is expected is hasattr(model.model, "coupling")
        given = dict(cross_branch=config.cross_branch, tile_tokens=None, kept_layers=0)
        run_config = RunReversibleConfig(coupling="cross_branch", **given)
        assert run_config.resolve(calibration is not None).cross_branch.stream_maps is expected


def test_stream_maps_without_calibration_are_the_identity():
    inputs = tiny_batch()
    losses = [
        revffn.convert(tiny_model(), ReversibleConfig.from_dict(dict(coupling="cross_branch", stream_maps=maps)))
        .eval()(**inputs)
        .loss
        for maps in (None, True)
    ]
    assert losses[0] == losses[1]
