"""Names of transformers that it does not promise to keep: what each is needed for, and which versions have it.

The rest of the package uses what `transformers` itself exports, and these. Each has a test in
tests/test_upstream.py, and `make test-oldest` runs them under the oldest version that is allowed. Where
nothing else is said, a name is the same in 5.17 and 5.24.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization, masking_utils
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import create_causal_mask
from transformers.utils import output_capturing
from transformers.utils.chat_template_utils import render_jinja_template

OVERRIDDEN = {
    "PreTrainedModel": ("_init_weights",),
    "Trainer": ("_get_output_dir", "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_save_checkpoint"),
}
"""Methods that classes of ours have in place of transformers', by its class."""

# --- what a model's forward calls capture ----------------------------------------------------------------------------

active_collector = output_capturing._active_collector
"""Lists of outputs by name, of the model's forward call that runs now; None if nothing is asked for. The tiles of a
layer are put together in them."""


def layer_class(pretrained: type[PreTrainedModel]) -> type[nn.Module]:
    """The decoder layer class of a family: what its hidden states are captured from."""
    return pretrained._can_record_outputs["hidden_states"]


# --- classes made at run time, and what their configs choose ---------------------------------------------------------


def note_classes(model: PreTrainedModel, layers: Iterable[nn.Module]) -> None:
    """What a model notes of itself in `__init__`, again for the classes that it and its layers have been given since:
    what is captured, and which modules FSDP's wrapping policies and device maps leave whole.

    The registry goes by the class's name: until 5.22 in a plain dictionary, from 5.23 in one that takes the model for
    it. A model that is put into the plain one is never freed.
    """
    registry = output_capturing._CAN_RECORD_REGISTRY
    registry[str(type(model)) if type(registry) is dict else model] = type(model)._can_record_outputs
    model._no_split_modules = {type(layer).__name__ for layer in layers}


def implementation_flags(cls: type[PreTrainedModel]) -> dict[str, bool]:
    """Attributes for a class made from `cls`. transformers would read the source of its module, and there is none."""
    return {
        "_can_set_attn_implementation_cached_value": cls._can_set_attn_implementation(),
        "_can_set_experts_implementation_cached_value": cls._can_set_experts_implementation(),
    }


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """The one in force; before a model has been made, the one that was asked for."""
    return config._attn_implementation


def experts_implementation(config: PreTrainedConfig) -> str | None:
    """Likewise."""
    return getattr(config, "_experts_implementation", None)


def copy_implementations(config: PreTrainedConfig, to: PreTrainedConfig) -> None:
    """`to_dict` leaves them out."""
    to._attn_implementation = config._attn_implementation
    to._experts_implementation = config._experts_implementation


# --- experts ---------------------------------------------------------------------------------------------------------


def is_expert_parallel(experts: nn.Module) -> bool:
    """Whether it holds a part of its layer's experts only. From 5.18; 5.17 does not say."""
    return getattr(experts, "_is_expert_parallel", False)


def family_forward(experts: type[nn.Module]) -> Callable[..., Tensor]:
    """The forward that a family wrote, behind the decorator that asks the interface."""
    mro = experts.__mro__
    decorated = next(c.__dict__["forward"] for c in mro if hasattr(c.__dict__.get("forward"), "__wrapped__"))
    return inspect.unwrap(decorated)


# --- the loss --------------------------------------------------------------------------------------------------------


def has_own_loss(model: PreTrainedModel) -> bool:
    """Whether `model.loss_function` was set."""
    return hasattr(model, "_loss_function")


def remove_own_loss(model: PreTrainedModel) -> None:
    """`loss_function` can be set but not deleted."""
    del model._loss_function


# --- fake tensors ----------------------------------------------------------------------------------------------------


@contextmanager
def fake_tensors_as_real() -> Iterator[None]:
    """While open, what transformers decides by looking at a tensor it decides for fake ones as for real ones on a GPU.

    - It looks for packed sequences in the values of `position_ids`; of fake tensors it assumes the worst and makes
      masks of T x T.
    - grouped_mm on fake tensors knows bf16 only; transformers has a product of its own for other dtypes, which has a
      backward on fake tensors from 5.23.
    """
    can_use_grouped_mm = moe._can_use_grouped_mm

    def in_bf16(input: Tensor, *args: Any, **kwargs: Any) -> bool:
        return input.dtype == torch.bfloat16 and can_use_grouped_mm(input, *args, **kwargs)

    with (
        patch.object(moe, "_can_use_grouped_mm", in_bf16),
        patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None),
    ):
        yield


__all__ = [
    "ALL_EXPERTS_FUNCTIONS",
    "OVERRIDDEN",
    "active_collector",
    "attention_implementation",
    "copy_implementations",
    "create_causal_mask",
    "experts_implementation",
    "fake_tensors_as_real",
    "family_forward",
    "get_checkpoint_conversion_mapping",
    "has_own_loss",
    "implementation_flags",
    "initialization",
    "is_expert_parallel",
    "layer_class",
    "note_classes",
    "register_checkpoint_conversion_mapping",
    "remove_own_loss",
    "render_jinja_template",
]


# --- the trainer -----------------------------------------------------------------------------------------------------


def reports_to(name: str) -> bool:
    """Whether what training reports to under this name is installed.

    Raises:
        ValueError: No such name; the message lists those there are.
    """
    from transformers import integrations  # takes a second

    integrations.get_reporting_integration_callbacks([name])
    return name in integrations.get_available_reporting_integrations()
