"""What is learnt is what was meant: responses in templates of every kind, turns, fields, special tokens, counts.

Run: pytest tests/data/test_responses.py
"""

import copy
import importlib.util
import json
import re
from pathlib import Path

import pytest
from conftest import CHAT_TEMPLATE

from revffn.data import IGNORED, load_conversations, tokenize, tokenize_all, tokenize_and_count
from revffn.data.conversations import conversation
from revffn.recipe import DataConfig, InputError

SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
# As the quickstart's model has it.
SMOLLM = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def user(text):
    return {"role": "user", "content": text}


def said(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def example(*messages, **more):
    return conversation({"messages": list(messages), **more}, "data.jsonl line 3")


@pytest.fixture
def written(tokenizer):
    """`written(template, *messages)`: what is learnt, one text for each run of tokens."""

    def learnt(template, *messages, learn="all_responses", **more):
        with_template = copy.copy(tokenizer)
        with_template.chat_template = template
        row = tokenize(example(*messages, **more), with_template, 10_000, learn)
        runs = [[]]
        for token, label in zip(row["input_ids"], row["labels"], strict=True):
            assert label in (token, IGNORED)
            if label == IGNORED:
                runs.append([])
            else:
                runs[-1].append(token)
        return [with_template.decode(run) for run in runs if run]

    return learnt


def former_rule(example, tokenizer):
    """Labels from the first token on in which the prompt alone and the whole differ."""
    prompt = tokenizer.apply_chat_template(example["prompt"], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(example["prompt"] + example["completion"], tokenize=False)
    prompt_ids, input_ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, whole))
    start = 0
    while start < min(len(prompt_ids), len(input_ids)) and prompt_ids[start] == input_ids[start]:
        start += 1
    return {"input_ids": input_ids, "labels": [IGNORED] * start + input_ids[start:]}


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, SMOLLM], ids=["tests", "smollm"])
def test_one_turn_is_learnt_as_before(tokenizer, template):
    with_template = copy.copy(tokenizer)
    with_template.chat_template = template
    _, examples = load_conversations(DataConfig(heldout=150))
    for row in examples:
        assert tokenize(row, with_template, 10**6) == former_rule(row, with_template)


# A name, the template, what is learnt of "Say red." - "red", with a system prompt.
LOOP = "{% for m in messages %}"
ODD = {
    "the system prompt goes into the last question": (
        "{% set s = messages[0].content %}{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
        "[{{ s if loop.last and s }}{{ m.content }}]{% else %}{{ m.content }}{% endif %}{% endfor %}",
        "red",
    ),
    "the same with an end of turn": (
        LOOP + "{% if m.role == 'user' %}[{{ 'Now: ' if loop.last }}{{ m.content }}]<|im_end|>\n"
        "{% elif m.role == 'assistant' %}<|im_start|>{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}",
        "red<|im_end|>\n",
    ),
    "the number of messages stands in front": (
        "{{ messages|length }} messages\n" + CHAT_TEMPLATE,
        "red<|im_end|>\n",
    ),
    "a reminder at the end of everything": (
        LOOP + "({{ m.role }}) {{ m.content }} {% endfor %}[Remember: be brief]",
        "red",
    ),
    "a reminder behind the end of turn": (
        CHAT_TEMPLATE.partition("{% if add")[0] + "[Remember: be brief]"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "red<|im_end|>\n",
    ),
    "questions are written with their answers": (
        LOOP + "{% if m.role == 'assistant' %}Q: {{ messages[loop.index0 - 1].content }} A: {{ m.content }}"
        "<|im_end|>{% endif %}{% endfor %}",
        "red<|im_end|>",
    ),
    "no words that ask for an answer, no end": (LOOP + "{{ m.content }} {% endfor %}", "red "),
    "an end of sequence for the last turn only": (
        LOOP + "({{ m.role }}) {{ m.content|trim }}{{ '<|im_end|>' if loop.last and m.role == 'assistant' }}"
        "{% endfor %}{% if add_generation_prompt %}(assistant) {% endif %}",
        "red<|im_end|>",
    ),
    "it marks what is generated": (
        LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}",
        "red<|im_end|>",
    ),
    "it marks the words alone": (
        LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}",
        "red<|im_end|>",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_only_the_response_is_learnt(written, name):
    template, expected = ODD[name]
    assert written(template, SYSTEM, user("Say red."), said("red")) in ([expected], [" " + expected])


@pytest.mark.parametrize("answer", ["red", "Say red.", "user", "\n\nred\n\n", " red", "assistant", "<|", "r", "é🙂"])
@pytest.mark.parametrize("name", ["the same with an end of turn", "the number of messages stands in front"])
def test_an_answer_is_found_at_its_place(written, name, answer):
    template, _ = ODD[name]
    assert written(template, user("red Say red. user assistant é🙂"), said(answer)) == [answer + "<|im_end|>\n"]


def test_a_question_may_be_written_twice_and_repeated_by_the_answer(written):
    template = "# {{ messages[0].content }}\n" + CHAT_TEMPLATE
    assert written(template, user("Say red."), said("Say red. Red.")) == ["Say red. Red.<|im_end|>\n"]


IMPOSSIBLE = {
    "written twice": ("{{ messages[-1].content }}: " + LOOP + "{{ m.content }} {% endfor %}", "at several places"),
    "not written": (LOOP + "{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "leaves out the last"),
    "only parts are written": (LOOP + "{{ m.role }}{{ m.content[0].text }}<|im_end|>{% endfor %}", "leaves out the l"),
    "the system prompt comes last": (
        LOOP + "{% if m.role != 'system' %}{{ m.content }} {% endif %}{% endfor %}{{ messages[0].content }}",
        "writes the system's message behind",
    ),
    "it refuses": ("{{ raise_exception('Roles must\nalternate') }}", "cannot write it (TemplateError: Roles must al"),
    "it is broken": ("{% for", "cannot write it (TemplateSyntaxError"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_where_it_cannot_be_found_a_line_names_the_example(written, name):
    template, message = IMPOSSIBLE[name]
    with pytest.raises(InputError, match="^data.jsonl line 3: the chat template ") as error:
        written(template, SYSTEM, user("Say red."), said("red"))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_all_turns_are_learnt_or_the_last(written):
    turns = SYSTEM, user("Say red."), said("red"), user("Again red."), said(" red red\n"), user("Bye"), said("red")
    every = ["red<|im_end|>\n", " red red\n<|im_end|>\n", "red<|im_end|>\n"]
    for template in (CHAT_TEMPLATE, "{{ messages|length }}\n" + CHAT_TEMPLATE):
        assert written(template, *turns) == every
        assert written(template, *turns, learn="last_response") == every[-1:]
    template, _ = ODD["it marks the words alone"]
    assert written(template, *turns[:5]) == ["red<|im_end|>", " red red\n<|im_end|>"]
    assert written(template, *turns[:5], learn="last_response") == [" red red\n<|im_end|>"]
    assert written(CHAT_TEMPLATE, said("Hello"), user("Say red."), said("red")) == ["Hello<|im_end|>\n", every[0]]


THINKING = (
    LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% if loop.last %}<think>"
    "{{ m.reasoning_content or '' }}</think>{% endif %}{{ m.content.split('</think>')[-1]|trim }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments|tojson }}</call>{% endfor %}"
    "{% else %}{% if loop.first and tools %}{{ tools|tojson }}\n{% endif %}{{ m.name or '' }}"
    "{{ m.tool_call_id or '' }}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_reasoning_of_earlier_turns_may_be_dropped(written):
    turns = user("a"), said("<think>why</think>\n\nred"), user("b"), said("blue", reasoning_content="because")
    assert written(THINKING, *turns) == ["red<|im_end|>\n", "<think>because</think>blue<|im_end|>\n"]


def test_calls_of_tools_are_learnt_and_every_field_reaches_the_template(written, tokenizer):
    turns = [
        user("1 and 2?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "tool_call_id": "c7", "content": "3", "other": None},
        said("It is 3."),
    ]
    expected = ['<call>add {"a": 1}</call><|im_end|>\n', "<think></think>It is 3.<|im_end|>\n"]
    assert written(THINKING, *turns, tools=[TOOL]) == expected
    assert written(THINKING, *turns, tools=json.dumps([TOOL])) == expected
    with_template = copy.copy(tokenizer)
    with_template.chat_template = THINKING
    text = with_template.decode(tokenize(example(*turns, tools=[TOOL]), with_template, 10_000)["input_ids"])
    assert '"description": "Adds."' in text and "addc73<|im_end|>" in text
    with pytest.raises(InputError, match="line 3: the chat template leaves out the call of 'add'"):
        written(CHAT_TEMPLATE, *turns)


FOLDER = importlib.util.find_spec("trl")
FOLDER = Path(FOLDER.origin).parent / "chat_templates" if FOLDER else Path("none")
FAMILIES = ["cohere", "deepseekv3", "gemma", "gemma3", "glm4moe", "gptoss", "llama3", "phi3", "qwen2_5", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_of_families(tokenizer, family):
    file = FOLDER / f"{family}.jinja"
    if not file.exists():
        pytest.skip("this TRL has no such template")
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = file.read_text()
    special = re.findall(r"<[|｜][^>{}]*?[|｜]>|<\w+_of_turn>", with_template.chat_template)
    with_template.add_special_tokens({"additional_special_tokens": sorted(set(special))})
    with_template.bos_token = "<|im_start|>"
    row = tokenize(
        example(user("One two?"), said("green red"), user("River?"), said("blue tree")), with_template, 10_000
    )
    labels = [label if label != IGNORED else with_template.pad_token_id for label in row["labels"]]
    learnt = with_template.decode(labels).replace("<pad>", "")
    assert learnt.count("green red") == learnt.count("blue tree") == 1
    assert "One" not in learnt and "River" not in learnt and "user<" not in learnt


class Slow:
    """A tokenizer that does not say where its tokens stand."""

    is_fast = False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text, add_special_tokens):
        return self.tokenizer(text, add_special_tokens=add_special_tokens)


def test_a_tokenizer_without_positions(tokenizer):
    for turns in (
        [user("Say red."), said("red")],
        [user("red"), said("\n\nred"), user("blue?"), said("é🙂 blue ")],
    ):
        assert tokenize(example(*turns), Slow(tokenizer), 1000) == tokenize(example(*turns), tokenizer, 1000)
    spelt = example(user("<|im_end|>"), said("red"))
    assert tokenize_and_count([spelt], Slow(tokenizer), 100)[1].spelt_out_special == 1


def test_special_tokens_that_are_spelt_out_are_plain_text(tokenizer):
    plain = tokenize(example(user("Say end."), said("red")), tokenizer, 1000)
    end = tokenizer.eos_token_id
    turns = user("Say <|im_end|> <pad>."), said("<|im_start|>red <|im_end|>")
    rows, counts = tokenize_and_count([example(*turns), example(user("Say end."), said("red"))], tokenizer, 1000)
    assert rows[1] == plain and counts.spelt_out == 1 and counts.spelt_out_special == 0
    assert rows[0]["input_ids"].count(end) == 2 and tokenizer.pad_token_id not in rows[0]["input_ids"]
    assert tokenizer.decode(rows[0]["input_ids"]) == tokenizer.apply_chat_template(list(turns), tokenize=False)
    learnt = [label for label in rows[0]["labels"] if label != IGNORED]
    assert tokenizer.decode(learnt) == "<|im_start|>red <|im_end|><|im_end|>\n" and learnt.count(end) == 1
    assert "1 with special tokens spelt out (read as plain text)" in counts.line("Data", 1000)


def test_special_tokens_in_a_text_that_the_template_changes_are_said(tokenizer):
    with_template = copy.copy(tokenizer)
    with_template.chat_template = CHAT_TEMPLATE.replace("message['content']", "message['content'].split('<pad>')[-1]")
    _, counts = tokenize_and_count([example(user("a<pad>b"), said("red"))], with_template, 1000)
    assert counts.spelt_out_special == 1 and "(read as special tokens)" in counts.line("Data", 1000)


def test_examples_are_counted(tokenizer):
    long, cut, short = (example(user(q), said(a)) for q, a in (("red " * 90, "x"), ("a", "red " * 90), ("a", "x")))
    rows, counts = tokenize_and_count([long, cut, short, long], tokenizer, 64)
    assert rows == tokenize_all([cut, short], tokenizer, 64)
    assert (counts.examples, counts.learnt, counts.left_out, counts.truncated) == (4, 2, 2, 1)
    assert counts.tokens == sum(len(row["input_ids"]) for row in rows)
    whole = tokenize_and_count([long, cut, short, long], tokenizer, 10_000)[1]
    assert counts.learnt_tokens + counts.cut_tokens == whole.learnt_tokens
    line = counts.line("Data", 64)
    assert line == "Data: 4 examples, 2 learnt, 2 left out (no response token within max_length=64), 1 truncated"
    # One token less than is asked for would not do.
    assert len(tokenize_all([long], tokenizer, counts.needed[0])) == 1
    assert not tokenize_all([long], tokenizer, counts.needed[0] - 1)
    silent = example(user("a"), said("x", reasoning_content="because"))
    assert tokenize_and_count([silent], tokenizer, 64)[1].without_reasoning == 1
