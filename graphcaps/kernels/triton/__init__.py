"""The pass over the edges and dynamic routing on CUDA, compiled by Triton."""

from graphcaps.kernels.triton.device import DTYPES, why_not
from graphcaps.kernels.triton.edges import TritonEdges

__all__ = ["DTYPES", "TritonEdges", "why_not"]
