"""Conversations to learn from.

conversations.py  files and data sets -> messages -> tokens with labels -> batches
"""

from .conversations import IGNORED, batches, find_file, load_conversations, read_file, tokenize, tokenize_all

__all__ = ["IGNORED", "batches", "find_file", "load_conversations", "read_file", "tokenize", "tokenize_all"]
