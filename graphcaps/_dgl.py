"""Imports DGL and reports on which devices this build can compute."""

import importlib.util
import sys

import torch

from graphcaps.tracing import is_traced

if importlib.util.find_spec("dgl") is None:
    raise ImportError(
        "graphcaps routes on DGL graphs, and DGL is not installed: python -m graphcaps.install_dgl"
    )

import dgl
from dgl._ffi.function import get_global_func

if "dgl.graphbolt" in sys.modules:  # a module placed by hand is not yet its parent's attribute
    dgl.graphbolt = sys.modules["dgl.graphbolt"]


def has_cuda() -> bool:
    """Whether this build of DGL can hold graphs on a CUDA device (the one on PyPI cannot)."""
    return get_global_func("device_api.cuda", allow_missing=True) is not None


def why_not_on(device: torch.device) -> str | None:
    """Why DGL cannot compute on `device`, or None where it can."""
    if is_traced():
        return "torch cannot trace or transform what DGL computes"
    if device.type == "cpu" or (device.type == "cuda" and has_cuda()):
        return None
    if device.type == "cuda":
        return (
            f"DGL {dgl.__version__} is a build without CUDA; the README says how to get one with it"
        )
    return f"DGL computes on the CPU and on CUDA, not on {device.type}"


__all__ = ["dgl", "has_cuda", "why_not_on"]
