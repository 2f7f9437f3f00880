"""Do servers compute with an exported model what transformers computes with it?

    revffn upcycle --output runs/smollm2-moe
    revffn train recipes/quickstart_cpu.yaml --training.output_dir runs/mine
    revffn export runs/mine runs/mine-plain
    python benchmarks/serving.py --model runs/mine-plain --output benchmarks/results/serving_quickstart.json \
        --engines transformers vllm --python /path/of/an/environment/with/vllm/bin/python

Each engine runs in a process of its own, in float32 on a CPU, and generates greedily from the same token ids; tokens
that would end the text are forbidden. Compared
with transformers, in a process that cannot import revffn: the tokens, and the log-probability of each. `--python` is
the interpreter of transformers and vllm (one without revffn is the stronger proof). llama.cpp is converted for by its
own converter and runs by its Python binding, both found in the folder `--llama_cpp`:

    pip install --no-deps --target .venv/llama_cpp -r benchmarks/llama_cpp.txt

A result that is there already is kept: engines may be run apart.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LLAMA_CPP = ROOT / ".venv" / "llama_cpp"

# --- engines: (model folder, prompts of token ids, number of tokens) -> one {"tokens", "logprobs"} for each prompt ---


def transformers_engine(model: str, prompts: list[list[int]], num_tokens: int) -> list[dict[str, list]]:
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rows = []
    for prompt in prompts:
        found = plain.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens = found.sequences[0, len(prompt) :]
        logprobs = torch.cat(found.logits).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        rows.append({"tokens": tokens.tolist(), "logprobs": logprobs.tolist()})
    return rows


def vllm_engine(model: str, prompts: list[list[int]], num_tokens: int) -> list[dict[str, list]]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    engine = LLM(model=model, dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=8)
    settings = SamplingParams(temperature=0, max_tokens=num_tokens, min_tokens=num_tokens, logprobs=0)
    found = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings)
    rows = []
    for request in found:
        output = request.outputs[0]
        tokens = list(output.token_ids)
        logprobs = [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)]
        rows.append({"tokens": tokens, "logprobs": logprobs})
    return rows


def llama_cpp_engine(model: str, prompts: list[list[int]], num_tokens: int) -> list[dict[str, list]]:
    """`model` is a GGUF file here."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 512, 1, False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count()))
    server = xllamacpp.Server(parameters)
    rows = []
    for prompt in prompts:
        request = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "logprobs": 1, "ignore_eos": True}
        found = server.handle_completions(request)
        steps = found["choices"][0]["logprobs"]["content"]
        rows.append({"tokens": [s["id"] for s in steps], "logprobs": [s["logprob"] for s in steps]})
    return rows


ENGINES: dict[str, Callable[[str, list[list[int]], int], list[dict[str, list]]]] = {
    "transformers": transformers_engine,
    "vllm": vllm_engine,
    "llama.cpp": llama_cpp_engine,
}

# --- processes -------------------------------------------------------------------------------------------------------


def run_python(python: str | Path, words: list[str], path: Path | None = None) -> None:
    """A process without this checkout on its path. Raises RuntimeError with the end of its errors."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = str(path)
    with tempfile.TemporaryDirectory() as elsewhere:
        found = subprocess.run([str(python), *words], cwd=elsewhere, env=environment, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"{' '.join(words[:3])}: exit {found.returncode}\n{found.stderr[-3000:]}")


def generate(
    engine: str, model: Path, prompts: list[list[int]], num_tokens: int, python: str | Path, path: Path | None = None
) -> dict[str, Any]:
    """What an engine generates in a process of its own: {"engine", "versions", "rows"}."""
    with tempfile.TemporaryDirectory() as scratch:
        task, answer = Path(scratch, "task.json"), Path(scratch, "answer.json")
        task.write_text(json.dumps({"model": str(model.resolve()), "prompts": prompts, "num_tokens": num_tokens}))
        run_python(python, [str(Path(__file__).resolve()), "--work", engine, str(task), str(answer)], path)
        return json.loads(answer.read_text())


def work(engine: str, task: Path, answer: Path) -> None:
    """The inside of `generate`."""
    sys.modules["revffn"] = None  # an import fails, also where it is installed
    rows = ENGINES[engine](**json.loads(task.read_text()))
    names = ("torch", "transformers", "vllm", "xllamacpp")
    versions = {n: str(sys.modules[n].__version__) for n in names if sys.modules.get(n)}
    answer.write_text(json.dumps({"engine": engine, "versions": versions, "rows": rows}))


def to_gguf(model: Path, file: Path, llama_cpp: Path) -> None:
    """Convert a folder with llama.cpp's converter, float32."""
    words = ["-m", "convert_hf_to_gguf", str(model.resolve()), "--outtype", "f32", "--outfile", str(file.resolve())]
    run_python(sys.executable, words, llama_cpp)


def parts_of_characters(tokenizer: Any) -> set[int]:
    """Tokens that are no text alone: llama.cpp's server gives them together with those that complete the character."""
    return {token for token in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([token])}


def difference(
    rows: list[dict[str, list]], reference: list[dict[str, list]], leave_out: Collection[int] = ()
) -> dict[str, Any]:
    """Tokens generated, those equal up to a prompt's first difference, and the largest difference of a log-probability
    (nats) among these; None where an engine gave no number."""

    def steps(row: dict[str, list]) -> list[tuple[int, float]]:
        return [step for step in zip(row["tokens"], row["logprobs"], strict=True) if step[0] not in leave_out]

    equal, total, worst = 0, 0, 0.0
    for mine, theirs in zip(rows, reference, strict=True):
        total += len(steps(theirs))
        for (token, logprob), (other_token, other) in zip(steps(mine), steps(theirs), strict=False):
            if token != other_token:
                break
            equal += 1
            # NaN, or null in JSON
            bad = worst is None or logprob is None or logprob != logprob
            worst = None if bad else max(worst, abs(logprob - other))
    return {"tokens": total, "equal_tokens": equal, "largest_logprob_difference": worst}


def questions(model: Path, number: int, max_tokens: int = 96) -> list[list[int]]:
    """Held-out questions of dolly-15k in the chat template, as token ids."""
    from transformers import AutoTokenizer

    from revffn.data import load_conversations
    from revffn.recipe import DataConfig

    tokenizer = AutoTokenizer.from_pretrained(model)
    path = ROOT / "data" / "databricks-dolly-15k" / "databricks-dolly-15k.jsonl.gz"
    _, heldout = load_conversations(DataConfig(path=str(path), heldout=8 * number))
    prompts = []
    for conversation in heldout:
        ids = tokenizer.apply_chat_template(conversation["prompt"], add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        if len(ids) <= max_tokens:
            prompts.append(ids)
    return prompts[:number]


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        return work(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of an exported model")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--python", default=sys.executable, help="interpreter of transformers and vllm")
    parser.add_argument("--llama_cpp", type=Path, default=LLAMA_CPP)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--num_tokens", type=int, default=32)
    arguments = parser.parse_args()
    from simulate import git_state
    from transformers import AutoTokenizer

    result = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    result.setdefault("model", arguments.model.name)
    result.setdefault("prompts", questions(arguments.model, arguments.prompts))
    result.setdefault("engines", {})
    for engine in dict.fromkeys(["transformers", *arguments.engines]):
        if engine in result["engines"]:
            continue
        if engine == "llama.cpp":
            with tempfile.TemporaryDirectory() as scratch:
                file = Path(scratch, "model.gguf")
                to_gguf(arguments.model, file, arguments.llama_cpp)
                found = generate(
                    engine, file, result["prompts"], arguments.num_tokens, sys.executable, arguments.llama_cpp
                )
        else:
            found = generate(engine, arguments.model, result["prompts"], arguments.num_tokens, arguments.python)
        reference = result["engines"].get("transformers", found)["rows"]
        leave_out = (
            parts_of_characters(AutoTokenizer.from_pretrained(arguments.model)) if engine == "llama.cpp" else ()
        )
        found["against_transformers"] = difference(found["rows"], reference, leave_out)
        result["engines"][engine] = {**found, "git": git_state()}
        arguments.output.write_text(json.dumps(result) + "\n")
        print(engine, found["versions"], found["against_transformers"], flush=True)


if __name__ == "__main__":
    main()
