"""Records as examples: the columns alone say what a record is.

Every record is checked, and a bad one is named with its line. A message keeps every field it has, for the chat
template.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..recipe import InputError

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
"""What `from` says in ShareGPT's conversations, and the role it means."""
TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold a text if they are there; others, like tool_calls, may hold anything."""
MAX_DEPTH = 64  # of values in a message or in tools; templates and Arrow walk them recursively


class Example(dict[str, Any]):
    """A conversation, `{"prompt": messages, "completion": messages}`, and `tools` if there are any; or plain text,
    `{"text": text}` or `{"prompt": text, "completion": text}`, which no chat template writes.

    Attributes:
        where: The place it was read from, for error messages.
        layout: The name of its columns' layout.
        learns_completion: Of a conversation only the completion is learnt, not what the assistant says before.
    """

    where: str = ""
    layout: str = ""
    learns_completion: bool = False


def is_plain(example: dict[str, Any]) -> bool:
    """Whether it is text as it is, not a conversation."""
    return "text" in example or isinstance(example["prompt"], str)


def conversation(record: Any, where: str) -> Example:
    """One record as an example.

    Raises:
        InputError: It has none of the known columns, or a column does not hold what it should.
    """
    columns = set(record) if isinstance(record, dict) else set()
    layout = next((layout for layout in LAYOUTS if columns.issuperset(layout.needed)), None)
    if layout is None:
        names = ", ".join(sorted(shown(name).strip("'") for name in columns)) or f"none (a {type(record).__name__})"
        raise InputError(f"{where}: missing columns. Found: {names[:400]}. Accepted: {ACCEPTED}. Rename the columns.")
    found = layout.read(record, where)
    for part, value in found.items():
        is_messages = part in ("prompt", "completion") and not isinstance(value, str)
        check_texts(value, "messages" if is_messages else part, where)
    found.where, found.layout = where, layout.name
    return found


# --- layouts ---------------------------------------------------------------------------------------------------------


def from_columns(instruction: str, context: str, response: str, record: dict[str, Any], where: str) -> Example:
    """One question and its answer; the context may be missing or empty."""
    texts = [record[instruction], record.get(context), record[response]]
    texts[1] = "" if texts[1] is None else texts[1]
    for column, text in zip((instruction, context, response), texts, strict=True):
        check_text(text, column, where, may_be_empty=column == context)
    prompt = "\n\n".join(text for text in texts[:2] if text.strip())
    return Example(
        prompt=[{"role": "user", "content": prompt}], completion=[{"role": "assistant", "content": texts[2]}]
    )


def from_text(record: dict[str, Any], where: str) -> Example:
    check_text(record["text"], "text", where)
    return Example(text=record["text"])


def from_prompt(record: dict[str, Any], where: str) -> Example:
    """TRL's: two texts as they are, or two lists of messages."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        for column in ("prompt", "completion"):
            check_text(record[column], column, where)
        return Example(prompt=prompt, completion=completion)
    if not isinstance(prompt, list) or not isinstance(completion, list) or not completion:
        raise InputError(
            f"{where}: prompt and completion must be two texts, or two lists of messages, got {shown(prompt)} and "
            f"{shown(completion)}. Correct the record."
        )
    found = from_messages([*prompt, *completion], len(prompt), record, where, "prompt and completion")
    found.learns_completion = True
    return found


def from_chat(record: dict[str, Any], where: str) -> Example:
    messages = record["messages"]
    return from_messages(messages, -1, record, where, "messages")


def from_sharegpt(record: dict[str, Any], where: str) -> Example:
    messages = record["conversations"]
    if isinstance(messages, list):
        messages = [sharegpt_message(m, f"{where}: conversations[{i}]") for i, m in enumerate(messages)]
        system = record.get("system")
        if isinstance(system, str) and system.strip():
            messages.insert(0, {"role": "system", "content": system})
    return from_messages(messages, -1, record, where, "conversations")


def sharegpt_message(message: Any, where: str) -> Any:
    """`{from, value}` as `{role, content}`; what is that already, or nothing, as it is."""
    if not isinstance(message, dict) or "from" not in message:
        return message
    speaker, value = message["from"], message.get("value")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        names = ", ".join(SHAREGPT_ROLES)
        raise InputError(f"{where}: from must be one of {names}, got {shown(speaker)}. Correct it.")
    rest = {name: part for name, part in message.items() if name not in ("from", "value")}
    if speaker != "function_call":
        return {"role": SHAREGPT_ROLES[speaker], "content": value} | rest
    calls = from_json(value, "value", where)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise InputError(f"{where}: value must be a call, {{name, arguments}}, got {shown(value)}. Correct it.")
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in calls]} | rest


def from_messages(messages: Any, completion: int, record: dict[str, Any], where: str, name: str) -> Example:
    """Messages, of which those from number `completion` on are the completion; and the record's tools."""
    ok = isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    if not ok or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: {name} must be a list of at least two {{role, content}}, the last by the assistant and not "
            "empty. Correct the record."
        )
    messages = [check_message(message, f"{where}: {name}[{i}]") for i, message in enumerate(messages)]
    if all(message["role"] in ("assistant", "system") for message in messages):
        raise InputError(f"{where}: {name} must be a list with a user's message too. Correct the record.")
    found = Example(prompt=messages[:completion], completion=messages[completion:])
    tools = check_tools(record.get("tools"), where)
    if tools:
        found["tools"] = tools
    return found


@dataclass(frozen=True)
class Layout:
    """Columns that belong together."""

    name: str
    needed: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[dict[str, Any], str], Example]
    """A record and its place -> the example."""

    def __str__(self) -> str:
        return " and ".join(self.needed) + (f" (and {', '.join(self.optional)})" if self.optional else "")


LAYOUTS = (
    Layout("messages", ("messages",), ("tools",), from_chat),
    Layout("sharegpt", ("conversations",), ("system", "tools"), from_sharegpt),
    Layout("prompt_completion", ("prompt", "completion"), ("tools",), from_prompt),
    *(
        Layout(name, (instruction, response), (context,), partial(from_columns, instruction, context, response))
        for name, instruction, context, response in (
            ("dolly", "instruction", "context", "response"),
            ("alpaca", "instruction", "input", "output"),
            ("question_answer", "question", "context", "answer"),
        )
    ),
    Layout("text", ("text",), (), from_text),
)
"""The first one that fits a record is taken: `text` last, because others have a column of that name beside."""
ACCEPTED = "; or ".join(map(str, LAYOUTS))


# --- checks ----------------------------------------------------------------------------------------------------------


def check_text(text: Any, column: str, where: str, may_be_empty: bool = False) -> None:
    if not isinstance(text, str) or not (text.strip() or may_be_empty):
        raise InputError(f"{where}: {column} must be a text that is not empty, got {shown(text)}. Correct the record.")


def from_json(text: Any, name: str, where: str) -> Any:
    """The value of a column that holds it as JSON, or as it is."""
    if not isinstance(text, str) or not text.strip():
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{where}: {name} is a text that is not JSON, got {shown(text)}. Correct it.") from None


def check_message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message with all that it holds; what is null counts as not there.

    Raises:
        InputError: `where` says which message it is.
    """
    message = {name: value for name, value in message.items() if value is not None}
    if message["role"] not in ROLES:
        raise InputError(f"{where}: role must be one of {', '.join(ROLES)}, got {shown(message['role'])}. Correct it.")
    calls = message.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InputError(f"{where}: tool_calls must be a list of objects, got {shown(calls)}. Correct the record.")
    if calls and message["role"] == "assistant":
        message.setdefault("content", "")
    for name in ("content", *TEXTS):
        if (name in message or name == "content") and not isinstance(message.get(name), str):
            raise InputError(f"{where}: {name} must be a text, got {shown(message.get(name))}. Correct the record.")
    said = [message["content"], *(message.get(name, "") for name in TEXTS[2:])]
    if message["role"] == "assistant" and not calls and not any(text.strip() for text in said):
        raise InputError(f"{where}: the assistant says nothing: content must not be empty. Correct or delete it.")
    return message


def check_tools(tools: Any, where: str) -> list[dict[str, Any]]:
    """The functions offered to the assistant: a list of objects, or JSON with one."""
    tools = from_json(tools, "tools", where)
    if not tools and not isinstance(tools, (bool, int, float)):
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{where}: tools must be a list of objects, got {shown(tools)}. Correct the record.")
    return tools


def check_texts(value: Any, name: str, where: str) -> None:
    """Refuse what no tokenizer takes: half a character, and values that are nested without end."""
    stack = [(value, 0)]
    while stack:
        value, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise InputError(f"{where}: {name} is nested more than {MAX_DEPTH} deep. Make it flatter.")
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"{where}: {name} holds {value[error.start]!r}, half a character (a lone surrogate). Write the "
                    "file as UTF-8, or delete it there."
                ) from None
        elif isinstance(value, dict):
            stack += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            stack += [(part, depth + 1) for part in value]


def shown(value: Any) -> str:
    """A value in an error message: short, one line, printable."""
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
