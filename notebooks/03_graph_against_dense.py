# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Graph against dense
#
# This notebook compares a capsule layer as message passing on a graph with the same layer on dense
# tensors: their results, their cost, and graphs for which there is no efficient dense form.

# %%
# %matplotlib inline
import json
from pathlib import Path
from timeit import repeat

import torch
from IPython.display import Image, Markdown

import graphcaps as gc
from graphcaps.pictures import figures, inspection

import dgl  # isort: skip (after graphcaps, which makes it importable under any torch)

torch.manual_seed(0)
torch.set_num_threads(2)
graph = gc.complete_graph(children=1152, parents=10)  # the class capsules of the paper
layer = gc.CapsuleLayer(graph, child_dim=8, parent_dim=16, iterations=3)
u = gc.squash(torch.randn(16, 1152, 8))

# %% [markdown]
# ## The same outputs, the same gradients
#
# An engine determines *how* messages are passed, not what is computed. It has no parameters, so the
# same layer runs on any engine.

# %%
dense_votes = gc.reference.votes(u, layer.weight.unflatten(0, (1152, 10)))
dense, _ = gc.reference.dynamic_routing(dense_votes, iterations=3)
for engine in ("udf", "builtin", "scatter", "fused"):
    layer.engine = engine
    torch.testing.assert_close(layer(u), dense)
layer.engine = "auto"

# %% [markdown]
# Compared with dense routing in float64, all forms in float32, including the dense one, differ by a
# few rounding errors. The engines are about as precise as the dense form.

# %%
figures.differences(inspection.differences_from_dense(layer, u))

# %% [markdown]
# ## Time and memory
#
# `udf` uses DGL's user-defined functions and follows the definition literally, `builtin` uses DGL's
# sparse kernels, `scatter` torch's index operations, and `fused` a kernel that never stores a vote.
# Time of forward and backward for 16 images on the machine that ran this notebook:

# %%
poses = u.clone().requires_grad_()
for engine in ("udf", "builtin", "scatter", "fused"):
    layer.engine = engine
    seconds = repeat(lambda: layer(poses).square().sum().backward(), number=5, repeat=7)
    print(f"{engine:8} {1e3 * sorted(seconds)[3] / 5:6.1f} ms")
layer.engine = "auto"
code = """
votes = gc.reference.votes(poses, layer.weight.unflatten(0, (1152, 10)))
gc.reference.dynamic_routing(votes, 3)[0].square().sum().backward()
"""
seconds = repeat(code, globals=globals(), number=5, repeat=7)
print(f"{'dense':8} {1e3 * sorted(seconds)[3] / 5:6.1f} ms")

# %% [markdown]
# `scripts/bench_routing.py` measures the peak memory of each form in a separate process; these are
# its results for 64 images (`benchmarks/routing-cpu.json`):

# %%
measured = json.loads(Path("../benchmarks/routing-cpu.json").read_text())
rows = [
    f"| {form} | {peak['inference']:.0f} | {peak['forward+backward']:.0f} |"
    for form, peak in measured["peak_mib"].items()
]
Markdown("| form | inference (MiB) | forward + backward (MiB) |\n|---|---|---|\n" + "\n".join(rows))

# %% [markdown]
# Time by the size of the layer, from the same file:

# %%
Image("../benchmarks/routing-cpu.png")

# %% [markdown]
# ## A pruned graph
#
# Nine of ten edges are dropped. The dense form would compute the votes of missing edges, and mask
# them; a graph only has votes and matrices for existing edges.

# %%
kept = torch.randperm(11520)[:1152]
pruned = gc.routing_graph(kept // 10, kept % 10, children=1152, parents=10)
sparse_layer = gc.CapsuleLayer(pruned, child_dim=8, parent_dim=16)
print(f"{layer.weight.numel():,} weights complete, {sparse_layer.weight.numel():,} pruned")
for name, one in (("complete", layer), ("pruned", sparse_layer)):
    seconds = repeat("one(u)", globals={"one": one, "u": u}, number=20, repeat=7)
    print(f"{name:8} {1e3 * sorted(seconds)[3] / 20:6.2f} ms forward")

# %% [markdown]
# ## Shared matrices
#
# `weight_index` selects the matrix of each edge. Children at all positions of a capsule map can
# share matrices, as in a convolution: 32 maps × 10 classes instead of 1152 × 10 matrices.

# %%
child = torch.arange(1152).repeat_interleave(10)
parent = torch.arange(10).repeat(1152)
shared = gc.routing_graph(child, parent, weight_index=child // 36 * 10 + parent)
shared_layer = gc.CapsuleLayer(shared, child_dim=8, parent_dim=16)
print(list(shared_layer.weight.shape), list(shared_layer(u).shape))

# %% [markdown]
# ## A ragged batch
#
# A batch can contain graphs of different sizes, such as scenes with different numbers of parts.
# Dense tensors would have to be padded to the largest; DGL batches the graphs without padding, and
# each is routed independently of the others.

# %%
scenes = [gc.complete_graph(parts, 2) for parts in (3, 7, 1)]
for scene in scenes:
    edges = scene.edges()
    scene.edata["weight_index"] = edges[1].long()  # one matrix per whole, for any number of parts
wholes = gc.CapsuleLayer(scenes[0], child_dim=4, parent_dim=8)
ragged = dgl.batch(scenes)
parts = torch.randn(ragged.num_nodes("child"), 4)
together = wholes(parts, graph=ragged)
alone = [
    wholes(poses, graph=scene) for poses, scene in zip(parts.split([3, 7, 1]), scenes, strict=True)
]
torch.testing.assert_close(together, torch.cat(alone))
print(list(together.shape), "parents of", ragged.batch_num_nodes("child").tolist(), "children")
