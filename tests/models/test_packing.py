"""Examples that are packed into one sequence do not see each other: for every family and coupling, in eval mode and in
a walk.

Run: pytest tests/models/test_packing.py
"""

import pytest
import torch
from helpers import COUPLINGS, coupled, tiny_batch
from torch.nn import functional as F

from revffn.models.architectures import ARCHITECTURES

LENGTHS = (5, 7, 4)


def packed():
    """As TRL packs: position ids begin anew, there is no mask."""
    rows = [tiny_batch(1, length, seed=length)["input_ids"] for length in LENGTHS]
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return rows, dict(input_ids=torch.cat(rows, dim=1), position_ids=positions)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_packed_examples_do_not_see_each_other(model_type, coupling, training):
    settings = COUPLINGS[coupling] | (dict(random_sign=False) if coupling == "innovation" else {})
    model = coupled(model_type, calibrate=False, fraction_bits=18, **settings).train(training)
    rows, together = packed()
    with torch.set_grad_enabled(training):
        logits = model(**together, use_cache=False).logits.split(LENGTHS, dim=1)
        alone = [model(input_ids=row, use_cache=False).logits for row in rows]
    seen = model(input_ids=together["input_ids"], use_cache=False).logits.split(LENGTHS, dim=1)
    if not ARCHITECTURES[model_type].keeps_packed_apart:
        assert F.l1_loss(logits[1], alone[1]) > 0.01, "it keeps them apart by now: say so in its row"
        return
    for a, b in zip(logits, alone, strict=True):
        # The same numbers in other sums; one example more in sight changes them by a hundred times as much.
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert F.l1_loss(seen[1], alone[1]) > 30 * F.l1_loss(logits[1], alone[1]) + 1e-3


@pytest.mark.parametrize("model_type", [name for name, row in ARCHITECTURES.items() if not row.keeps_packed_apart])
def test_packing_is_refused_where_they_do(model_type, recipe_file, refused):
    line = refused("train", recipe_file(model_type=model_type), "--data.packing", "true")
    assert "see each other in attention. Set data.packing: false" in line
