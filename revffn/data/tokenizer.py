"""The model's tokenizer, checked: what a user can get wrong is one line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..recipe import InputError, ModelConfig
from .conversations import Example, is_plain


def load_tokenizer(model: ModelConfig, examples: Iterable[Example]) -> Any:
    """The tokenizer of a model, with a padding token, and a chat template if an example is a conversation.

    Raises:
        InputError: There is none, or it lacks something.
    """
    from transformers import AutoTokenizer

    path, tokenizer = model.path, load_hf(AutoTokenizer, model)
    # transformers makes up a tokenizer of special tokens alone where a folder has none.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(f"{path}: no usable tokenizer in this folder. Copy the tokenizer's files there.")
    if not tokenizer.chat_template and not all(map(is_plain, examples)):
        raise InputError(
            f"{path}: the tokenizer has no chat template, so conversations cannot be written as tokens. Put a "
            "chat_template.jinja into the model's folder (an instruction-tuned model of the same family has one)."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError(f"{path}: the tokenizer has neither a padding nor an end token. Add one to it.")
    return tokenizer


def load_hf(auto_class: Any, model: ModelConfig) -> Any:
    """`from_pretrained` with one line when it fails. (Not told about its code, transformers asks the terminal.)"""
    path = model.path
    try:
        return auto_class.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # OSError, ValueError, hub errors: to the user all mean that nothing usable is there
        kind = {"AutoConfig": "model", "AutoTokenizer": "tokenizer"}[auto_class.__name__]
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{path}: the {kind} is code of its own, which is not run unasked. Read it, then set "
                "model.trust_remote_code: true."
            ) from None
        if not Path(path).is_dir():
            raise InputError(
                f"model.path {path!r}: no such folder, and no {kind} of that name can be had from the Hub. Correct "
                "model.path."
            ) from None
        raise InputError(f"{path}: no usable {kind} in this folder ({' '.join(str(error).split())[:200]}).") from None
