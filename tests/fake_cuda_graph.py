"""A stand-in for CUDA graphs that records and replays on the CPU.

It records operations on tensors, with the tensors themselves; a replay repeats these on the same
memory, without the Python code around them. As with CUDA, operations that synchronise are errors:
reading values back, counting, and creating tensors from Python numbers. It does not detect memory
that is freed in between, and does not record kernels other than torch's.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = (
    *("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"),
    *("_unique2", "unique_dim", "lift_fresh"),
)


class FakeCudaGraph:
    def __init__(self):
        self.work = []

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, results in self.work:
            again = function(*args, **kwargs)
            for old, new in zip(tensors(results), tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITS or (name.startswith("index") and has_mask(args)):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        results = function(*args, **(kwargs or {}))
        if function.namespace == "profiler":
            return results
        self.graph.work.append((function, args, kwargs or {}, results))
        return results


def has_mask(args):
    """Whether an index is a mask, which synchronises because True values are counted."""
    lists = [x for x in args if isinstance(x, (list, tuple))]
    return any(x is not None and x.dtype == torch.bool for indices in lists for x in indices)


def tensors(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [x for x in results or () if isinstance(x, torch.Tensor)]


class FakeStream:
    def wait_stream(self, other):
        pass


def refuse(*args):
    raise RuntimeError("operation not permitted when stream is capturing: it leaves the GPU")


def install(monkeypatch):
    """Replace CUDA's graphs; returns the list of graphs that are created."""
    made = []

    def new_graph():
        made.append(FakeCudaGraph())
        return made[-1]

    @contextmanager
    def recording(graph):
        with Recorder(graph), monkeypatch.context() as patch:
            for name in ("cpu", "numpy", "tolist"):
                patch.setattr(torch.Tensor, name, refuse)
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    return made
