"""All that `revffn plan` is asked at once, put to the planner."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..config import CrossBranchConfig, ReversibleConfig
from ..models.known import load_config
from .amounts import parse_bytes
from .answers import USUAL_TILE, Answer, Comparison, TileChoice
from .plan import check, choose_tile, plan, tiled, traffic, what_would_fit
from .simulation import Method
from .wire import wire

if TYPE_CHECKING:
    from ..options import PlanConfig


def method_of(question: PlanConfig) -> Method:
    """How is trained; with the usual tile where it is to be chosen."""
    reversible = ReversibleConfig(
        coupling=question.coupling,
        side_bits=question.side_bits,
        cross_branch=CrossBranchConfig(query_stream=question.query_stream),
        tile_tokens=USUAL_TILE if question.tile_tokens == "auto" else question.tile_tokens or None,
    ).resolve(calibrated=True)  # as `revffn train` does
    return Method(
        reversible=reversible,
        optimizer=question.optimizer,
        rounding=question.rounding,
        dtype=getattr(torch, question.dtype),
        weights=question.weights,
        gpus=question.gpus,
        parallel=question.parallel,
    )


def answer(question: PlanConfig) -> Answer:
    """Work everything out.

    Raises:
        ValueError: See `plan`, `load_config`, `parse_bytes`.
    """
    gpu_bytes = None if question.gpu is None else parse_bytes(question.gpu)
    method = method_of(question)
    hf_config = load_config(question.model)
    tile = None
    if question.tile_tokens == "auto":
        tile = TileChoice(USUAL_TILE, "no --gpu to fit")
        if gpu_bytes is not None:
            tile = choose_tile(hf_config, question.batch, question.tokens, method, limit_bytes=gpu_bytes)
        method = tiled(method, tile.tile_tokens)
    options = dict(with_alternatives=question.alternatives, tile_at_most=USUAL_TILE if tile else None)
    found = plan(hf_config, question.batch, question.tokens, method, gpu_bytes=gpu_bytes, **options)
    changes = []
    if gpu_bytes is not None and found.total_bytes > gpu_bytes:
        changes = what_would_fit(hf_config, question.batch, question.tokens, method, gpu_bytes=gpu_bytes)
    copied = None
    if question.weights == "host":
        copied = traffic(hf_config, method, question.link_gb_per_s * 1e9, question.tflops * 1e12)
    ways = []
    if question.gpus > 1:
        link = question.gpu_link_gb_per_s
        rates = (None if link is None else link * 1e9, question.tflops * 1e12)
        ways = wire(hf_config, question.batch, question.tokens, method, *rates)
    return Answer(plan=found, tile=tile, changes=changes, traffic=copied, wire=ways)


def simulated(question: PlanConfig, found: Answer) -> Comparison:
    """The whole step beside the plan; see `check`."""
    method = method_of(question)
    if found.tile is not None:
        method = tiled(method, found.tile.tile_tokens)
    return check(load_config(question.model), question.batch, question.tokens, method, found.plan)
