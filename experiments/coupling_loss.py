"""What the innovation coupling costs a pretrained model before any training, in nats of held-out loss.

    python experiments/coupling_loss.py --model runs/smollm2-moe --parts features chosen_signs settings \
        --output experiments/results/coupling_loss.json
    python experiments/coupling_loss.py --model runs/smollm2-moe --parts grids \
        --output experiments/results/coupling_loss_grids.json

`settings`: the library's coupling by ridge, calibration rows, m and sign. `features`: the share of the last update's
energy that a predictor explains on held-out tokens, by what it sees. `token_groups`: the same with a map for each
group of tokens. `chosen_signs`: signs not drawn but chosen for every token and group of channels so that they undo
what the coupling has added so far, in plain floating point. `sublayers`: a step of the coupling for each sublayer in
place of each layer, likewise. These four are not in the library: what they would win is measured here first.
`refit`: `--model` is a trained reversible model; its predictors as they are, and fitted again on its states. `grids`:
the library's coupling by how much finer the grid becomes with depth, and by how coarse one grid for all states may be.
`ranks`, `plain_layers`: by the rank of the predictors, by the number of leading plain layers. `cross_branch`: the
other coupling, by where its adapters start.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import revffn
from revffn.couplings import observe
from revffn.data import batches
from revffn.training.heldout import coupled, heldout_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import quality  # noqa: E402
from simulate import git_state  # noqa: E402

WORKLOAD = quality.WORKLOADS["dolly"]
HELDOUT_ROWS = 32
PARTS = ("features", "chosen_signs", "token_groups", "sublayers", "refit", "settings", "grids", "ranks")
PARTS += ("plain_layers", "cross_branch")


@torch.no_grad()
def settings(model: PreTrainedModel, training: list, held: list, pad: int) -> list[dict[str, Any]]:
    found, default = [], observe.RIDGE
    for rows in (64, 256):
        for ridge in (1e-3, 1e-2, 1e-1, 1.0):
            observe.RIDGE = ridge
            config = revffn.ReversibleConfig.from_dict(dict(grid_growth=0))
            revffn.convert(model, config, calibration=batches(training[:rows], 8, pad))
            for m in (1, 2):
                for layer in model.model.layers[1:]:
                    layer.coupling.side_bits = m
                for random_sign in (False, True):
                    model.config.revffn["innovation"]["random_sign"] = random_sign
                    with coupled(model):
                        loss = heldout_loss(model, held, 8, pad)["loss"]
                    found.append(dict(rows=rows, ridge=ridge, m=m, random_sign=random_sign, loss=loss))
                    print(found[-1], flush=True)
            model = revffn.export(model)
    observe.RIDGE = default
    return found


@torch.no_grad()
def grids(model: PreTrainedModel, training: list, held: list, pad: int) -> list[dict[str, Any]]:
    found = []

    def note(m: int) -> None:
        for layer in model.model.layers[1:]:
            layer.coupling.side_bits = m
        with coupled(model):
            loss = heldout_loss(model, held, 8, pad)["loss"]
        grids = model.config.revffn["grids"]
        found.append({"m": m, "loss": loss, **grids, "wide_channels": len(grids["wide_channels"])})
        print(found[-1], flush=True)

    for growth in (0, 4, 8, None):
        config = revffn.ReversibleConfig.from_dict(dict(grid_growth=growth))
        revffn.convert(model, config, calibration=batches(training[:256], 8, pad))
        for m in range(4):
            note(m)
        if growth == 0:
            fraction_bits = model.config.revffn["grids"]["fraction_bits"]
            for coarse in (7, 8, 9, 10, fraction_bits):
                model.config.revffn["grids"]["fraction_bits"] = coarse
                note(4)
        model = revffn.export(model)
    return found


@torch.no_grad()
def variants(model: PreTrainedModel, training: list, held: list, pad: int, name: str, values: tuple) -> list:
    """One setting of `ReversibleConfig`, all others as they come, with m = 1 and 2."""
    found = []
    for value in values:
        config = revffn.ReversibleConfig.from_dict({name: value})
        revffn.convert(model, config, calibration=batches(training[:256], 8, pad))
        explained = list(model.config.revffn_calibration["explained"].values())
        for m in (1, 2):
            for layer in model.model.layers:
                if layer.coupling.side_bits is not None:  # plain layers have none
                    layer.coupling.side_bits = m
            with coupled(model):
                loss = heldout_loss(model, held, 8, pad)["loss"]
            explained_mean = sum(explained) / len(explained) if explained else 0.0
            found.append({name: value, "m": m, "loss": loss, "explained": explained_mean})
            print(found[-1], flush=True)
        model = revffn.export(model)
    return found


def cross_branch(path: str, training: list, held: list, pad: int) -> Iterator[dict[str, Any]]:
    """Its loss untrained by what its adapters were fitted on, and how its fixed points do in one training step
    (left). `seen_loss` is on examples that every fit has seen; the plain model's is first."""
    seen = training[: len(held)]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    yield {"query_stream": None, **scores(model, held, seen, pad)}
    for stream, rows in (("right", 0), ("left", 0), ("left", 64), ("right", 64), ("right", 256), ("right", 1024)):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        config = revffn.ReversibleConfig.from_dict(
            dict(coupling="cross_branch", query_stream=stream, stream_maps=rows > 0, verify="report")
        )
        revffn.convert(model, config, calibration=batches(training[: rows or 64], 8, pad))
        row = {"query_stream": stream, "rows": rows, "calibration": model.config.revffn_calibration}
        row |= scores(model.eval(), held, seen, pad)
        if stream == "left":
            model.train()(**next(batches(training[-2:], 2, pad)), use_cache=False).loss.backward()
            row["layers"] = revffn.reversible_report(model)["layers"]
        yield row


def scores(model: PreTrainedModel, held: list, seen: list, pad: int) -> dict[str, float]:
    return quality.heldout(model, held, 8, pad) | {"seen_loss": quality.heldout(model, seen, 8, pad)["loss"]}


@torch.no_grad()
def states(model: PreTrainedModel, rows: list, pad: int) -> list[Tensor]:
    """s_0 to s_{L-1} of all tokens, L of (N, D), float64."""
    parts = []
    for batch in batches(rows, 8, pad):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = model.model(**inputs, use_cache=False, output_hidden_states=True).hidden_states[:-1]
        parts.append([state[batch["attention_mask"].bool()].double() for state in found])
    return [torch.cat(states_of_layer) for states_of_layer in zip(*parts, strict=True)]


def ridge_fit(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    x0, y0 = x - x.mean(0), y - y.mean(0)
    weight = observe.ridge_weight(x0.T @ x0, x0.T @ y0, ridge)
    return weight, y.mean(0) - x.mean(0) @ weight


def features(now: list[Tensor], held: list[Tensor]) -> list[dict[str, Any]]:
    def unit(s: Tensor) -> Tensor:
        return s * s.square().mean(1, keepdim=True).rsqrt()

    inputs: dict[str, Callable[[list[Tensor], int], Tensor]] = {
        "s_k": lambda s, k: s[k],
        "s_k and f_k(s_k)": lambda s, k: torch.cat([s[k], s[k + 1] - s[k]], 1),
        "s_k and the embedding": lambda s, k: torch.cat([s[k], s[0]], 1),
        "s_k and s_k scaled to norm 1": lambda s, k: torch.cat([s[k], unit(s[k])], 1),
    }
    found = []
    for k in range(5, len(now) - 1, 5):
        for name, take in inputs.items():
            weight, bias = ridge_fit(take(now, k), now[k - 1] - now[k], 3e-3)
            target = held[k - 1] - held[k]
            left = (target - take(held, k) @ weight - bias).square().sum() / (target - target.mean(0)).square().sum()
            found.append(dict(layer=k, inputs=name, explained=1 - left.item()))
            print(found[-1], flush=True)
    return found


def chosen_signs(model: PreTrainedModel, now: list[Tensor], held: list, pad: int) -> list[dict[str, Any]]:
    layers = model.model.layers
    maps = {k: [t.float() for t in ridge_fit(now[k], now[k - 1] - now[k], 0.1)] for k in range(1, len(layers))}
    memory: dict[str, Any] = {}

    def hook(k: int, gain: float, group: int | None, state: Tensor, output: Tensor) -> Tensor:
        if k == 0:
            memory.update(added=torch.zeros_like(state), previous=state)
            return output
        weight, bias = maps[k]
        change = gain * (memory["previous"] - state - state @ weight - bias)
        if group is not None:
            split = (*change.shape[:-1], -1, group)
            product = (memory["added"].view(split) * change.view(split)).sum(-1, keepdim=True)
            change = (change.view(split) * torch.where(product > 0, -1.0, 1.0)).view_as(change)
        memory.update(added=memory["added"] + change, previous=state)
        return output + change

    found = []
    for m in (1, 2):
        for group in (None, 1, 8, state_size := now[0].shape[1]):
            handles = [
                layer.register_forward_hook(
                    lambda _, args, output, k=k: hook(k, 2.0**-m, group, args[0], output)  # noqa: B023
                )
                for k, layer in enumerate(layers)
            ]
            loss = heldout_loss(model, held, 8, pad)["loss"]
            for handle in handles:
                handle.remove()
            found.append(dict(m=m, group=group, of=state_size, loss=loss))
            print(found[-1], flush=True)
    return found


def token_groups(now: list[Tensor], held: list[Tensor]) -> list[dict[str, Any]]:
    """The share of the last update that is predicted with one map for each group of tokens alike in direction."""
    from sklearn.cluster import KMeans

    found = []
    for k in range(5, len(now) - 1, 5):
        target = held[k - 1] - held[k]
        directions = [F.normalize(s[k]).numpy() for s in (now, held)]
        for number in (1, 2, 4, 8):
            groups = KMeans(number, random_state=0).fit(directions[0])
            predicted = torch.zeros_like(target)
            for group in range(number):
                inside, asked = (torch.from_numpy(groups.predict(part) == group) for part in directions)
                weight, bias = ridge_fit(now[k][inside], (now[k - 1] - now[k])[inside], observe.RIDGE)
                predicted[asked] = held[k][asked] @ weight + bias
            left = (target - predicted).square().sum() / (target - target.mean(0)).square().sum()
            smallest = int(min(torch.from_numpy(groups.labels_).bincount()))
            found.append(dict(layer=k, groups=number, smallest=smallest, explained=1 - left.item()))
            print(found[-1], flush=True)
    return found


@torch.no_grad()
def sublayers(model: PreTrainedModel, training: list, held: list, pad: int) -> list[dict[str, Any]]:
    """The loss with a step for each layer, and with one for each sublayer, which keeps bits twice per layer. The
    first layer is plain."""
    layers = model.model.layers
    seen: dict[int, list[Tensor]] = {}
    # h_{2k} enters layer k, h_{2k+1} its feed-forward.
    readers = [module for layer in layers for module in (layer, layer.post_attention_layernorm)]
    adders = [module for layer in layers for module in (layer.self_attn, layer.mlp)]
    mask = torch.tensor(True)

    def note(j: int, state: Tensor) -> None:
        seen.setdefault(j, []).append(state[mask].double())

    hooks = [
        reader.register_forward_pre_hook(lambda _, args, j=j: note(j, args[0])) for j, reader in enumerate(readers)
    ]
    for batch in batches(training, 8, pad):
        mask = batch["attention_mask"].bool()
        model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    for hook in hooks:
        hook.remove()
    states = [torch.cat(seen.pop(j)) for j in range(len(readers))]
    at: dict[int, Tensor] = {}

    def enter(j: int, state: Tensor) -> None:
        at[j] = state

    def add(weight: Tensor, bias: Tensor, gain: float, j: int, before: int, output: Any) -> Any:
        change = gain * (at[before] - at[j] - at[j] @ weight - bias)
        return (output[0] + change, *output[1:]) if isinstance(output, tuple) else output + change

    found = []
    for per, stride in (("layer", 2), ("sublayer", 1)):
        steps = range(2, len(readers), stride)
        maps = {j: ridge_fit(states[j], states[j - stride] - states[j], observe.RIDGE) for j in steps}
        for m in (1, 2, 4):
            hooks = [
                reader.register_forward_pre_hook(lambda _, args, j=j: enter(j, args[0]))
                for j, reader in enumerate(readers)
            ]
            for j, (weight, bias) in maps.items():
                step = partial(add, weight.float(), bias.float(), 2.0**-m, j, j - stride)
                # The step's last sublayer, so that nothing in the step reads what is added.
                hooks.append(adders[j + stride - 1].register_forward_hook(lambda _, args, out, step=step: step(out)))
            loss = heldout_loss(model, held, 8, pad)["loss"]
            for hook in hooks:
                hook.remove()
            found.append(dict(per=per, m=m, bits_per_layer=m * 2 // stride, loss=loss))
            print(found[-1], flush=True)
    return found


@torch.no_grad()
def refit(path: str, training: list, held: list, pad: int) -> dict[str, float]:
    """The coupled function of a trained model above the exported one, with its predictors and with new ones."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    before = model.reversible_config
    config = revffn.ReversibleConfig(side_bits=before.side_bits, innovation=before.innovation)
    found = {}
    for name in ("as they are", "fitted again"):
        with coupled(model):
            found[name] = heldout_loss(model, held, 8, pad)["loss"]
        model = revffn.export(model)
        found["exported"] = heldout_loss(model, held, 8, pad)["loss"]
        revffn.convert(model, config, calibration=batches(training, 8, pad))
    print(found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/smollm2-moe")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    git = git_state()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    pad = tokenizer.pad_token_id
    training, held = quality.load(WORKLOAD, tokenizer, 0)
    held = held[:HELDOUT_ROWS]
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    result: dict[str, Any] = {"model": arguments.model, "heldout_rows": len(held), "git": git}
    result["hidden_size"] = model.config.hidden_size
    result["plain"] = heldout_loss(model, held, 8, pad)["loss"]
    if "refit" in arguments.parts:
        result["refit"] = refit(arguments.model, training[:256], held, pad)
    if {"features", "chosen_signs", "token_groups"} & set(arguments.parts):
        now = states(model, training[:128], pad)
    if "features" in arguments.parts:
        result["features"] = features(now, states(model, held, pad))
    if "chosen_signs" in arguments.parts:
        result["chosen_signs"] = chosen_signs(model, now, held, pad)
    if "token_groups" in arguments.parts:
        result["token_groups"] = token_groups(now, states(model, held, pad))
    if "sublayers" in arguments.parts:
        result["sublayers"] = sublayers(model, training[:128], held, pad)
    if "settings" in arguments.parts:
        result["settings"] = settings(model, training, held, pad)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    if "grids" in arguments.parts:
        result["grids"] = grids(model, training, held, pad)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    if "ranks" in arguments.parts:
        hidden_size = model.config.hidden_size
        ranks = (0, hidden_size // 8, hidden_size // 4, hidden_size // 2, None)
        result["ranks"] = variants(model, training, held, pad, "predictor_rank", ranks)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    if "plain_layers" in arguments.parts:
        result["plain_layers"] = variants(model, training, held, pad, "plain_layers", (1, 2, 4, 8))
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    if "cross_branch" in arguments.parts:
        del model
        result["cross_branch"] = []
        # The same order, and more of them.
        training, _ = quality.load(replace(WORKLOAD, steps=1026 // WORKLOAD.batch_size), tokenizer, 0)
        for row in cross_branch(arguments.model, training, held, pad):
            result["cross_branch"].append(row)
            print({key: value for key, value in row.items() if key != "calibration"}, flush=True)
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
