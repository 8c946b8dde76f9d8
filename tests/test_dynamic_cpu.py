"""Dynamic routing compiled for the CPU: lanes, threads, memory; its laws are in test_laws.py."""

import math
import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from dynamic_cases import ALGORITHMS, cases, complete, route_densely
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import graphcaps as gc
from graphcaps import engines, kernels
from graphcaps.kernels import cpu
from graphcaps.kernels.cpu import lay_out, parts

CPU = torch.device("cpu")
MATRICES = 3  # where edges share them

every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# for each number of lanes, kernels are compiled for some seconds
BATCHES = [
    *((torch.float32, batch) for batch in (1, 15, 16, 17, 32, 33, 48, 49, 64, 65, 70, 129)),
    *((torch.float64, batch) for batch in (1, 16, 60, 128)),
]


pytestmark = pytest.mark.usefixtures("several_threads")


def shared(case):
    """A few matrices that the edges share."""
    return [(2 * i + j) % MATRICES for i, j in case.edges]


def own(case):
    return list(range(len(case.edges)))


def make_input(case, kinds, child_dim=3, dtype=torch.float64, scale=1.0):
    u = torch.randn(case.batch, case.children, child_dim, dtype=torch.float64)
    matrices = max(kinds, default=0) + 1
    weight = scale * torch.randn(matrices, child_dim, case.dim, dtype=torch.float64)
    return u.to(dtype), weight.to(dtype)


def route_by_kernel(case, kinds, u, weight, algorithm="dynamic"):
    ends = [*zip(*case.edges, strict=True)] or [(), ()]
    graph = gc.routing_graph(
        *ends, children=case.children, parents=case.parents, weight_index=kinds
    )
    iterations = 1 if algorithm == "uniform" else case.iterations
    edges = kernels.prepare(graph, len(weight), CPU)
    return kernels.routed(u, weight, edges, iterations)


def route_by_reference(case, kinds, u, weight, algorithm="dynamic"):
    child = [i for i, _ in case.edges]
    u_hat = torch.einsum("bek,ekd->bed", u[:, child], weight[kinds]).flatten(0, 1)
    return route_densely(case, u_hat, algorithm)


def with_gradients(route, case, kinds, u, weight, *args):
    """v, and the gradients of a fixed random functional of it."""
    u, weight = u.detach().requires_grad_(), weight.detach().requires_grad_()
    v = route(case, kinds, u, weight, *args)
    generator = torch.Generator().manual_seed(1)
    functional = torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v)
    loss = (v * functional).sum() + 0 * (u.sum() + weight.sum())  # where there is no edge
    return v.detach(), *torch.autograd.grad(loss, (u, weight))


@every_algorithm
@pytest.mark.parametrize("kinds_of", [shared, own])
@given(case=cases(), child_dim=st.sampled_from([1, 3, 8, 11]))
def test_outputs_and_all_gradients_equal_the_reference(algorithm, kinds_of, case, child_dim):
    kinds = kinds_of(case)
    u, weight = make_input(case, kinds, child_dim)
    got = with_gradients(route_by_kernel, case, kinds, u, weight, algorithm)
    expected = with_gradients(route_by_reference, case, kinds, u, weight, algorithm)
    for actual, right in zip(got, expected, strict=True):
        assert_close(actual, right, rtol=1e-9, atol=1e-11)


@every_algorithm
@pytest.mark.parametrize(
    ("children", "parents", "batch"),
    [
        *((*nodes, 60) for nodes in ((3, 5), (129, 3), (1152, 10))),
        (3, 5000, 2),
        (20_000, 2, 2),
    ],
)
def test_float32_errs_no_more_than_the_dense_form(algorithm, children, parents, batch):
    """Against float64; 4 ulp are allowed in addition to the error of the dense form."""
    case = complete(children, parents, batch=batch, dim=8)
    kinds = own(case)
    u, weight = make_input(case, kinds, child_dim=8, scale=(8 * children) ** -0.5)
    u, weight = u.float(), weight.float()
    truth = with_gradients(route_by_reference, case, kinds, u.double(), weight.double(), algorithm)
    kernel = with_gradients(route_by_kernel, case, kinds, u, weight, algorithm)
    dense = with_gradients(route_by_reference, case, kinds, u, weight, algorithm)
    names = ("v", "gradient of u", "gradient of weight")
    for name, right, got, rival in zip(names, truth, kernel, dense, strict=True):
        unit = torch.finfo(torch.float32).eps * right.abs().max()
        error, allowed = (got - right).abs().max(), (rival - right).abs().max() + 4 * unit
        assert error <= allowed, f"{name}: {error / unit:.1f} units, allowed {allowed / unit:.1f}"


@every_algorithm
@pytest.mark.parametrize(("dtype", "batch"), BATCHES)
def test_any_batch_size_equals_the_reference(algorithm, dtype, batch):
    case = complete(6, 3, batch=batch)
    kinds = own(case)
    u, weight = make_input(case, kinds, dtype=dtype)
    got = with_gradients(route_by_kernel, case, kinds, u, weight, algorithm)
    expected = with_gradients(route_by_reference, case, kinds, u, weight, algorithm)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for actual, right in zip(got, expected, strict=True):
        assert_close(actual, right, rtol=0, atol=tolerance * float(right.abs().max()))


@every_dtype
@pytest.mark.parametrize("scale", [1e5, 1e10, 1e15])
def test_gradients_of_long_capsules_equal_the_reference(dtype, scale):
    """|s|⁴ overflows in float32; the coupling is uniform, since long votes decide at once."""
    case = complete(4, 3, batch=5)
    u, weight = make_input(case, own(case), scale=scale)
    got = with_gradients(route_by_kernel, case, own(case), u.to(dtype), weight.to(dtype), "uniform")
    expected = with_gradients(route_by_reference, case, own(case), u, weight, "uniform")
    for actual, right in zip(got, expected, strict=True):
        error = (actual - right).abs().max() / right.abs().max()
        assert error < 64 * torch.finfo(dtype).eps


@every_dtype
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_hidden(dtype, number):
    case = complete(20, 3, batch=2)
    u, weight = make_input(case, own(case), dtype=dtype)
    weight[31] = number
    v, du, dweight = with_gradients(route_by_kernel, case, own(case), u, weight)
    assert v.isnan().any(dim=2).all()  # through the coupling of its child, in every parent
    assert du.isnan().any()
    assert dweight.isnan().any()


def test_the_exponential_is_that_of_torch():
    """Within 1 ulp, down to the smallest normal numbers."""
    import numba
    import numpy as np

    from graphcaps.kernels.cpu.vectors import exp_below_0, put_row, row

    @numba.njit
    def exponentials_of_rows(x):
        out = np.empty_like(x)
        for n in range(0, len(x), 16):
            put_row(out, n, exp_below_0(row(x, n)))
        return out

    def exponentials(x):
        return exponentials_of_rows(np.pad(x, (0, -len(x) % 16)))[: len(x)]

    x = -torch.cat([torch.linspace(0, 87, 100_001), torch.logspace(-20, 0, 1000)])
    exact = x.double().exp()
    error = (torch.from_numpy(exponentials(x.numpy())).double() / exact - 1).abs()
    assert error.max() < torch.finfo(torch.float32).eps
    assert exponentials(np.float32([0, -1e9])).tolist() == [1.0, pytest.approx(1.6e-38, abs=1e-38)]
    assert np.isnan(exponentials(np.float32([np.nan]))).all()
    x = np.linspace(-700, 0, 1000)
    assert np.allclose(exponentials(x), np.exp(x), rtol=1e-15, atol=0)


@pytest.mark.parametrize("kinds_of", [shared, own])
def test_a_gradient_that_is_not_needed_is_not_computed(kinds_of, in_lanes, monkeypatch):
    case = complete(5, 3)
    kinds = kinds_of(case)
    u, weight = make_input(case, kinds)
    _, *expected = with_gradients(route_by_kernel, case, kinds, u, weight)
    computed, right = [], in_lanes.dynamic_gradient_pass
    monkeypatch.setattr(
        in_lanes,
        "dynamic_gradient_pass",
        lambda *args: computed.append(right(*args)) or computed[-1],
    )
    for wanted in (0, 1):
        pair = [u, weight]
        pair[wanted] = pair[wanted].detach().requires_grad_()
        v = route_by_kernel(case, kinds, *pair)
        generator = torch.Generator().manual_seed(1)
        functional = torch.randn(v.shape, generator=generator, dtype=torch.float64)
        (got,) = torch.autograd.grad((v * functional).sum(), pair[wanted])
        assert_close(got, expected[wanted])
        assert computed[-1][1 - wanted].size == 0


def test_any_layout_in_memory_is_read_right():
    case = complete(5, 3, batch=4)
    kinds = own(case)
    u, weight = make_input(case, kinds)
    expected = with_gradients(route_by_kernel, case, kinds, u, weight)
    layouts = (
        u.transpose(0, 2).contiguous().transpose(0, 2),
        weight.transpose(1, 2).contiguous().transpose(1, 2),
    )
    assert not any(x.is_contiguous() for x in layouts)
    for got, right in zip(
        with_gradients(route_by_kernel, case, kinds, *layouts), expected, strict=True
    ):
        assert torch.equal(got, right)
    one = u[:1].expand(4, -1, -1).detach().requires_grad_()
    v = route_by_kernel(case, kinds, one, weight)
    (du,) = torch.autograd.grad(v.sum(), one)  # an expanded gradient, too
    assert torch.equal(v[0], v[3])
    assert torch.equal(du[0], du[3])
    alone = route_by_reference(case, kinds, one, weight)
    assert_close(du, torch.autograd.grad(alone.sum(), one)[0])


def test_the_backward_pass_may_be_repeated_but_not_after_poses_have_changed():
    case = complete(5, 3, batch=4)
    u, weight = make_input(case, own(case))
    _, *expected = with_gradients(route_by_kernel, case, own(case), u, weight)
    leaf = u.clone().requires_grad_()
    weight.requires_grad_()
    poses = leaf * 1
    v = route_by_kernel(case, own(case), poses, weight)
    generator = torch.Generator().manual_seed(1)
    functional = torch.randn(v.shape, generator=generator, dtype=torch.float64)
    for _ in range(2):
        got = torch.autograd.grad((v * functional).sum(), (leaf, weight), retain_graph=True)
        for actual, right in zip(got, expected, strict=True):
            assert_close(actual, right)
    poses.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(v.sum(), leaf)


@pytest.mark.parametrize("engine", ["fused", "builtin"])
def test_a_layer_may_be_checkpointed(engine):
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, engine=engine)
    u = torch.randn(9, 6, 4, requires_grad=True)
    expected = torch.autograd.grad(layer(u).square().sum(), (u, layer.weight))
    v = checkpoint(layer, u, use_reentrant=False)
    got = torch.autograd.grad(v.square().sum(), (u, layer.weight))
    for actual, right in zip(got, expected, strict=True):
        assert_close(actual, right)


def test_shared_matrices_have_no_more_private_gradients_than_poses_take_memory(monkeypatch):
    monkeypatch.setattr(lay_out, "COST_OF_A_POSE", math.inf)  # the sizes below are of such matrices
    calls, right = [], parts.Parts.private_matrices

    def private_matrices(*args):
        with monkeypatch.context() as patch:
            patch.setattr(parts, "FEW_THREADS", 1)  # else so many always have their own
            calls.append(right(*args))
        return calls[-1]

    monkeypatch.setattr(parts.Parts, "private_matrices", private_matrices)
    case = complete(6, 4, batch=6)
    for kinds, threads in ((shared(case), 3), ([*own(case)[:-1], 0], 1)):
        u, weight = make_input(case, kinds, child_dim=40 if threads == 1 else 3)
        calls.clear()
        got = with_gradients(route_by_kernel, case, kinds, u, weight)
        ranges, private = calls[-1]
        assert len(ranges) == len(private) == threads
        assert len({x.ctypes.data for x in private}) == threads
        expected = with_gradients(route_by_reference, case, kinds, u, weight)
        for actual, reference in zip(got, expected, strict=True):
            assert_close(actual, reference, rtol=1e-9, atol=1e-11)


def test_the_same_threads_give_the_same_numbers():
    case = complete(200, 5, batch=40)
    u, weight = make_input(case, shared(case), dtype=torch.float32)
    first = with_gradients(route_by_kernel, case, shared(case), u, weight)
    for _ in range(5):
        again = with_gradients(route_by_kernel, case, shared(case), u, weight)
        assert all(map(torch.equal, first, again))


def test_a_trace_is_refused_by_the_kernel_and_given_by_auto():
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, engine="fused")
    u = torch.randn(2, 6, 4)
    with pytest.raises(ValueError, match=r"stores no votes, and a trace.*Use engine='auto'"):
        layer(u, return_trace=True)
    expected = layer(u)
    layer.engine = "auto"
    v, trace = layer(u, return_trace=True)
    assert_close(v, expected)
    assert trace.c.shape == (3, 2, 18)


def count_routings(monkeypatch):
    called = []
    right = kernels.routed
    monkeypatch.setattr(kernels, "routed", lambda *args: called.append(1) or right(*args))
    return called


def test_auto_takes_the_kernel_where_it_applies(monkeypatch):
    called = count_routings(monkeypatch)
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5)
    layer(torch.randn(64, 6, 4))
    assert len(called) == 1
    layer(torch.randn(64, 6, 4), return_trace=True)
    assert len(called) == 1
    layer(torch.randn(1, 6, 4))
    assert len(called) == 2
    layer.bfloat16()(torch.randn(64, 6, 4, dtype=torch.bfloat16))  # in float32
    assert len(called) == 3


def test_without_numba_fused_says_so_and_auto_falls_back(monkeypatch):
    called = count_routings(monkeypatch)
    monkeypatch.delitem(sys.modules, "graphcaps.kernels.cpu.lanes", raising=False)
    monkeypatch.setitem(sys.modules, "numba", None)
    cpu.why_not.cache_clear()
    try:
        layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5)
        assert layer(torch.randn(64, 6, 4)).shape == (64, 3, 5)
        assert not called
        layer.engine = "fused"
        with pytest.raises(RuntimeError, match=r"'fused' cannot run on cpu.*pip install numba"):
            layer(torch.randn(64, 6, 4))
    finally:
        cpu.why_not.cache_clear()


def test_torch_compile_keeps_the_kernel(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert kernels.why_not(CPU) is None
    assert engines.choose("auto", CPU) == "fused"


def test_where_no_compiled_code_can_be_kept_it_is_compiled_anew():
    program = """
from numba.core import caching
caching.CompileResultCacheImpl._locator_classes = []
from graphcaps.kernels import cpu
from graphcaps.kernels.cpu import dynamic, parts
import torch; assert cpu.why_not(torch.device('cpu')) is None
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_edges_are_sorted_once_and_not_saved(monkeypatch):
    sorted_graphs = []
    right = kernels.prepare
    monkeypatch.setattr(
        kernels, "prepare", lambda graph, *args: sorted_graphs.append(graph) or right(graph, *args)
    )
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, engine="fused")
    for size in (1, 2, 40, 2):
        layer(torch.randn(size, 6, 4))
    assert sorted_graphs == [layer.graph]
    assert layer.structure._kept
    assert not layer.structure.__getstate__()["_kept"]


def test_several_threads_may_route_at_once():
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, engine="fused")
    poses = [torch.randn(size, 6, 4) for size in range(1, 9)]
    expected = [layer(u) for u in poses]
    with ThreadPoolExecutor(8) as threads:
        for got, right in zip(threads.map(layer, poses), expected, strict=True):
            assert_close(got, right)


def test_several_threads_may_differentiate_at_once():
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, engine="fused")

    def gradients(u):
        return torch.autograd.grad(layer(u).square().sum(), (u, layer.weight))

    poses = [torch.randn(size, 6, 4, requires_grad=True) for size in range(1, 9)]
    expected = [gradients(u) for u in poses]
    with ThreadPoolExecutor(8) as threads:
        for got, right in zip(threads.map(gradients, poses), expected, strict=True):
            assert all(map(torch.equal, got, right))


def test_a_thread_that_outlives_the_main_one_may_route():
    program = """
import threading, time, torch
import graphcaps as gc
from graphcaps.kernels import cpu
from graphcaps.kernels.cpu import parts
parts.WORK_OF_A_THREAD = 1
torch.set_num_threads(2)
layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, engine="fused")
def route():
    threading.main_thread().join()
    time.sleep(0.2)
    print(layer(torch.rand(9, 6, 4)).shape)
threading.Thread(target=route).start()
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert "torch.Size([9, 3, 5])" in done.stdout


def _route_in_child(layer, u):
    with torch.no_grad():
        return layer(u).numpy()


def test_a_forked_process_may_route_after_its_parent_has():
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, engine="fused")
    u = torch.randn(2, 6, 4)
    expected = _route_in_child(layer, u)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        got = pool.apply_async(_route_in_child, (layer, u)).get(timeout=60)
    assert_close(torch.from_numpy(got), torch.from_numpy(expected))


MEMORY = """
import sys
from pathlib import Path
import torch
import graphcaps as gc

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

torch.set_num_threads(2)
children, parents, batch = map(int, sys.argv[1:])
layer = gc.CapsuleLayer(gc.complete_graph(children, parents), 8, 16, engine="fused")
u = torch.randn(batch, children, 8, requires_grad=True)
layer(u).sum().backward()
u.grad.zero_(), layer.weight.grad.zero_()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
du, dweight = torch.autograd.grad(layer(u).sum(), (u, layer.weight))
print((status("VmHWM") - before) * 1024 - du.nbytes - dweight.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells the peak")
@pytest.mark.parametrize("batch", [64, 7])
def test_memory_is_that_of_children_and_parents_not_of_edges(batch):
    """Memory is measured beyond inputs, outputs and gradients."""
    children, parents = 1152, 100
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(children), str(parents), str(batch)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": ":".join(sys.path)},
    )
    lanes = 16 if batch <= 16 else 64
    of_children = 4 * lanes * children * 8
    of_parents = 4 * lanes * parents * 16
    votes = 4 * batch * children * parents * 16
    allowed = 2 * of_children + 40 * of_parents
    assert int(done.stdout) < allowed < votes / 4
