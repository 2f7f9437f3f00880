"""Where the responses stand in a conversation as the chat template writes it: characters, not tokens.

A template that marks what the assistant generates (`{% generation %}`) is taken at its word. Otherwise a response is
what follows the prompt that generation would be given, if the template writes that prompt as it is into the whole
conversation. Many do not: they write a prompt differently once an answer follows, or drop the reasoning of earlier
turns. There the response is found by what changes in the whole conversation when its message says something else.
Plain text needs no template: all of it is learnt, or the completion of a prompt.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from ..recipe import InputError
from .conversations import is_plain
from .files import reason

Span = tuple[int, int]
"""First character, and the one after the last."""
MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
SAID = ("content", "reasoning_content", "reasoning", "thinking")


class Chat:
    """A conversation and the template that writes it.

    Args:
        example: `{"prompt": messages, "completion": [message]}`, and `tools` if there are any.
        tokenizer: One with a chat template.
    """

    goes_on = False
    """Whether what is longer than a sequence goes on in the next one."""
    adds_special_tokens = False
    """Whether the tokenizer puts special tokens around the text; else they are in it."""

    def __init__(self, example: dict[str, Any], tokenizer: Any):
        self.messages: list[dict[str, Any]] = [*example["prompt"], *example["completion"]]
        self.tools = example.get("tools")
        # The first message that may be learnt.
        self.first = len(example["prompt"]) if getattr(example, "learns_completion", False) else 0
        self.where = getattr(example, "where", "") or f"the conversation {self.messages[0].get('content', '')[:40]!r}"
        self.tokenizer = tokenizer
        self.special = special_tokens(tokenizer)
        self.text = self.render(self.messages)

    def render(self, messages: list[dict[str, Any]], prompt: bool = False, tools: Any = None) -> str:
        """`messages` as text, with what asks the assistant to go on if it is a prompt.

        Raises:
            InputError: The template cannot write them.
        """
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools or self.tools, add_generation_prompt=prompt, tokenize=False
            )
        except Exception as error:  # a template may fail in any way, with raise_exception for one
            raise self.refuse(f"the chat template cannot write it ({reason(error)})") from None

    def refuse(self, why: str) -> InputError:
        return InputError(f"{self.where}: {why}. Correct the record, or the tokenizer's chat template.")

    def responses(self, learn: str) -> list[Span]:
        """The characters of `self.text` that are to be learnt, in order.

        Args:
            learn: `all_responses` or `last_response`.

        Raises:
            InputError: A response cannot be told apart from the rest.
        """
        every = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        turns = [i for i in every if i >= self.first][0 if learn == "all_responses" else -1 :]
        found = self.marked(turns, all_of_them=turns == every)
        if not found:
            found = [span for span in map(self.response, turns) if span is not None]
        starts = [0, *(end for _, end in found)]
        spans = [(max(start, before), end) for (start, end), before in zip(found, starts, strict=False)]
        self.check_calls(turns, spans)
        return [(start, end) for start, end in spans if start < end]

    def check_calls(self, turns: list[int], spans: list[Span]) -> None:
        """Calls of functions are all that some responses say."""
        learnt = "\n".join(self.text[start:end] for start, end in spans)
        for call in (call for turn in turns for call in self.messages[turn].get("tool_calls", [])):
            name = call.get("function", call).get("name")
            if isinstance(name, str) and name not in learnt:
                raise self.refuse(f"the chat template leaves out the call of {name[:40]!r}")

    def leaves_out_reasoning(self) -> bool:
        """Whether the last response has reasoning that the template does not write."""
        reasons = [str(self.messages[-1].get(name, "")).strip() for name in SAID[1:]]
        return any(reasons) and not any(text[:20] in self.text for text in filter(None, reasons))

    def marked(self, turns: list[int], all_of_them: bool) -> list[Span]:
        """What the template itself marks of the messages `turns`, which are the last by the assistant; with the
        end-of-turn token behind it, which teaches to stop."""
        from ..upstream import render_jinja_template

        template = self.tokenizer.get_chat_template(tools=self.tools)
        if not MARKS.search(template):
            return []
        (text,), (spans,) = render_jinja_template(
            conversations=[self.messages],
            tools=self.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        if text != self.text:
            return []
        if not all_of_them:
            first = self.changed(turns[0], self.text)
            spans = spans[-len(turns) :] if first is None else [span for span in spans if span[1] > first[0]]
        end = self.tokenizer.eos_token
        return [(a, b + len(end) if end and text.startswith(end, b) else b) for a, b in spans if a < b]

    def response(self, turn: int) -> Span | None:
        """What the assistant says in its message `turn`; None if the template leaves that message out."""
        return self.by_prefix(turn) or self.by_change(turn)

    def by_prefix(self, turn: int) -> Span | None:
        """What follows the prompt, where that is simply the beginning of the whole."""
        prompt, whole = self.before(turn, prompt=True), self.before(turn + 1)
        if not prompt or not whole or not (self.text.startswith(whole) and whole.startswith(prompt)):
            return None
        response = whole[len(prompt) :]
        words = str(self.messages[turn].get("content", "")).strip()
        others = (str(message.get("content", "")).strip() for message in self.messages[:turn])
        # Does it repeat a part of the prompt? That may be chance, or a template that writes prompts late.
        if not response or words not in response or any(map(response.__contains__, filter(None, others))):
            return None
        return len(prompt), len(whole)

    def by_change(self, turn: int) -> Span | None:
        """What changes with the message, from behind the words that ask for it to the end of the turn."""
        place = self.changed(turn, self.text, once=True)
        if place is None:
            if turn == len(self.messages) - 1:
                raise self.refuse("the chat template leaves out the last response")
            return None
        return self.start_of_turn(turn, place[0]), self.end_of_turn(turn, place[1])

    def start_of_turn(self, turn: int, start: int) -> int:
        """Where the response begins whose words begin at `start`: reasoning tags may stand in front of them."""
        before = self.changed(turn - 1, self.text) if turn else None
        prompt = self.before(turn, prompt=True)
        if before is None or prompt is None or before[1] > start:
            return start
        if self.text.startswith(prompt) and before[1] <= len(prompt) <= start:
            return len(prompt)
        without = self.before(turn) or ""
        asks = prompt[len(os.path.commonprefix([prompt, without])) :]
        at = self.text.rfind(asks, before[1], start) if asks else -1
        return start if at < 0 else at + len(asks)

    def end_of_turn(self, turn: int, end: int) -> int:
        """Where the response ends whose words end at `end`: what ends the turn is learnt too."""
        without, whole = self.before(turn), self.before(turn + 1)
        if turn < len(self.messages) - 1:
            if whole is None:
                return end
            if self.text.startswith(whole) and len(whole) >= end:
                return len(whole)
            place = self.changed(turn, whole, turn + 1)
            rest = whole[end if place is None else place[1] :]
            tail = whole_tokens(os.path.commonprefix([rest, self.text[end:]]), self.text[end:], self.special)
        else:
            tail = self.text[end:]
            self.check_end(turn, end)
        if without and not self.text.startswith(without) and not self.messages[turn].get("tool_calls"):
            tail = own_end(tail, without, self.special)
        return end + len(tail)

    def check_end(self, turn: int, end: int) -> None:
        """No other message may stand behind the last response."""
        for other, message in enumerate(self.messages[:turn]):
            words = str(message.get("content", "")).strip()
            if words and words in self.text[end:]:
                place = self.changed(other, self.text)
                if place is not None and place[1] > end:
                    raise self.refuse(
                        f"the chat template writes the {message['role']}'s message behind the last response, so the "
                        "two cannot be told apart"
                    )

    def before(self, turn: int, prompt: bool = False) -> str | None:
        """The messages before `turn` as text; None if the template refuses them alone."""
        if turn == len(self.messages) and not prompt:
            return self.text
        try:
            return self.render(self.messages[:turn], prompt) if turn else None
        except InputError:
            return None

    def changed(self, turn: int, text: str, number: int | None = None, once: bool = False) -> Span | None:
        """The part of `text`, which is the first `number` messages, that changes with message `turn`.

        Raises:
            InputError: The template writes it at several places, and it has to be `once`.
        """
        messages = self.messages[:number]
        for other, probes in changes(messages[turn], text):
            try:
                changed = self.render([*messages[:turn], other, *messages[turn + 1 :]])
            except InputError:
                continue
            if not any(map(changed.__contains__, probes)):
                continue
            if once and any(changed.count(probe) > 1 for probe in probes):
                raise self.refuse(
                    f"the chat template writes message {turn + 1} ({messages[turn]['role']}) at several places, so "
                    "responses cannot be told apart from the rest"
                )
            return difference(text, changed)
        return None

    def spelt_out(self) -> list[Span] | None:
        """Special tokens in `self.text` that come out of messages and tools, not out of the template; None if there
        are some and the template changes the text around them, so that they cannot be found."""
        if not any(map(self.special.search, strings([self.messages, self.tools]))):
            return []
        first, last = islice(unused(self.text), 2)
        mark: Callable[[str], str] = partial(self.special.sub, rf"{first}\g<0>{last}")
        try:
            marked = self.render(mapped(self.messages, mark), tools=mapped(self.tools, mark))
        except InputError:
            return None
        spans, removed = [], 0
        for found in re.finditer(f"{first}([^{first}{last}]*){last}", marked):
            spans.append((found.start() - removed, found.end() - removed - 2))
            removed += 2
        same = re.sub(f"[{first}{last}]", "", marked) == self.text
        return spans if same and marked.count(first) == marked.count(last) == len(spans) else None


class PlainText:
    """A text that no template writes, and what ends it. Special tokens that it spells out are read as such: many texts
    are conversations that have been written as text before.

    Args:
        example: `{"text": text}`, or `{"prompt": text, "completion": text}`.
        tokenizer: Any.
    """

    def __init__(self, example: dict[str, Any], tokenizer: Any):
        prompt, text = (example["prompt"], example["completion"]) if "prompt" in example else ("", example["text"])
        end = tokenizer.eos_token or ""
        self.where = getattr(example, "where", "") or f"the text {(prompt + text)[:40]!r}"
        self.tokenizer, self.special = tokenizer, special_tokens(tokenizer)
        self.start = len(prompt)
        self.text = prompt + text + ("" if text.endswith(end) else end)
        self.goes_on = not prompt
        begin = tokenizer.bos_token
        self.adds_special_tokens = not (begin and self.text.startswith(begin))

    def refuse(self, why: str) -> InputError:
        return InputError(f"{self.where}: {why}. Correct the record, or take another tokenizer.")

    def responses(self, learn: str) -> list[Span]:
        """The characters of `self.text` that are to be learnt."""
        return [(self.start, len(self.text))]

    def leaves_out_reasoning(self) -> bool:
        return False

    def spelt_out(self) -> list[Span] | None:
        """See `Chat.spelt_out`: here they cannot be told from those that are meant."""
        end = self.text.removesuffix(self.tokenizer.eos_token or "")
        return None if self.special.search(end) else []


def written(example: dict[str, Any], tokenizer: Any) -> Chat | PlainText:
    """An example as text."""
    return (PlainText if is_plain(example) else Chat)(example, tokenizer)


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Matches each of a tokenizer's."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    # The longest first: one may begin with another.
    special = "|".join(re.escape(token) for token in sorted(filter(None, special), key=len, reverse=True))
    return re.compile(special or r"(?!)")


def changes(message: dict[str, Any], text: str) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The message with other words, and these words: characters that `text` lacks. Then with other names of functions,
    for templates that write nothing else of a call."""
    said = [name for name in SAID if message.get(name)] or ["content"]
    probes = list(islice(unused(text), len(said) + 1))
    yield message | dict(zip(said, probes, strict=False)), probes[:-1]
    calls = message.get("tool_calls")
    if calls:
        yield message | {"tool_calls": [renamed(call, probes[-1]) for call in calls]}, probes[-1:]


def renamed(call: dict[str, Any], name: str) -> dict[str, Any]:
    return call | ({"function": call["function"] | {"name": name}} if "function" in call else {"name": name})


def difference(text: str, other: str) -> Span:
    """The part of `text` that is another one in `other`."""
    start = len(os.path.commonprefix([text, other]))
    rest, rest_of_other = text[start:], other[start:]
    return start, len(text) - len(os.path.commonprefix([rest[::-1], rest_of_other[::-1]]))


def whole_tokens(tail: str, text: str, special: re.Pattern[str]) -> str:
    """`tail`, the beginning of `text`, without a special token of `text` that it has only half."""
    for found in special.finditer(text):
        if found.start() < len(tail) < found.end():
            return tail[: found.start()]
    return tail


def own_end(tail: str, prompt: str, special: re.Pattern[str]) -> str:
    """What of `tail` ends a response, where a template may write more behind it: up to a special token and the space
    after it; or all, unless the prompt ends with the same words."""
    found = special.search(tail)
    if found:
        return tail[: found.end()] + re.match(r"\s*", tail[found.end() :])[0]
    return "" if tail.strip() and prompt.rstrip().endswith(tail.strip()) else tail


def unused(text: str) -> Iterator[str]:
    """Characters for private use that a text does not have."""
    return (c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in text)


def strings(value: Any) -> Iterator[str]:
    """All texts in a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    """A value with all texts in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {name: mapped(part, change) for name, part in value.items()}
    return [mapped(part, change) for part in value] if isinstance(value, list) else value
