"""Functions of tensors on a GPU, recorded as a CUDA graph and replayed at each call.

A training step launches many kernels, and a small one may be done sooner than the next is launched.
Recorded once, they are launched as one.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM_UPS = 3  # libraries choose their algorithms, kernels are compiled, nothing of it recorded


class Captured:
    """A function whose work on the GPU is recorded at once and replayed at every call.

    Only that work is repeated, none of the function's Python; it is on the inputs' present values,
    and writes where it wrote when it was recorded: into the same outputs, and into the same
    gradients, if the function leaves any.

    Args:
        function: takes and returns tensors. Whatever it computes must be right however often it is
            called, and read no number back from the GPU. Other tensors that it reads must live,
            where they are, as long as this.
        inputs: tensors on one GPU; their values are of no matter.

    Raises:
        RuntimeError: work that cannot be recorded.
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
