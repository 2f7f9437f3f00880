"""Examples to learn from.

files.py          one file -> records, each with its file and line
sources.py        what a recipe names: files, folders, data sets of the Hub -> records
conversations.py  records -> messages or plain text, by their columns alone
split.py          training and held-out examples, drawn from all sources
responses.py      messages -> text; which of its characters are responses
tokens.py         text -> tokens with labels, what is left out, batches
tokenizer.py      the model's tokenizer, checked
command.py        `revffn data`
"""

from .conversations import Example
from .files import read_file
from .sources import find_file
from .split import SourceCounts, load_conversations, load_split
from .tokenizer import load_tokenizer
from .tokens import IGNORED, Counts, batches, check_left_out, tokenize, tokenize_all, tokenize_and_count

__all__ = [
    "IGNORED",
    "Counts",
    "Example",
    "SourceCounts",
    "batches",
    "check_left_out",
    "find_file",
    "load_conversations",
    "load_split",
    "load_tokenizer",
    "read_file",
    "tokenize",
    "tokenize_all",
    "tokenize_and_count",
]
