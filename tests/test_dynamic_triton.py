"""The Triton kernels without a GPU: interpreted for their numbers, compiled for their code."""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import graphcaps as gc
from graphcaps.kernels import dynamic_triton
from graphcaps.kernels.dynamic_triton import TritonEdges, routed, why_not

triton = pytest.importorskip("triton", reason="triton is not installed")

NUMBERS = Path(__file__).with_name("triton_numbers.py")
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int32: "*i32"}
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    90: 227 * 1024,
}  # bytes a program may have, by CUDA's manual


def test_the_numbers_are_right():
    """In a process of its own: triton chooses between compiler and interpreter when imported."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(NUMBERS)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | interpret,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


def launches(monkeypatch, graph, sizes, dtype=torch.float32, *, tiles=True, iterations=3):
    """Every kernel that forward and backward would launch, with what it would be given."""
    batch, child_dim, parent_dim = sizes
    kinds = graph.num_edges()
    found = {}

    def launch(kernel, grid, *args, **constants):
        key = (kernel.__name__, *constants.values())
        found.setdefault(key, (kernel, grid, args, constants))

    monkeypatch.setattr(dynamic_triton, "_launch", launch)
    monkeypatch.setattr(dynamic_triton, "why_not", lambda device: None)
    edges = TritonEdges.of(graph, kinds, torch.device("cpu"))
    edges = replace(edges, complete=edges.complete and tiles)
    u = torch.zeros(batch, graph.num_nodes("child"), child_dim, dtype=dtype, requires_grad=True)
    weight = torch.zeros(kinds, child_dim, parent_dim, dtype=dtype, requires_grad=True)
    routed(u, weight, edges, iterations).sum().backward()
    return list(found.values())


def compiled(kernel, args, constants, target):
    """As at a launch, but for a GPU that need not be there."""
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    options["enable_fp_fusion"] = True
    constants = {name: value for name, value in constants.items() if name not in options}
    signature, attributes = dict.fromkeys(constants, "constexpr"), {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif value == 1:  # triton makes it a constant
            signature[name], constants[name] = "constexpr", 1
            continue
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[place,] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    gpu = triton.backends.compiler.GPUTarget("cuda", target, 32)
    return triton.compile(source, target=gpu, options=options)


def resources(code):
    """Registers and bytes of stack of one thread: what does not fit in registers goes there."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("triton came without cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [tool, "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said).groups()
    return int(registers), int(stack)


@pytest.mark.parametrize(
    ("dtype", "target", "tiles"),
    [
        (torch.float32, 80, True),
        (torch.float32, 90, True),
        (torch.bfloat16, 90, True),
        (torch.float32, 90, False),
    ],
)
def test_at_the_layers_real_size_nothing_spills(monkeypatch, dtype, target, tiles):
    graph = gc.complete_graph(1152, 10)
    for kernel, _, args, constants in launches(
        monkeypatch, graph, (128, 8, 16), dtype, tiles=tiles
    ):
        code = compiled(kernel, args, constants, target)
        registers, stack = resources(code)
        print(target, dtype, kernel.__name__, registers, stack, code.metadata.shared, constants)
        assert stack == 0, f"{kernel.__name__} spills {stack} bytes"
        assert code.metadata.shared <= SHARED_MEMORY[target] // 4, kernel.__name__


@pytest.mark.parametrize(
    ("graph", "sizes", "tiles"),
    [
        (gc.complete_graph(1, 1), (1, 1, 1), True),
        (gc.complete_graph(1, 1), (1, 1, 1), False),
        (gc.routing_graph([0, 2], [1, 0], parents=3), (3, 7, 33), False),
    ],
)
def test_odd_sizes_and_sizes_of_1_compile(monkeypatch, graph, sizes, tiles):
    for kernel, _, args, constants in launches(monkeypatch, graph, sizes, tiles=tiles):
        assert compiled(kernel, args, constants, 90).metadata.shared <= SHARED_MEMORY[90]


@pytest.mark.parametrize(("parent_dim", "iterations"), [(256, 3), (16, 12)])
def test_long_outputs_and_many_iterations_fit_in_shared_memory(monkeypatch, parent_dim, iterations):
    graph, sizes = gc.routing_graph([0, 0], [0, 1]), (64, 16, parent_dim)
    found = launches(monkeypatch, graph, sizes, iterations=iterations)
    for kernel, _, args, constants in found[-2:]:  # ∂u and ∂W hold most
        code = compiled(kernel, args, constants, 86)
        assert code.metadata.shared <= SHARED_MEMORY[86], kernel.__name__


def test_on_the_cpu_it_is_refused_with_the_reason():
    assert why_not(torch.device("cpu")) == "Triton's kernels run on CUDA, not on cpu"
    assert (why_not(torch.device("cuda")) is None) == torch.cuda.is_available()
    edges = TritonEdges.of(gc.complete_graph(3, 2), 6, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="run on CUDA, not on cpu"):
        routed(torch.zeros(1, 3, 4), torch.zeros(6, 4, 5), edges)


def test_without_triton_it_is_imported_and_refused_with_the_reason():
    program = """
import sys
sys.modules["triton"] = None
import torch
from graphcaps.kernels.dynamic_triton import why_not
assert why_not(torch.device("cuda")) == "triton is not installed"
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
