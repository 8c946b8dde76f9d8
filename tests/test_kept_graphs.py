"""What layers keep of the graphs that calls are given."""

import gc as garbage
import weakref

import pytest
import torch

import graphcaps as gc
from graphcaps._dgl import dgl
from graphcaps.structure import structure_of


def _voting(child, parent, index, **sizes):
    return gc.routing_graph(child, parent, weight_index=index, **sizes)


def test_what_is_prepared_for_a_graph_is_kept():
    graph = _voting([0, 1, 2], [0, 0, 1], [0, 1, 0])
    first = structure_of(graph, 2)
    assert structure_of(graph, 2) is first
    assert structure_of(graph, 3) is not first
    assert structure_of(graph, 2, "votes") is not first
    assert structure_of(graph, 2) is first
    assert structure_of(_voting([0, 1, 2], [0, 0, 1], [0, 1, 0]), 2) is not first


def test_three_edge_types_are_not_one_with_their_names():
    graph = dgl.heterograph(
        {
            ("x", "y", "z"): ([0, 1], [0, 0]),
            ("q", "x", "z"): ([0, 1], [0, 0]),
            ("q", "z", "z"): ([0], [0]),
        }
    )
    assert structure_of(graph, 3, ("x", "y", "z")).edges == 2
    assert structure_of(graph, 3, ["x", "y", "z"]).edges == 5


def _with_another_matrix(graph):
    graph.edata["weight_index"][0] = 1


def _with_another_feature(graph):
    graph.edata["weight_index"] = torch.tensor([1, 1, 0])


def _with_another_type(graph):
    graph.nodes["parent"].data["type"] = torch.tensor([1, 0])


def _with_another_competition(graph):
    graph.edata["competition"] = torch.tensor([0, 0, 0])


def _with_another_edge(graph):
    graph.add_edges(2, 0, {"weight_index": torch.tensor([0])})


def _with_an_edge_that_leads_elsewhere(graph):
    graph.remove_edges(0)
    graph.add_edges(0, 1, {"weight_index": torch.tensor([0])})


def _with_another_node(graph):
    graph.add_nodes(1, ntype="child")


def _as_two_graphs(graph):
    graph.set_batch_num_nodes({"child": torch.tensor([2, 1]), "parent": torch.tensor([1, 1])})
    graph.set_batch_num_edges({("child", "votes", "parent"): torch.tensor([2, 1])})


@pytest.mark.parametrize(
    "change",
    [
        _with_another_matrix,
        _with_another_feature,
        _with_another_type,
        _with_another_competition,
        _with_another_edge,
        _with_an_edge_that_leads_elsewhere,
        _with_another_node,
        _as_two_graphs,
    ],
)
def test_a_graph_that_changed_is_prepared_anew(change):
    graph = _voting([0, 1, 2], [0, 0, 1], [0, 1, 0], parent_type=[0, 0])
    layer = gc.CapsuleLayer(kinds=2, types=2, child_dim=4, parent_dim=5)
    layer(torch.rand(3, 4), graph=graph)
    change(graph)
    u = torch.rand(graph.num_nodes("child"), 4)
    anew = gc.CapsuleLayer(graph, kinds=2, types=2, child_dim=4, parent_dim=5)
    anew.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(u, graph=graph), anew(u), rtol=0, atol=0)
    assert structure_of(graph, 2).edges == graph.num_edges()
    assert structure_of(graph, 2).graphs == graph.batch_size


def test_a_graph_that_became_wrong_is_refused():
    graph = _voting([0, 1, 2], [0, 0, 1], [0, 1, 0])
    structure_of(graph, 2)
    graph.edata["weight_index"] = graph.edata["weight_index"].int()
    with pytest.raises(ValueError, match="expected weight_index as int64"):
        structure_of(graph, 2)


def test_what_is_kept_goes_with_its_graph():
    graph = _voting([0, 1, 2], [0, 0, 1], [0, 1, 0])
    kept = weakref.ref(structure_of(graph, 2))
    assert kept() is not None
    del graph
    garbage.collect()
    assert kept() is None


def test_only_the_last_graphs_are_kept():
    graphs = [_voting([0, 1], [0, 0], [0, 1]) for _ in range(20)]
    kept = [weakref.ref(structure_of(graph, 2)) for graph in graphs]
    structure_of(graphs[-8], 2)
    garbage.collect()
    assert [n for n, structure in enumerate(kept) if structure() is not None] == [*range(12, 20)]
    structure_of(graphs[0], 2)
    garbage.collect()
    assert kept[12]() is not None  # used after 13, which is dropped for it
    assert kept[13]() is None
