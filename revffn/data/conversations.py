"""Records as conversations: what TRL and datasets do not have.

Reads dolly, alpaca, question-answer and messages columns, checks every record, names the line of a bad one, and splits
off held-out examples by seed. A message keeps every field it has, for the chat template.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from ..recipe import DataConfig, InputError
from .files import find_file, read_file, read_hub

# columns of instruction, context, response; the context may be missing or empty
LAYOUTS = {
    "dolly": ("instruction", "context", "response"),
    "alpaca": ("instruction", "input", "output"),
    "gsm8k": ("question", "context", "answer"),
}
ACCEPTED = (
    "instruction and response (and context); or instruction and output (and input); or question and answer (and "
    "context); or messages"
)
ROLES = ("system", "user", "assistant", "tool")
TEXTS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold a text if they are there; others, like tool_calls, may hold anything."""
MAX_DEPTH = 64  # of values in a message or in tools; templates and Arrow walk them recursively


class Conversation(dict[str, Any]):
    """`{"prompt": messages, "completion": [message]}`, and `tools` if there are any.

    Attributes:
        where: The place it was read from, for error messages.
    """

    where: str = ""


def load_conversations(
    config: DataConfig, recipe: Path | None = None
) -> tuple[list[Conversation], list[Conversation]]:
    """Read, check and split a data set.

    Args:
        config: Where the data is and how many examples are used.
        recipe: The recipe's path, beside which a relative data path is looked for as well.

    Returns:
        (training, held-out), each a list of `{"prompt": messages, "completion": [message]}`, with `tools` where the
        record has some.

    Raises:
        InputError: The file is missing, empty or broken, a record lacks a column, or there are too few records.
    """
    file = find_file(config.path, recipe)
    records = read_file(file) if file else read_hub(config)
    conversations = [conversation(record, where) for record, where in records]
    name = str(file or config.path)
    if not conversations:
        raise InputError(f"{name}: no records. Give a file with at least one record with columns {ACCEPTED}.")
    wanted = config.num_heldout + (config.num_examples or 1)
    if len(conversations) < wanted:
        raise InputError(
            f"{name}: {len(conversations)} records, but {wanted} are needed: data.num_heldout={config.num_heldout} "
            f"and {config.num_examples or 'at least 1'} to train on. Lower data.num_heldout or data.num_examples."
        )
    order = list(range(len(conversations)))
    random.Random(config.seed).shuffle(order)
    end = None if config.num_examples is None else wanted
    held_out, training = order[: config.num_heldout], order[config.num_heldout : end]
    return [conversations[i] for i in training], [conversations[i] for i in held_out]


def conversation(record: Any, where: str) -> Conversation:
    """One record as a prompt and a completion.

    Raises:
        InputError: It has none of the known columns, or a column does not hold what it should.
    """
    columns = set(record) if isinstance(record, dict) else set()
    found = from_messages(record, where) if "messages" in columns else from_columns(record, columns, where)
    for part, value in found.items():
        check_texts(value, "messages" if part in ("prompt", "completion") else part, where)
    found.where = where
    return found


def from_columns(record: Any, columns: set[Any], where: str) -> Conversation:
    for instruction, context, response in LAYOUTS.values():
        if {instruction, response} <= columns:
            texts = [record[instruction], record.get(context), record[response]]
            texts[1] = "" if texts[1] is None else texts[1]
            for column, text in zip((instruction, context, response), texts, strict=True):
                if not isinstance(text, str) or (not text.strip() and column != context):
                    raise InputError(
                        f"{where}: {column} must be a text that is not empty, got {shown(text)}. Correct the record."
                    )
            prompt = "\n\n".join(text for text in texts[:2] if text.strip())
            return Conversation(
                prompt=[{"role": "user", "content": prompt}], completion=[{"role": "assistant", "content": texts[2]}]
            )
    names = ", ".join(sorted(shown(name).strip("'") for name in columns)) or f"none (a {type(record).__name__})"
    raise InputError(f"{where}: missing columns. Found: {names[:400]}. Accepted: {ACCEPTED}. Rename the columns.")


def from_messages(record: dict[str, Any], where: str) -> Conversation:
    messages = record["messages"]
    ok = isinstance(messages, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages)
    if not ok or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: messages must be a list of at least two {{role, content}}, the last by the assistant and not "
            "empty. Correct the record."
        )
    messages = [check_message(message, f"{where}: messages[{i}]") for i, message in enumerate(messages)]
    if all(message["role"] in ("assistant", "system") for message in messages):
        raise InputError(f"{where}: messages must be a list with a user's message too. Correct the record.")
    found = Conversation(prompt=messages[:-1], completion=messages[-1:])
    tools = check_tools(record.get("tools"), where)
    if tools:
        found["tools"] = tools
    return found


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
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise InputError(f"{where}: tools is a text that is not JSON, got {shown(tools)}. Correct it.") from None
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
