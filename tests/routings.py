"""Helpers for tests of routing: graphs, engines, and every routing with its options."""

import os
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import graphcaps as gc

# set by laws_by_triton.py, where "fused" is Triton's kernels, which have no float64
BY_TRITON = "GRAPHCAPS_LAWS_BY_TRITON" in os.environ
WITH_VOTES = () if BY_TRITON else ("udf", "builtin", "scatter")
ENGINES = ("fused", *WITH_VOTES)
DTYPES = (torch.float32,) if BY_TRITON else (torch.float32, torch.float64)
WIDEST = DTYPES[-1]


class Case(NamedTuple):
    """A graph given by its edges and their matrices, and the sizes of the features on it."""

    children: int
    parents: int
    edges: list[tuple[int, int]]
    batch: int = 2
    kinds: list[int] | None = None  # each edge has a matrix of its own, if not given
    child_dim: int = 4
    parent_dim: int = 4
    rows: int = 1

    @property
    def graph(self):
        child, parent = zip(*self.edges, strict=True) if self.edges else ((), ())
        return gc.routing_graph(
            child,
            parent,
            children=self.children,
            parents=self.parents,
            weight_index=self.kinds,
        )

    @property
    def mask(self) -> Tensor:
        return self.dense(torch.ones(len(self.edges), dtype=torch.bool))

    def dense(self, on_edges: Tensor) -> Tensor:
        """Convert edge features of one sample, `[E, ...]`, to `[I, J, ...]`; 0 without an edge."""
        dense = on_edges.new_zeros(self.children, self.parents, *on_edges.shape[1:])
        if not self.edges:
            return dense
        child, parent = torch.tensor(self.edges).T
        return dense.index_put((child, parent), on_edges)


def complete(children, parents, **sizes) -> Case:
    edges = [(i, j) for i in range(children) for j in range(parents)]
    return Case(children, parents, edges, **sizes)


SPARSE = Case(4, 5, [(3, 0), (0, 2), (0, 0), (2, 2), (3, 3)], batch=3, kinds=[1, 0, 2, 0, 1])
# nodes without edges, matrices that are shared, two components, children of one parent alone
CASES = {
    "complete": complete(6, 3),
    "sparse": SPARSE,
    "one edge": Case(1, 1, [(0, 0)]),
    "no edges": Case(2, 3, []),
    "matrix poses": complete(5, 4, child_dim=6, parent_dim=4, rows=2),
}


@st.composite
def cases(draw, most_nodes=6):
    """Random simple bipartite graphs, with isolated nodes, edges in any order, shared matrices."""
    children = draw(st.integers(1, most_nodes))
    parents = draw(st.integers(1, most_nodes))
    every_edge = [(i, j) for i in range(children) for j in range(parents)]
    edges = draw(st.lists(st.sampled_from(every_edge), unique=True, max_size=len(every_edge)))
    kinds = draw(st.lists(st.integers(0, 4), min_size=len(edges), max_size=len(edges)))
    return Case(children, parents, edges, draw(st.integers(1, 3)), kinds)


class Poses(NamedTuple):
    """Inputs of a layer: u `[B, I, K]`, and a `[B, I]` for a routing with activations."""

    u: Tensor
    a: Tensor | None


class Routed(NamedTuple):
    """Outputs of a layer: v `[B, J, D]`, and a `[B, J]` for a routing with activations."""

    v: Tensor
    a: Tensor | None


class Variant(NamedTuple):
    """A routing with its options."""

    routing: str
    options: dict[str, Any] = {}  # noqa: RUF012, a tuple's default

    @property
    def activations(self) -> bool:
        return gc.ROUTINGS[self.routing].activations


VARIANTS = {
    "dynamic": Variant("dynamic", {}),
    "dynamic, last": Variant("dynamic", {"gradients": "last"}),
    "dynamic, options": Variant("dynamic", {"bias": True, "leak": True}),
    "dynamic, last, options": Variant(
        "dynamic", {"gradients": "last", "bias": True, "leak": True, "temperature": 2.0}
    ),
    "k-means": Variant("dynamic", {"accumulate": False, "temperature": 0.5}),
    "uniform": Variant("uniform", {}),
    "em": Variant("em", {}),
    "em, authors": Variant("em", {"variant": "authors"}),
    "attention": Variant("attention", {"iterations": 3}),
    "self_attention": Variant("self_attention", {}),
    "self_routing": Variant("self_routing", {}),
    "variational_bayes": Variant("variational_bayes", {}),
}


def fits(variant: str, case: Case) -> bool:
    return case.rows == 1 or variant != "self_routing"


def make_layer(case: Case, variant: str, engine: str, dtype=WIDEST, /, **options):
    """A layer with matrices so large that coupling is far from equal, and no parameter is 0."""
    routing, fixed = VARIANTS[variant]
    layer = gc.CapsuleLayer(
        case.graph,
        case.child_dim,
        case.parent_dim,
        routing=routing,
        rows=case.rows,
        engine=engine,
        dtype=torch.float64,
        **{**fixed, **options},
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer.to(dtype)


def make_poses(case: Case, variant: str, dtype=WIDEST) -> Poses:
    generator = torch.Generator().manual_seed(2)
    size = (case.batch, case.children)
    u = torch.randn(*size, case.child_dim, generator=generator, dtype=torch.float64)
    a = torch.rand(size, generator=generator, dtype=torch.float64)
    return Poses(u.to(dtype), a.to(dtype) if VARIANTS[variant].activations else None)


def route(layer, poses: Poses) -> Routed:
    """Route with the layer."""
    found = layer(*poses) if layer.routing.activations else layer(poses.u)
    return Routed(*found) if isinstance(found, tuple) else Routed(found, None)


def dense_votes(layer, case: Case, u: Tensor) -> Tensor:
    """`[B, I, J, P·D]`."""
    kinds = list(range(len(case.edges))) if case.kinds is None else case.kinds
    matrices = case.dense(layer.weight[kinds])
    return torch.einsum("bipk,ijkd->bijpd", u.unflatten(2, (case.rows, -1)), matrices).flatten(3)


def route_densely(layer, case: Case, poses: Poses) -> tuple[Routed, Tensor]:
    """The same by the reference, with the parameters of the layer; and the last coupling."""
    kinds = list(range(len(case.edges))) if case.kinds is None else case.kinds
    u_hat = dense_votes(layer, case, poses.u)
    v, c, *a = layer.routing.dense(
        u_hat, poses.a, case.mask, lambda of_kinds: case.dense(of_kinds[kinds])
    )
    return Routed(v, a[0] if a else None), c


def results_and_gradients(routed: Routed, layer, poses: Poses) -> dict[str, Tensor]:
    """v, a, and gradients of a fixed random functional of both, by name; `poses` require them."""
    generator = torch.Generator().manual_seed(3)
    found = {name: x for name, x in zip("va", routed, strict=True) if x is not None}
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)).sum()
        for x in found.values()
    )
    inputs = {"u": poses.u, **dict(layer.named_parameters())}
    if poses.a is not None:
        inputs["activations"] = poses.a
    reached = loss + 0 * sum(x.sum() for x in inputs.values())  # where there is no edge
    gradients = torch.autograd.grad(reached, list(inputs.values()))
    found = {name: x.detach() for name, x in found.items()}
    return found | {f"gradient of {n}": g for n, g in zip(inputs, gradients, strict=True)}


def with_gradients(poses: Poses) -> Poses:
    """The same, with gradients required."""
    return Poses(*(x if x is None else x.detach().clone().requires_grad_() for x in poses))


def assert_equal(got: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Compare all results and gradients, within rounding, relative to the largest value."""
    assert got.keys() == right.keys()
    tolerance = 1e-9 if torch.float64 == WIDEST else 2e-4
    for name, expected in right.items():
        atol = tolerance * (float(expected.abs().sum()) + 0.01)
        assert_close(got[name].to(expected), expected, rtol=tolerance, atol=atol, msg=name)
