"""Whether torch records or transforms a call, so that nothing but its own operations may run."""

import torch
from torch import Tensor

# no public function of torch, from 2.6 to 2.15, tells these two
from torch._C._functorch import peek_interpreter_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode


def is_traced(*tensors: Tensor) -> bool:
    """Whether numbers cannot be looked at, nor be given to code that is not torch's.

    It is so under `torch.compile`, `torch.export`, `torch.jit.trace`, `make_fx` and the transforms
    of `torch.func`, in FakeTensors and on the meta device.

    Args:
        tensors: those to be looked at, if it is about any.

    >>> is_traced(torch.ones(2)), is_traced(torch.ones(2, device="meta"))
    (False, True)
    """
    return (
        torch.compiler.is_compiling()  # asked first: torch.compile would stop at the others
        or torch.jit.is_tracing()
        or under_torch_func()
        or _get_current_dispatch_mode() is not None
        or any(x.is_meta or _dispatches_by_itself(x) for x in tensors)
    )


def under_torch_func() -> bool:
    """Whether a transform of `torch.func` is at work, as `vmap` or `grad`, in eager mode.

    >>> torch.func.vmap(lambda x: x * under_torch_func())(torch.ones(2))
    tensor([1., 1.])
    """
    return not torch.compiler.is_compiling() and peek_interpreter_stack() is not None


def _dispatches_by_itself(x: Tensor) -> bool:
    """As FakeTensor and DTensor do."""
    return type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__
