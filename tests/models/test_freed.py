"""A model that nobody holds any longer is gone, whatever was done with it.

Run: pytest tests/models/test_freed.py
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from datasets import Dataset
from helpers import COUPLINGS, coupled, couplings, tiny_batch, tiny_model
from transformers import AutoModelForCausalLM
from trl import SFTConfig

import revffn
from revffn.training.trainer import RevFFNTrainer


def by_hand(model, tokenizer, tmp_path):
    """Steps, one that was interrupted, a forward without its backward, and evaluation."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(**tiny_batch(), output_router_logits=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    hook = model.model.layers[1].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**tiny_batch())
    hook.remove()
    model(**tiny_batch())
    model.eval().generate(tiny_batch()["input_ids"], max_new_tokens=2, do_sample=False)


def interrupt(*_):
    raise KeyboardInterrupt


def in_backward(model, tokenizer, tmp_path):
    revffn.use_linear_cross_entropy(model)
    optimizer = revffn.OptimizerInBackward(revffn.parameter_groups(model, 0.0), rule="adafactor", lr=1e-3)
    for _ in range(2):
        model(**tiny_batch()).loss.backward()
        optimizer.step()


def by_the_trainer(model, tokenizer, tmp_path):
    rows = [{"input_ids": list(range(3, 14)), "labels": list(range(3, 14))} for _ in range(8)]
    args = SFTConfig(output_dir=str(tmp_path), bf16=False, max_steps=2, save_steps=1, report_to="none")
    RevFFNTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()


def with_others(model, tokenizer, tmp_path):
    """Models that were made of it."""
    model.save_pretrained(tmp_path)
    others = [AutoModelForCausalLM.from_pretrained(tmp_path).train(), copy.deepcopy(model)]
    if model.reversible_config.find_coupling().export_problem is None:
        others.append(revffn.export(model))
    for other in others:
        other(**tiny_batch()).loss.backward()
    return others


@couplings
@pytest.mark.parametrize("train", [by_hand, in_backward, by_the_trainer, with_others], ids=lambda f: f.__name__)
def test_a_model_is_freed_after_training(train, coupling, tokenizer, tmp_path):
    model = coupled(overrides=dict(vocab_size=len(tokenizer)), **COUPLINGS[coupling])
    held = things(model, *(train(model, tokenizer, tmp_path) or ()))
    del model
    gc.collect()
    assert [name for name, thing in held.items() if thing() is not None] == []


def things(*models) -> dict[str, weakref.ref]:
    """A weak reference to every module and parameter."""
    return {
        f"{i} {type(thing).__name__} {name}": weakref.ref(thing)
        for i, model in enumerate(models)
        for name, thing in (*model.named_modules(), *model.named_parameters())
    }


def test_a_refused_conversion_holds_nothing():
    model = tiny_model()
    held = things(model)
    with pytest.raises(ValueError, match="side_bits"):
        revffn.convert(model, revffn.ReversibleConfig(side_bits=[2]))
    del model
    gc.collect()
    assert [name for name, thing in held.items() if thing() is not None] == []
