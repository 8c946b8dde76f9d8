# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Routing by hand
#
# Twenty capsules below, the *children*, each vote for ten capsules above, the *parents*. Which
# parent a child should vote for is not known: *routing by agreement* finds out (Sabour, Frosst and
# Hinton 2017, procedure 1). Here it is built step by step with DGL, on random votes, for ten
# iterations.

# %%
# %matplotlib inline
from pathlib import Path

import torch

import graphcaps as gc
from graphcaps.pictures import figures

import dgl  # isort: skip (after graphcaps, which makes it importable under any torch)

torch.manual_seed(2)
CHILDREN, PARENTS, DIM, ITERATIONS = 20, 10, 16, 10

# %% [markdown]
# ## The graph
#
# A bipartite graph `child -votes-> parent`, with an edge for each pair. On the edge from child $i$
# to parent $j$ lies the vote $\hat u_{j|i}$: the pose that child $i$ expects parent $j$ to have.

# %%
graph = gc.complete_graph(CHILDREN, PARENTS)
graph.edata["u_hat"] = 0.5 * torch.randn(graph.num_edges(), DIM)
graph

# %% [markdown]
# ## The algorithm
#
# The logits $b_{ij}$ start at zero. Then, ten times:
#
# - **coupling** $c_{ij} = \mathrm{softmax}_j \, b_{ij}$ over the parents of a child: an *edge
#   softmax*, with `norm_by="src"`, because a child shares itself out. DGL's default, `dst`, makes
#   the children of a parent compete, a mistake that published implementations have made;
# - **sum** $s_j = \sum_i c_{ij} \, \hat u_{j|i}$: a *message* on each edge, *reduced* at the
#   parent;
# - **squash** $v_j = \frac{|s_j|^2}{1+|s_j|^2} \frac{s_j}{|s_j|}$, so that a length is below 1: a
#   *node function*;
# - **agreement** $b_{ij} \leftarrow b_{ij} + \hat u_{j|i} \cdot v_j$: an *edge function*.

# %%
graph.edata["b"] = torch.zeros(graph.num_edges(), 1)
coupling = []
for _ in range(ITERATIONS):
    graph.edata["c"] = dgl.nn.functional.edge_softmax(graph, graph.edata["b"], norm_by="src")
    graph.update_all(
        lambda edges: {"message": edges.data["c"] * edges.data["u_hat"]},
        lambda nodes: {"s": nodes.mailbox["message"].sum(dim=1)},
        lambda nodes: {"v": gc.squash(nodes.data["s"])},
    )
    graph.apply_edges(
        lambda edges: {
            "b": edges.data["b"] + (edges.data["u_hat"] * edges.dst["v"]).sum(1, keepdim=True)
        }
    )
    coupling.append(graph.edata["c"])

# %% [markdown]
# That is all of it. The library does the same, and keeps what every iteration computed in a
# `Trace`:

# %%
u_hat = graph.edata["u_hat"]
iterations = list(gc.dynamic_routing(gc.bind(graph), u_hat, ITERATIONS))
trace = gc.Trace.of(graph, samples=1, u_hat=u_hat, iterations=iterations)
torch.testing.assert_close(trace.c[:, 0], torch.stack(coupling)[..., 0])
torch.testing.assert_close(trace.v[-1, 0], graph.nodes["parent"].data["v"])

# %% [markdown]
# A child's coupling sums to one over its parents, at every iteration:

# %%
trace.c.view(ITERATIONS, CHILDREN, PARENTS).sum(dim=2).aminmax()

# %% [markdown]
# ## Entropy falls
#
# A child that does not know its parent spreads its coupling evenly, with an entropy of
# $\ln 10 = 2.30$ nats. A child that has decided has entropy 0. Votes that agree with a parent's
# output pull more coupling there, which pulls the output towards them.

# %%
figures.entropy_by_iteration(trace.entropy(), PARENTS)

# %% [markdown]
# The exponential of the entropy is how many parents a child has *in effect*:

# %%
for number in (0, 2, 4, ITERATIONS - 1):
    effective = trace.effective_parents()[number, 0]
    print(f"iteration {number + 1:2}: {effective.mean():5.2f} parents in effect, on average")

# %% [markdown]
# ## Coupling moves to 0 and 1

# %%
animation = figures.coupling_histogram_animation(trace.c, PARENTS)
written = Path("01_histogram.gif").write_bytes(figures.gif(animation))

# %% [markdown]
# ![The distribution of the coupling, a frame for each of ten iterations: from one bar at 0.1 to two
# heaps, at 0 and at 1](01_histogram.gif)

# %% [markdown]
# ## The graph, as routing goes on
#
# Children below, parents above. An edge is as wide and dark as its coupling; the area of a parent
# is the length of its output. First all edges are equal; in the end most children have one parent:
# a *parse tree*. Children are drawn in the order of the parents that they end up with.

# %%
order = trace.children_by_parent(0, ITERATIONS - 1)
graphs = [trace.networkx(0, number, children=order) for number in range(ITERATIONS)]
animation = figures.coupling_graph_animation(graphs)
written = Path("01_coupling.gif").write_bytes(figures.gif(animation))

# %% [markdown]
# ![The coupling graph of 20 children and 10 parents, a frame for each of ten iterations: from equal
# edges to one strong edge for most children](01_coupling.gif)

# %%
figures.coupling_graph(graphs[-1], title="The last iteration")

# %%
print("strongest parent of each child:", trace.strongest_parent()[-1, 0].tolist())

# %% [markdown]
# ## What to try
#
# - Smaller votes (the factor 0.5): children decide later. Larger ones: sooner.
# - `norm_by="dst"`: the coupling of a child no longer sums to one.
# - Fewer edges: `gc.routing_graph(child=[...], parent=[...])` takes any bipartite graph, and the
#   lines above stay as they are.
