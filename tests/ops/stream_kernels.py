"""Stream kernels against their reference; run by test_streams.py in the interpreter, by hand on a GPU.

python tests/ops/stream_kernels.py            everything, bit for bit
python tests/ops/stream_kernels.py --break    one kernel shifts by a digit too many: must fail
"""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from interpreter import assert_same

from revffn.ops.streams import kernels, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def stream(shape: tuple[int, ...], bits: int = 20) -> torch.Tensor:
    return torch.randint(-(2**bits), 2**bits, shape, dtype=torch.int64).to(torch.int32).to(DEVICE)


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def compare(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    D = shape[-1]
    scale, next_scale = (2.0 ** torch.randint(10, 14, (D,)).float().to(DEVICE) for _ in range(2))
    finer = torch.randint(0, 4, (D,), dtype=torch.int32).to(DEVICE)
    flags = [torch.zeros(2, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    x, update = stream(shape, 30), numbers(shape, dtype)

    def both(name: str, *args, in_place: int | None = None, flagged: bool = False) -> tuple:
        results = []
        for module, own in zip((kernels, reference), flags, strict=True):
            given = [a.clone() if i == in_place else a for i, a in enumerate(args)]
            out = getattr(module, name)(*given, *([own] if flagged else []))
            out = (out,) if isinstance(out, torch.Tensor) else tuple(out)
            results.append(out if in_place is None else (*out, given[in_place]))
        assert_same(*results, f"{name} {shape} {dtype}")
        assert_same(*flags, f"flags of {name}")
        return results[1]

    both("stream_check", x, flagged=True)
    both("add_update", update, x, scale, finer, flagged=True)
    for m, predicted in zip((0, 1, 2, 4), (None, *[numbers(shape, dtype)] * 3), strict=True):
        prev, cur, middle = stream(shape), stream(shape), stream(shape, 29)
        settings = (scale, next_scale, finer, m, 3)
        moved = (middle, prev, cur, update, predicted, None, *settings)
        bits, _, following = both("innovation_move", *moved, in_place=0, flagged=True)
        out, unused = following.clone(), (cur, middle, update, predicted, None, bits)
        _, rebuilt = both("innovation_undo", out, following, *unused, *settings, in_place=0)
        assert_same(rebuilt, prev, f"m={m}: the past is rebuilt")
    grad, grad_middle = numbers(shape, torch.float32), numbers(shape, torch.float32)
    for has_prediction in (False, True):
        both("innovation_gradients", grad, grad_middle, 1 / scale, dtype, has_prediction)
    weight = numbers((D,), dtype)
    for rounds_first, want_value in itertools.product((True, False), repeat=2):
        *_, rstd = both("read_norm", x, 1 / scale, weight, 1e-6, dtype, rounds_first, want_value)
        value, through, also = (numbers(shape, kind) for kind in (dtype, torch.float32, torch.float32))
        for more in ((None, None, None), (value, through, also), (None, None, also)):
            given = (numbers(shape, dtype), *more, x, 1 / scale, weight, rstd, rounds_first, want_value)
            both("read_norm_backward", *given)
    update.view(-1)[-3] = float("nan")
    both("add_update", update, x, scale, finer, flagged=True)
    assert flags[0][0] == 1, "a NaN went unseen"


if __name__ == "__main__":
    torch.manual_seed(0)
    if "--break" in sys.argv:
        right = kernels.add_update
        kernels.add_update = lambda update, now, scale, finer, flags: right(update, now, scale, finer + 1, flags)
    # 17 tokens are more than one partial sum of the norm's weight gradient takes.
    for shape, dtype in (((1, 1, 16), torch.float32), ((1, 17, 48), torch.bfloat16)):
        compare(shape, dtype)
    print("all equal")
