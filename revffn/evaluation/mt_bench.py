"""MT-Bench: answers to 80 questions of two turns, rated from 1 to 10 by a judge behind an OpenAI-compatible endpoint.

Questions, reference answers and judge prompts are FastChat's files (Zheng et al., arXiv 2306.05685): single-answer
grading, with the reference answer in the prompt for math, reasoning and coding, and FastChat's temperature for each
category. Its averages are over judgments; the score here is over questions, which is the same where all are rated.

Answers and judgments are appended to two JSON-lines files as they come, in FastChat's layout, and what is there is
not made again. Answers are generated one at a time, each with a seed of its own, so that a resumed run draws the same
ones.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import math
import os
import re
import statistics
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ..data import read_file
from ..options import EvaluateConfig
from ..recipe import InputError
from ..training.heldout import mode

TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
WITH_REFERENCE = ("math", "reasoning", "coding")
# First turn and second turn, without and with a reference answer.
PROMPTS = {False: ("single-v1", "single-v1-multi-turn"), True: ("single-math-v1", "single-math-v1-multi-turn")}
RATINGS = (r"\[\[(\d+\.?\d*)\]\]", r"\[(\d+\.?\d*)\]")
UNRATED = -1  # FastChat's
JUDGE_TOKENS = 2048
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, TIMEOUT_SECONDS = 1.0, 60.0, 300.0


class JudgeError(RuntimeError):
    """The judge cannot be had. The message is one line; what it has judged is kept."""


# --- files -----------------------------------------------------------------------------------------------------------


@dataclass
class Material:
    """What FastChat's files hold."""

    questions: list[dict[str, Any]]
    references: dict[int, list[str]]
    """question_id -> the two turns of the reference answer."""
    prompts: dict[str, dict[str, str]]


def read_material(folder: Path) -> Material:
    """Read and check all of MT-Bench.

    Raises:
        InputError: A file is missing, or lacks something.
    """
    names = ("question.jsonl", "reference_answer/gpt-4.jsonl", "judge_prompts.jsonl")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"mt_bench_path {folder}: no {', '.join(missing)} here. Give a folder with {', '.join(names)}."
        )
    questions, references, prompts = ([*read_file(folder / name)] for name in names)
    for question, where in questions:
        turns = question.get("turns")
        if not isinstance(turns, list) or len(turns) != 2 or question.get("category") not in TEMPERATURES:
            raise InputError(f"{where}: expected two turns and a category of {', '.join(TEMPERATURES)}.")
    if not questions:
        raise InputError(f"{folder / names[0]}: no questions.")
    try:
        material = Material(
            questions=[question for question, _ in questions],
            references={row["question_id"]: row["choices"][0]["turns"] for row, _ in references},
            prompts={row["name"]: row for row, _ in prompts},
        )
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(
            f"mt_bench_path {folder}: not FastChat's layout ({error!r}). Take its files unchanged."
        ) from None
    for question in material.questions:
        if question["category"] in WITH_REFERENCE and question["question_id"] not in material.references:
            raise InputError(f"{folder / names[1]}: no reference answer to question {question['question_id']}.")
    for name in (*PROMPTS[False], *PROMPTS[True]):
        if name not in material.prompts:
            raise InputError(f"{folder / names[2]}: no prompt {name!r}.")
    return material


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file that was appended to; a last line that was cut off is cut away."""
    if not file.exists():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        file.write_bytes(whole)
    return [row for row, _ in read_file(file)] if whole else []


def append_row(file: Path, row: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


# --- answers ---------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def next_turn(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    top_p: float = 1.0,
    streamer: TextStreamer | None = None,
) -> str:
    """The model's next turn of a conversation; empty if the conversation leaves no room for one."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
    used = inputs["input_ids"].shape[1]
    room = min(max_new_tokens, getattr(model.config, "max_position_embeddings", used + max_new_tokens) - used)
    if room < 1:
        return ""
    how: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    own = model.generation_config
    # The plain distribution at this temperature: what a model's own generation config adds (a repetition penalty, ...)
    # would be taken for everything that is not given.
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=pad)
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), mode(model, training=False):
            torch.manual_seed(seed)
            output = model.generate(**inputs.to(model.device), **how, max_new_tokens=room, streamer=streamer)
    finally:
        model.generation_config = own
    return tokenizer.decode(output[0, used:], skip_special_tokens=True).strip()


def answer_question(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: dict[str, Any],
    max_new_tokens: int,
    seed: int,
) -> list[str]:
    """Both turns of the model's answer."""
    messages: list[dict[str, str]] = []
    for number, turn in enumerate(question["turns"]):
        messages.append({"role": "user", "content": turn})
        answer = next_turn(
            model,
            tokenizer,
            messages,
            temperature=TEMPERATURES[question["category"]],
            max_new_tokens=max_new_tokens,
            seed=1_000_003 * seed + 2 * question["question_id"] + number,
        )
        messages.append({"role": "assistant", "content": answer})
    return [message["content"] for message in messages[1::2]]


# --- judge -----------------------------------------------------------------------------------------------------------


def judge_prompt(
    material: Material, question: dict[str, Any], answers: list[str], turn: int
) -> tuple[str, list[dict[str, str]]]:
    """Name of the prompt and the messages that ask for a rating of turn 1 or 2."""
    with_reference = question["category"] in WITH_REFERENCE
    name = PROMPTS[with_reference][turn - 1]
    prompt = material.prompts[name]
    first, second = question["turns"]
    values = {"question": first, "answer": answers[0]}
    if turn == 2:
        values = {"question_1": first, "question_2": second, "answer_1": answers[0], "answer_2": answers[1]}
    if with_reference:
        references = material.references[question["question_id"]]
        values |= {f"ref_answer_{number}": text for number, text in enumerate(references, start=1)}
    return name, [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": prompt["prompt_template"].format(**values)},
    ]


def rating(judgment: str) -> float:
    """The rating that a judgment gives, [[5]] or else [5]; UNRATED without one from 1 to 10."""
    for pattern in RATINGS:
        match = re.search(pattern, judgment)
        if match:
            return float(match[1]) if 1 <= float(match[1]) <= 10 else UNRATED
    return UNRATED


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: followed, it would carry the key to whoever it names."""

    def redirect_request(self, *args: Any) -> None:
        return None


def body_of(error: urllib.error.HTTPError) -> str:
    try:
        return error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return "no readable body"


@dataclass
class Judge:
    """A chat endpoint."""

    url: str
    model: str
    key: str | None
    attempts: int

    def ask(self, messages: list[dict[str, str]]) -> str:
        """One completion, tried again while the endpoint is busy, fails or cannot be reached.

        Raises:
            JudgeError: It refuses, or does not answer in so many attempts.
        """
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": JUDGE_TOKENS}
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        address = f"{self.url.rstrip('/')}/chat/completions"
        opener = urllib.request.build_opener(NoRedirect)
        problem = ""
        for attempt in range(self.attempts):
            request = urllib.request.Request(address, json.dumps(body).encode(), headers)
            wanted_pause = None
            try:
                with opener.open(request, timeout=TIMEOUT_SECONDS) as response:
                    content = json.loads(response.read())["choices"][0]["message"]["content"]
                if content is not None and not isinstance(content, str):
                    raise ValueError(f"content of type {type(content).__name__}")
                return content or ""  # null: all tokens went into thinking, or it would not
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code}: {' '.join(body_of(error).split())[:200]}"
                if error.code not in (408, 429) and error.code < 500:
                    raise JudgeError(f"judge {address} refuses with {problem}.") from None
                wanted_pause = error.headers.get("Retry-After")
            except (OSError, http.client.HTTPException) as error:
                problem = " ".join(str(getattr(error, "reason", error)).split())
            except (ValueError, LookupError, TypeError) as error:
                problem = f"an answer that is not a chat completion ({error!r})"
            if attempt + 1 < self.attempts:
                pause = FIRST_PAUSE_SECONDS * 2**attempt
                if wanted_pause is not None and wanted_pause.isdigit():
                    pause = float(wanted_pause)
                time.sleep(min(pause, LONGEST_PAUSE_SECONDS))
        raise JudgeError(f"judge {address} did not answer in {self.attempts} attempts; the last one met {problem}.")


# --- the benchmark ---------------------------------------------------------------------------------------------------


class Bench:
    """One run of MT-Bench: what is read and checked before the model is loaded, and where it goes."""

    def __init__(self, config: EvaluateConfig):
        self.config = config
        self.material = read_material(Path(config.mt_bench_path))
        questions, limit = self.material.questions, config.limit or len(self.material.questions)
        number = min(limit, len(questions))
        # Spread evenly, because the file goes by category.
        self.questions = [questions[i * len(questions) // number] for i in range(number)]
        output = Path(config.output)
        self.folder = output.with_name(f"{output.stem}.mt_bench")
        self.judge = None
        if config.judge_url is not None and config.judge_model is not None:
            if not config.judge_url.startswith(("http://", "https://")):
                raise InputError(f"judge_url {config.judge_url!r}: expected http:// or https://, up to and with /v1.")
            key = os.environ.get(config.judge_key_variable)
            self.judge = Judge(config.judge_url, config.judge_model, key, config.judge_attempts)

    def run(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, about: dict[str, Any]) -> dict[str, Any]:
        """Answer what is not answered, judge what is not judged.

        Args:
            about: `weights`, `config`, `tokenizer` and `dtype` tell whether answers that are there are this model's.

        Returns:
            `metrics`, empty without a judge, and how many there are of what; `complete` says that all is judged.

        Raises:
            InputError: The answers that are there are another model's.
            JudgeError: The judge cannot be had.
        """
        answers = self.answers(model, tokenizer, about)
        result: dict[str, Any] = {"metrics": {}, "answers": len(answers), "files": self.folder.name, "complete": False}
        return result if self.judge is None else result | self.scores(self.judgments(self.judge, answers))

    def answers(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, about: dict[str, Any]
    ) -> dict[int, dict[str, Any]]:
        """question_id -> row of answers.jsonl."""
        file = self.folder / "answers.jsonl"
        how = {name: about[name] for name in ("weights", "config", "tokenizer", "dtype")}
        how |= {"max_new_tokens": self.config.max_new_tokens, "seed": self.config.seed}
        rows = read_rows(file)
        for row in rows:
            differing = [key for key, value in how.items() if row.get(key) != value]
            if differing:
                raise InputError(f"{file} holds answers with other {', '.join(differing)}. Name another output.")
        found = {row["question_id"]: row for row in rows}
        for question in tqdm([q for q in self.questions if q["question_id"] not in found], "mt_bench answers"):
            turns = answer_question(model, tokenizer, question, self.config.max_new_tokens, self.config.seed)
            text = json.dumps([question["question_id"], how["weights"], turns])
            row = {
                "question_id": question["question_id"],
                "answer_id": hashlib.sha256(text.encode()).hexdigest()[:22],
                "model_id": self.config.model,
                "choices": [{"index": 0, "turns": turns}],
                "tstamp": time.time(),
                **how,
            }
            append_row(file, row)
            found[question["question_id"]] = row
        return {question["question_id"]: found[question["question_id"]] for question in self.questions}

    def judgments(self, judge: Judge, answers: dict[int, dict[str, Any]]) -> dict[tuple[int, int], float]:
        """(question_id, turn) -> rating."""
        file = self.folder / "judgments.jsonl"
        known = {(row["answer_id"], row["turn"], row["judge"][0]): row["score"] for row in read_rows(file)}
        found: dict[tuple[int, int], float] = {}
        everything = [(question, turn) for question in self.questions for turn in (1, 2)]
        for question, turn in tqdm(everything, "mt_bench judgments"):
            row = answers[question["question_id"]]
            key = (row["answer_id"], turn, judge.model)
            if key not in known:
                name, messages = judge_prompt(self.material, question, row["choices"][0]["turns"], turn)
                try:
                    judgment = judge.ask(messages)
                except JudgeError as error:
                    raise JudgeError(
                        f"{error} {len(found)} of {len(everything)} judgments are kept in {file}; the same command "
                        "goes on from there."
                    ) from None
                known[key] = rating(judgment)
                append_row(
                    file,
                    {
                        "question_id": question["question_id"],
                        "answer_id": row["answer_id"],
                        "model": self.config.model,
                        "judge": [judge.model, name],
                        "user_prompt": messages[1]["content"],
                        "judgment": judgment,
                        "score": known[key],
                        "turn": turn,
                        "tstamp": time.time(),
                    },
                )
            found[question["question_id"], turn] = known[key]
        return found

    def scores(self, ratings: dict[tuple[int, int], float]) -> dict[str, Any]:
        """Means over questions; a question's score is the mean of its rated turns."""
        rated = {key: value for key, value in ratings.items() if value != UNRATED}
        by_category: dict[str, list[float]] = {}
        for question in self.questions:
            turns = [
                rated[question["question_id"], turn] for turn in (1, 2) if (question["question_id"], turn) in rated
            ]
            if turns:
                by_category.setdefault(question["category"], []).append(statistics.mean(turns))
        groups = {
            "score": [value for values in by_category.values() for value in values],
            "first_turn": [value for (_, turn), value in rated.items() if turn == 1],
            "second_turn": [value for (_, turn), value in rated.items() if turn == 2],
        }
        return {
            "metrics": {name: mean(values) for name, values in groups.items() if values},
            "categories": {
                name: {"metrics": {"score": mean(values)}, "questions": len(values)}
                for name, values in by_category.items()
            },
            "questions": len(self.questions),
            "unrated": len(ratings) - len(rated),
            "complete": True,
        }


def mean(values: list[float]) -> dict[str, float | None]:
    """Mean and its standard error over questions; None for one question alone."""
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"value": statistics.mean(values), "stderr": stderr}
