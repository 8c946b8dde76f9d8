"""Routing without stored votes, compared with forms that store them."""

import pytest
import torch
from hypothesis import given
from routings import ENGINES, cases

import graphcaps as gc
from graphcaps import kernels
from graphcaps.kernels.edges import sort_edges
from graphcaps.kernels.triton import TritonEdges

CPU = torch.device("cpu")


@pytest.mark.parametrize("by", ["child", "parent", "kind"])
@given(case=cases())
def test_sorted_edges_are_the_graphs_edges_in_groups(by, case):
    kinds = [(3 * i + j) % 4 for i, j in case.edges]
    ends = [*zip(*case.edges, strict=True)] or [(), ()]
    graph = gc.routing_graph(
        *ends, children=case.children, parents=case.parents, weight_index=kinds
    )
    found = sort_edges(graph, by, 5, CPU)
    rows = [*zip(found.child.tolist(), found.parent.tolist(), found.kind.tolist(), strict=True)]
    given_rows = [(i, j, m) for (i, j), m in zip(case.edges, kinds, strict=True)]
    column = ("child", "parent", "kind").index(by)
    assert rows == sorted(given_rows, key=lambda row: row[column])
    count = {"child": case.children, "parent": case.parents, "kind": 5}[by]
    assert len(found.start) == count + 1
    for n in range(count):
        group = rows[found.start[n] : found.start[n + 1]]
        assert group == [row for row in rows if row[column] == n]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(u=torch.zeros(2, 8, 4)), r"expected u as \[batch, 9, K\]; got \[2, 8, 4\]"),
        (dict(weight=torch.zeros(27, 3, 5)), r"expected weight as \[27, 4, D\]; got \[27, 3, 5\]"),
        (dict(weight=torch.zeros(26, 4, 5)), r"expected weight as \[27, 4, D\]; got \[26, 4, 5\]"),
        (dict(u=torch.zeros(2, 9, 4).double()), "got torch.float64 and torch.float32"),
        (dict(u=torch.zeros(2, 9, 4).half()), "got torch.float16 and torch.float32"),
        (dict(iterations=0), "iterations must be at least 1; got 0"),
        (dict(gradients="al"), "unknown gradients 'al'"),
        (dict(weight=torch.zeros(27, 4, 5, device="meta")), "move all to one device"),
    ],
)
@pytest.mark.parametrize("prepare", [kernels.prepare, TritonEdges.of])
def test_what_cannot_be_routed_is_refused(prepare, changes, said):
    edges = prepare(gc.complete_graph(9, 3), 27, CPU)
    asked = dict(u=torch.zeros(2, 9, 4), weight=torch.zeros(27, 4, 5), iterations=3) | changes
    with pytest.raises(ValueError, match=said):
        kernels.routed(edges=edges, **asked)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_layer_whose_matrices_were_exchanged_for_too_few_is_refused(engine):
    too_few = torch.nn.Parameter(torch.zeros(5, 4, 5))
    for has_run in (True, False):
        layer = gc.CapsuleLayer(gc.complete_graph(9, 3), 4, 5, engine=engine)
        if has_run:
            layer(torch.zeros(2, 9, 4))
        layer.weight = too_few
        with pytest.raises(ValueError, match="refers to 27 matrices, but weight has 5"):
            layer(torch.zeros(2, 9, 4))
