"""Convolutional capsules against a dense form that unfolds windows, written from the papers."""

import math

import pytest
import torch
import torch.nn.functional as F
from routings import ENGINES, WIDEST
from torch import nn
from torch.testing import assert_close

import graphcaps as gc
from graphcaps import engines
from graphcaps.convolution import COMPETITIONS
from graphcaps.pictures.inspection import dense_form
from graphcaps.structure import Structure

# a stride that leaves children out at the border, a padded one, and a kernel as large as the grid
GRIDS = {
    "strided": dict(height=6, width=7, kernel_size=3, stride=2),
    "padded": dict(height=4, width=3, kernel_size=3, padding=1),
    "one window": dict(height=2, width=2, kernel_size=2),
}
CHILD_MAPS, PARENT_MAPS = 2, 3
POSES = dict(child_dim=4, parent_dim=4)


def make(grid, competition, routing, engine, **options):
    torch.manual_seed(0)
    layer = gc.ConvCapsules(
        **GRIDS[grid],
        child_maps=CHILD_MAPS,
        parent_maps=PARENT_MAPS,
        child_dim=4,
        parent_dim=6 if routing == "dynamic" else 4,
        competition=competition,
        routing=routing,
        rows=1 if routing == "dynamic" else 2,
        engine=engine,
        dtype=torch.float64,
        **options,
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer.to(WIDEST)


def capsules(layer, batch=2):
    torch.manual_seed(1)
    size = (batch, *layer.children_grid)
    u = torch.randn(*size, 4, dtype=torch.float64).to(WIDEST).requires_grad_()
    a = torch.rand(size, dtype=torch.float64).to(WIDEST).requires_grad_()
    return u, a


class Unfolded:
    """Votes for every window, `[B, maps, k·k, windows, parent maps, D]`, and their competition.

    Windows are extracted from padded maps by torch's `unfold`; sums over a child's copies in
    several windows are taken by `fold`.
    """

    def __init__(self, layer, u, a, grid, competition):
        self.size = dict(height=0, width=0, kernel_size=0, stride=1, padding=0) | GRIDS[grid]
        self.competition = competition
        inner, rows = layer.layer, layer.layer.rows
        k, (maps, *_) = self.size["kernel_size"], layer.children_grid
        there = self.unfold(torch.ones_like(u[..., :1]))[..., 0]
        self.there = there.unsqueeze(-1)  # 0 where a window reaches over the border
        poses = self.unfold(u).unflatten(-1, (rows, -1))
        matrices = inner.weight.unflatten(0, (k * k, maps, PARENT_MAPS))
        u_hat = torch.einsum("bioxpk,oijkd->bioxjpd", poses, matrices)
        self.u_hat = u_hat.flatten(-2)
        self.a = None if a is None else self.unfold(a.unsqueeze(-1))

    def unfold(self, x):
        """`[B, maps, H, W, K]` to `[B, maps, k·k, windows, K]`."""
        k = self.size["kernel_size"]
        columns = F.unfold(
            x.permute(0, 1, 4, 2, 3).flatten(0, 1), k, 1, self.size["padding"], self.size["stride"]
        )
        return columns.unflatten(0, x.shape[:2]).unflatten(2, (-1, k * k)).permute(0, 1, 3, 4, 2)

    def sum_where_it_competes(self, x):
        """Sum `[B, maps, k·k, windows, J]` over the edges that compete, for each edge."""
        x = x * self.there
        if self.competition == "window":
            return x.sum(dim=-1, keepdim=True)
        if self.competition == "map":
            return x.sum(dim=(2, 3, 4), keepdim=True)
        k, grid = self.size["kernel_size"], (self.size["height"], self.size["width"])
        how = (k, 1, self.size["padding"], self.size["stride"])
        columns = x.sum(dim=-1).flatten(0, 1)
        images = F.fold(columns, grid, *how)
        return F.unfold(images, *how).view(*x.shape[:-1], 1)

    def softmax(self, b):
        b = b.masked_fill(self.there == 0, -math.inf)
        power = (b - b.amax(dim=(2, 3, 4), keepdim=True).detach()).exp()
        return power / self.sum_where_it_competes(power).where(self.there > 0, 1)

    def sum_into_parents(self, w, x):
        """`[B, J, windows, ·]`."""
        return torch.einsum("bioxj,bioxjd->bjxd", w * self.there, x)


def on_votes(x):
    """Broadcast `[B, J, windows, ·]` to the shape of votes."""
    return x.transpose(1, 2)[:, None, None]


def dynamic_densely(dense):
    b = torch.zeros_like(dense.u_hat[..., 0])
    for _ in range(3):
        s = dense.sum_into_parents(dense.softmax(b), dense.u_hat)
        norm = s.norm(dim=-1, keepdim=True)
        v = s * norm / (1 + norm**2)
        b = b + (dense.u_hat * on_votes(v)).sum(dim=-1)
    return (v,)


def em_densely(dense, beta_a, beta_u):
    c = dense.softmax(torch.zeros_like(dense.u_hat[..., 0]))
    for t in range(3):
        w = dense.a * c
        N = dense.sum_into_parents(w, torch.ones_like(dense.u_hat[..., :1]))
        mu = dense.sum_into_parents(w, dense.u_hat) / N
        square = (dense.u_hat - on_votes(mu)) ** 2
        variance = dense.sum_into_parents(w, square) / N + 5e-4
        cost = N * (beta_u.view(-1, 1, 1) + variance.log() / 2).sum(dim=-1, keepdim=True)
        inverse_temperature = 0.01 * (1 - 0.95 ** (t + 1))
        logit = inverse_temperature * (beta_a.view(-1, 1, 1) - cost)
        log_p = -(square / on_votes(2 * variance) + on_votes(2 * math.pi * variance).log() / 2)
        c = dense.softmax(log_p.sum(dim=-1) + F.logsigmoid(on_votes(logit)[..., 0]))
    return mu, logit[..., 0].sigmoid()


def route_densely(layer, u, a, grid, competition):
    routing = layer.layer.routing
    if routing.name == "dynamic":
        found = dynamic_densely(Unfolded(layer, u, None, grid, competition))
    else:
        dense = Unfolded(layer, u, a, grid, competition)
        found = em_densely(dense, routing.beta_a, routing.beta_u)
    return [x.unflatten(2, (layer.height, layer.width)) for x in found]


def route(layer, u, a):
    found = layer(u, a) if layer.layer.routing.activations else layer(u)
    return list(found) if isinstance(found, tuple) else [found]


def gradients(found, layer, u, a):
    torch.manual_seed(2)
    loss = sum((x * torch.randn(x.shape, dtype=torch.float64).to(x)).sum() for x in found)
    inputs = {"u": u, **dict(layer.named_parameters())}
    if layer.layer.routing.activations:
        inputs["a"] = a
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


@pytest.mark.parametrize("routing", ["dynamic", "em"])
@pytest.mark.parametrize("competition", COMPETITIONS)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_convolution_equals_the_dense_form_that_unfolds_its_windows(
    engine, grid, competition, routing
):
    layer = make(grid, competition, routing, engine)
    u, a = capsules(layer)
    found, right = route(layer, u, a), route_densely(layer, u, a, grid, competition)
    of_found, of_right = (gradients(x, layer, u, a) for x in (found, right))
    tolerance = 1e-9 if torch.float64 == WIDEST else 2e-4
    for x, y in [*zip(found, right, strict=True), *((of_found[n], of_right[n]) for n in of_right)]:
        scale = float(y.detach().abs().max())
        assert_close(x, y, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("competition", COMPETITIONS)
def test_the_coupling_sums_to_1_over_the_edges_that_compete(competition):
    graph = gc.conv_graph(5, 5, 2, 3, 3, stride=2, competition=competition)
    layer = gc.CapsuleLayer(graph, 4, 4, dtype=torch.float64)
    torch.nn.init.normal_(layer.weight)
    _, trace = layer(torch.randn(2, 50, 4, dtype=torch.float64), return_trace=True)
    child, parent = (x.long() for x in graph.edges())
    number = {"image": child, "window": child * 4 + parent % 4, "map": child // 25}[competition]
    total = torch.zeros(2, int(number.max()) + 1, dtype=torch.float64)
    total = total.index_add(1, number, trace.c[-1])
    torch.testing.assert_close(total[:, number.unique()].min(), torch.ones(()).double())
    torch.testing.assert_close(total.max(), torch.ones(()).double())
    c = trace.c[-1].detach()
    assert c.std() > 0.1 * c.mean()  # and not because all are equal


def test_a_child_moved_changes_only_the_parents_that_see_it():
    layer = gc.ConvCapsules(
        6, 6, 2, 3, child_dim=4, parent_dim=5, kernel_size=3, competition="window"
    )
    u = torch.randn(1, 2, 6, 6, 4)
    moved = u.clone()
    moved[0, 1, 1, 4] += 1
    changed = (layer(u) != layer(moved)).any(dim=-1)[0]
    seen = torch.zeros(4, 4, dtype=torch.bool)
    seen[0:2, 2:4] = True  # windows that start in rows 0 and 1, columns 2 and 3
    assert torch.equal(changed, seen.expand(3, 4, 4))


def test_children_that_no_window_reaches_have_no_effect_and_no_gradient():
    # one window, and a border that it does not reach
    layer = gc.ConvCapsules(4, 4, 1, 2, child_dim=4, parent_dim=5, kernel_size=3, stride=2)
    u = torch.randn(2, 1, 4, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(u).sum(), u)
    reached = torch.zeros(4, 4, dtype=torch.bool)
    reached[:3, :3] = True
    assert torch.equal((gradient != 0).any(dim=-1), reached.expand(2, 1, 4, 4))


@pytest.mark.parametrize(("routing", "filling"), [("dynamic", 0.0), ("em", 5.0)])
def test_padding_is_children_of_no_effect(routing, filling):
    """Padding has zero poses for dynamic routing, and activation 0 with any pose for EM."""
    options = dict(competition="window", routing=routing, dtype=torch.float64)
    sizes = dict(child_maps=2, parent_maps=3, child_dim=4, parent_dim=4, kernel_size=3)
    padded = gc.ConvCapsules(4, 5, padding=1, **sizes, **options)
    larger = gc.ConvCapsules(6, 7, **sizes, **options)
    larger.load_state_dict(padded.state_dict())
    u = torch.randn(2, 2, 4, 5, 4, dtype=torch.float64)
    a = torch.rand(2, 2, 4, 5, dtype=torch.float64)
    around = F.pad(u, (0, 0, 1, 1, 1, 1), value=filling)
    if routing == "dynamic":
        assert_close(padded(u), larger(around))
    else:
        assert_close(padded(u, a), larger(around, F.pad(a, (1, 1, 1, 1))))


def test_children_and_matrices_are_numbered_as_documented():
    graph = gc.conv_graph(3, 4, child_maps=2, parent_maps=5, kernel_size=2)
    child, parent = (x.long() for x in graph.edges())
    (edge,) = torch.nonzero(
        (child == (1 * 3 + 2) * 4 + 1) & (parent == (4 * 2 + 1) * 3 + 0)
    ).flatten()  # map 1, row 2, column 1; map 4, second row of windows, first column
    assert graph.edata["weight_index"][edge] == ((1 * 2 + 1) * 2 + 1) * 5 + 4
    assert graph.nodes["parent"].data["type"].tolist() == [j for j in range(5) for _ in range(6)]
    assert torch.equal(child, child.sort().values)


def test_graphs_of_a_batch_do_not_compete():
    from graphcaps._dgl import dgl

    graphs = [gc.conv_graph(n, n, 1, 2, 2, competition="map") for n in (2, 3)]
    together = gc.CapsuleLayer(graphs[0], 4, 5, routing="dynamic", dtype=torch.float64)
    u = [torch.randn(n * n, 4, dtype=torch.float64) for n in (2, 3)]
    apart = [together(x, graph=graph) for x, graph in zip(u, graphs, strict=True)]
    assert_close(together(torch.cat(u), graph=dgl.batch(graphs)), torch.cat(apart))


@pytest.mark.parametrize("rows", [1, 2])
def test_coordinates_are_added_to_the_votes(rows):
    layer = gc.ConvCapsules(
        2, 4, 3, 2, **POSES, kernel_size=2, rows=rows, coordinates=True, engine="scatter"
    )
    plain = gc.CapsuleLayer(layer.layer.graph, 4, 4, rows=rows, engine="scatter")
    plain.weight = layer.layer.weight
    u = torch.randn(2, 3 * 2 * 4, 4)
    _, trace = layer.layer(u, return_trace=True)
    _, without = plain(u, return_trace=True)
    child = layer.layer.graph.edges()[0].long()
    y, x = (child % 8) // 4, child % 4
    added = torch.zeros(len(child), 4)
    first, second = (0, 1) if rows == 1 else (1, 3)  # the last number of each of two rows
    added[:, first], added[:, second] = (y + 0.5) / 2, (x + 0.5) / 4
    assert_close(trace.u_hat, without.u_hat + added)
    assert layer.layer.weight.shape == plain.weight.shape
    assert "layer.coordinates" in layer.state_dict()


def test_the_dense_form_of_a_layer_knows_coordinates_and_refuses_other_competitions():
    layer = make("strided", "image", "dynamic", "scatter", coordinates=True)
    u = capsules(layer)[0].flatten(1, 3)
    assert_close(dense_form(layer.layer)(u)[0], layer.layer(u))
    with pytest.raises(ValueError, match="another competition"):
        dense_form(make("strided", "window", "dynamic", "scatter").layer)


def test_layers_with_activations_stack():
    options = dict(routing="em", rows=2, coordinates=True, **POSES)
    net = nn.Sequential(
        gc.ConvCapsules(8, 8, 2, 3, kernel_size=3, stride=2, **options),
        gc.ConvCapsules(3, 3, 3, 2, kernel_size=3, padding=1, **options),
    )
    poses, activations = net(gc.Capsules(torch.randn(2, 2, 8, 8, 4), torch.rand(2, 2, 8, 8)))
    assert poses.shape == (2, 2, 3, 3, 4)
    assert activations.shape == (2, 2, 3, 3)
    (poses.sum() + activations.sum()).backward()
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(kernel_size=0), "kernel_size must be at least 1; got 0"),
        (dict(padding=3), "padding must be from 0 to kernel_size − 1, 2"),
        (dict(height=2), "a window of 3 rows and columns does not fit on a grid of 2×5"),
        (dict(competition="all"), "unknown competition 'all'; choose image or window or map"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, said):
    sizes = dict(height=4, width=5, child_maps=2, parent_maps=3, kernel_size=3)
    with pytest.raises(ValueError, match=said):
        gc.conv_graph(**sizes | change)


def test_capsules_on_another_grid_are_refused():
    layer = gc.ConvCapsules(4, 5, 2, 3, **POSES, kernel_size=3, routing="em")
    with pytest.raises(ValueError, match=r"expected u as \[batch, 2, 4, 5, child_dim\]"):
        layer(torch.randn(1, 2, 5, 4, 4))
    with pytest.raises(ValueError, match=r"expected a as \[batch, 2, 4, 5\]"):
        layer(torch.randn(1, 2, 4, 5, 4), torch.rand(1, 40))
    with pytest.raises(ValueError, match="activations twice"):
        layer(gc.Capsules(torch.randn(1, 2, 4, 5, 4), torch.rand(1, 2, 4, 5)), torch.rand(1))


def test_a_graph_may_say_which_edges_compete():
    """Here edge 0 competes with 3 and 1 with 2, and neither pair belongs to one child."""
    graph = gc.routing_graph([0, 0, 1, 1], [0, 1, 0, 1], competition=[4, 7, 7, 4])
    structure = Structure(graph)
    assert structure.competition.tolist() == [0, 1, 1, 0]
    assert structure.rivals(torch.device("cpu")).tolist() == [2, 2, 2, 2]
    uneven = gc.routing_graph([0, 0, 1], [0, 1, 0], competition=[0, 1, 1])
    layer = gc.CapsuleLayer(uneven, 4, 4, routing="self_attention", engine="scatter")
    with pytest.raises(ValueError, match="compete with different numbers of edges"):
        layer(torch.rand(1, 2, 4))
    with pytest.raises(ValueError, match="competition needs one number per edge, 2; got 1"):
        gc.routing_graph([0, 1], [0, 1], competition=[0])


def test_the_kernels_for_cuda_refuse_other_competitions():
    structure = Structure(gc.conv_graph(3, 3, 1, 2, 2, competition="window"))
    cuda = torch.device("cuda")
    reason = engines.why_not("fused", cuda, structure=structure)
    assert reason == "its kernels know no competition but that of the edges of a child"
    assert engines.choose("auto", cuda, structure=structure) in {"builtin", "scatter"}
