"""The kernels as custom operations of torch: schemas, fakes, compilation, export, derivatives."""

import pytest
import torch
from couplings import CPU, FEATURES, Sizes, complete, make_features
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from graphcaps import kernels
from graphcaps.kernels import ops

GRAPH, SIZE = complete(4, 3, kinds=5), Sizes(batch=2, rows=2)
ORDER = ("a", "r", "k", "p", "q", "beta", "prior")


def arguments(features, leak=True, squares=True, detach_coupling=False):
    """Arguments for `graphcaps::couple`."""
    optional = (features.get(name) for name in ORDER)
    edges = GRAPH.prepared()
    return (
        features["u"],
        features["weight"],
        *optional,
        edges.tensors,
        edges.parents,
        SIZE.rows,
        leak,
        squares,
        detach_coupling,
    )


def routing_arguments(requires_grad):
    graph = complete(4, 3)
    features = make_features(graph, Sizes(batch=2))
    leaves = (x.requires_grad_(requires_grad) for x in features.values())
    return (*leaves, graph.prepared().tensors, graph.parents, False)


@pytest.mark.parametrize("names", [(), ("p",), FEATURES])
@pytest.mark.parametrize("squares", [False, True])
def test_torch_finds_no_fault_with_couple(names, squares):
    features = make_features(GRAPH, SIZE, names)
    leaves = {name: x.requires_grad_() for name, x in features.items()}
    torch.library.opcheck(ops.couple, arguments(leaves, squares=squares))


@pytest.mark.parametrize("needed", [[True] * 8, [n % 3 == 0 for n in range(8)], [False] * 8])
@pytest.mark.parametrize("squares", [False, True])
def test_torch_finds_no_fault_with_the_backward_of_couple(needed, squares):
    inputs = arguments(make_features(GRAPH, SIZE, FEATURES), squares=squares)
    sums = ops.couple(*inputs)
    gradients = [torch.randn_like(x) for x in sums[:3]]
    torch.library.opcheck(ops.couple_backward, (*gradients, sums[3], *inputs, needed))


@pytest.mark.parametrize("through_all", [True, False])
def test_torch_finds_no_fault_with_dynamic_routing(through_all):
    torch.library.opcheck(ops.dynamic_routing, (*routing_arguments(True), 3, through_all))
    inputs = routing_arguments(False)
    v, *kept = ops.dynamic_routing(*inputs, 3, through_all)
    for needed in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(
            ops.dynamic_routing_backward,
            (torch.randn_like(v), *kept, *inputs, through_all, needed),
        )


def two_passes(edges, u, weight, a, k, r):
    votes = kernels.Votes(u, weight, edges, a, SIZE.rows)
    total, linear, _ = votes.couple(k=k, r=r)
    mean = linear / (1 + total.unsqueeze(-1))
    _, linear, square = votes.couple(p=mean, r=r, squares=True)
    return linear.sin().sum() + square.sum()


def route(edges, u, weight):
    return kernels.routed(u, weight, edges, 3).square().sum()


every_function = pytest.mark.parametrize(
    ("function", "graph", "size", "names"),
    [(two_passes, GRAPH, SIZE, ("a", "k", "r")), (route, complete(4, 3), Sizes(), ())],
)


@every_function
def test_torch_compile_makes_one_graph_of_it(function, graph, size, names):
    edges = graph.prepared()
    leaves = [x.requires_grad_() for x in make_features(graph, size, names).values()]
    expected = function(edges, *leaves)
    compiled = torch.compile(
        lambda *leaves: function(edges, *leaves), fullgraph=True, backend="aot_eager"
    )
    got = compiled(*leaves)
    assert_close(got, expected)
    gradients = torch.autograd.grad(expected, leaves)
    for actual, right in zip(torch.autograd.grad(got, leaves), gradients, strict=True):
        assert_close(actual, right)


class Routing(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight, self.edges = weight, complete(4, 3).prepared()

    def forward(self, u):
        return kernels.routed(u, self.weight, self.edges, 3)


def test_torch_export_keeps_the_number_of_samples_open():
    features = make_features(complete(4, 3), Sizes(batch=2))
    routing = Routing(features["weight"])
    samples = torch.export.Dim("samples", min=2, max=64)
    exported = torch.export.export(routing, (features["u"],), dynamic_shapes=({0: samples},))
    more = torch.randn(7, 4, 3, dtype=torch.float64)
    assert_close(exported.module()(more), routing(more))


def test_the_meta_device_gives_shapes_and_computes_nothing():
    features = make_features(GRAPH, SIZE, FEATURES)
    on_meta = {name: x.to("meta").requires_grad_() for name, x in features.items()}
    u, weight, a = (on_meta.pop(name) for name in ("u", "weight", "a"))
    votes = kernels.Votes(u, weight, GRAPH.prepared(torch.device("meta")), a, SIZE.rows)
    sums = votes.couple(**on_meta, squares=True)
    assert [list(x.shape) for x in sums] == [[2, 3], [2, 3, 8], [2, 3, 8]]
    assert all(x.is_meta for x in sums)
    leaves = (u, weight, a, *on_meta.values())
    gradients = torch.autograd.grad(sum(x.sum() for x in sums), leaves)
    assert [x.shape for x in gradients] == [x.shape for x in leaves]


@pytest.mark.parametrize(
    ("device", "dtype", "of_sums", "kept"),
    [
        ("cpu", torch.float32, torch.float32, 0),
        ("cpu", torch.float64, torch.float64, 0),
        ("cuda", torch.bfloat16, torch.float32, 2 * 2 * 4),
    ],
)
def test_fakes_have_the_dtypes_of_the_device(device, dtype, of_sums, kept):
    with FakeTensorMode():
        u, weight = (torch.empty(x, device=device, dtype=dtype) for x in ((2, 4, 6), (5, 3, 4)))
        p = torch.empty(2, 3, 8, device=device, dtype=of_sums)
        inputs = (u, weight, *[None] * 3, p, *[None] * 3, [], 3, 2, False, True, False)
        sums = ops.couple(*inputs)
        assert [x.dtype for x in sums[:3]] == [of_sums] * 3
        assert sums[3].numel() == kept
        gradients = ops.couple_backward(*sums, *inputs, [True] * 8)
        assert [x.dtype for x in gradients] == [dtype] * 3 + [of_sums] * 5


@every_function
def test_second_derivatives_are_refused(function, graph, size, names):
    edges = graph.prepared()
    leaves = [x.requires_grad_() for x in make_features(graph, size, names).values()]
    gradients = torch.autograd.grad(function(edges, *leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="use engine='scatter' for the second"):
        gradients[0].square().sum().backward()


def test_the_backward_pass_may_be_repeated_but_not_after_poses_have_changed():
    features = make_features(GRAPH, SIZE, ("p",))
    leaves = [x.requires_grad_() for x in features.values()]
    poses = leaves[0] * 1
    votes = kernels.Votes(poses, leaves[1], GRAPH.prepared(), rows=SIZE.rows)
    _, linear, _ = votes.couple(p=leaves[2])
    loss = linear.square().sum()
    first, again = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))
    poses.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves)


def test_a_device_without_a_kernel_is_told():
    assert kernels.why_not(CPU) is None
    u = torch.zeros(2, 4, 6, device="meta")
    with pytest.raises(ValueError, match="move all to one device"):
        kernels.Votes(u, torch.zeros(5, 3, 4, device="meta"), GRAPH.prepared(), rows=2)
