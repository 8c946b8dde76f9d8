"""What the benchmarks share: fair times, memory, the machine, files."""

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
    """Seconds of each function in each round, one after the other in every round.

    Whatever else the machine does then meets all of them alike, and so does what another one leaves
    behind, since every round has an order of its own. Each runs once before, untimed, and after a
    pause: torch's threads keep cores busy for milliseconds after their work, which would be counted
    for the next form.
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
    """Seconds of each of so many calls without a pause, after some that are not timed."""
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
    """MiB of memory that one call needs beyond what there is before it; Linux alone can tell."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    kept = function()
    peak = _status("VmHWM")
    del kept
    return (peak - before) / 1024


def in_own_process(script: str, *arguments: str) -> str:
    """What a script prints when it runs alone, every large block given back as it is freed."""
    done = subprocess.run(
        [sys.executable, script, *arguments],
        check=False,
        capture_output=True,
        text=True,
        # large blocks are then given back when they are freed, and count only while in use
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def machine(threads: int) -> dict[str, Any]:
    """Hardware and versions, to stand beside every figure."""
    return {
        "processor": _processor(),
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dgl": dgl.__version__,
    }


def write(path: Path, results: Mapping[str, Any]) -> None:
    """Results as JSON."""
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
