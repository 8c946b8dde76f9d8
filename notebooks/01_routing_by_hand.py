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
# Twenty lower capsules, the *children*, vote for ten higher capsules, the *parents*. It is not
# known in advance which parent a child belongs to; *routing by agreement* determines this from the
# votes (Sabour, Frosst and Hinton 2017, procedure 1). This notebook implements it step by step with
# DGL, on random votes, for ten iterations.

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
# The graph is bipartite, `child -votes-> parent`, with an edge for each pair. The edge from child
# $i$ to parent $j$ carries the vote $\hat u_{j|i}$: the pose that child $i$ predicts for parent
# $j$.

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
#   softmax*, with `norm_by="src"`, because each child distributes its vote over its parents. With
#   DGL's default, `dst`, the children of a parent would compete; published implementations have
#   made this mistake;
# - **sum** $s_j = \sum_i c_{ij} \, \hat u_{j|i}$: a *message* on each edge, *reduced* at the
#   parent;
# - **squash** $v_j = \frac{|s_j|^2}{1+|s_j|^2} \frac{s_j}{|s_j|}$, which makes lengths less than 1:
#   a *node function*;
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
# This is the whole algorithm. The library computes the same, and can record the results of every
# iteration in a `Trace`:

# %%
u_hat = graph.edata["u_hat"]
iterations = list(gc.dynamic_routing(gc.bind(graph), u_hat, ITERATIONS))
trace = gc.Trace.of(graph, samples=1, u_hat=u_hat, iterations=iterations)
torch.testing.assert_close(trace.c[:, 0], torch.stack(coupling)[..., 0])
torch.testing.assert_close(trace.v[-1, 0], graph.nodes["parent"].data["v"])

# %% [markdown]
# The coupling of a child sums to one over its parents, at every iteration:

# %%
trace.c.view(ITERATIONS, CHILDREN, PARENTS).sum(dim=2).aminmax()

# %% [markdown]
# ## The entropy decreases
#
# Equal coupling to all ten parents has an entropy of $\ln 10 = 2.30$ nats; coupling to a single
# parent has entropy 0. If a vote agrees with the output of a parent, the coupling to this parent
# increases, which in turn moves the output towards the vote.

# %%
figures.entropy_by_iteration(trace.entropy(), PARENTS)

# %% [markdown]
# The exponential of the entropy is the *effective* number of parents of a child:

# %%
for number in (0, 2, 4, ITERATIONS - 1):
    effective = trace.effective_parents()[number, 0]
    print(f"iteration {number + 1:2}: {effective.mean():5.2f} parents in effect, on average")

# %% [markdown]
# ## Couplings approach 0 or 1

# %%
animation = figures.coupling_histogram_animation(trace.c, PARENTS)
written = Path("01_histogram.gif").write_bytes(figures.gif(animation))

# %% [markdown]
# ![The distribution of the coupling, with one frame for each of ten iterations: from a single bar
# at 0.1 to two peaks at 0 and 1](01_histogram.gif)

# %% [markdown]
# ## The graph during routing
#
# Children are at the bottom, parents at the top. Wide and dark edges have a strong coupling; the
# area of a parent shows the length of its output. At first all edges are equal; in the end most
# children have one parent, so that the strong edges form a *parse tree*. Children are sorted by
# their final parents.

# %%
order = trace.children_by_parent(0, ITERATIONS - 1)
graphs = [trace.networkx(0, number, children=order) for number in range(ITERATIONS)]
animation = figures.coupling_graph_animation(graphs)
written = Path("01_coupling.gif").write_bytes(figures.gif(animation))

# %% [markdown]
# ![The coupling graph of 20 children and 10 parents, with one frame for each of ten iterations:
# from equal edges to one strong edge for most children](01_coupling.gif)

# %%
figures.coupling_graph(graphs[-1], title="The last iteration")

# %%
print("strongest parent of each child:", trace.strongest_parent()[-1, 0].tolist())

# %% [markdown]
# ## What to try
#
# - Scale the votes (the factor 0.5): with smaller votes the coupling needs more iterations to
#   approach 0 or 1, with larger votes fewer.
# - Use `norm_by="dst"`: the coupling of a child no longer sums to one.
# - Use fewer edges: `gc.routing_graph(child=[...], parent=[...])` creates any bipartite graph, and
#   the code above works unchanged.
