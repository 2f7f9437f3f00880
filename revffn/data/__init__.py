"""Conversations to learn from.

files.py          files and data sets -> records, each with its file and line
conversations.py  records -> messages, training and held-out
responses.py      messages -> text; which of its characters are responses
tokens.py         text -> tokens with labels, what is left out, batches
"""

from .conversations import Conversation, load_conversations
from .files import find_file, read_file
from .tokens import IGNORED, Counts, batches, check_left_out, tokenize, tokenize_all, tokenize_and_count

__all__ = [
    "IGNORED",
    "Conversation",
    "Counts",
    "batches",
    "check_left_out",
    "find_file",
    "load_conversations",
    "read_file",
    "tokenize",
    "tokenize_all",
    "tokenize_and_count",
]
