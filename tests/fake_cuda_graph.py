"""Recording and replaying on the CPU, as a CUDA graph does it on a GPU.

Of what runs while it records, only operations on tensors are kept, with the tensors themselves. A
replay repeats these on the same memory, and nothing of the Python around them. What waits for a GPU
is an error, as it is there: numbers that are read back, counts, tensors made of Python's numbers.
What memory is given back in between, and kernels that are not torch's, it does not know.
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


def refuse(*args):
    raise RuntimeError("operation not permitted when stream is capturing: it leaves the GPU")


def install(monkeypatch):
    """Put these in the place of CUDA's; returns the graphs that are made."""
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
