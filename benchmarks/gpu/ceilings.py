"""What the device reaches at most: products of matrices and a copy, of random data, since zeros run faster."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.figure import Figure
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.timing import median_seconds
from megatron_mm.parallel.platform import Platform, get_platform

WARM_UP, REPEATS = 5, 20
# So many pairs of matrices are multiplied in turn, and between two looks at the clock, which cost microseconds.
PAIRS = 4


def measure(setting: Setting) -> Iterator[Figure]:
    """Yield the ceilings."""
    platform, sizes = get_platform(setting.sizes.platform), setting.sizes
    platform.prepare(0)
    yield bf16_product(platform, sizes.matrix_side)
    fp8 = fp8_product(platform, sizes.matrix_side)
    yield Figure("fp8 product of matrices", fp8, "TFLOP/s")
    yield copy_speed(platform, sizes.copy_bytes)


def bf16_product(platform: Platform, side: int) -> Figure:
    """Return the speed of a product of two square matrices in bf16."""
    pairs = [
        [torch.randn(side, side, dtype=torch.bfloat16, device=platform.device()) for _ in range(2)]
        for _ in range(PAIRS)
    ]
    outcome = torch.empty_like(pairs[0][0])
    return Figure("bf16 product of matrices", _tflops(platform, side, lambda: _multiply(pairs, outcome)), "TFLOP/s")


def _multiply(pairs: list[list[Tensor]], outcome: Tensor) -> None:
    for left, right in pairs:
        torch.mm(left, right, out=outcome)


def fp8_product(platform: Platform, side: int) -> float:
    """Return the TFLOP/s of a product of two square matrices in e4m3, with one scale each."""
    device = platform.device()
    pairs = [[torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2)] for _ in range(PAIRS)]
    scale = torch.ones((), device=device)

    def work() -> None:
        for left, right in pairs:
            # The second matrix has to lie column by column.
            torch._scaled_mm(left, right.t(), scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True)

    return _tflops(platform, side, work)


def _tflops(platform: Platform, side: int, work: Callable[[], None]) -> float:
    """Return the speed of `work`, which is PAIRS products."""
    return 2e-12 * PAIRS * side**3 / median_seconds(platform, work, warm_up=WARM_UP, repeats=REPEATS)


def copy_speed(platform: Platform, num_bytes: int) -> Figure:
    """Return the speed of a copy inside the device's memory, bytes read and bytes written both counted."""
    source = torch.randint(-(2**31), 2**31 - 1, (num_bytes // 4,), dtype=torch.int32, device=platform.device())
    target = torch.empty_like(source)
    taken = median_seconds(platform, lambda: target.copy_(source), warm_up=WARM_UP, repeats=REPEATS)
    return Figure("copy in the device's memory", 2e-9 * source.nbytes / taken, "GB/s")
