"""Functions of tensors on a GPU, captured as a CUDA graph and replayed at each call.

A training step launches many kernels, and small ones may finish sooner than the next is launched.
Captured once, they are launched together.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UPS = 3  # warm-up: libraries choose algorithms and kernels are compiled before capture


class Captured:
    """A function whose work on the GPU is captured once, on creation, and replayed at every call.

    Only the kernels run again, not the function's Python code. They read the present values of the
    inputs and write to the same memory as during capture: the same outputs, and the same gradients
    if the function computes any.

    Args:
        function: takes and returns tensors. It must give correct results when called repeatedly,
            and must not copy values to the CPU. Other tensors that it reads must stay alive, at
            the same address, as long as this object.
        inputs: tensors on one GPU; their values do not matter.

    Raises:
        RuntimeError: the work cannot be captured.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
        self.inputs = [x.clone() for x in inputs]
        with torch.cuda.device_of(self.inputs[0]):
            apart, current = torch.cuda.Stream(), torch.cuda.current_stream()
            apart.wait_stream(current)
            with torch.cuda.stream(apart):
                for _ in range(WARM_UPS):
                    function(*self.inputs)
            current.wait_stream(apart)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The function's outputs for inputs like the first ones; the next call overwrites them."""
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        with torch.cuda.device_of(self.inputs[0]):
            self.graph.replay()
        return self.outputs
