"""`revffn chat`: the conversation is kept, answers are those of the model, two models answer the same questions.

Run: pytest tests/evaluation/test_chat.py
     pytest tests/evaluation/test_chat.py -m slow      on a real terminal, with Ctrl-C and Ctrl-D
"""

import io
import json
import os
import re
import shutil
import sys
import time

import pytest
import torch
from helpers import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config

from revffn.__main__ import main
from revffn.evaluation import chat
from revffn.evaluation.mt_bench import next_turn
from revffn.options import ChatConfig


@pytest.fixture(scope="module")
def talker(tmp_path_factory, tokenizer):
    """A folder with a tiny model whose answers are words, and others to other prompts."""
    folder = tmp_path_factory.mktemp("talker")
    special = dict(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=2)
    model = tiny_model(embedding_gain=10.0, **special)
    words = [re.fullmatch(r" ?[a-z]+", tokenizer.decode([i])) is not None for i in range(len(tokenizer))]
    with torch.no_grad():
        model.lm_head.weight[~torch.tensor(words)] = 0.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def ask(monkeypatch, capsys):
    """`ask(text, *words)`: the answers that `revffn chat` gives to the lines of `text`."""

    def run(text: str | bytes, *words: object) -> list[str]:
        content = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        capsys.readouterr()
        assert main(["chat", *map(str, words), "--max_new_tokens", "6"]) == 0
        return capsys.readouterr().out.split("\n\n")[:-1]

    return run


def expected(folder, *questions: str, system: str | None = None) -> list[str]:
    """The most likely answers of a conversation."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    messages, how = [{"role": "system", "content": system}] if system else [], dict(temperature=0, seed=0)
    for question in questions:
        messages.append({"role": "user", "content": question})
        answer = next_turn(model, tokenizer, messages, max_new_tokens=6, **how)
        messages.append({"role": "assistant", "content": answer})
    return [message["content"] for message in messages if message["role"] == "assistant"]


@pytest.fixture
def run_folder(recipe_file, tmp_path):
    def make(*words: str):
        assert main(["train", str(recipe_file("optimizer:\n  learning_rate: 3e-3\n")), *words]) == 0
        return tmp_path / "run"

    return make


def stripped(answers: list[str]) -> list[str]:
    return [answer.strip() for answer in answers]


def test_a_conversation(ask, talker):
    folder = talker
    first, second = expected(folder, "Say red 3 times.", "Say blue.")
    assert first and second and expected(folder, "Say blue.") != [second]  # what was said before counts
    said = ask("Say red 3 times.\n\n  Say blue. \n/clear\nSay red 3 times.\n/exit\nSay one.\n", folder, "--greedy")
    assert stripped(said) == [first, second, first]
    assert stripped(ask("Say red 3 times.", folder, "--temperature", "0")) == [first]


def test_a_system_prompt_stays(ask, talker):
    folder, system = talker, "tree " * 9
    (answer,) = expected(folder, "Say red.", system=system)
    assert expected(folder, "Say red.") != [answer]
    said = ask("Say red.\n/clear\nSay red.\n", folder, "--greedy", "--system", system)
    assert stripped(said) == [answer, answer]


def test_drawn_answers_go_by_the_seed(ask, talker):
    hot = ("--temperature", "5", "--top_p", "1")
    one, same, other = (ask("red\nred\n", talker, *hot, "--seed", seed) for seed in (1, 1, 2))
    assert one == same != other


def test_a_run_answers_as_the_model_it_exports_to(ask, run_folder, model_folder, tmp_path):
    folder = run_folder()
    assert main(["export", str(folder), str(tmp_path / "plain")]) == 0
    (answer,) = expected(tmp_path / "plain", "Say red 3 times.")
    # Two models: each by its name, one after the other.
    said = ask("Say red 3 times.\n", folder, model_folder(), "--greedy")
    names = [block.partition("\n")[0] for block in said]
    assert names == [f"{folder}:", f"{model_folder()}:"]
    answers = stripped(block.partition("\n")[2] for block in said)
    assert answers == [answer, *expected(model_folder(), "Say red 3 times.")]


def test_a_model_that_has_only_its_own_function(ask, run_folder):
    folder = run_folder("--reversible.coupling", "cross_branch", "--reversible.cross_branch.query_stream", "right")
    (answer,) = expected(folder / "model", "Say red.")
    assert stripped(ask("Say red.\n", folder, "--greedy")) == [answer]


def test_odd_input(ask, model_folder, capsys):
    assert len(ask(b"\xff\xfe red\n/\n/what\n\x00\n", model_folder(), "--greedy")) == 2
    assert ask("", model_folder()) == []


def test_no_room_is_said(model_folder, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"red " * 600 + b"\nred\n")))
    assert main(["chat", str(model_folder()), "--greedy", "--max_new_tokens", "3"]) == 0
    captured = capsys.readouterr()
    assert captured.err == chat.NO_ANSWER + "\n"
    assert captured.out.split("\n\n")[1].strip()  # the long question was not kept


def test_refusals(refused, model_folder, tmp_path):
    assert "no model with a tokenizer here" in refused("chat", "nowhere")
    assert "expected one model or two" in refused("chat", "a", "b", "c")
    assert "top_p must be above 0" in refused("chat", "a", "--top_p", "0")
    assert "model is missing" in refused("chat", "--greedy")
    assert "cannot be used" in refused("chat", model_folder(), "--device", "nothing")
    folder = tmp_path / "model"
    shutil.copytree(model_folder(), folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no system here') if messages[1:] else 'x' }}")
    line = refused("chat", folder, "--system", "Be red.")
    assert "cannot write a system prompt (no system here)" in line and "Leave --system out" in line
    (folder / "chat_template.jinja").unlink()
    assert "no chat template" in refused("chat", model_folder(), folder)
    T5Config(num_layers=1).save_pretrained(folder)
    assert "type 't5' does not continue a text" in refused("chat", folder)
    code = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(code))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    assert "code of its own" in refused("chat", folder)
    assert not (tmp_path / "ran").exists()


# --- on a terminal ---------------------------------------------------------------------------------------------------


@pytest.fixture
def speaker(talker):
    folder = talker
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    return lambda name="one": chat.Speaker(
        name, model, "plain", tokenizer, ChatConfig(model=name, greedy=True, max_new_tokens=40)
    )


def stop_after(pieces: int):
    def show(text: str) -> None:
        nonlocal pieces
        pieces -= 1
        if not pieces:
            raise KeyboardInterrupt

    return show


def test_what_was_said_of_a_stopped_answer_stays(speaker):
    one = speaker()
    whole = speaker().answer("Say red 3 times.", lambda text: None)
    with pytest.raises(KeyboardInterrupt):
        one.answer("Say red 3 times.", stop_after(1))
    said = one.messages[-1]["content"]
    assert one.messages[-1]["role"] == "assistant" and whole.startswith(said) and len(said) < len(whole)
    assert one.answer("Say blue.", lambda text: None)  # and it goes on


def test_a_question_without_an_answer_is_not_kept(speaker, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    one = speaker()
    monkeypatch.setattr(chat, "next_turn", stopped)
    with pytest.raises(KeyboardInterrupt):
        one.answer("Say red.", lambda text: None)
    assert one.messages == []


def test_ctrl_c_stops_an_answer_and_ctrl_d_ends(speaker, monkeypatch, capsys):
    typed = iter(["Say red.", KeyboardInterrupt, "Say blue.", "/clear", EOFError])

    def type_in(prompt):
        word = next(typed)
        if isinstance(word, type):
            raise word
        return word

    asked = []

    def show(speakers, question):
        asked.append(question)
        if question == "Say red.":
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", type_in)
    chat.converse([speaker()], show, on_terminal=True)
    assert asked == ["Say red.", "Say blue."]
    assert next(typed, None) is None and "Ctrl-D" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):  # a script's is the whole program's
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Say red.\n")))
        chat.converse([speaker()], show, on_terminal=False)


def test_side_by_side(speaker, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    chat.side_by_side([speaker("the first"), speaker("the second")], "Say red 3 times.")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "the first" in lines[1] and "the second" in lines[1]
    answer = speaker().answer("Say red 3 times.", lambda text: None)
    columns = [[part.strip() for part in line.split("│")[1:3]] for line in lines[3:-1]]
    for column in zip(*columns, strict=True):
        assert "".join("".join(column).split()) == "".join(answer.split())


@pytest.mark.slow
def test_on_a_real_terminal(talker):
    import pty

    words = [sys.executable, "-m", "revffn", "chat", str(talker), "--max_new_tokens", "200"]
    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, words)
    seen = b""

    def read_until(*marks: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 120
        while not all(mark in seen for mark in marks) and time.monotonic() < end:
            seen += os.read(terminal, 4096)
        assert all(mark in seen for mark in marks), seen

    read_until(b"Qwen2MoeForCausalLM", b"> ")
    seen = b""
    os.write(terminal, b"Say red 3 times.\n")
    read_until(b"times.\r\n")
    time.sleep(0.5)
    os.write(terminal, b"\x03")
    read_until(b"> ")
    os.write(terminal, b"\x04")
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
