"""Runs compiled functions in parallel, in the threads that torch keeps for its own operations.

After a parallel operation, OpenMP's threads wait for the next one in a loop, for milliseconds, and
occupy their cores. Other threads that compute meanwhile would have to share these cores; a call of
`GOMP_parallel`, which the C compiler makes of `#pragma omp parallel`, takes the waiting ones.
"""

import ctypes
import functools
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_Work = ctypes.CFUNCTYPE(None)  # OpenMP gives it a pointer, which it ignores


class _Process:
    """Whether this process was forked: OpenMP's threads are missing there.

    A parallel operation of OpenMP would wait for them forever; torch's own operations do.
    """

    forked = False


def _note_fork() -> None:
    _Process.forked = True


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_note_fork)


def run(function: Callable, calls: Sequence[Sequence[Any]]) -> None:
    """Call a compiled function with all arguments, in parallel; each thread takes the next ones.

    Args:
        function: compiled for these arguments, and releasing the interpreter's lock.
        calls: the arguments of each call.

    Raises:
        RuntimeError: a call raised an exception, which was printed.
    """
    # no other thread may run Python code while the interpreter shuts down
    if len(calls) < 2 or not threading.main_thread().is_alive():
        for arguments in calls:
            function(*arguments)
        return
    threads = torch.get_num_threads()
    in_parallel = None if _Process.forked else _openmp()
    # all of OpenMP's threads need the interpreter in turn, which takes too long if few have work
    if in_parallel is None or threads > 2 * len(calls):
        with ThreadPoolExecutor(len(calls) - 1) as pool:
            others = [pool.submit(function, *arguments) for arguments in calls[1:]]
            function(*calls[0])
            for other in others:
                other.result()
        return
    # All of this is C code. Python code would take signals, and ctypes drops the exceptions that
    # their handlers raise, such as KeyboardInterrupt.
    done: deque[None] = deque()
    work = _Work(functools.partial(done.extend, itertools.starmap(function, iter(calls))))
    # with fewer threads than torch has, OpenMP would end the others, and torch start them again
    in_parallel(work, None, threads, 0)
    if len(done) < len(calls):
        raise RuntimeError("a pass of the kernel failed, with the exception printed above")


@functools.cache
def _openmp() -> Callable | None:
    """`GOMP_parallel` of the OpenMP that torch is linked to, or None if there is none.

    GCC's runtime has it, LLVM's and Intel's have it for compatibility.
    """
    try:
        in_parallel = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    in_parallel.argtypes = [_Work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    in_parallel.restype = None
    return in_parallel
