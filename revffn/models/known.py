"""Public models whose configs are known without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

CONFIGS = Path(__file__).parents[1] / "models" / "configs"


def known_models() -> list[str]:
    """Names that need no network."""
    return sorted(file.stem for file in CONFIGS.glob("*.json"))


def load_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """A model's config: of a folder, of a known name (with or without its organisation), else from the Hub.

    Raises:
        ValueError: None of these.
    """
    file = CONFIGS / f"{name.rstrip('/').split('/')[-1].lower()}.json"
    if file.is_file() and not Path(name).is_dir():
        values = json.loads(file.read_text()) | overrides
        return AutoConfig.for_model(values.pop("model_type"), **values)
    try:
        return AutoConfig.from_pretrained(name, **overrides)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"No config for model {name!r}: it is not a folder with a config.json, nor to be had from the Hub. Known "
            f"without either: {', '.join(known_models())}."
        ) from error
