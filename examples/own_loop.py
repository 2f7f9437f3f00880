"""Your own training loop: convert, step in backward, export.

    python examples/own_loop.py --model runs/smollm2-moe --output runs/own-loop

Needs nothing but revffn, torch and transformers. With the quickstart's model (`make quickstart` makes it) a few
minutes on two CPU cores; on a GPU add `--device cuda`.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import revffn

TEXTS = [
    "A river carries fresh water to the sea; a lake keeps it where it is.",
    "Bread rises because yeast turns sugar into gas, which the dough holds.",
    "The moon has no light of its own: what we see is the sun's.",
    "A triangle's angles add up to a straight line, on a plane.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a pretrained model, or its name on the Hub")
    parser.add_argument("--output", required=True, help="folder for the plain model")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="bfloat16").to(arguments.device)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True).to(arguments.device)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    # The batches set the streams' grids and fit the predictors; more of the text to be trained on is better.
    revffn.convert(model, revffn.ReversibleConfig(tile_tokens=2048), calibration=[batch])
    revffn.use_linear_cross_entropy(model)
    model.train()
    optimizer = revffn.OptimizerInBackward(revffn.parameter_groups(model, weight_decay=0.0), lr=1e-4)
    for step in range(1, arguments.steps + 1):
        loss = model(**batch, labels=labels).loss
        loss.backward()  # every parameter has stepped when this returns, and no gradient is left
        optimizer.step()  # counts the step, and says the gradients' norm
        report = revffn.reversible_report(model)
        print(
            f"step {step}: loss {loss.item():.4f}, gradient norm {optimizer.grad_norm:.2f}, "
            f"{report['mismatched_states']} of {report['verified_states']} states differ"
        )
    optimizer.detach()
    revffn.export(model).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"{arguments.output}: the original architecture, loadable without revffn")


if __name__ == "__main__":
    main()
