"""The processes that train one model together, as torchrun starts them."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Workers:
    """The processes that train one model together; without torchrun, this process alone."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints, evaluates and writes files."""
        return self.rank == 0

    def total(self, numbers: Tensor) -> Tensor:
        """All-reduce: the sum of a tensor over all workers, on their device."""
        numbers = numbers.to(self.device)  # NCCL supports no other
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def wait(self) -> None:
        """Synchronise the workers: return when all have called this."""
        if self.size > 1:
            dist.barrier()

    def agree(self, value: Any) -> Any:
        """Broadcast the leader's value to every worker."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    @contextmanager
    def leader_in(self, context: AbstractContextManager[Any]) -> Iterator[None]:
        """Enter a context on the leader while the other workers wait.

        Raises:
            Exception: on every worker, the exception that entering it raised.
        """
        with ExitStack() as stack:
            refusal = None
            if self.leads:
                try:
                    stack.enter_context(context)
                except Exception as error:
                    refusal = error
            refusal = self.agree(refusal)
            if refusal is not None:
                raise refusal
            yield


def leads() -> bool:
    """Whether this process is the leader, also outside `joined_workers`."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined_workers(device: str = "auto") -> Iterator[Workers]:
    """Join the process group of the processes that torchrun started.

    Args:
        device: `"auto"` for CUDA where there is one and the CPU elsewhere, or torch's name.

    Yields:
        The workers. With CUDA, each process uses the GPU of its local rank.

    Raises:
        ValueError: an unknown device.
        RuntimeError: a device that is not available.
    """
    chosen = _device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Workers(rank=0, size=1, device=chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
        dist.init_process_group("nccl", device_id=chosen)
    else:
        dist.init_process_group("gloo")
    try:
        yield Workers(rank=dist.get_rank(), size=size, device=chosen)
        dist.barrier()  # no process exits while another still waits for a message
    finally:
        dist.destroy_process_group()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device: torch.device | None = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type == "meta":
        raise ValueError(f"unknown device {name!r}; try auto, cpu, cuda or cuda:1")
    try:
        torch.empty(0, device=device)
    except Exception as error:  # backends raise exceptions of different types
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise RuntimeError(
            f"device {name!r} is not there: {reason}. Use --device auto or cpu"
        ) from None
    return device
