"""Router load and drift are those of the tokens that were seen: padding does not count, nor does recomputation.

Run: pytest tests/training/test_router_health.py
"""

import json
import math

import pytest
import torch
from helpers import coupled, tiny_batch, tiny_model

from revffn.models.architectures import routers
from revffn.training.router_health import ROWS, RouterDrift, RouterLoad, changed


def test_load_is_that_of_real_tokens_in_forward():
    model, batch = coupled(coupling="none", tile_tokens=11), tiny_batch(padded=True)
    load = RouterLoad(model)
    with load.counting():
        for _ in range(2):
            model(**batch).loss.backward()
    tokens = int(batch["attention_mask"].sum())
    assert load.window.shape == (3, 6) and (load.window.sum(-1) == 2 * 2 * tokens).all()
    share = load.window.double() / load.window.sum(-1, keepdim=True)
    entropy = -(share * share.clamp_min(1e-300).log()).sum(-1).mean().item() / math.log(6)
    expected = (entropy, share.max().item() * 6, (share == 0).sum().item())
    taken = load.take()
    assert list(taken.values()) == pytest.approx(expected)
    assert load.window.sum() == 0 and load.row.sum() == 3 * 2 * 2 * tokens


def test_load_outside_training_is_not_counted():
    model, load = tiny_model(), None
    load = RouterLoad(model)
    model(**tiny_batch())
    assert load.take() == {}
    with load.counting():
        model(**tiny_batch())
    assert load.take()["router_entropy"] > 0


def test_even_and_collapsed_routers_are_told_apart():
    """A bias of the router towards one pair of experts, by its weights."""
    model = coupled(coupling="none")
    collapsed = RouterLoad(model)
    with torch.no_grad():
        for router in routers(model):
            router.weight.zero_()  # all scores are equal: top-k takes the same two
    with collapsed.counting():
        model(**tiny_batch())
    assert collapsed.take() == pytest.approx(
        {"router_entropy": math.log(2) / math.log(6), "router_max_load": 3.0, "router_idle_experts": 12.0}
    )


def test_rows_are_few_and_lose_no_token(tmp_path):
    model, file = coupled(coupling="none"), tmp_path / "router.jsonl"
    load, total = RouterLoad(model, file), 0
    for step in range(1, 211):
        if step % 10 == 0:
            with load.counting():
                model(**tiny_batch(seed=step))
            total += 3 * 2 * 33
            load.take()
        load.write_row(2, step, 210)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) <= ROWS + 10 and rows[-1]["step"] == 210 and rows[0]["layers"] == [0, 1, 3]
    assert sum(sum(map(sum, row["load"])) for row in rows) == total


def test_drift_is_the_share_of_choices_that_changed(tmp_path):
    """None while nothing changes, whatever the batches; some once the routers do; known to a run that goes on."""
    model, file = tiny_model(), tmp_path / "base.safetensors"
    rows = [tiny_batch(1, 9, seed=i) for i in range(4)]
    together = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    drift = RouterDrift(model, file)
    with drift.comparing():
        model(**together)
    assert drift.values() == {} and drift.summary() is None  # the base is not known
    with torch.no_grad():
        with drift.keep_base():
            for row in rows:
                model(**row)
        with drift.comparing():
            model(**together)
        assert drift.values() == {"router_drift": pytest.approx(0.0)}
        for router in routers(model)[1:]:
            router.weight.copy_(router.weight.roll(1, 0))
        again = RouterDrift(model, file)
        with again.comparing():
            model(**together)
    assert list(again.by_layer) == [0, 1, 3] and again.by_layer[0] == 0 and again.by_layer[3] > 0.2
    assert again.values()["router_drift"] == pytest.approx(sum(again.by_layer.values()) / 3)


def test_a_broken_file_of_base_choices_is_none(tmp_path):
    file = tmp_path / "base.safetensors"
    file.write_bytes(b"\x00" * 40)
    assert RouterDrift(tiny_model(), file).base == {}


def test_changed_goes_by_sets():
    base, now = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [3, 5]])
    assert changed(base, now) == 0.25
