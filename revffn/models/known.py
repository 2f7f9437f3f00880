"""Public models whose configs are known without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONFIGS = Path(__file__).parents[1] / "models" / "configs"


def known_models() -> list[str]:
    """Names that need no network."""
    return sorted(file.stem for file in CONFIGS.glob("*.json"))


def config_file(name: str) -> Path:
    """Where a known model's config is; there may be none of that name (with or without its organisation)."""
    return CONFIGS / f"{name.rstrip('/').split('/')[-1].lower()}.json"


def load_config(name: str, **overrides: Any) -> PreTrainedConfig:
    """A model's config: of a folder, of a known name (with or without its organisation), else from the Hub.

    Raises:
        ValueError: None of these.
    """
    from transformers import AutoConfig  # takes seconds, which nobody needs who asks for the names

    file = config_file(name)
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
