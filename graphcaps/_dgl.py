"""Imports DGL under any release of torch, and tells on which devices this build can compute."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import torch

from graphcaps.tracing import is_traced


class _Graphbolt(ModuleType):
    """Stands in for `dgl.graphbolt`, DGL's data loading, which graphcaps does not use."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # what the import system and inspection ask of any module
            raise AttributeError(name)
        raise RuntimeError(
            f"dgl.graphbolt.{name} is not available: this DGL has no graphbolt library for "
            f"torch {torch.__version__}, so graphcaps imported DGL without it. "
            "For graphbolt, install a DGL that was built for this torch."
        )


def _graphbolt_would_fail(dgl_folder: Path) -> bool:
    """DGL 2 imports graphbolt at once: a library per torch release, on top of torchdata's pipes."""
    folder = dgl_folder / "graphbolt"
    if not folder.is_dir():
        return False
    release = torch.__version__.split("+")[0]
    has_library = any(folder.glob(f"*graphbolt_pytorch_{release}.*"))
    has_pipes = (
        importlib.util.find_spec("torchdata") is not None
        and importlib.util.find_spec("torchdata.datapipes") is not None
    )
    return not (has_library and has_pipes)


def _prepare_import() -> None:
    spec = importlib.util.find_spec("dgl")
    if spec is None or spec.origin is None:
        raise ImportError(
            "graphcaps routes on DGL graphs, and DGL is not installed: "
            "python -m graphcaps.install_dgl"
        )
    if "dgl" not in sys.modules and _graphbolt_would_fail(Path(spec.origin).parent):
        sys.modules["dgl.graphbolt"] = _Graphbolt("dgl.graphbolt")
    # Unset, DGL prints a notice and writes a file into the home directory.
    os.environ.setdefault("DGLBACKEND", "pytorch")


_prepare_import()

import dgl  # noqa: E402
from dgl._ffi.function import get_global_func  # noqa: E402

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
