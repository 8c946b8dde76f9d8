"""Routing without votes: its parts, and what it must be equal to."""

import pytest
import torch
from hypothesis import given
from routings import cases

import graphcaps as gc
from graphcaps.kernels.edges import sort_edges

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
