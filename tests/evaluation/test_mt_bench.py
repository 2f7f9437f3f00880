"""MT-Bench against a judge on this machine: what is asked of it, with FastChat's prompts and ratings; busy and failing
endpoints; going on after an interruption; scores.

Run: pytest tests/evaluation/test_mt_bench.py
"""

import json
import math
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from helpers import tiny_model

from revffn.__main__ import main
from revffn.evaluation import mt_bench

DATA = Path(os.environ.get("REVFFN_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Say red.", "Say it twice."]},
    {"question_id": 111, "category": "math", "turns": ["Add 1 {and} 1.", "Double it."]},
    {"question_id": 121, "category": "coding", "turns": ["Print 1.", "Print 2."]},
    {"question_id": 151, "category": "humanities", "turns": ["Who?", "Why?"]},
]
SINGLE = "Rate [[rating]], for example: Rating: [[5]].\nQ {question}\nA {answer}"
MULTI = "Q1 {question_1}\nA1 {answer_1}\nQ2 {question_2}\nA2 {answer_2}"
PROMPTS = {
    "single-v1": SINGLE,
    "single-math-v1": SINGLE + "\nREF {ref_answer_1}",
    "single-v1-multi-turn": MULTI,
    "single-math-v1-multi-turn": MULTI + "\nREF {ref_answer_1} {ref_answer_2}",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Four questions in FastChat's layout."""
    folder = tmp_path_factory.mktemp("mt_bench")
    references = [
        {"question_id": number, "choices": [{"turns": [f"ref {number} 1", f"ref {number} 2"]}]}
        for number in (111, 121)
    ]
    prompts = [
        {"name": name, "type": "single", "system_prompt": f"system of {name}", "prompt_template": template}
        for name, template in PROMPTS.items()
    ]
    (folder / "reference_answer").mkdir()
    files = {"question": QUESTIONS, "reference_answer/gpt-4": references, "judge_prompts": prompts}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("plain")
    special = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=2)
    tiny_model("llama", **special).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def judge(monkeypatch):
    """A judge on this machine: answers from a queue, the last one again and again; it keeps what it was asked.

    An answer is a text, or (status, headers) for an error, or bytes for a body of its own.
    """
    monkeypatch.setattr(mt_bench, "FIRST_PAUSE_SECONDS", 0.0)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append((self.path, self.headers.get("Authorization"), body))
            answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            status, headers = answer if isinstance(answer, tuple) else (200, {})
            if answer is None or isinstance(answer, str):
                answer = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
            body = answer if isinstance(answer, bytes) else b'{"error": "no\\nidea"}'
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answers = [], ["Fine. Rating: [[7]]"]
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def words(folder, bench, output, url=None, *more):
    given = ["evaluate", folder, "--tasks", "mt_bench", "--mt_bench_path", bench, "--output", output]
    given += ["--max_new_tokens", "6", "--device", "cpu"]
    given += ["--judge_url", url, "--judge_model", "judy"] if url else []
    return [str(word) for word in (*given, *more)]


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- one run ---------------------------------------------------------------------------------------------------------


def test_a_run(folder, bench, judge, tmp_path, monkeypatch, capsys):
    """What the judge is asked, what is kept, and the scores."""
    monkeypatch.setenv("MY_KEY", "secret")
    judge.answers = [
        "Rating: [[8]]",
        "Rating: [[6.5]]",
        "[[2]]",
        None,
        "[[10]]",
        "Rating: [4]",
        "[[9]]",
        "[[99]]",
    ]
    output = tmp_path / "r.json"
    assert main(words(folder, bench, output, judge.url, "--judge_key_variable", "MY_KEY")) == 0
    answers = {row["question_id"]: row["choices"][0]["turns"] for row in rows(tmp_path / "r.mt_bench/answers.jsonl")}
    assert set(answers) == {81, 111, 121, 151} and all(len(turns) == 2 for turns in answers.values())
    paths, keys, bodies = zip(*judge.asked, strict=True)
    assert set(paths) == {"/v1/chat/completions"} and set(keys) == {"Bearer secret"} and len(bodies) == 8
    assert all((body["model"], body["temperature"], body["max_tokens"]) == ("judy", 0, 2048) for body in bodies)
    first, second, math_first, math_second = ([m["content"] for m in body["messages"]] for body in bodies[:4])
    a = answers[81]
    assert first == [
        "system of single-v1",
        PROMPTS["single-v1"].replace("{question}", "Say red.").replace("{answer}", a[0]),
    ]
    assert second == ["system of single-v1-multi-turn", f"Q1 Say red.\nA1 {a[0]}\nQ2 Say it twice.\nA2 {a[1]}"]
    assert math_first[0] == "system of single-math-v1" and math_first[1].endswith("REF ref 111 1")
    assert "Q Add 1 {and} 1.\n" in math_first[1] and math_second[1].endswith("REF ref 111 1 ref 111 2")
    kept = rows(tmp_path / "r.mt_bench/judgments.jsonl")
    assert [row["score"] for row in kept] == [8, 6.5, 2, -1, 10, 4, 9, -1]
    assert [(row["question_id"], row["turn"]) for row in kept[:3]] == [(81, 1), (81, 2), (111, 1)]
    text = output.read_text()
    result = json.loads(text)["results"]["mt_bench"]
    assert "secret" not in text + (tmp_path / "r.mt_bench/judgments.jsonl").read_text()
    score = result["metrics"]["score"]  # (8 + 6.5) / 2, 2, (10 + 4) / 2, 9
    values = torch.tensor([7.25, 2.0, 7.0, 9.0], dtype=torch.float64)
    assert score["value"] == pytest.approx(values.mean().item())
    assert score["stderr"] == pytest.approx(values.std().item() / math.sqrt(4))
    assert result["metrics"]["first_turn"]["value"] == 7.25 and result["metrics"]["second_turn"]["value"] == 5.25
    assert result["unrated"] == 2 and result["categories"]["coding"]["metrics"]["score"]["value"] == 7.0
    assert "mt_bench  score " in capsys.readouterr().out


def test_temperatures_and_seeds(folder, bench, tokenizer, monkeypatch):
    """Greedy where the category says so; drawn answers are the same again, others with another seed."""
    from transformers import AutoModelForCausalLM

    model, seen = AutoModelForCausalLM.from_pretrained(folder), {}
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **how: seen.update(how) or generate(**how))

    def answers(question, seed):
        state = torch.get_rng_state()
        found = mt_bench.answer_question(model, tokenizer, question, 12, seed)
        assert torch.equal(state, torch.get_rng_state())
        return found

    writing, mathematics = QUESTIONS[:2]
    assert answers(writing, 0) == answers(writing, 0) != answers(writing, 1)
    assert (seen["do_sample"], seen["temperature"], seen["top_p"], seen["top_k"]) == (True, 0.7, 1.0, 0)
    assert answers(mathematics, 0) == answers(mathematics, 1) and seen["do_sample"] is False
    greedy = answers(mathematics, 0)
    model.generation_config.update(repetition_penalty=5.0, no_repeat_ngram_size=1, min_p=0.9)
    assert answers(mathematics, 0) == greedy and model.generation_config.repetition_penalty == 5.0
    long = {**writing, "turns": ["Say red. " * 200, "Why?"]}
    assert answers(long, 0) == ["", ""]  # more than max_position_embeddings


def test_limit_is_spread_over_the_categories(folder, bench, judge, tmp_path):
    assert main(words(folder, bench, tmp_path / "r.json", judge.url, "--limit", "2")) == 0
    assert {row["question_id"] for row in rows(tmp_path / "r.mt_bench/answers.jsonl")} == {81, 121}


# --- a judge that is busy, fails, or refuses -------------------------------------------------------------------------


def test_a_busy_judge_is_asked_again(folder, bench, judge, tmp_path):
    judge.answers = [(429, {"Retry-After": "0"}), (503, {}), b"not json", b"{}", "Rating: [[3]]"]
    assert main(words(folder, bench, tmp_path / "r.json", judge.url)) == 0
    assert len(judge.asked) == 12
    assert json.loads((tmp_path / "r.json").read_text())["results"]["mt_bench"]["metrics"]["score"]["value"] == 3


def test_pauses_grow(judge, monkeypatch):
    pauses = []
    monkeypatch.setattr(mt_bench, "FIRST_PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(mt_bench.time, "sleep", pauses.append)
    judge.answers = [(500, {}), (500, {}), (429, {"Retry-After": "7"}), (500, {})]
    with pytest.raises(mt_bench.JudgeError, match="did not answer in 5 attempts; the last one met HTTP 500: "):
        mt_bench.Judge(judge.url, "judy", None, 5).ask([])
    assert pauses == [1.0, 2.0, 7.0, 8.0]
    assert judge.asked[0][1] is None  # no key, no header


def test_a_redirect_is_not_followed(judge):
    """It would get the key."""
    judge.answers = [(302, {"Location": f"{judge.url}/elsewhere"})]
    with pytest.raises(mt_bench.JudgeError, match="refuses with HTTP 302"):
        mt_bench.Judge(judge.url, "judy", "secret", 3).ask([])
    assert len(judge.asked) == 1


def test_a_failure_keeps_what_was_judged(folder, bench, judge, tmp_path, capsys):
    """One line and status 1; the next call asks for the rest only, and answers nothing again."""
    output, files = tmp_path / "r.json", tmp_path / "r.mt_bench"
    judge.answers = ["[[5]]", "[[5]]", "[[5]]", (401, {})]
    with pytest.raises(SystemExit) as stop:
        main(words(folder, bench, output, judge.url))
    line = str(stop.value.code)
    assert "\n" not in line and "refuses with HTTP 401" in line and f"3 of 8 judgments are kept in {files}" in line
    assert not output.exists() and len(judge.asked) == 4
    with open(files / "judgments.jsonl", "a") as stream:
        stream.write('{"question_id": 111, "turn"')  # as if it had been cut off while writing
    before, judge.answers, judge.asked = (files / "answers.jsonl").read_bytes(), ["[[6]]"], []
    assert main(words(folder, bench, output, judge.url)) == 0
    assert len(judge.asked) == 5 and (files / "answers.jsonl").read_bytes() == before
    assert len(rows(files / "judgments.jsonl")) == 8
    assert json.loads(output.read_text())["results"]["mt_bench"]["metrics"]["score"]["value"] == 45 / 8


def test_answers_first_and_a_judge_later(folder, bench, judge, tmp_path):
    output = tmp_path / "r.json"
    assert main(words(folder, bench, output)) == 0
    result = json.loads(output.read_text())["results"]["mt_bench"]
    assert result["metrics"] == {} and result["answers"] == 4 and result["complete"] is False
    # Half of the answers are lost; the others stay.
    file = tmp_path / "r.mt_bench/answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2]))
    assert main(words(folder, bench, output, judge.url)) == 0
    again = file.read_text().splitlines(keepends=True)
    assert again[:2] == lines[:2]
    assert [json.loads(line)["choices"] for line in again] == [json.loads(line)["choices"] for line in lines]
    assert json.loads(output.read_text())["results"]["mt_bench"]["metrics"]["score"]["value"] == 7


def test_an_unreachable_judge(folder, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(mt_bench, "FIRST_PAUSE_SECONDS", 0.0)
    with pytest.raises(SystemExit, match="did not answer in 2 attempts; the last one met .*refused"):
        main(words(folder, bench, tmp_path / "r.json", "http://127.0.0.1:9/v1", "--judge_attempts", "2"))


def test_answers_of_another_model_stay(folder, bench, tmp_path, tokenizer, capsys):
    assert main(words(folder, bench, tmp_path / "r.json")) == 0
    (tmp_path / "r.json").unlink()
    file = tmp_path / "r.mt_bench/answers.jsonl"
    before = file.read_bytes()
    assert main(words(folder, bench, tmp_path / "r.json", None, "--seed", "1")) == 2
    assert "holds answers with other seed. Name another output." in capsys.readouterr().err
    assert file.read_bytes() == before and not (tmp_path / "r.json").exists()


# --- material --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("Rating: [[5]]", 5),
        ("[[7.5]] or [[3]]", 7.5),
        ("[4]", 4),
        ("[[11]]", -1),
        ("[[0]]", -1),
        ("five", -1),
        ("", -1),
    ],
)
def test_ratings(text, value):
    assert mt_bench.rating(text) == value


def test_bad_material(folder, bench, tmp_path, refused):
    import shutil

    def line(name, text):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(bench, copy)
        (copy / name).write_text(text)
        return refused(*words(folder, copy, tmp_path / "r.json"))

    question = {"question_id": 1, "category": "writing", "turns": ["one"]}
    assert "question.jsonl line 1: expected two turns" in line("question.jsonl", json.dumps(question))
    assert "no reference answer to question 111" in line("reference_answer/gpt-4.jsonl", "")
    assert "no prompt 'single-v1'" in line("judge_prompts.jsonl", "")
    assert "not FastChat's layout" in line("judge_prompts.jsonl", "{}")
    assert "no question.jsonl, reference" in refused(*words(folder, tmp_path, tmp_path / "r.json"))
    assert "expected http:// or https://" in refused(*words(folder, bench, tmp_path / "r.json", "localhost:1"))


@pytest.mark.skipif(not (DATA / "mt_bench").is_dir(), reason=f"no {DATA}; runs wherever the benchmark's data is")
def test_the_published_material_is_read():
    material = mt_bench.read_material(DATA / "mt_bench")
    assert len(material.questions) == 80 and len(material.references) == 30
    for question in material.questions:
        for turn in (1, 2):
            name, messages = mt_bench.judge_prompt(material, question, ["MY FIRST", "MY SECOND"], turn)
            asked = messages[1]["content"]
            assert "MY FIRST" in asked and ("MY SECOND" in asked) == (turn == 2)
            assert question["turns"][0] in asked and (question["turns"][1] in asked) == (turn == 2)
            assert ("Reference Answer" in asked) == (question["category"] in mt_bench.WITH_REFERENCE)
            # Of the single-turn prompts the user's message has the instruction, of the others the system's.
            assert "[[rating]]" in messages[turn == 1]["content"]
