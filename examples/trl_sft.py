"""TRL's own SFTTrainer on a converted model: no trainer of ours, no optimizer of ours, only the reversible blocks.

    python examples/trl_sft.py --model runs/smollm2-moe --output runs/trl-sft

Needs `pip install 'revffn[train]'`. With the quickstart's model a few minutes on two CPU cores. AdamW keeps two
moments of all parameters in float32; examples/own_loop.py shows the optimizer in backward, which does not.
"""

from __future__ import annotations

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import revffn
from revffn.data import load_conversations
from revffn.recipe import DataConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a pretrained model, or its name on the Hub")
    parser.add_argument("--data", default=DataConfig.path, help="conversations, as in a recipe's data.path")
    parser.add_argument("--output", required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")
    training, _ = load_conversations(DataConfig(path=arguments.data, num_examples=32, heldout=4))
    rows = Dataset.from_list(training)
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in training]
    batch = tokenizer(texts[:8], return_tensors="pt", padding=True, truncation=True, max_length=128)
    revffn.convert(model, calibration=[batch])

    trainer = SFTTrainer(
        model,
        SFTConfig(
            output_dir=arguments.output,
            max_steps=arguments.steps,
            per_device_train_batch_size=2,
            max_length=128,
            learning_rate=5e-5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,  # the blocks rebuild their inputs already
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    report = revffn.reversible_report(model)
    print(f"{report['mismatched_states_total']} states differed in {report['walks']} backward passes")
    revffn.export(model).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"{arguments.output}: the original architecture, loadable without revffn")


if __name__ == "__main__":
    main()
