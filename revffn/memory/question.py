"""All that `revffn plan` is asked at once, put to the planner."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..config import CrossBranchConfig, ReversibleConfig
from ..models.known import load_config
from .amounts import parse_bytes
from .answers import USUAL_TILE, Answer, Comparison, TileChoice
from .plan import check, choose_kept, choose_tile, keeping, plan, tiled, traffic, what_would_fit
from .simulation import Method
from .wire import wire

if TYPE_CHECKING:
    from ..options import PlanConfig


def method_of(question: PlanConfig) -> Method:
    """How is trained; with the usual tile and no kept layer where those are to be chosen."""
    reversible = ReversibleConfig(
        coupling=question.coupling,
        side_bits=question.side_bits,
        cross_branch=CrossBranchConfig(query_stream=question.query_stream),
        tile_tokens=USUAL_TILE if question.tile_tokens == "auto" else question.tile_tokens or None,
        kept_layers=0 if question.kept_layers == "auto" else question.kept_layers,
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
    # More fits with small tiles, and where no layer is kept.
    kept, roomiest = None, method
    if tile is not None:
        roomiest = tiled(method, min(USUAL_TILE, tile.tile_tokens or USUAL_TILE))
    if question.kept_layers == "auto" and gpu_bytes is not None:
        kept = choose_kept(hf_config, question.batch, question.tokens, method, limit_bytes=gpu_bytes)
        method = keeping(method, kept.kept_layers)
    options = dict(with_alternatives=question.alternatives, roomiest=roomiest)
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
    return Answer(plan=found, tile=tile, kept=kept, changes=changes, traffic=copied, wire=ways)


def simulated(question: PlanConfig, found: Answer) -> Comparison:
    """The whole step beside the plan; see `check`."""
    method = method_of(question)
    if found.tile is not None:
        method = tiled(method, found.tile.tile_tokens)
    if found.kept is not None:
        method = keeping(method, found.kept.kept_layers)
    return check(load_config(question.model), question.batch, question.tokens, method, found.plan)
