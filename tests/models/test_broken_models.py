"""Folders of models with anything in them changed: what is loaded is what lies there, or it is refused in a line.

Run: pytest tests/models/test_broken_models.py; REVFFN_MUTATIONS=10000 for more
"""

import random
import shutil
import signal
import traceback
from collections import Counter
from difflib import unified_diff

import pytest
import torch
from helpers import tiny_model
from mutations import changed_file, changed_folder, fresh, number_of
from safetensors import safe_open

from revffn.command_line import load_run_config
from revffn.models.loading import load_causal_lm
from revffn.recipe import InputError
from revffn.training import preflight

TINY = dict(num_hidden_layers=1, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_experts=4)
SECONDS = 30
"""That a folder may take: a number in config.json must not make a model without end."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """A Mixture-of-Experts model in one file, a dense one in several with an index, and the tokenizer in both."""
    made = []
    special = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=2)
    for model_type, shard in (("qwen2_moe", "1GB"), ("llama", "8KB")):
        folder = tmp_path_factory.mktemp(model_type)
        tiny_model(model_type, **special, **TINY).save_pretrained(folder, max_shard_size=shard)
        tokenizer.save_pretrained(folder)
        made.append(folder)
    return made


def tensors_in(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            # transformers takes names without the prefix of the model inside as well.
            found |= {name.removeprefix("model."): opened.get_tensor(name).float() for name in opened.keys()}
    return found


def broken_weights(numbers, folder):
    """Tensors that are gone, new, of another shape or not numbers, under a header that is right."""
    from safetensors.torch import load_file, save_file

    file = numbers.choice(sorted(folder.glob("*.safetensors")))
    weights = load_file(file)
    name = numbers.choice(sorted(weights))
    how = numbers.choice(["gone", "new", "shape", "nan", "inf", "turned", "number", "kind", "renamed", "empty"])
    tensor = weights[name]
    if how in ("gone", "renamed"):
        del weights[name]
    if how == "new" or how == "renamed":
        weights[numbers.choice(["x", name + "_", name.replace("model.", ""), name.replace("0", "1")])] = tensor.clone()
    elif how in ("nan", "inf"):
        tensor.view(-1)[numbers.randrange(tensor.numel())] = float(how)
    elif how == "number":
        tensor.view(-1)[numbers.randrange(tensor.numel())] = numbers.choice([1e38, -1e30, 1e-45])
    elif how == "kind":
        weights[name] = tensor.to(numbers.choice([torch.float16, torch.float64, torch.int8, torch.bool]))
    elif how != "gone":
        turned = tensor.permute(*range(tensor.dim())[::-1]).contiguous()
        weights[name] = {"shape": tensor.flatten(), "turned": turned, "empty": tensor[:0].clone()}[how]
    save_file(weights, file, metadata={"format": "pt"})
    return f"{how} {name}"


@pytest.fixture
def in_time():
    """An error in a folder that takes longer than it may."""

    def late(number, frame):
        raise TimeoutError(f"longer than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    yield lambda: signal.alarm(SECONDS)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def outcome(config, folder, again):
    """`refused`, `loaded`, or what is wrong.  Whatever else is raised is a traceback to the user."""
    try:
        preflight.check(config)
        model = load_causal_lm(folder, torch.float32)
    except InputError as error:
        line = str(error)
        return "refused" if "\n" not in line and len(line) < 1500 else f"said badly: {line}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)
        return f"{type(error).__name__}: {str(error)[:300]} ({place[-1].filename} {place[-1].lineno})"
    finally:
        signal.alarm(0)
    model.save_pretrained(again)
    there, loaded = tensors_in(folder), tensors_in(again)
    differing = there.keys() ^ loaded.keys() or {name for name in there if not torch.equal(there[name], loaded[name])}
    return f"not loaded as they are: {sorted(differing)[:3]}" if differing else "loaded"


def test_a_mutated_model_is_the_one_that_lies_there_or_is_refused(
    folders, recipe_file, tmp_path, monkeypatch, in_time
):
    folder, numbers, problems, counts = tmp_path / "model", random.Random(0), [], Counter()
    config = load_run_config(recipe_file(), ["--model.path", str(folder)])
    planned = preflight.check_memory
    for i in range(number_of("models")):
        fresh(numbers.choice(folders), folder)
        shutil.rmtree(tmp_path / "again", ignore_errors=True)
        how = numbers.choice(["config", "config", "weights", "weights", "anything", "anything"])
        if how == "config":
            changed_file(numbers, folder / "config.json")
        elif how == "weights":
            how = broken_weights(numbers, folder)
        else:
            how = changed_folder(numbers, folder, tuple(folders))
        # Planning takes most of the time.
        monkeypatch.setattr(preflight, "check_memory", planned if i % 10 == 0 else lambda *args: None)
        in_time()
        found = outcome(config, folder, tmp_path / "again")
        counts[found] += 1
        if found not in ("refused", "loaded"):
            problems.append(f"{i}: {how}: {found}\n{difference(folder, folders) if 'config' in how else ''}")
    assert not problems, f"{len(problems)}\n" + "\n".join(problems)
    assert min(counts["refused"], counts["loaded"]) > number_of("models") / 20


def difference(folder, folders):
    """Of a config.json from the one it was."""
    lines = [(place / "config.json").read_text().splitlines() for place in (folder, *folders)]
    return "\n".join(min((list(unified_diff(old, lines[0], n=0)) for old in lines[1:]), key=len)[2:8])[:600]
