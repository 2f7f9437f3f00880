"""Twenty steps of every coupling with a fixed seed -> a hash of losses and weights: do new code and old give the same?

    python benchmarks/same_bits.py --out before.json          # on the old commit
    python benchmarks/same_bits.py --against before.json      # on the new one; status 1 where a run differs

A tiny Qwen2-MoE in float32 and bf16, whole and in tiles, with adafactor and adamw in backward, calibrated. The same
machine, torch and transformers for both.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from pathlib import Path

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # where the package is not installed

import revffn  # noqa: E402
from revffn.optim import OptimizerInBackward, parameter_groups  # noqa: E402

STEPS, BATCH, TOKENS, VOCABULARY = 20, 4, 24, 96
COUPLINGS = {
    "innovation": dict(coupling="innovation"),
    "innovation m=0": dict(coupling="innovation", side_bits=0, grid_growth=0),
    "cross_branch left": dict(coupling="cross_branch"),
    "cross_branch right": dict(coupling="cross_branch", query_stream="right"),
    "none": dict(coupling="none"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(settings: dict, dtype: torch.dtype, tile_tokens: int | None, rule: str) -> str:
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, moe_intermediate_size=24,
        shared_expert_intermediate_size=40, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        num_experts=6, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[1],
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config).to(dtype)
    batches = [{"input_ids": torch.randint(0, VOCABULARY, (BATCH, TOKENS))} for _ in range(3)]
    model = revffn.convert(
        model, revffn.ReversibleConfig.from_dict(dict(tile_tokens=tile_tokens, **settings)), calibration=batches
    )
    model.train()
    optimizer = OptimizerInBackward(parameter_groups(model, weight_decay=0.01), rule=rule, lr=1e-3, seed=7)
    digest = hashlib.sha256()
    for _ in range(STEPS):
        ids = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        digest.update(loss.detach().double().numpy().tobytes())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the hashes")
    parser.add_argument("--against", type=Path, help="hashes to compare with")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for (name, settings), dtype, tile, rule in itertools.product(
        COUPLINGS.items(), DTYPES, (None, TOKENS), ("adafactor", "adamw")
    ):
        key = f"{name}, {dtype}, {'tiles' if tile else 'whole'}, {rule}"
        found[key] = run(settings, DTYPES[dtype], tile, rule)
        print(f"{found[key][:16]}  {key}", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    if args.against is None:
        return 0
    before = json.loads(args.against.read_text())
    differ = [key for key in found if found[key] != before.get(key)]
    print(f"{len(found) - len(differ)} of {len(found)} runs have the same bits.", *differ, sep="\n  ")
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
