"""Recording and replaying on the CPU, as a CUDA graph does it on a GPU.

Of what runs while it records, only operations on tensors are kept, with the tensors themselves. A
replay repeats these on the same memory, and nothing of the Python around them. Reading a number
back is an error, as it is there.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")


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
        if name in READS or (name.startswith("index") and has_mask(args)):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        results = function(*args, **(kwargs or {}))
        if function.namespace == "profiler":
            return results
        self.graph.work.append((function, args, kwargs or {}, results))
        return results


def has_mask(args):
    """Indexing by True and False has to count them first."""
    lists = [x for x in args if isinstance(x, (list, tuple))]
    return any(x is not None and x.dtype == torch.bool for indices in lists for x in indices)


def tensors(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [x for x in results or () if isinstance(x, torch.Tensor)]


class FakeStream:
    def wait_stream(self, other):
        pass


def install(monkeypatch):
    """Put these in the place of CUDA's; returns the graphs that are made."""
    made = []

    def new_graph():
        made.append(FakeCudaGraph())
        return made[-1]

    @contextmanager
    def recording(graph):
        with Recorder(graph):
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", new_graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "current_stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    return made
