"""Routing without votes on CUDA; the derivation is in kernels/README.md."""

from graphcaps.kernels.triton.device import DTYPES, why_not
from graphcaps.kernels.triton.edges import TritonEdges

__all__ = ["DTYPES", "TritonEdges", "why_not"]
