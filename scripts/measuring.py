"""Functions that the benchmarks share: timing, peak memory, a description of the machine, files."""

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from graphcaps._dgl import dgl

PAUSE = 0.03  # seconds


def alternating(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round; every round runs all functions, in random order.

    Other load on the machine, and the effects of one function on the next, are thus distributed
    evenly. Each function runs once before, untimed. There is a pause before each call, because
    torch's threads keep spinning for some milliseconds after an operation, which would slow down
    the next function.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    orders = random.Random(0)
    for _ in range(rounds):
        for name in orders.sample(list(functions), len(functions)):
            function = functions[name]
            time.sleep(PAUSE)
            _synchronize()
            started = time.perf_counter()
            function()
            _synchronize()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def in_a_row(function: Callable[[], Any], rounds: int) -> list[float]:
    """Seconds of each of `rounds` calls without a pause, after a warm-up."""
    seconds = []
    for timed in [False] * 3 + [True] * rounds:
        _synchronize()
        started = time.perf_counter()
        function()
        _synchronize()
        if timed:
            seconds.append(time.perf_counter() - started)
    return seconds


def _synchronize() -> None:
    for device in range(torch.cuda.device_count()):
        torch.cuda.synchronize(device)


def quartiles(seconds: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median and the upper quartile."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, middle, high


def peak_mib(function: Callable[[], Any]) -> float:
    """Peak memory of one call in MiB, beyond the memory in use before it; on Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    kept = function()
    peak = _status("VmHWM")
    del kept
    return (peak - before) / 1024


def in_own_process(script: str, *arguments: str) -> str:
    """Run a script in its own process, without cached free memory, and return its output."""
    done = subprocess.run(
        [sys.executable, script, *arguments],
        check=False,
        capture_output=True,
        text=True,
        # large blocks then return to the system when freed, and only count while in use
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def machine(threads: int) -> dict[str, Any]:
    """Hardware and versions, which are reported with every result."""
    return {
        "processor": _processor(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dgl": dgl.__version__,
    }


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Write results as JSON."""
    path.write_text(json.dumps(results, indent=1) + "\n")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()
