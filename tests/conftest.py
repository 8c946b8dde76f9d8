"""Fixtures and configuration for all tests."""

import hashlib
import math
import os
import shutil
import signal
import warnings
from pathlib import Path

import hypothesis
import pytest
import torch

from graphcaps.kernels.cpu import lay_out, parts
from graphcaps.kernels.cpu.by_pose import PosesInLanes
from graphcaps.kernels.cpu.by_sample import SamplesInLanes

warnings.filterwarnings("ignore", category=FutureWarning, module="dgl")
hypothesis.settings.register_profile("here", deadline=None, max_examples=40, derandomize=True)
hypothesis.settings.load_profile("here")

# These files run first, in this order, so that parallel workers finish at about the same time; with
# --dist loadfile, each file is run by a single worker.
LONGEST_FILES = (
    "test_laws.py",
    "test_scripts.py",
    "test_dynamic_cpu.py",
    "test_workers.py",
    "test_cli.py",
    "test_killed.py",
    "test_triton.py",
    "test_training.py",
    "test_report.py",
    "test_report_page.py",
)


def pytest_configure(config):
    """Restore Ctrl-C, and cache compiled kernels for later runs and for processes of the tests."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in the background of a shell script
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not config.pluginmanager.has_plugin("cacheprovider"):
        return
    sources = sorted((Path(__file__).parents[1] / "graphcaps" / "kernels").rglob("*.py"))
    version = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
    folder = config.cache.mkdir("numba")
    for other in folder.iterdir():
        if other.name != version:
            shutil.rmtree(other, ignore_errors=True)
    os.environ["NUMBA_CACHE_DIR"] = str(folder / version)


def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


@pytest.fixture(autouse=True)
def same_random_numbers():
    torch.manual_seed(0)


@pytest.fixture
def set_threads():
    """`torch.set_num_threads`, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(set_threads):
    """Let torch and the kernels use one thread."""
    set_threads(1)


@pytest.fixture
def several_threads(set_threads, monkeypatch):
    """Divide even the smallest graph among threads of the CPU kernel."""
    set_threads(3)
    monkeypatch.setattr(parts, "WORK_OF_A_THREAD", 1)


@pytest.fixture(params=["samples", "poses"])
def in_lanes(request, monkeypatch):
    """Force a memory layout of the CPU kernels, samples or poses in lanes, on every call."""
    cost = math.inf if request.param == "samples" else 0
    monkeypatch.setattr(lay_out, "COST_OF_A_POSE", cost)
    return SamplesInLanes if request.param == "samples" else PosesInLanes
