"""The laws of routing for the Triton kernels, in a process where they are interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
pytest.importorskip("triton", reason="triton is not installed")

# the interpreter runs an edge in about a millisecond: the smaller cases, and not every law
LAWS = (
    "(test_results_and_gradients_equal_the_reference and sparse)"
    " or (test_results_and_gradients_equal_the_reference and matrix and em)"
    " or (test_graphs_of_different_sizes_route_in_one_batch and (dynamic or em))"
    " or (test_moving_a_child_changes_only and em)"
    " or (test_the_activation_of_a_child_matters and em)"
)


def test_the_laws_hold_for_the_triton_kernels():
    options = ("-q", "-p", "laws_by_triton", "-p", "no:cacheprovider", "-k", f"fused and ({LAWS})")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "test_laws.py"],
        check=False,
        capture_output=True,
        text=True,
        cwd=TESTS,
        env={
            **os.environ,
            "GRAPHCAPS_LAWS_BY_TRITON": "1",
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent))),
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
