"""Any text that JSON and CSV can hold is read, or refused in one line with file and place; nothing is lost between.

Run: pytest tests/data/test_records.py
"""

import csv
import gzip
import json
import random

import pytest
from mutations import number_of

from revffn.data import load_conversations, tokenize_and_count
from revffn.recipe import DataConfig, InputError

RECORD = {"instruction": "Say red.", "context": "", "response": "red"}
TURNS = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


def load(path):
    return load_conversations(DataConfig(path=str(path), heldout=0))[0]


def with_turn(number, **fields):
    turns = [dict(turn) for turn in TURNS]
    turns[number] |= fields
    return {"messages": turns}


REFUSED = {
    "half a character": (
        r'{"instruction": "Say red.", "response": "red \ud83d"}',
        "holds '\\ud83d', half a character",
    ),
    "half a character in a role": (with_turn(0, role="\udc00"), "role must be one of"),
    "half a character in a tool": ({"messages": TURNS, "tools": [{"a": ["\ud83d"]}]}, "tools holds"),
    "half a character in a column": ({"\ud800": 1}, "missing columns. Found: \\ud800"),
    "nested without end": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "broken JSON (nested too deeply)"),
    "nested deeply": ({"messages": TURNS, "tools": [json.loads('{"a":' * 80 + "1" + "}" * 80)]}, "more than 64 deep"),
    "a huge number": ('{"instruction": ' + "1" * 5000 + ', "response": "a"}', "broken JSON (Exceeds the limit"),
    "a key twice": ('{"instruction": "a", "instruction": "b", "response": "c"}', "the key 'instruction' twice"),
    "a number for a context": (RECORD | {"context": 0}, "context must be a text that is not empty, got 0"),
    "a mark of byte order": ("\ufeff" + json.dumps(RECORD), "broken JSON"),
    "no messages": ({"messages": []}, "messages must be a list of at least two"),
    "messages are a text": ({"messages": "hello"}, "messages must be a list of at least two"),
    "an unknown role": (with_turn(0, role="bot"), "messages[0]: role must be one of system, user, assistant, tool"),
    "content of parts": (with_turn(0, content=[{"text": "a"}]), "messages[0]: content must be a text, got a list"),
    "no content": (with_turn(0, content=None), "messages[0]: content must be a text, got None"),
    "an empty answer": ({"messages": [*TURNS[:1], {"role": "assistant", "content": " "}, *TURNS]}, "says nothing"),
    "no question": ({"messages": [TURNS[1], TURNS[1]]}, "with a user's message"),
    "a name that is none": (with_turn(0, name=3), "messages[0]: name must be a text, got 3"),
    "calls that are none": (with_turn(1, tool_calls="add"), "messages[1]: tool_calls must be a list"),
    "tools that are none": ({"messages": TURNS, "tools": 3}, "tools must be a list of objects, got 3"),
    "tools in broken JSON": ({"messages": TURNS, "tools": "[{"}, "tools is a text that is not JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_records_that_are_refused(data_file, name):
    record, message = REFUSED[name]
    file = data_file([RECORD, record])
    with pytest.raises(InputError) as error:
        load(file)
    text = str(error.value)
    assert text.startswith(f"{file} line 2: ") and message in text and "\n" not in text and len(text) < 800
    text.encode()


@pytest.mark.parametrize("text", ["a\0b", "\ufeffa", "\u2028", "\x85a\x0b", "\U0010ffff", "\ufdd0", "a" * 200_000])
def test_texts_that_are_read(data_file, tmp_path, tokenizer, text):
    record = {"instruction": f"x{text}", "response": f"y{text}"}
    for kind in ("jsonl", "csv"):
        file = data_file([record])
        if kind == "csv":
            file = tmp_path / "data.csv"
            with file.open("w", newline="", encoding="utf-8") as out:
                csv.writer(out).writerows([list(record), list(record.values())])
        (example,) = load(file)
        assert example["completion"][0]["content"] == f"y{text}"
        if len(text) < 100:
            assert tokenize_and_count([example], tokenizer, 1000)[1].learnt == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("instruction,response\nName two.,red, and blue\n", "line 2: 3 cells, but the header has 2. Put quotation"),
        ("instruction,response\na,b\n\nName two.\n", "line 4: 1 cells, but the header has 2"),
        ("instruction,response,response\na,b,c\n", "line 1: the header names 'response' twice"),
        ('instruction,response\n"a\nb",c\nd,e,f\n', "line 4: 3 cells"),
    ],
)
def test_rows_that_are_not_as_the_header_says(tmp_path, text, message):
    limit = csv.field_size_limit()
    (tmp_path / "data.csv").write_text(text)
    with pytest.raises(InputError) as error:
        load(tmp_path / "data.csv")
    assert message in str(error.value) and csv.field_size_limit() == limit


def values(random_state):
    return random_state.choice(
        [None, 0, 1e400, True, "", " ", "\0", "\ud800", "<|im_end|>", "<pad>", [], {}, [[]], [{}], "x" * 500, "é🙂",
         -(10**30), {"role": "user"}, [None], TURNS, "system", "assistant", "tool", {"name": "f", "arguments": {}}]
    )  # fmt: skip


def mutated(random_state, value):
    """A value with something in it changed."""
    if random_state.random() < 0.2 or not isinstance(value, (dict, list)) or not value:
        return values(random_state)
    if isinstance(value, list):
        found = list(value)
        at = random_state.randrange(len(found))
        return random_state.choice(
            [found[:at] + found[at + 1 :], found + found[at:], [*found[:at], mutated(random_state, found[at])]]
        )
    found = dict(value)
    key = random_state.choice(list(found))
    names = ["content", "tool_calls", "tools", "messages", "response", "reasoning_content", "name"]
    return random_state.choice(
        [
            {name: part for name, part in found.items() if name != key},
            found | {key: mutated(random_state, found[key])},
            found | {random_state.choice(names): values(random_state)},
        ]
    )


def broken(random_state, data):
    """Bytes with a few of them changed, or cut."""
    data = bytearray(data)
    for _ in range(random_state.randrange(1, 4)):
        at = random_state.randrange(len(data) or 1)
        data[at : at + random_state.randrange(3)] = random_state.choice(
            [b"", b'"', b",", b"\n", b"\\", b"{", b"[", b"\0", b"\xff", b"\\ud800", b"\r", "é".encode(), b"1e999"]
        )
    return bytes(data)


def test_no_mutated_file_ends_in_a_traceback_and_no_example_is_lost(tmp_path, tokenizer):
    """Files with a record, a text or some bytes changed. What went in is learnt, left out or refused."""
    random_state, read, refused = random.Random(0), 0, 0
    good = [RECORD, {"messages": TURNS}, {"messages": [{"role": "system", "content": "x"}, *TURNS * 2], "tools": [{}]}]
    for i in range(number_of("data")):
        kind = random_state.choice(["jsonl", "json", "csv", "jsonl.gz"])
        records = [random_state.choice(good) for _ in range(4)]
        if random_state.random() < 0.6:
            records[random_state.randrange(4)] = mutated(random_state, random_state.choice(good))
        file = tmp_path / f"{i}.{kind}"
        if kind == "csv":
            text = "instruction,context,response\n" + '"a, b",,c\nd,"e\nf",g\n' * 2
        else:
            text = json.dumps(records) if kind == "json" else "\n".join(map(json.dumps, records))
        data, whole = text.encode(), random_state.random() >= 0.5
        if not whole:
            data = broken(random_state, data)
        file.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
        try:
            examples = load(file)
            _, counts = tokenize_and_count(examples, tokenizer, random_state.choice([8, 64, 1000]))
        except InputError as error:
            refused += 1
            assert "\n" not in str(error) and str(file) in str(error) and len(str(error)) < 1000
            str(error).encode()
        else:
            read += 1
            assert len(examples) == counts.examples == counts.learnt + counts.left_out
            assert len(examples) == 4 or not whole
    assert min(read, refused) > number_of("data") / 5
