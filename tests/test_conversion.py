"""DGL graphs with other node and edge types are routed like the same graphs rebuilt by hand."""

from typing import Any, NamedTuple

import pytest
import torch
from routings import (
    ENGINES,
    VARIANTS,
    WIDEST,
    WITH_VOTES,
    Poses,
    Routed,
    assert_equal,
    results_and_gradients,
    with_gradients,
)

import graphcaps as gc
from graphcaps._dgl import dgl

every_engine = pytest.mark.parametrize("engine", ENGINES)
IN = ("atom", "in", "molecule")
RINGS = ("ring", "in", "molecule")


class Guest(NamedTuple):
    """A graph with other node types, the same graph by hand, and the node type of each child."""

    graph: dgl.DGLGraph
    by_hand: dgl.DGLGraph
    etype: Any = None
    nodes: dict[str, list[int]] | None = None


def molecule(atoms, rings, features=False):
    """A graph of atoms and rings: atoms vote for both parents, rings for the second."""
    graph = dgl.heterograph(
        {
            IN: (list(range(atoms)) * 2, [0] * atoms + [1] * atoms),
            RINGS: (list(range(rings)), [1] * rings),
            ("atom", "bonds", "atom"): ([0], [atoms - 1]),
        },
        num_nodes_dict={"atom": atoms, "ring": rings + 1, "molecule": 2},
    )
    if features:
        graph.edges[IN].data["weight_index"] = torch.arange(2 * atoms) % 3
        graph.edges[RINGS].data["weight_index"] = torch.full((rings,), 2)
        graph.nodes["molecule"].data["type"] = torch.tensor([1, 0])
    return graph


def molecule_by_hand(atoms, rings, features=False):
    """The same by hand: children are atoms, then rings; atoms have matrix 1, rings matrix 0."""
    return gc.routing_graph(
        [*range(atoms), *range(atoms), *range(atoms, atoms + rings)],
        [0] * atoms + [1] * atoms + [1] * rings,
        children=atoms + rings + 1,
        weight_index=[e % 3 for e in range(2 * atoms)] + [2] * rings
        if features
        else [1] * 2 * atoms + [0] * rings,
        parent_type=[1, 0] if features else [0, 0],
    )


def shared(child, parent, children, parents, kinds=None):
    """A graph by hand in which edges share one matrix, unless `kinds` is given."""
    return gc.routing_graph(
        child,
        parent,
        children=children,
        parents=parents,
        weight_index=[0] * len(child) if kinds is None else kinds,
        parent_type=[0] * parents,
    )


def guests():
    child, parent = [3, 0, 0, 2], [0, 2, 0, 2]
    named = dgl.heterograph({IN: (child, parent)}, {"atom": 5, "molecule": 4})
    narrow = dgl.heterograph({IN: (child, parent)}, {"atom": 5, "molecule": 4}, torch.int32)
    narrow.edata["weight_index"] = torch.tensor([1, 0, 2, 0])
    homogeneous = dgl.graph((child, parent), num_nodes=4)
    bonds = {
        ("atom", "single", "molecule"): ([0, 1], [0, 0]),
        ("atom", "double", "molecule"): ([2, 0], [0, 1]),
    }
    bonded, bonded_by_hand = dgl.heterograph(bonds), shared([2, 0, 0, 1], [0, 1, 0, 0], 3, 2)
    bonded_by_hand.edata["weight_index"] = torch.tensor([0, 0, 1, 1])
    edge_index = torch.tensor([[0, 1, 3, 4, 2, 2], [1, 2, 4, 3, 0, 2]])  # graph 0, graph 1, graph 0
    first = gc.routing_graph(
        [0, 1, 2, 2], [1, 2, 0, 2], weight_index=[0, 1, 2, 0], parent_type=[0, 1, 0]
    )
    second = gc.routing_graph([0, 1], [1, 0], parents=3, weight_index=[1, 2], parent_type=[0, 1, 0])
    return {
        "int64 and other names": Guest(named, shared(child, parent, 5, 4)),
        "int32 with weight_index": Guest(narrow, shared(child, parent, 5, 4, [1, 0, 2, 0])),
        "one edge type of several": Guest(
            molecule(3, 2), shared([0, 1, 2] * 2, [0] * 3 + [1] * 3, 3, 2), IN
        ),
        "a graph of one node type": Guest(homogeneous, shared(child, parent, 4, 4)),
        "a block": Guest(
            dgl.to_block(homogeneous, torch.tensor([2, 0])),
            shared([2, 1, 1, 0], [1, 0, 1, 0], 3, 2),
        ),
        "two edge types of one node type": Guest(
            dgl.batch([bonded, bonded]), dgl.batch([bonded_by_hand] * 2), ["double", "single"]
        ),
        "two node types": Guest(
            molecule(3, 2),
            molecule_by_hand(3, 2),
            [RINGS, IN],
            {"atom": [0, 1, 2], "ring": [3, 4, 5]},  # in another order than etype
        ),
        "two node types, ragged": Guest(
            dgl.batch([molecule(3, 2, True), molecule(1, 0, True)]),
            dgl.batch([molecule_by_hand(3, 2, True), molecule_by_hand(1, 0, True)]),
            [IN, RINGS],
            {"atom": [0, 1, 2, 6], "ring": [3, 4, 5, 7]},
        ),
        "edge_index with batch": Guest(
            gc.graph_from_edge_index(edge_index, batch=torch.tensor([0, 0, 0, 1, 1])),
            dgl.batch([shared([0, 1, 2, 2], [1, 2, 0, 2], 3, 3), shared([0, 1], [1, 0], 2, 2)]),
        ),
        "edge_index of two kinds of nodes": Guest(
            gc.graph_from_edge_index(
                edge_index,
                batch=(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])),
                weight_index=[0, 1, 1, 2, 2, 0],
                parent_type=[0, 1, 0, 0, 1, 0],
            ),
            dgl.batch([first, second]),
        ),
    }


GUESTS = guests()
every_guest = pytest.mark.parametrize("guest", GUESTS.values(), ids=GUESTS)


def make_layer(guest, variant, engine, **changes):
    """A layer with parameters so large that its coupling is far from equal."""
    routing, options = VARIANTS[variant]
    own = dict(graph=guest.graph, etype=guest.etype) | changes
    layer = gc.CapsuleLayer(
        child_dim=3,
        parent_dim=4,
        routing=routing,
        engine=engine,
        dtype=torch.float64,
        **own,
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in layer.parameters():
            x.copy_(torch.randn(x.shape, generator=generator, dtype=torch.float64))
    return layer.to(WIDEST)


def make_poses(guest, variant):
    """Of two samples."""
    children = guest.by_hand.num_nodes("child")
    a = torch.rand(2, children, dtype=WIDEST) if VARIANTS[variant].activations else None
    return with_gradients(Poses(torch.randn(2, children, 3, dtype=WIDEST), a))


def route(layer, guest, poses, **graph):
    """Route the features of a guest's nodes."""
    given = [poses.u] if poses.a is None else list(poses)
    if guest.nodes is not None:
        given = [
            {name: x.index_select(dim, torch.tensor(own)) for name, own in guest.nodes.items()}
            for x, dim in zip(given, (-2, -1), strict=False)
        ]
    found = layer(*given, **graph)
    return Routed(*found) if isinstance(found, tuple) else Routed(found, None)


@pytest.mark.parametrize(
    ("variant", "engine"),  # the second looks at types of parents and at graphs of a batch
    [*(("dynamic", engine) for engine in ENGINES), ("variational_bayes", ENGINES[-1])],
)
@every_guest
def test_a_graph_from_elsewhere_routes_as_the_same_graph_rebuilt_by_hand(variant, engine, guest):
    plain = guest._replace(nodes=None)
    by_hand = make_layer(plain, variant, engine, graph=guest.by_hand, etype=None)
    poses = make_poses(guest, variant)
    expected = results_and_gradients(route(by_hand, plain, poses), by_hand, poses)
    layer = make_layer(guest, variant, engine)
    assert_equal(results_and_gradients(route(layer, guest, poses), layer, poses), expected)
    kinds, types = len(layer.weight), layer.structure.types
    without = make_layer(guest, variant, engine, graph=None, kinds=kinds, types=types)
    given = route(without, guest, poses, graph=guest.graph)
    assert_equal(results_and_gradients(given, without, poses), expected)


@every_engine
def test_one_sample_is_routed_alike_with_and_without_a_batch_dimension(engine):
    layer = gc.CapsuleLayer(gc.complete_graph(6, 3), 4, 5, engine=engine)
    u = torch.randn(6, 4)
    assert torch.equal(layer(u), layer(u.unsqueeze(0)).squeeze(0))


@pytest.mark.parametrize("engine", WITH_VOTES)
def test_votes_are_routed_on_a_graph_from_elsewhere(engine):
    graph, etype = molecule(3, 2), [IN, RINGS]
    u_hat = torch.randn(8, 4)
    *_, found = gc.dynamic_routing(gc.bind(graph, engine, etype=etype), u_hat)
    *_, expected = gc.dynamic_routing(gc.bind(molecule_by_hand(3, 2), engine), u_hat)
    torch.testing.assert_close(found.v, expected.v)


def test_dgl_parts_the_trace_of_a_batch_of_graphs_with_several_node_types():
    graphs = [molecule(3, 2), molecule(1, 0), molecule(2, 1)]
    layer = gc.CapsuleLayer(kinds=2, child_dim=3, parent_dim=4, etype=[IN, RINGS])
    poses = {"atom": torch.randn(6, 3), "ring": torch.randn(6, 3)}
    _, trace = layer(poses, graph=dgl.batch(graphs), return_trace=True)
    parts = dgl.unbatch(trace.graph(sample=0, iteration=-1))
    assert [part.num_nodes("child") for part in parts] == [6, 2, 4]
    atoms, rings = (
        poses[name].split(sizes) for name, sizes in (("atom", [3, 1, 2]), ("ring", [3, 1, 2]))
    )
    for graph, part, *own in zip(graphs, parts, atoms, rings, strict=True):
        alone, trace = layer(dict(zip(poses, own, strict=True)), graph=graph, return_trace=True)
        torch.testing.assert_close(part.nodes["parent"].data["v"], alone)
        torch.testing.assert_close(part.edata["c"].squeeze(1), trace.c[-1, 0])


def test_a_graph_from_elsewhere_is_not_written_on_and_may_be_written_on_later():
    graph = molecule(3, 2, features=True)
    layer = gc.CapsuleLayer(graph, 3, 4, etype=[IN, RINGS])
    graph.edges[IN].data["weight_index"][:] = 7
    graph.nodes["molecule"].data["type"][:] = 7
    assert layer.graph.edata["weight_index"].tolist() == [0, 1, 2, 0, 1, 2, 2, 2]
    assert layer.structure.parent_type.tolist() == [1, 0]
    assert list(graph.edges[IN].data) == ["weight_index"]
    assert not graph.nodes["atom"].data


def test_edge_types_without_edges_have_matrices_all_the_same():
    assert gc.CapsuleLayer(molecule(3, 0), 3, 4, etype=[IN, RINGS]).weight.shape == (2, 3, 4)


def test_a_layer_without_a_graph_says_so_where_it_needs_one():
    layer = gc.CapsuleLayer(kinds=2, child_dim=3, parent_dim=4, routing="em", types=5)
    assert repr(layer).startswith("CapsuleLayer(\n  weight=[2, 3, 4], engine='auto'")
    assert layer.routing.beta_a.shape == (5,)
    for use in (lambda: layer(torch.zeros(1, 3)), lambda: layer.graph):
        with pytest.raises(ValueError, match="no graph of its own; give each call one"):
            use()


def with_feature(name, feature):
    graph = molecule(3, 2, features=True)
    data = graph.nodes["molecule"].data if name == "type" else graph.edges[RINGS].data
    if feature is None:
        del data[name]
    else:
        data[name] = feature
    return dict(graph=graph, etype=[IN, RINGS])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(), "needs its number of matrices: give a graph, or kinds"),
        (dict(kinds=0), "kinds must be at least 1; got 0"),
        (dict(graph=molecule(3, 2), types=0, etype=IN), "types must be at least 1"),
        (dict(kinds=1, parent_dim=0), "parent_dim must be at least 1; got 0"),
        (dict(graph=molecule(3, 2)), r"3 edge types, .* in the order of their matrices: etype="),
        (dict(graph=molecule(3, 2), etype="on"), "no edge type 'on'; it has .*'bonds'"),
        (dict(graph=molecule(3, 2), etype="in"), "several edge types 'in'; .* name one by"),
        (dict(graph=molecule(3, 2), etype=[IN, IN]), "expected different edge types"),
        (dict(graph=molecule(3, 2), etype=[IN, "bonds"]), "lead to one node type, the parents"),
        (dict(graph=molecule(3, 2), etype=[]), "expected different edge types"),
        (dict(graph=molecule(3, 2), etype=[IN, RINGS], kinds=1), "there are 1 matrices"),
        (with_feature("weight_index", None), r"'ring', .* lack the feature weight_index"),
        (with_feature("weight_index", torch.zeros(2)), "weight_index as int64"),
        (with_feature("weight_index", torch.tensor([0, -1])), "weight_index runs from -1"),
        (with_feature("type", torch.zeros(2, 1)), r"the parents' type as int64 \[J\]; got"),
        (with_feature("type", torch.tensor([0, -1])), "parent_type runs from -1"),
        (
            dict(graph=dgl.heterograph({IN: ([0], [0])}, {"atom": 2**31, "molecule": 1})),
            "2147483648 nodes or edges cannot be numbered in int32",
        ),
    ],
)
def test_graphs_and_edge_types_that_do_not_fit_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        gc.CapsuleLayer(**dict(child_dim=3, parent_dim=4) | given)


ATOMS, FEWER, LONGER = torch.zeros(3, 3), torch.zeros(1, 3), torch.zeros(3, 5)


@pytest.mark.parametrize(
    "u",
    [
        torch.zeros(6, 3),
        {"atom": ATOMS},
        {"atom": ATOMS, "ring": ATOMS, "bond": ATOMS},
        {"atom": ATOMS, "ring": FEWER},
        {"atom": ATOMS, "ring": LONGER},
        {"atom": ATOMS, "ring": ATOMS.double()},
        {"atom": ATOMS, "ring": ATOMS.unsqueeze(0)},
        {"atom": ATOMS[0], "ring": ATOMS[0]},
    ],
    ids=str,
)
def test_poses_that_do_not_fit_the_node_types_are_refused(u):
    layer = gc.CapsuleLayer(molecule(3, 2), 3, 4, etype=[IN, RINGS])
    with pytest.raises(
        ValueError, match=r"one tensor for each node type that has children, .*'ring': 3"
    ):
        layer(u)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(edge_index=torch.zeros(3, 2)), r"shape \[2, E\], .*; got \[3, 2\]"),
        (dict(edge_index=torch.zeros(2, 3)), "child needs integers"),
        (dict(edge_index=torch.tensor([[0], [2]]), size=(1, 2)), "parent runs from 2 to 2"),
        (dict(edge_index=torch.tensor([[0], [-1]])), "parent runs from -1"),
        (dict(batch=torch.tensor([0, 1, 0])), "expected batch sorted"),
        (dict(batch=torch.tensor([-1, 0, 0])), "expected batch sorted, from graph 0 on"),
        (dict(batch=torch.zeros(3)), r"batch as int64 \[N\]"),
        (dict(batch=torch.tensor([0, 0])), "child runs from 0 to 2"),
        (dict(batch=torch.tensor([0, 0, 0]), size=(3, 4)), "4 nodes of type parent, .* 3 entries"),
        (dict(batch=torch.tensor([0, 0, 1])), "different graphs of the batch"),
        (dict(weight_index=[0]), "one number per edge, 3; got 1"),
        (dict(parent_type=[0]), "one number per parent, 3; got 1"),
    ],
)
def test_edges_that_make_no_graph_are_refused(given, said):
    edge_index = torch.tensor([[0, 1, 2], [1, 2, 0]])
    with pytest.raises(ValueError, match=said):
        gc.graph_from_edge_index(**dict(edge_index=edge_index) | given)
