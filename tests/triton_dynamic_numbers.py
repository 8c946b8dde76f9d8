"""Numbers of dynamic routing by the Triton kernels, on a GPU or else in Triton's interpreter.

`test_triton.py` starts these, with TRITON_INTERPRET=1 where there is no GPU: triton must not have
been imported without it.
"""

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from interpreted import DEVICE, assert_near
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import graphcaps as gc
from graphcaps import kernels, reference
from graphcaps.kernels import ops
from graphcaps.kernels.triton import TritonEdges, device, dynamic, gradients, parents, tiles


@pytest.fixture(autouse=True)
def interpreted_on_the_cpu(monkeypatch):
    """Without a GPU, the operation of torch is Triton's kernels in their interpreter."""
    monkeypatch.setattr(ops, "dynamic_cpu", dynamic)


def routed(u, weight, edges, iterations=3, gradients="all"):
    return kernels.routed(u, weight, edges, iterations, gradients)


def votes_along_edges(u, weight, child, weight_index):
    """`[B·E, D]`, the same edges for every sample."""
    u_hat = torch.einsum("bek,ekd->bed", u[:, child], weight[weight_index])
    return u_hat.reshape(-1, weight.shape[-1])


class Layer(NamedTuple):
    """A graph and the sizes of what is routed on it."""

    graph: object
    batch: int = 3
    child_dim: int = 4
    parent_dim: int = 5
    tiles: bool = True  # where the graph is complete

    @property
    def kinds(self):
        index = self.graph.edata["weight_index"]
        return int(index.max()) + 1 if len(index) else 0

    @property
    def edges(self):
        edges = TritonEdges.of(self.graph, self.kinds, DEVICE)
        return replace(edges, complete=edges.complete and self.tiles)

    def numbers(self, dtype=torch.float32):
        """u, W and the gradient of v."""
        children, parents = (self.graph.num_nodes(end) for end in ("child", "parent"))
        u = torch.randn(self.batch, children, self.child_dim)
        # votes of unit numbers; c errs by the rounding of a logit, which dense softmax may not
        weight = torch.randn(self.kinds, self.child_dim, self.parent_dim) / self.child_dim**0.5
        gradient = torch.randn(self.batch, parents, self.parent_dim)
        return tuple(x.to(DEVICE, dtype) for x in (u, weight, gradient))


SPARSE = gc.routing_graph([3, 0, 0], [0, 2, 0], children=4, parents=4)
SHARED = gc.routing_graph([2, 1, 0, 0, 1], [0, 1, 0, 2, 2], weight_index=[1, 0, 3, 1, 1])
LAYERS = {
    "complete": Layer(gc.complete_graph(9, 2), 1),  # more than a tile of children
    "few": Layer(gc.complete_graph(3, 2), 2),
    "few, not by tiles": Layer(gc.complete_graph(2, 2), 1, tiles=False),
    "sizes of 1": Layer(gc.complete_graph(1, 1), batch=1, child_dim=1, parent_dim=1),
    "poses beyond a block": Layer(gc.complete_graph(2, 1), 17, child_dim=37, parent_dim=3),
    "long poses, one parent": Layer(gc.complete_graph(2, 1), 2, child_dim=20, parent_dim=66),
    "long outputs": Layer(gc.complete_graph(2, 2), 1, child_dim=3, parent_dim=130),
    "more images than a tile": Layer(gc.complete_graph(2, 3), 34, child_dim=2, parent_dim=2),
    "sparse": Layer(SPARSE, 2),
    "shared matrices": Layer(SHARED, 1),
}


def differentiated(function, u, weight, gradient):
    """v and the gradients of u and W."""
    u, weight = u.detach().requires_grad_(), weight.detach().requires_grad_()
    v = function(u, weight)
    du, dweight = torch.autograd.grad(v, (u, weight), gradient)
    return dict(v=v.detach(), du=du, dweight=dweight)


def by_kernels(layer, numbers, iterations=3, gradients="all"):
    edges = layer.edges
    return differentiated(lambda u, w: routed(u, w, edges, iterations, gradients), *numbers)


def densely(layer, numbers, iterations=3, gradients="all", dtype=torch.float64):
    """The same by the reference, from votes that are there."""
    child, parent = (ends.long() for ends in layer.graph.edges())
    index = layer.graph.edata["weight_index"]
    children, parents = (layer.graph.num_nodes(end) for end in ("child", "parent"))
    mask = torch.zeros(children, parents, dtype=torch.bool)
    mask[child, parent] = True

    def route(u, weight):
        on_edges = torch.einsum("bek,ekd->bed", u[:, child], weight[index])
        u_hat = u.new_zeros(len(u), children, parents, weight.shape[2])
        u_hat = u_hat.index_put((torch.arange(len(u))[:, None], child, parent), on_edges)
        return reference.dynamic_routing(u_hat, iterations, mask=mask, gradients=gradients)[0]

    return differentiated(route, *(x.cpu().to(dtype) for x in numbers))


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_and_gradients_equal_the_reference(name):
    """Besides twice the error of the dense form in float32, 16 units are allowed."""
    layer = LAYERS[name]
    numbers = layer.numbers()
    got, truth = by_kernels(layer, numbers), densely(layer, numbers)
    assert_near(got, truth, densely(layer, numbers, dtype=torch.float32))


@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize(("iterations", "gradients"), [(1, "all"), (2, "all"), (3, "last")])
def test_every_number_of_iterations_and_the_last_alone_equal_the_reference(
    iterations, gradients, tiles
):
    layer = Layer(gc.complete_graph(2, 3), 2, tiles=tiles)
    numbers = layer.numbers()
    got = by_kernels(layer, numbers, iterations, gradients)
    truth = densely(layer, numbers, iterations, gradients)
    rival = densely(layer, numbers, iterations, gradients, torch.float32)
    assert_near(got, truth, rival)


def test_sums_cut_into_parts_equal_the_reference(monkeypatch):
    monkeypatch.setattr(parents, "EDGES_OF_PART", 2)
    layer = Layer(gc.complete_graph(5, 1), 2, tiles=False)
    numbers = layer.numbers()
    rival = densely(layer, numbers, dtype=torch.float32)
    assert_near(by_kernels(layer, numbers), densely(layer, numbers), rival)


def test_gradients_of_the_last_iteration_differ_from_those_of_all():
    layer = LAYERS["few"]
    numbers = layer.numbers()
    last, every = (by_kernels(layer, numbers, 3, gradients) for gradients in ("last", "all"))
    assert torch.equal(last["v"], every["v"])
    assert not torch.allclose(last["du"], every["du"], rtol=0.01)


def test_routing_once_is_uniform_routing():
    layer = Layer(SPARSE)
    u, weight, _ = layer.numbers()
    child, _ = layer.graph.edges()
    u_hat = votes_along_edges(u.cpu(), weight.cpu(), child.long(), torch.arange(layer.kinds))
    (only,) = gc.uniform_routing(gc.bind(gc.batch_graph(SPARSE, layer.batch)), u_hat)
    v = routed(u, weight, layer.edges, iterations=1)
    assert_close(v.cpu(), only.v.view(v.shape))


def test_two_edges_between_the_same_nodes_are_two_votes():
    graph = gc.routing_graph([0, 0, 0, 1], [0, 0, 1, 1])
    layer = Layer(graph)
    numbers = layer.numbers()
    child, _ = graph.edges()
    passing = gc.bind(gc.batch_graph(graph, layer.batch), "scatter")

    def route(u, weight):
        u_hat = votes_along_edges(u, weight, child.long(), torch.arange(4))
        *_, last = gc.dynamic_routing(passing, u_hat, iterations=3)
        return last.v.view(layer.batch, 2, -1)

    truth = differentiated(route, *(x.cpu().double() for x in numbers))
    assert_near(by_kernels(layer, numbers), truth, units=64)


@pytest.mark.parametrize(
    "layer",
    [
        Layer(gc.routing_graph([], [], children=3, parents=2)),
        Layer(gc.complete_graph(3, 2), batch=0),
        Layer(SPARSE, batch=0),
    ],
)
def test_where_there_is_nothing_to_route_there_are_zeros(layer):
    numbers = layer.numbers()
    found = by_kernels(layer, numbers)
    for got, like in zip(found.values(), numbers[2:] + numbers[:2], strict=True):
        assert torch.equal(got, torch.zeros_like(like))


def test_a_parent_without_children_is_zero_and_a_child_without_parents_has_no_gradient():
    layer = Layer(SPARSE)
    v, du, _ = by_kernels(layer, layer.numbers()).values()
    assert v[:, [1, 3]].eq(0).all() and v[:, [0, 2]].ne(0).all()
    assert du[:, [1, 2]].eq(0).all() and du[:, [0, 3]].ne(0).all()


@pytest.mark.parametrize("name", ["few", "sparse"])
def test_zero_poses_give_zeros_and_finite_gradients(name):
    u, weight, gradient = LAYERS[name].numbers()
    v, du, dweight = by_kernels(LAYERS[name], (0 * u, weight, gradient)).values()
    assert v.eq(0).all()
    assert du.eq(0).all()  # squash has slope 0 there
    assert dweight.eq(0).all()


@pytest.mark.parametrize("name", ["few", "few, not by tiles"])
def test_large_votes_do_not_overflow(name):
    """Logits far beyond where exp alone is infinite: every v_j has length 1, or nearly so."""
    u, weight, gradient = LAYERS[name].numbers()
    numbers = (1e3 * u, weight, gradient)
    got = by_kernels(LAYERS[name], numbers)
    assert all(x.isfinite().all() for x in got.values())
    truth = densely(LAYERS[name], numbers)["v"]
    assert_close(got["v"].cpu().double(), truth, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["few", "sparse"])
def test_an_image_is_routed_alike_alone_and_in_a_batch(name):
    layer = LAYERS[name]
    u, weight, _ = layer.numbers()
    together = routed(u, weight, layer.edges)
    for image in range(layer.batch):
        alone = routed(u[image : image + 1], weight, layer.edges)
        assert_close(alone[0], together[image], rtol=1e-6, atol=1e-7)


def test_equal_calls_give_equal_bits():
    layer = LAYERS["few"]
    numbers = layer.numbers()
    once, again = (by_kernels(layer, numbers) for _ in range(2))
    assert all(map(torch.equal, once.values(), again.values()))


def test_bfloat16_errs_by_its_rounding_of_what_leaves():
    """Inputs are exact in float32, sums too: 1 unit of bfloat16 at the largest number is left."""
    layer = LAYERS["few"]
    numbers = layer.numbers(torch.bfloat16)
    got = by_kernels(layer, numbers)
    assert {x.dtype for x in got.values()} == {torch.bfloat16}
    truth = densely(layer, numbers)
    assert_near(got, truth, units=1)


def test_poses_and_matrices_need_not_be_contiguous():
    layer = Layer(gc.complete_graph(2, 2), 2)
    u, weight, gradient = layer.numbers()
    strided = (u.mT.contiguous().mT, weight.mT.contiguous().mT, gradient[:1].expand_as(gradient))
    dense = tuple(x.contiguous() for x in strided)
    found = (by_kernels(layer, numbers).values() for numbers in (strided, dense))
    assert all(map(torch.equal, *found))


def test_the_operation_gives_what_its_fake_says():
    layer = LAYERS["few"]
    u, weight, _ = layer.numbers()
    edges = layer.edges
    found = dynamic.dynamic_routing(u, weight, edges.tensors, edges.parents, True, 3, True)
    with FakeTensorMode():
        fakes = (torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in (u, weight))
        said = ops.dynamic_routing(*fakes, [], edges.parents, True, 3, True)
    for got, expected in zip(found, said, strict=True):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        assert got.is_contiguous()


def test_differentiating_twice_is_refused():
    layer = Layer(gc.complete_graph(2, 2), 1)
    u, weight, _ = layer.numbers()
    u.requires_grad_()
    loss = routed(u, weight, layer.edges).square().sum()
    (gradient,) = torch.autograd.grad(loss, u, create_graph=True)
    with pytest.raises(RuntimeError, match="has first derivatives only"):
        gradient.sum().backward()


def test_a_gradient_that_is_not_needed_is_not_computed(monkeypatch):
    launched, right = [], device.launch
    monkeypatch.setattr(
        device,
        "launch",
        lambda *args, **how: launched.append(args[0]) or right(*args, **how),
    )
    both_kernels = gradients.gradient_of_poses_kernel, gradients.gradients_of_kinds_kernel
    u, weight, gradient = LAYERS["few"].numbers()
    both = [x.clone().requires_grad_() for x in (u, weight)]
    expected = torch.autograd.grad(routed(*both, LAYERS["few"].edges), both, gradient)
    for wanted in (0, 1):
        launched.clear()
        pair = [u, weight]
        pair[wanted] = pair[wanted].clone().requires_grad_()
        v = routed(*pair, LAYERS["few"].edges)
        (got,) = torch.autograd.grad(v, pair[wanted], gradient)
        assert torch.equal(got, expected[wanted])
        assert both_kernels[wanted] in launched
        assert both_kernels[1 - wanted] not in launched


def test_the_kernels_that_are_meant_run(monkeypatch):
    """Tiles for complete graphs whose matrices and votes fit, two passes otherwise."""
    ran = []
    monkeypatch.setattr(device, "launch", lambda kernel, *_, **__: ran.append(kernel))
    by_tiles = set()
    for name, layer in LAYERS.items():
        ran.clear()
        u, weight, _ = layer.numbers()
        routed(u, weight, layer.edges)
        if tiles.partial_sums_kernel in ran:
            by_tiles.add(name)
        else:
            assert parents.partial_sums_kernel in ran
    small = {"complete", "few", "sizes of 1", "more images than a tile"}
    assert by_tiles == small | {"long poses, one parent"}


@pytest.mark.parametrize("tiles", [True, False])
def test_nan_in_one_matrix_reaches_every_parent_of_its_child(tiles):
    layer = Layer(gc.complete_graph(2, 2), 1, tiles=tiles)
    u, weight, gradient = layer.numbers()
    weight[0, 0, 0] = torch.nan
    assert by_kernels(layer, (u, weight, gradient))["v"].isnan().all()


def test_nan_in_one_matrix_leaves_parents_alone_that_its_child_does_not_see():
    layer = Layer(gc.routing_graph([0, 0, 1], [0, 1, 2]))
    u, weight, gradient = layer.numbers()
    weight[0, 0, 0] = torch.nan
    v = by_kernels(layer, (u, weight, gradient))["v"]
    assert v[:, :2].isnan().all() and v[:, 2].isfinite().all()


def test_tiles_of_many_children_lose_no_digits(monkeypatch):
    """The first child's vote is 1, those of the others are lost beside it one by one."""
    monkeypatch.setattr(tiles, "MOST_TILES", 1)
    monkeypatch.setattr(parents, "EDGES_OF_PART", 1000)
    small, many = 2.0**-25, 70
    graph = gc.complete_graph(1 + many, 1)
    for by_tiles in (True, False):
        layer = Layer(graph, 1, 1, 1, tiles=by_tiles)
        u = torch.tensor([1.0] + [small] * many, device=DEVICE).view(1, -1, 1)
        v = routed(u, torch.ones(1 + many, 1, 1, device=DEVICE), layer.edges, iterations=1)
        s = 1 + many * small
        right = torch.full((1, 1, 1), s * s / (1 + s * s))
        assert_close(v.cpu(), right, rtol=12 * 2.0**-23, atol=0)
