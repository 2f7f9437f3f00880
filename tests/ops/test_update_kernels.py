"""The Triton kernels of the optimizer give the reference's bits, on ragged shapes, in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so all comparisons run in one process of their own. It shows
indexing, masks, orders of summation, noise and float32 arithmetic; benchmarks/kernels_update.py repeats the comparison
on a GPU.

Run: pytest tests/ops/test_update_kernels.py (needs triton)
"""

import os

import torch

SHAPES = [(5,), (1, 37), (70, 150), (3, 9, 20), (2, 40, 8), (131, 3)]
RULES = {
    "adafactor": dict(rule="adafactor", weight_decay=0.1),
    "adafactor, momentum": dict(rule="adafactor", momentum=0.9),
    "adafactor, no clipping": dict(rule="adafactor", clip_threshold=None, momentum=0.5),
    "adamw": dict(rule="adamw", weight_decay=0.1),
    "adamw8bit": dict(rule="adamw8bit", weight_decay=0.1),
    "sgd": dict(rule="sgd"),
    "sgd, momentum": dict(rule="sgd", momentum=0.9, weight_decay=0.1),
}
KINDS = {
    "bf16": (torch.bfloat16, "stochastic"),
    "nearest": (torch.bfloat16, "nearest"),
    "master": (torch.bfloat16, "master"),
    "float32": (torch.float32, "stochastic"),
}


def steps(rule, dtype, rounding, shapes, bad=None, **options):
    """Weights and states after two steps, and the gradients' norm; `bad`: the parameter whose second gradient is NaN."""
    from revffn.optim import NonFiniteGradientError, OptimizerInBackward

    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]
    optimizer = OptimizerInBackward(
        weights, lr=0.02, max_grad_norm=3.0, rounding=rounding, seed=11, chunk_bytes=4000, **{**RULES[rule], **options}
    )
    for step in range(2):
        for i, weight in enumerate(weights):
            # Sizes from 1e-3 to 1e3, so that an order of summation shows.
            spread = 10 ** (6 * torch.rand(weight.shape, generator=generator) - 3)
            weight.grad = (torch.randn(weight.shape, generator=generator) * spread).to(dtype)
            if step == 1 and bad == i:
                weight.grad.view(-1)[-1] = float("nan")
            with torch.no_grad():
                optimizer._update(weight)
        try:
            optimizer.step()
        except NonFiniteGradientError:
            assert bad is not None
    states = [optimizer.state[w][name] for w in weights for name in sorted(optimizer.state[w])]
    return [w.detach() for w in weights], states, optimizer.grad_norm


def both(*args, **options):
    """`steps` by the reference and by the kernels."""
    from revffn.ops import dispatch

    found = []
    for choice in ("torch", "triton"):
        dispatch.implementation.cache_clear()
        dispatch.requested.cache_clear()
        os.environ["REVFFN_KERNELS"] = choice
        assert dispatch.implementation("cpu") == choice
        found.append(steps(*args, **options))
    return found


def same(ours, others):
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(others) and all(map(same, ours, others))
    if not isinstance(ours, torch.Tensor):
        return ours == others
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[ours.element_size()]
    return ours.dtype == others.dtype and torch.equal(ours.contiguous().view(kind), others.contiguous().view(kind))


def compare():
    """Prints one line for every comparison."""
    from revffn.ops.update import kernels, reference

    # Several programs of every kind on shapes that the interpreter gets through in time.
    kernels.TILE, reference.SEGMENT, kernels.FLAT, kernels.AVERAGES = 32, 64, 16, 64
    for rule in RULES:
        for kind, (dtype, rounding) in KINDS.items():
            shapes = [(3, 64, 64), (70, 96)] if rule == "adamw8bit" else SHAPES
            if kind != "bf16":
                shapes = shapes[-1:] if rule == "adamw8bit" else shapes[2:4]
            if rule == "adamw8bit":
                kernels.TILE = 1024
            reference_, ours = both(rule, dtype, rounding, shapes)
            print(f"{rule}, {kind}: {'equal' if same(ours, reference_) else 'DIFFERENT'}", flush=True)
            kernels.TILE = 32
        shapes = [(64, 64)] * 2 if rule == "adamw8bit" else [(3, 9, 20), (7,), (12, 11)]
        before, after = steps(rule, torch.bfloat16, "stochastic", shapes, bad=0), None
        after = both(rule, torch.bfloat16, "stochastic", shapes, bad=0)
        print(f"{rule}, not finite: {'equal' if all(same(a, before) for a in after) else 'DIFFERENT'}", flush=True)


if __name__ == "__main__":
    compare()
