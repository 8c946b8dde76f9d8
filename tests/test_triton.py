"""The Triton kernels without a GPU: interpreted for their numbers, compiled for their code."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import graphcaps as gc
from graphcaps.kernels.triton import TritonEdges, device, why_not
from graphcaps.kernels.triton.couple import couple, couple_backward
from graphcaps.kernels.triton.dynamic import dynamic_routing, dynamic_routing_backward

triton = pytest.importorskip("triton", reason="triton is not installed")

NUMBERS = [Path(__file__).with_name(f"triton_{name}.py") for name in ("numbers", "dynamic_numbers")]
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    90: 227 * 1024,
}  # bytes a program may have, by CUDA's manual
CPU = torch.device("cpu")
PAPER = gc.complete_graph(1152, 10)


def test_the_numbers_are_right():
    """In a process of its own: triton chooses between compiler and interpreter when imported."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, NUMBERS)],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | interpret,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout)


class NoGPU:
    """What triton asks of a driver to compile a kernel as at a launch, for a GPU that is not there.

    A number of the compute capability is the number of the device.
    """

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", self.target, 32)

    def get_current_device(self):
        return self.target

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch):
    """Every kernel that some work would launch, compiled for a GPU."""

    def compile_all(target, work, *args, only="", **how):
        found = {}

        def launch(kernel, grid, like, **arguments):
            if not kernel.__name__.startswith(only):
                return
            code = kernel.warmup(grid=grid, enable_fp_fusion=True, **arguments)
            module = kernel.fn.__module__.rpartition(".")[2]
            found[code.hash] = f"{module}.{kernel.__name__}", code

        monkeypatch.setattr(device, "launch", launch)
        monkeypatch.setattr(device, "why_not", lambda device: None)
        monkeypatch.setattr(triton.runtime.driver, "_active", NoGPU(target))
        work(*args, **how)
        return list(found.values())

    return compile_all


def route(graph, batch, child_dim, parent_dim, dtype=torch.float32, *, tiles=True, iterations=3):
    """Dynamic routing, forward and backward."""
    edges = TritonEdges.of(graph, graph.num_edges(), CPU)
    u = torch.zeros(batch, edges.children, child_dim, dtype=dtype)
    weight = torch.zeros(edges.kinds, child_dim, parent_dim, dtype=dtype)
    how = (edges.tensors, edges.parents, edges.complete and tiles)
    v, *kept = dynamic_routing(u, weight, *how, iterations, True)
    needed = [True, True]
    dynamic_routing_backward(torch.zeros_like(v), *kept, u, weight, *how, True, needed)


EVERY_TERM = ("a", "r", "k", "p", "q", "beta", "prior", "leak", "squares")
TERMS_OF_EM = ("a", "r", "k", "q", "squares")


def pass_over(
    graph, batch, child_dim, parent_dim, dtype=torch.float32, *, rows=1, terms=EVERY_TERM
):
    """A pass with some of its terms, and all of its gradients."""
    edges = TritonEdges.of(graph, graph.num_edges(), CPU)
    of_parents = (batch, edges.parents, rows * parent_dim)
    shapes = {
        "u": (batch, edges.children, rows * child_dim),
        "weight": (edges.kinds, child_dim, parent_dim),
        "a": (batch, edges.children),
        "r": of_parents,
        "k": of_parents[:2],
        "p": of_parents,
        "q": of_parents,
        "beta": (edges.kinds,),
        "prior": (edges.kinds,),
    }
    inputs = [
        torch.zeros(shape, dtype=dtype) if name in ("u", "weight", *terms) else None
        for name, shape in shapes.items()
    ]
    flags = (name in terms for name in ("leak", "squares", "detach_coupling"))
    how = (edges.tensors, edges.parents, rows, *flags)
    *sums, kept = couple(*inputs, *how)
    wanted = {"u", "weight", *terms} - {"r"}
    if "detach_coupling" in terms:
        wanted -= {"k", "p", "q", "prior"}
    needed = [name in wanted for name in shapes if name != "r"]
    couple_backward(*sums, kept, *inputs, *how, needed)


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


def assert_fits(kernels, target):
    for name, code in kernels:
        registers, stack = resources(code)
        print(f"sm_{target} {name}: {registers} registers, {stack} bytes of stack, ", end="")
        print(f"{code.metadata.shared} of shared memory, {code.metadata.num_warps} warps")
        assert stack == 0, f"{name} spills {stack} bytes"
        assert code.metadata.shared <= SHARED_MEMORY[target] // 4, name


def assert_no_tensor_float_32(kernels):
    for name, code in kernels:
        assert "tf32" not in code.asm["ttir"] + code.asm["ptx"], name


def is_product_of_32_bits(value, made):
    """Whether two numbers that are not constants were multiplied; `made` has all operations."""
    operation, operands, kind = made.get(value, ("argument", [], ""))
    if operation == "arith.muli":
        of_constant = any(made.get(x, [""])[0] == "arith.constant" for x in operands)
        return "i32" in kind and not of_constant
    through = ("arith.addi", "tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape")
    return operation in through and any(is_product_of_32_bits(x, made) for x in operands)


def assert_offsets_are_of_64_bits(kernels):
    """What indexes edges and nodes stays below 2³¹; a product of two of their counts may not."""
    for name, code in kernels:
        made = {
            result: (operation, re.findall(r"%\w+", operands), kind)
            for result, operation, operands, kind in re.findall(
                r"(%\w+) = ([\w.]+) ?(.*) : (.*?) loc", code.asm["ttir"]
            )
        }
        pointers = [x for x in made.values() if x[0] == "tt.addptr"]
        assert pointers, name
        for _, (_, offset), kind in pointers:
            if "tensor" in kind:
                assert kind.endswith("xi64>"), f"{name} adds {offset} to a pointer: {kind}"
            assert not is_product_of_32_bits(offset, made), f"{name}: {offset}"
        for operation, operands, _ in made.values():
            if operation == "arith.extsi":
                assert not is_product_of_32_bits(operands[0], made), f"{name}: {operands[0]}"


@pytest.mark.parametrize(
    ("target", "dtype", "work", "sizes", "how"),
    [
        (80, torch.float32, route, (8, 16), {}),
        (90, torch.float32, route, (8, 16), {}),
        (90, torch.bfloat16, route, (8, 16), {}),
        (80, torch.float32, pass_over, (8, 16), {}),
        (90, torch.float32, pass_over, (8, 16), {}),
        (90, torch.float32, pass_over, (8, 16), dict(terms=(*EVERY_TERM, "detach_coupling"))),
        (80, torch.float32, pass_over, (4, 4), dict(rows=4, terms=TERMS_OF_EM)),
        (90, torch.float32, pass_over, (4, 4), dict(rows=4, terms=TERMS_OF_EM)),
    ],
)
def test_at_the_layers_real_size_nothing_spills(compiled, target, dtype, work, sizes, how):
    kernels = compiled(target, work, PAPER, 128, *sizes, dtype, **how)
    print(f"{work.__name__} {sizes} {dtype} {how}")
    assert_fits(kernels, target)
    assert_no_tensor_float_32(kernels)
    assert_offsets_are_of_64_bits(kernels)


@pytest.mark.parametrize(
    ("work", "graph", "sizes"),
    [
        (route, gc.complete_graph(1, 1), (1, 1, 1)),
        (pass_over, gc.routing_graph([0, 2], [1, 0], parents=3), (3, 7, 33)),
    ],
)
def test_odd_sizes_and_sizes_of_1_compile(compiled, work, graph, sizes):
    for name, code in compiled(90, work, graph, *sizes):
        assert code.metadata.shared <= SHARED_MEMORY[90], name


@pytest.mark.parametrize(
    ("work", "sizes", "how"),
    [(route, (16, 16), dict(iterations=12)), (pass_over, (64, 512), {})],
    ids=["many iterations", "long outputs"],
)
def test_long_outputs_and_many_iterations_fit_in_shared_memory(compiled, work, sizes, how):
    """Those kernels that have most there."""
    graph = gc.routing_graph([0, 0], [0, 1])
    for name, code in compiled(86, work, graph, 64, *sizes, only="gradient", **how):
        assert code.metadata.shared <= SHARED_MEMORY[86], name


def test_longer_outputs_are_refused_before_a_launch(monkeypatch):
    monkeypatch.setattr(device, "why_not", lambda device: None)
    monkeypatch.setattr(device, "launch", None)
    graph = gc.routing_graph([0, 0], [0, 1])
    with pytest.raises(ValueError, match=r"at most 512 numbers.* got 1 rows of 513"):
        route(graph, 2, 3, 513)
    with pytest.raises(ValueError, match="got 65 rows of 65"):
        pass_over(graph, 2, 3, 65, rows=65)


def grids(monkeypatch, batch):
    """What a pass would launch for a batch that is not in memory."""
    found = []

    class Kernel:
        def __getitem__(self, grid):
            found.append(grid)
            return lambda **arguments: None

    launch = device.launch
    monkeypatch.setattr(device, "launch", lambda kernel, *args, **_: launch(Kernel(), *args))
    monkeypatch.setattr(device, "why_not", lambda device: None)
    edges = [x.to("meta") for x in TritonEdges.of(gc.complete_graph(3, 2), 6, CPU).tensors]
    u, weight = torch.empty(batch, 3, 4, device="meta"), torch.empty(6, 4, 5, device="meta")
    k, absent = torch.empty(batch, 2, device="meta"), [None] * 4
    couple(u, weight, None, None, k, *absent, edges, 2, 1, False, True, False)
    return found


def test_more_blocks_of_samples_than_a_grid_has_rows_are_launched(monkeypatch):
    """CUDA has 2³¹ − 1 programs in the first dimension of a grid, and 65,535 in the others."""
    first, *others = grids(monkeypatch, batch=128 * 100_000)
    assert first[0] >= 3 * 100_000
    assert all(max(grid[1:], default=1) < 65_535 for grid in (first, *others))


def test_a_batch_of_more_programs_than_cuda_launches_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"more than .* at once; split the batch"):
        grids(monkeypatch, batch=128 * 2**31 // 3 + 128)


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    happened = []

    @contextlib.contextmanager
    def device_of(tensor):
        happened.append(tensor)
        yield
        happened.append("left")

    class Kernel:
        def __getitem__(self, grid):
            return lambda **arguments: happened.append(arguments["x"])

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    tensor = torch.zeros(2)
    device.launch(Kernel(), (1,), tensor, x="launched")
    assert happened == [tensor, "launched", "left"]


def test_on_the_cpu_it_is_refused_with_the_reason():
    assert why_not(CPU) == "Triton's kernels run on CUDA, not on cpu"
    assert (why_not(torch.device("cuda")) is None) == torch.cuda.is_available()
    for work in (route, pass_over):
        with pytest.raises(RuntimeError, match="run on CUDA, not on cpu"):
            work(gc.complete_graph(3, 2), 1, 4, 5)


def test_without_triton_it_is_imported_and_refused_with_the_reason():
    program = """
import sys
sys.modules["triton"] = None
import torch
from graphcaps.kernels.triton import couple, why_not
assert why_not(torch.device("cuda")) == "triton is not installed"
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
