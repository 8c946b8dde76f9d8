"""Which devices run the Triton kernels, and how a kernel is launched."""

import functools
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # why_not reports it, and no kernel is launched
    triton = tl = None

DTYPES = (torch.float32, torch.bfloat16)
OLDEST_TRITON = (3, 6)  # the oldest release that was tried
PROGRAMS = 512  # enough to keep a GPU busy; if a graph gives fewer, its sums are split into parts
MOST_PROGRAMS = (2**31 - 1, 65_535, 65_535)  # CUDA's limits for the grid of one launch


def jit(function: Any) -> Any:
    """`triton.jit`, or the function itself if Triton is not installed."""
    return function if triton is None else triton.jit(function)


@jit
def _nothing() -> None:
    """An empty kernel, whose type shows whether kernels are interpreted (TRITON_INTERPRET=1)."""


def why_not(device: torch.device) -> str | None:
    """Return why the kernels cannot run on a device, or None if they can.

    >>> why_not(torch.device("meta")) is None
    False
    """
    if triton is None:
        return "triton is not installed"
    if release() < OLDEST_TRITON:
        return f"it needs Triton 3.6, and this is {triton.__version__}"
    interpreted = not isinstance(_nothing, triton.JITFunction)
    if device.type != ("cpu" if interpreted else "cuda"):
        return f"Triton's kernels run on CUDA, not on {device.type}"
    return None if interpreted else _why_not_launched()


@functools.cache
def _why_not_launched() -> str | None:
    try:
        triton.runtime.driver.active.utils  # noqa: B018, it compiles what launches kernels
    except Exception as error:
        return f"Triton needs a CUDA device and a C compiler, and says: {error}"
    return None


def check(device: torch.device) -> None:
    """Raise RuntimeError if the kernels cannot run on a device."""
    if reason := why_not(device):
        raise RuntimeError(reason)


def launch(kernel: Any, grid: tuple[int, ...], like: Tensor, **arguments: Any) -> None:
    """Run a kernel on the device of a tensor.

    Raises:
        ValueError: the grid exceeds CUDA's limits.
    """
    if any(count > most for count, most in zip(grid, MOST_PROGRAMS, strict=False)):
        raise ValueError(
            f"{list(like.shape)} needs a grid of {grid} programs, more than {MOST_PROGRAMS} that "
            "CUDA launches at once; split the batch"
        )
    if all(grid):
        with torch.cuda.device_of(like):
            # fused multiply-add, for which Triton's default has changed between releases
            kernel[grid](**arguments, enable_fp_fusion=True)


def release() -> tuple[int, ...]:
    """Triton's version: major, minor."""
    return tuple(map(int, triton.__version__.split(".")[:2]))


def blocks(count: int, size: int) -> int:
    """The number of blocks of `size` that hold `count` elements."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """The least power of two that is not below `count`."""
    return 1 << max(0, count - 1).bit_length()
