"""Amounts of memory, read and written."""

from __future__ import annotations

import re


def gib(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.2f} GiB"


def parse_bytes(text: str) -> int:
    """`24GiB`, `80 GB`, `24` (GiB) -> bytes.

    Raises:
        ValueError: Something else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GiB|GB|G|MiB|MB|)\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise ValueError(f"{text!r} is not an amount of memory. Write it like 24GiB or 80GB.")
    unit = {"gib": 2**30, "g": 2**30, "": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}[match[2].lower()]
    return int(float(match[1]) * unit)
