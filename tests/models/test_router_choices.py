"""What routers choose is told once a forward call, of every family and coupling, tiled or not, and a model is left as
it was.

Run: pytest tests/models/test_router_choices.py
"""

import pytest
import torch
from helpers import ARCHITECTURES, coupled, tiny_batch, tiny_model

from revffn.engine.routing import RecordRouting
from revffn.models.router_choices import num_experts, router_choices, sparse_layers

MOE = [name for name, row in ARCHITECTURES.items() if row.router is not None]
COUPLINGS = {
    "innovation": dict(coupling="innovation"),
    "cross_left": dict(coupling="cross_branch", query_stream="left"),
    "cross_right": dict(coupling="cross_branch", query_stream="right"),
    "none": dict(coupling="none"),
}


def told(model, forward):
    found = {}

    def see(layer, indices, mask):
        assert layer not in found, "told twice"
        found[layer] = (indices.long(), mask)

    with router_choices(model, see):
        forward()
    return found


@pytest.mark.parametrize("model_type", MOE)
def test_a_plain_model_tells_and_is_left_as_it_was(model_type):
    """Against every top-k of the forward pass, whoever calls it: a layer's last is the choice of its experts."""
    model, batch = tiny_model(model_type).eval(), tiny_batch(padded=True)
    classes = [type(module) for module in model.modules()]
    with torch.no_grad():
        found = told(model, lambda: model(**batch))
        assert [type(module) for module in model.modules()] == classes
        assert not model.model._forward_hooks and not model.model._forward_pre_hooks
        record = []
        with RecordRouting(record):
            model(**batch)
    assert list(found) == list(sparse_layers(model))
    per_layer = len(record) // len(found)
    for (indices, mask), chosen in zip(found.values(), record[per_layer - 1 :: per_layer], strict=True):
        assert torch.equal(indices, chosen.long()) and torch.equal(mask, batch["attention_mask"].flatten())
        assert indices.max() < num_experts(model)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("model_type", MOE)
def test_training_tells_once_and_tiles_tell_the_same(model_type, coupling):
    """Backward recomputes and tells nothing; tiles of one sequence, and of chunks of it, tell what one tile does."""
    batch, per_tile = tiny_batch(padded=True), {}
    for tile_tokens in (None, 11, 4):
        model = coupled(model_type, **COUPLINGS[coupling], tile_tokens=tile_tokens, random_sign=False)
        per_tile[tile_tokens] = told(model, lambda model=model: model(**batch).loss.backward())
    whole = per_tile[None]
    assert list(whole) == list(sparse_layers(model))
    tokens = batch["input_ids"].numel()
    for found in per_tile.values():
        assert [len(indices) for indices, _ in found.values()] == [tokens] * len(whole)
    # Rounding differs with the shapes; a choice between near equals may fall otherwise.
    for found in (per_tile[11], per_tile[4]):
        first = next(iter(whole))
        assert (found[first][0] == whole[first][0]).double().mean() > 0.9


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_eval_mode_tells_what_the_plain_model_chooses(coupling):
    batch = tiny_batch()
    plain, model = tiny_model(), coupled(**COUPLINGS[coupling]).eval()
    with torch.no_grad():
        expected, found = (told(m, lambda m=m: m(**batch)) for m in (plain.eval(), model))
    assert list(found) == list(expected)
    if coupling in ("innovation", "none"):
        assert all(torch.equal(found[layer][0], expected[layer][0]) for layer in found)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_dense_models_have_nothing_to_tell(model_type):
    model = tiny_model(model_type)
    assert not told(model, lambda: model(**tiny_batch()))
