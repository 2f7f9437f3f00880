"""`revffn chat`: a conversation with one model, or the same questions to two.

On a terminal an answer is written as it is made, two side by side. Otherwise each line of standard input is a question
and the answers are printed as they are, so that a script can ask. Generation is MT-Bench's (`mt_bench.next_turn`),
with keys and values cached; of a reversible model the exported function answers.
"""

from __future__ import annotations

import contextlib
import re
import signal
import sys
from collections.abc import Callable, Iterator

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ..options import ChatConfig
from ..quiet import without_bars
from ..recipe import InputError
from .command import check_chat_template, find_device, find_model, load_model
from .mt_bench import next_turn

COMMANDS = "/clear forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer"
NO_ANSWER = "(no answer: the model ended at once, or the conversation leaves no room; /clear forgets it)"


def chat_command(config: ChatConfig) -> None:
    """Ask and answer until the questions end.

    Raises:
        InputError: A model cannot be used; nothing has been asked then.
    """
    device = find_device(config.device)
    names = [config.model] + ([config.other] if config.other else [])
    found = [find_model(name) for name in names]
    for name, (_, _, tokenizer) in zip(names, found, strict=True):
        check_chat_template(tokenizer, name)
        check_system(tokenizer, name, config.system)
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with without_bars():
        speakers = [
            Speaker(name, *load_model(folder, device), tokenizer, config)
            for name, (folder, _, tokenizer) in zip(names, found, strict=True)
        ]
    if on_terminal:
        print("\n".join(map(str, speakers)), COMMANDS + ".", sep="\n")
    show = side_by_side if on_terminal and len(speakers) > 1 else one_after_the_other
    converse(speakers, show, on_terminal)


def check_system(tokenizer: PreTrainedTokenizerBase, name: str, system: str | None) -> None:
    try:
        tokenizer.apply_chat_template(
            [*beginning(system), {"role": "user", "content": "Hello."}], add_generation_prompt=True, tokenize=False
        )
    except Exception as error:  # a template may fail in any way, with raise_exception for one
        what = "a system prompt" if system is not None else "a question"
        raise InputError(
            f"{name}: its chat template cannot write {what} ({' '.join(str(error).split())[:200]}). "
            + ("Leave --system out." if system is not None else "Correct the template.")
        ) from None


def beginning(system: str | None) -> list[dict[str, str]]:
    return [] if system is None else [{"role": "system", "content": system}]


class Speaker:
    """A model, and its side of the conversation."""

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        function: str,
        tokenizer: PreTrainedTokenizerBase,
        config: ChatConfig,
    ):
        self.name, self.model, self.function, self.tokenizer, self.config = name, model, function, tokenizer, config
        self.asked = 0
        self.clear()

    def __str__(self) -> str:
        model = self.model
        size = f"{model.num_parameters() / 1e6:,.1f} M parameters"
        function = "" if self.function == "plain" else f", {self.function}"
        return f"{self.name}: {type(model).__name__}{function}, {size}, {model.dtype}, {model.device}".replace(
            "torch.", ""
        )

    def clear(self) -> None:
        self.messages = beginning(self.config.system)

    def answer(self, question: str, show: Callable[[str], None]) -> str:
        """Ask, and show the answer piece by piece as it is made.

        What was said of an answer that is stopped stays in the conversation; a question that got none does not.
        """
        streamer = Streamer(self.tokenizer, show)
        self.messages.append({"role": "user", "content": question})
        self.asked += 1
        try:
            next_turn(
                self.model,
                self.tokenizer,
                self.messages,
                temperature=self.config.temperature,
                top_p=self.config.top_p,
                max_new_tokens=self.config.max_new_tokens,
                seed=self.config.seed + self.asked,
                streamer=streamer,
            )
        finally:
            streamer.end()
            if streamer.text.strip():
                self.messages.append({"role": "assistant", "content": streamer.text.strip()})
            else:
                self.messages.pop()
        return streamer.text.strip()


class Streamer(TextStreamer):
    """Hands an answer on as it is made, and keeps it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.text = show, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.text += text
            self.show(text)


def converse(speakers: list[Speaker], show: Callable[[list[Speaker], str], None], on_terminal: bool) -> None:
    for question in questions(on_terminal):
        if question == "/exit":
            return
        if question == "/clear":
            for speaker in speakers:
                speaker.clear()
        elif re.fullmatch(r"/\w*", question):
            print(f"{question}: not known. {COMMANDS}.", file=sys.stderr)
        elif question:
            try:
                show(speakers, question)
            except KeyboardInterrupt as error:
                if not on_terminal or ends(error):
                    raise
                print()


def questions(on_terminal: bool) -> Iterator[str]:
    if not on_terminal:
        sys.stdin.reconfigure(errors="replace")
        yield from map(str.strip, sys.stdin)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() edits lines and remembers them

    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            return print()
        except KeyboardInterrupt as error:
            if ends(error):
                raise
            print(f"\n{COMMANDS}.")


def ends(error: KeyboardInterrupt) -> bool:
    """Whether it was no Ctrl-C."""
    return getattr(error, "number", signal.SIGINT) != signal.SIGINT


# --- answers ---------------------------------------------------------------------------------------------------------


def one_after_the_other(speakers: list[Speaker], question: str) -> None:
    for speaker in speakers:
        if len(speakers) > 1:
            print(f"{speaker.name}:")
        if not speaker.answer(question, lambda text: print(text, end="", flush=True)):
            print(NO_ANSWER, file=sys.stderr)
        print("\n", flush=True)


def side_by_side(speakers: list[Speaker], question: str) -> None:
    """In columns: while they are made as much of the ends as the terminal has room for, then the whole answers."""
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    console, said = Console(), ["" for _ in speakers]

    def columns(rows: int | None = None) -> Table:
        table = Table(expand=True)
        for speaker in speakers:
            table.add_column(Text(speaker.name), ratio=1, overflow="fold")
        width = max(1, console.width // len(speakers) - 4)
        lines = [Text(text.strip()).wrap(console, width) for text in said]
        table.add_row(*(Text("\n").join(found[-rows:] if rows else found) for found in lines))
        return table

    try:
        with Live(console=console, transient=True, refresh_per_second=8) as live:
            for i, speaker in enumerate(speakers):

                def show(text: str, i: int = i) -> None:
                    said[i] += text
                    live.update(columns(max(1, console.height - 6)))

                said[i] = speaker.answer(question, show) or NO_ANSWER
    finally:
        console.print(columns())
