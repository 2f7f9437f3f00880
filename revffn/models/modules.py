"""Which class every module of a model gets, asked for all of them before any is changed.

A module whose class or forward was put in place of the family's (kernels, hooks) keeps it where the walk goes through
it, and is refused where the walk would pass it by.
"""

from __future__ import annotations

from types import MethodType

from torch import nn
from transformers import PreTrainedModel

MADE: dict[tuple[type, type], type] = {}
"""Reversible classes of classes that are not the families' own, by mixin and class."""


def own_class(known: type, module: nn.Module) -> type:
    """The reversible class of a module: `known`, which stands for (mixin, the family's class), or for a module of
    another class one with the same mixin in front."""
    mixin, family = known.__bases__
    cls = type(module)
    if cls is family:
        return known
    if (mixin, cls) not in MADE:
        made = type(f"RevFFN{cls.__name__}", (mixin, cls), {"__module__": __name__})
        MADE[mixin, cls] = globals()[made.__name__] = made  # found there when a model is pickled
    return MADE[mixin, cls]


def check_modules(model: PreTrainedModel, classes: dict[str, type]) -> None:
    """Refuse a model that the walk would not run through as it is.

    Args:
        classes: The family's reversible ones, as `conversion.register_architecture` made them.

    Raises:
        ValueError: Names the module, and what to do.
    """
    named = {"model": (model.model, "backbone")}
    named |= {f"model.layers.{i}": (layer, "layer") for i, layer in enumerate(model.model.layers)}
    for name, (module, kind) in named.items():
        family = classes[kind].__bases__[1]
        if not isinstance(module, family):
            raise ValueError(
                f"{name} is a {type(module).__name__}, no {family.__name__} and no class made from it: the walk would "
                "pass over what is different. Convert the model first, then wrap or replace."
            )
        if is_patched(module):
            hooked = " It is a hook of accelerate's: accelerate.hooks.remove_hook_from_module(model, recurse=True)."
            raise ValueError(
                f"The forward of {name} was replaced on the instance, and the walk would not run through it. Convert "
                f"the model first, then patch it.{hooked if hasattr(module, '_hf_hook') else ''}"
            )


def is_patched(module: nn.Module) -> bool:
    """Whether something else than the class's forward stands on the instance."""
    forward = module.__dict__.get("forward")
    return forward is not None and not (
        isinstance(forward, MethodType) and forward.__func__ is type(module).forward and forward.__self__ is module
    )


def remove_idle_patches(model: PreTrainedModel) -> None:
    """Take the class's own forward off the instances: it would stand before that of the class to come."""
    for module in (model.model, model.model.norm, *model.model.layers):
        if "forward" in module.__dict__ and not is_patched(module):
            del module.__dict__["forward"]
