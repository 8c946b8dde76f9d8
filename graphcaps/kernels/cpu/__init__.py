"""The pass over the edges and dynamic routing on the CPU, compiled by numba."""

import functools

import torch

from graphcaps.kernels.cpu.parts import Edges, prepare

DTYPES = (torch.float32, torch.float64)

__all__ = ["DTYPES", "Edges", "prepare", "why_not"]


@functools.cache
def why_not(device: torch.device) -> str | None:
    """Return why the compiled loops cannot run on `device`, or None if they can."""
    if device.type != "cpu":
        return f"it is for the CPU, not for {device.type}"
    try:
        import graphcaps.kernels.cpu.lanes  # noqa: F401
    except ImportError as error:
        return f"it is compiled by numba, which cannot be imported ({error}); pip install numba"
    return None
