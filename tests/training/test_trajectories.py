"""The same training by other ways: losses step by step, compared by their largest and their mean difference.

One model, one order of examples, AdamW in float32 after the same schedule. Every way has to learn: the plain model
under TRL's `SFTTrainer` is the reference, and its loss falls.

Run: pytest tests/training/test_trajectories.py
"""

import pytest
import torch
from datasets import Dataset
from helpers import tiny_batch, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, default_data_collator
from trl import SFTConfig, SFTTrainer

import revffn
from revffn.optim import OptimizerInBackward, parameter_groups
from revffn.training.trainer import RevFFNTrainer

STEPS, BATCH, LENGTH = 10, 4, 16
LARGEST, MEAN = 2e-4, 5e-5  # nats; observed 1.6e-5 and 4e-6, CPU, 2026-11
ARGUMENTS = dict(
    max_steps=STEPS, learning_rate=1e-2, lr_scheduler_type="linear", warmup_steps=0, weight_decay=0.0,
    max_grad_norm=0.0, logging_steps=1, save_strategy="no", report_to="none", bf16=False, disable_tqdm=True, seed=5,
    use_cpu=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    """Sequences that are all of one length; each counts up from somewhere, which can be learnt."""
    starts = torch.randint(3, 60, (3 * BATCH,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [list(range(start, start + LENGTH)) for start in starts]
    return [{"input_ids": row, "labels": row} for row in ids]


def make(tokenizer, coupling=None, **settings):
    model = tiny_model(vocab_size=len(tokenizer), gain=2.0)
    if coupling is None:
        return model
    calibration = [tiny_batch(4, LENGTH, seed=7)] if coupling != "none" else None
    config = revffn.ReversibleConfig.from_dict(dict(coupling=coupling, **settings))
    return revffn.convert(model, config, calibration=calibration)


def trained(by, model, rows, tokenizer, folder, batch=BATCH, **of_trl):
    """Losses of a run: by TRL's trainer, by transformers', or by ours with what it is for."""
    arguments = ARGUMENTS | dict(output_dir=str(folder), per_device_train_batch_size=batch)
    data = Dataset.from_list(rows)
    if by == "transformers":
        collator = default_data_collator  # examples of one length need no padding
        trainer = Trainer(model, TrainingArguments(**arguments), train_dataset=data, data_collator=collator)
    else:
        arguments |= dict(max_length=None, router_aux_loss_coef=0.0, gradient_checkpointing=False) | of_trl
        with_data = dict(args=SFTConfig(**arguments), train_dataset=data, processing_class=tokenizer)
        if by == "trl":
            trainer = SFTTrainer(model, **with_data)
        else:
            groups, rate = parameter_groups(model, 0.0), arguments["learning_rate"]
            optimizer = OptimizerInBackward(groups, rule="adamw", lr=rate, betas=(0.9, 0.999))
            trainer = RevFFNTrainer(model, **with_data, linear_cross_entropy=True, optimizers=(optimizer, None))
    trainer.train()
    return torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line], dtype=torch.float64)


@pytest.fixture(scope="module")
def reference(rows, tokenizer, tmp_path_factory):
    losses = trained("trl", make(tokenizer), rows, tokenizer, tmp_path_factory.mktemp("reference"))
    assert len(losses) == STEPS and losses[-1] < 0.8 * losses[0]
    return losses


def assert_same(losses, others):
    apart = (losses - others).abs()
    assert apart.max() < LARGEST and apart.mean() < MEAN, f"largest {apart.max():.2g}, mean {apart.mean():.2g}"


@pytest.mark.parametrize("by", ["transformers", "trl", "revffn"])
@pytest.mark.parametrize("tile_tokens", [None, 2 * LENGTH, LENGTH], ids=["one tile", "two tiles", "four tiles"])
def test_every_trainer_and_tile_trains_what_trl_does(by, tile_tokens, rows, tokenizer, tmp_path, reference):
    """Layer inputs stored: the very function of the plain model."""
    model = make(tokenizer, "none", tile_tokens=tile_tokens)
    assert_same(trained(by, model, rows, tokenizer, tmp_path), reference)


@pytest.mark.parametrize("coupling", ["innovation", "cross_branch"])
def test_trainers_and_tiles_of_a_coupling_agree(coupling, rows, tokenizer, tmp_path):
    runs = [
        trained(by, make(tokenizer, coupling, tile_tokens=tile), rows, tokenizer, tmp_path / f"{by}-{tile}")
        for by, tile in (("trl", None), ("transformers", 2 * LENGTH), ("revffn", LENGTH), ("revffn", None))
    ]
    assert runs[0][-1] < runs[0][0]
    for losses in runs[1:]:
        # Roundings to the streams' grid fall differently where products do.
        assert (losses - runs[0]).abs().max() < 2e-2 and (losses - runs[0]).abs().mean() < 5e-3


def test_packed_examples_train_what_padded_ones_do(tokenizer, tmp_path):
    """The same four examples in each step, of different lengths: one row, or four."""
    ids = [list(range(start, start + length)) for start, length in ((3, 9), (20, 16), (40, 5), (60, 12))]
    apart, length = [{"input_ids": row, "labels": row} for row in ids], sum(map(len, ids))
    padded, packed = (
        trained("revffn", make(tokenizer, "none"), apart, tokenizer, tmp_path / name, **arguments)
        for name, arguments in (("padded", {}), ("packed", dict(batch=1, packing=True, max_length=length)))
    )
    assert padded[-1] < 0.8 * padded[0]
    assert_same(packed, padded)


@pytest.mark.parametrize("by", ["transformers", "trl"])
def test_lora_on_a_converted_model_is_lora_on_the_plain_one(by, rows, tokenizer, tmp_path):
    """Without this package's trainer; adapters on attention, everything else frozen."""
    losses = {}
    for coupling in (None, "none"):
        torch.manual_seed(3)
        adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(make(tokenizer, coupling), adapters)
        losses[coupling] = trained(by, model, rows, tokenizer, tmp_path / str(coupling))
    assert losses[None][-1] < losses[None][0]
    assert_same(losses["none"], losses[None])
