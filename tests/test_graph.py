import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routings import WITH_VOTES, cases

import graphcaps as gc
from graphcaps._dgl import dgl
from graphcaps.graph import is_complete


def test_a_complete_graph_is_child_major_with_a_matrix_for_each_edge():
    graph = gc.complete_graph(children=3, parents=2)
    child, parent = graph.edges()
    assert child.tolist() == [0, 0, 1, 1, 2, 2]
    assert parent.tolist() == [0, 1, 0, 1, 0, 1]
    assert graph.edata["weight_index"].tolist() == list(range(6))


def test_a_graph_is_a_dgl_heterograph_of_votes_in_int32():
    graph = gc.routing_graph([2, 0], [1, 0], children=4, parents=3, weight_index=[0, 0])
    assert graph.canonical_etypes == [("child", "votes", "parent")]
    assert graph.idtype == torch.int32
    assert (graph.num_nodes("child"), graph.num_nodes("parent")) == (4, 3)


@given(case=cases())
def test_edges_keep_the_order_in_which_they_were_given(case):
    child, parent = case.graph.edges()
    assert list(zip(child.tolist(), parent.tolist(), strict=True)) == case.edges


@given(case=cases(), batch=st.integers(0, 4))
def test_a_batch_is_sample_major(case, batch):
    batched = gc.batch_graph(case.graph, batch)
    child, parent = batched.edges()
    expected = [
        (sample * case.children + i, sample * case.parents + j)
        for sample in range(batch)
        for i, j in case.edges
    ]
    assert list(zip(child.tolist(), parent.tolist(), strict=True)) == expected
    assert batched.num_nodes("child") == batch * case.children
    assert batched.num_nodes("parent") == batch * case.parents
    if batch:
        assert batched.batch_num_edges().tolist() == [len(case.edges)] * batch


def test_votes_of_a_complete_batch_are_viewed_without_a_copy():
    graph = gc.complete_graph(3, 2)
    batched = gc.batch_graph(graph, 4)
    child, parent = (x.long() for x in batched.edges())
    name = torch.stack([child % 3, parent % 2, child // 3], dim=1)
    viewed = name.view(4, 3, 2, 3)
    for sample, i, j in [(0, 0, 0), (1, 2, 0), (3, 1, 1)]:
        assert viewed[sample, i, j].tolist() == [i, j, sample]


def features(graph):
    """Names of the features of edges, children and parents."""
    return list(graph.edata), *(list(graph.nodes[n].data) for n in ("child", "parent"))


def test_batching_writes_nothing_on_the_graph():
    graph = gc.complete_graph(3, 2)
    gc.batch_graph(graph, 4)
    assert features(graph) == (["weight_index"], [], ["type"])


@pytest.mark.parametrize("engine", WITH_VOTES)
def test_routing_writes_nothing_on_the_graph(engine):
    graph = gc.complete_graph(3, 2)
    for _ in gc.dynamic_routing(gc.bind(graph, engine), torch.randn(6, 4)):
        pass
    assert features(graph) == (["weight_index"], [], ["type"])


@pytest.mark.parametrize("engine", WITH_VOTES)
def test_a_failing_node_function_leaves_no_features_behind(engine):
    graph = gc.complete_graph(3, 2)

    def fail(s):
        raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError):
        gc.bind(graph, engine).update_parents(fail, torch.ones(2, 4))
    assert features(graph) == (["weight_index"], [], ["type"])


@pytest.mark.parametrize("engine", WITH_VOTES)
def test_graphs_without_edges_and_batches_without_samples_route_in_silence(engine):
    empty = gc.routing_graph([], [], children=2, parents=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for graph, parents in ((empty, 3), (gc.batch_graph(gc.complete_graph(2, 3), 0), 0)):
            u_hat = torch.zeros(0, 4, requires_grad=True)
            *_, last = gc.dynamic_routing(gc.bind(graph, engine), u_hat)
            assert torch.equal(last.v, torch.zeros(parents, 4))
            last.v.sum().backward()


def test_only_a_complete_graph_in_its_own_order_is_complete():
    assert is_complete(gc.complete_graph(3, 2))
    child, parent = gc.complete_graph(3, 2).edges()
    assert is_complete(gc.routing_graph(child, parent))
    assert not is_complete(gc.routing_graph(child.flip(0), parent.flip(0)))
    assert not is_complete(gc.routing_graph(child, parent, weight_index=[0] * 6))
    assert not is_complete(gc.routing_graph(child[:5], parent[:5]))
    assert not is_complete(gc.routing_graph([], []))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(child=[0, 1], parent=[0]), "2 children and 1 parents"),
        (dict(child=[0.5], parent=[0]), "needs integers"),
        (dict(child=[[0]], parent=[0]), "needs integers"),
        (dict(child=[True], parent=[0]), "needs integers"),
        (dict(child=[-1], parent=[0]), "child runs from -1"),
        (dict(child=[0], parent=[3], parents=3), "between 0 and 2"),
        (dict(child=[0, 0], parent=[0, 1], weight_index=[0]), "one number per edge"),
        (dict(child=[0], parent=[0], weight_index=[-1]), "weight_index runs from -1"),
    ],
)
def test_edges_that_make_no_graph_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        gc.routing_graph(**arguments)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0), (-1, 2)])
def test_a_complete_graph_needs_a_child_and_a_parent(sizes):
    with pytest.raises(ValueError, match="at least 1 child and 1 parent"):
        gc.complete_graph(*sizes)


@pytest.mark.parametrize("batch", [-1, 2**31])
def test_a_batch_that_int32_cannot_number_is_refused(batch):
    with pytest.raises(ValueError, match="int32"):
        gc.batch_graph(gc.complete_graph(3, 2), batch)


def foreign_graphs():
    index = torch.zeros(1, dtype=torch.int64)
    bare = dgl.heterograph({("child", "votes", "parent"): ([0], [0])}, idtype=torch.int32)
    floating = bare.local_var()
    floating.edata["weight_index"] = index.float()
    negative = bare.local_var()
    negative.edata["weight_index"] = index - 1
    return [
        ("a graph", "got str"),
        (bare, "lack the feature weight_index"),
        (floating, "weight_index as int64"),
        (negative, "runs from -1"),
    ]


@pytest.mark.parametrize(("graph", "said"), foreign_graphs())
def test_a_foreign_graph_is_refused_with_what_it_lacks(graph, said):
    with pytest.raises(ValueError, match=said):
        gc.CapsuleLayer(graph, child_dim=2, parent_dim=2)
