# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Write your own routing
#
# A routing is a class with one method, `steps`. It does not access edges: it requests sums over the
# edges, computes new parents from them, and repeats this. It therefore runs on every graph and
# every engine, including the kernel that stores no votes, and needs neither a backward pass nor a
# kernel of its own. This notebook defines three routings: one of five lines, and two published ones
# that the library does not include.

# %%
# %matplotlib inline
import math

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import graphcaps as gc
from graphcaps.data import load_dataset

torch.manual_seed(0)
torch.set_num_threads(1)  # the tensors below are small; more threads would wait for each other
ENGINES = ("udf", "builtin", "scatter", "fused")

# %% [markdown]
# ## Five lines
#
# Every child first couples equally to all parents, then more strongly to parents whose mean agrees
# with its vote.


# %%
class TwoSteps(gc.Routing):
    def steps(self, edges):
        equal = edges.couple()
        sums = edges.couple(p=equal.S / equal.N)
        yield gc.Iteration(sums, sums.S / sums.N)


# %% [markdown]
# A layer accepts it in place of a name. All engines give the same results:

# %%
layer = gc.CapsuleLayer(gc.complete_graph(children=6, parents=3), 4, 5, routing=TwoSteps())
u = torch.randn(2, 6, 4)
v = layer(u)
for engine in ENGINES:
    layer.engine = engine
    torch.testing.assert_close(layer(u), v)
print(list(v.shape))

# %% [markdown]
# A trace records its iterations; the coupling of a child still sums to one over its parents:

# %%
layer.engine = "auto"
v, trace = layer(u, return_trace=True)
trace.c.detach().view(2, 6, 3).sum(dim=2)

# %% [markdown]
# ## One pass over the edges
#
# `edges.couple` is the only operation on edges that a routing needs. It takes up to four features
# of the parents. With $y_{ij} = \hat u_{j|i} - r_j$, the vote relative to a reference point of its
# parent,
#
# $$b_{ij} = k_j + p_j \cdot y_{ij} + q_j \cdot y_{ij}^2, \qquad
# c_{ij} = \mathrm{softmax}_j \, b_{ij}, \qquad w_{ij} = a_i \, c_{ij},$$
#
# and it returns three sums,
#
# $$N_j = \sum_i w_{ij}, \qquad S_j = \sum_i w_{ij} \, y_{ij}, \qquad
# Q_j = \sum_i w_{ij} \, y_{ij}^2.$$
#
# Arguments that are not given count as 0 (the activation $a$ as 1). A dot product with the parent
# is $p$; a Gaussian is $q = -1/2\sigma^2$ with $r = \mu$, and its normalisation is $k$; mean and
# variance follow from $N$, $S$ and $Q$. Between the passes, ordinary torch operations work on
# tensors of the parents, `[B·J, ·]`, and autograd differentiates all of it.
#
# ## Heinsen 2019: parents that explain the votes
#
# *An Algorithm for Routing Capsules in All Domains* (arXiv:1911.00792) fits a Gaussian to the votes
# for each parent, as EM routing does, and weighs the data that a parent uses against the data that
# it ignores. It repeats the following three times, where $f$ is the logistic function:
#
# $$D^{use}_{ij} = f(a_i) \, c_{ij}, \quad D^{ign}_{ij} = f(a_i) - D^{use}_{ij}, \quad
# a_j = \sum_i \beta^{use} D^{use}_{ij} - \sum_i \beta^{ign} D^{ign}_{ij},$$
#
# $$\mu_j, \sigma_j^2 = \text{mean and variance of the votes, weighted by } D^{use}_{ij}, \quad
# c_{ij} = \mathrm{softmax}_j \big( \ln f(a_j) + \ln \mathcal{N}(\hat u_{j|i}; \mu_j, \sigma_j^2)
# \big).$$
#
# The sum of $D^{use}$ is $N$, and that of $D^{ign}$ is $\sum_i f(a_i) - N$. The sum of $f(a_i)$
# over the children of a parent is computed by a pass with equal coupling, multiplied by each
# child's number of parents. Votes have a bias: the last number of each pose is the constant 1, and
# the last row of a matrix is its bias.


# %%
class HeinsenRouting(gc.Routing):
    activations = True

    def __init__(self, iterations=3, epsilon=1e-5):
        super().__init__()
        self.iterations, self.epsilon = iterations, epsilon

    def build(self, sizes):
        self.beta_use = nn.Parameter(torch.empty(sizes.types))
        self.beta_ignore = nn.Parameter(torch.empty(sizes.types))

    def reset_parameters(self, weight):
        nn.init.normal_(weight, std=1 / (weight.shape[1] - 1))
        nn.init.zeros_(weight.detach()[:, -1])
        nn.init.zeros_(self.beta_use)
        nn.init.zeros_(self.beta_ignore)

    def steps(self, edges):
        use, ignore = edges.of_type(self.beta_use), edges.of_type(self.beta_ignore)
        f = edges.a.sigmoid()
        data = edges.couple(a=f * edges.degree())  # every vote counts f(a_i), for every parent
        r = (data.S / (data.N + self.epsilon)).detach()  # near the means: no digits are lost
        k = q = None
        for _ in range(self.iterations):
            sums = edges.couple(k=k, q=q, r=r, a=f, squares=True)
            N, S, Q, mass = sums.N, sums.S, sums.Q, sums.N + self.epsilon
            a = use * N - ignore * (data.N - N)
            mu = (S + N * r) / mass
            d = mu - r
            variance = (Q - d * (2 * S - d * N)).clamp_min(0) / mass + self.epsilon
            yield gc.Iteration(sums, mu, a)
            k = F.logsigmoid(a) - variance.log().sum(dim=1, keepdim=True) / 2
            q, r = -1 / (2 * variance), mu


# %% [markdown]
# The next cell implements the same on dense votes `[B, I, J, D]`, as in the paper. The author's
# code (github.com/glassroom/heinsen_routing) has two forms: if the number of children is variable,
# they share matrices and $\beta$, with one of each per parent; if it is fixed, each pair of child
# and parent has its own. Here the graph defines which edges share a matrix, and there is one
# $\beta$ for each parent. With $\beta$ set accordingly, both forms of the author's code agree with
# this class to 13 digits, also for matrix poses.


# %%
def heinsen_dense(u_hat, a, beta_use, beta_ignore, *, iterations=3, epsilon=1e-5):
    f = a.sigmoid().unsqueeze(2)
    c = torch.full_like(u_hat[..., 0], 1 / u_hat.shape[2])
    for _ in range(iterations):
        use = f * c
        ignore = f - use
        a = (beta_use * use).sum(dim=1) - (beta_ignore * ignore).sum(dim=1)
        share = use / (use.sum(dim=1, keepdim=True) + epsilon)
        mu = torch.einsum("bij,bijd->bjd", share, u_hat)
        square = (u_hat - mu.unsqueeze(1)).square()
        variance = torch.einsum("bij,bijd->bjd", share, square) + epsilon
        density = -(square / (2 * variance.unsqueeze(1)) + variance.sqrt().log().unsqueeze(1))
        c = (F.logsigmoid(a).unsqueeze(1) + density.sum(dim=3)).softmax(dim=2)
    return mu, a


# %% [markdown]
# Values and gradients agree to 10 digits on every engine:

# %%
graph = gc.complete_graph(children=30, parents=5)
layer = gc.CapsuleLayer(graph, 9, 8, routing=HeinsenRouting(), dtype=torch.float64)
for parameter in layer.parameters():
    nn.init.normal_(parameter)
u = torch.cat([torch.randn(4, 30, 8), torch.ones(4, 30, 1)], dim=2).double().requires_grad_()
a = torch.randn(4, 30, dtype=torch.float64, requires_grad=True)
inputs = [u, a, *layer.parameters()]


def with_gradients(results, inputs):
    return *results, *torch.autograd.grad(sum(x.sin().sum() for x in results), inputs)


u_hat = gc.reference.votes(u, layer.weight.unflatten(0, (30, 5)))
results = heinsen_dense(u_hat, a, layer.routing.beta_use, layer.routing.beta_ignore)
dense = with_gradients(results, inputs)
for engine in ENGINES:
    layer.engine = engine
    torch.testing.assert_close(with_gradients(layer(u, a), inputs), dense, rtol=1e-10, atol=1e-10)

# %% [markdown]
# ### Classifying digits
#
# A small net is trained on the 4,000 training images of `mnist-5k`. Two convolutions compute four
# capsules at each of 5 × 5 positions, which vote for ten parents; their poses include the position.
# All positions of a map share their matrices, of which there are 4 × 10. The predicted class is the
# parent with the highest score.

# %%
MAPS, SIDE, POSE = 4, 5, 12
digits = load_dataset("mnist-5k")
child = torch.arange(MAPS * SIDE**2).repeat_interleave(10)
parent = torch.arange(10).repeat(MAPS * SIDE**2)
graph = gc.routing_graph(child, parent, weight_index=child // SIDE**2 * 10 + parent)
classes = gc.CapsuleLayer(graph, POSE + 3, 12, routing=HeinsenRouting(), engine="fused")
convolutions = nn.Sequential(
    nn.Conv2d(1, 32, 5, stride=2), nn.ReLU(), nn.Conv2d(32, MAPS * (POSE + 1), 3, stride=2)
)
row, column = torch.meshgrid(*2 * [torch.linspace(-1, 1, SIDE)], indexing="ij")
place = torch.stack([row, column, torch.ones_like(row)], dim=2).view(1, 1, SIDE**2, 3)


def read(images, **options):
    maps = convolutions(images / 255).unflatten(1, (MAPS, POSE + 1)).flatten(3).transpose(2, 3)
    poses = torch.cat([maps[..., :POSE], place.expand(*maps.shape[:2], -1, -1)], dim=3)
    return classes(poses.flatten(1, 2), maps[..., POSE].flatten(1), **options)


# %%
parameters = [*convolutions.parameters(), *classes.parameters()]
batches = torch.cat([torch.randperm(4000) for _ in range(4)]).split(100)
adam = torch.optim.Adam(parameters)
schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 1e-2, total_steps=len(batches))
for batch in batches:
    scores = read(digits.train.images[batch]).activations
    loss = F.cross_entropy(scores, digits.train.labels[batch])
    adam.zero_grad()
    loss.backward()
    adam.step()
    schedule.step()
with torch.no_grad():
    seen = read(digits.test.images).activations.argmax(dim=1)
print(f"{sum(p.numel() for p in parameters):,} parameters; of 500 test images")
print(f"{int((seen == digits.test.labels).sum())} are read rightly")

# %% [markdown]
# The figure shows how much of the digit each class uses: $D^{use}$ at each position, summed over
# the maps. In the first iteration the data are divided equally between the classes; in the last,
# most of them are used by a few classes. Below are the scores $a_j$ of the last iteration, which
# grow with the data that a class uses and shrink with the data that it ignores.

# %%
shown = int((digits.test.labels == 4).nonzero()[0])
image = digits.test.images[shown : shown + 1]
classes.engine = "auto"
with torch.no_grad():
    _, trace = read(image, return_trace=True)
    f = convolutions(image / 255).unflatten(1, (MAPS, POSE + 1))[0, :, POSE].sigmoid()
used = trace.c.view(3, MAPS, SIDE, SIDE, 10) * f.unsqueeze(3)
used = used.sum(dim=1).permute(0, 3, 1, 2)  # [iteration, class, row, column]
figure = Figure(figsize=(10, 2.9), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=[1, 5])
axes = left.subplots()
axes.imshow(image[0, 0], cmap="gray_r")
axes.set_axis_off()
axes.set_title("image")
panels = right.subplots(3, 10)
for (iteration, j), axes in np.ndenumerate(panels):
    picture = axes.imshow(used[iteration, j], cmap="Blues", vmin=0, vmax=float(used.max()))
    axes.set(xticks=[], yticks=[])
    if iteration == 0:
        axes.set_title(f"class {j}", size=9)
    if iteration == 2:
        axes.set_xlabel(f"{trace.a[2, 0, j]:.1f}".replace("-", "−"), size=9)
    if j == 0:
        axes.set_ylabel(f"iteration {iteration + 1}", size=9)
right.colorbar(picture, ax=panels, label="data used", shrink=0.8)
figure

# %% [markdown]
# ## Slot Attention: parents that compete for points
#
# *Object-Centric Learning with Slot Attention* (Locatello et al. 2020, arXiv:2006.15055) is not a
# capsule network, but it can be computed by the same pass: the *slots* are parents, and the inputs
# are children that all vote with the same matrix. In its terms, an input has a key and a value, a
# slot has a query, and the softmax is over the slots. A vote is therefore the value followed by the
# key, $\hat u = W^\top x$ with $W = [W_v \, W_k]$, and the coupling depends only on the key: $p_j =
# [0, q_j / \sqrt{D}]$. Votes then have $D$ numbers more than a slot, which `vote_columns` declares.
# After each pass a slot is updated by a GRU and a small MLP:
#
# $$\text{slot}_j \leftarrow \mathrm{GRU}(S_j / N_j, \text{slot}_j), \qquad
# \text{slot}_j \leftarrow \text{slot}_j + \mathrm{MLP}(\text{slot}_j).$$
#
# Slots are initialised randomly with a learned mean and scale, which all slots share, so that their
# number can be changed. The $\epsilon$ that the authors add to the attention is `beta`.
#
# This is the algorithm of the paper, except for the LayerNorm of the inputs, which must be applied
# before the layer. With the parameters of the authors' code (google-research,
# `slot_attention/model.py`), the results agree to 13 digits. Two defaults differ: the $\epsilon$ of
# LayerNorm, $10^{-5}$ in PyTorch and $10^{-3}$ in Keras, and the initial values of some parameters,
# which are PyTorch's.


# %%
class SlotAttention(gc.Routing):
    def __init__(self, dim, iterations=3, epsilon=1e-8):
        super().__init__()
        self.dim, self.iterations, self.epsilon = dim, iterations, epsilon
        self.vote_columns = dim

    def build(self, sizes):
        dim = self.dim
        self.mean, self.log_scale = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.query = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim, bias=False))
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim)
        )
        self.register_buffer("added", torch.full([sizes.kinds], self.epsilon))

    def reset_parameters(self, weight):
        nn.init.xavier_uniform_(weight.detach()[0, :, : self.dim])
        nn.init.xavier_uniform_(weight.detach()[0, :, self.dim :])
        nn.init.normal_(self.mean)
        nn.init.zeros_(self.log_scale)
        for module in (*self.query, self.gru, *self.mlp[:2], self.mlp[3]):
            module.reset_parameters()

    def steps(self, edges):
        size = (edges.samples * edges.parents, self.dim)
        noise = torch.randn(size, dtype=edges.dtype, device=edges.device)
        slots = self.mean + self.log_scale.exp() * noise
        for _ in range(self.iterations):
            q = self.query(slots) / math.sqrt(self.dim)
            sums = edges.couple(p=F.pad(q, (self.dim, 0)), beta=self.added)
            slots = self.gru(sums.S[:, : self.dim] / sums.N, slots)
            slots = slots + self.mlp(slots)
            yield gc.Iteration(sums, slots)


# %% [markdown]
# The same on dense tensors:


# %%
def slot_attention_dense(x, weight, learned, slots, *, iterations=3, epsilon=1e-8):
    values, keys = (x @ weight[0]).chunk(2, dim=2)
    for _ in range(iterations):
        q = learned.query(slots) / math.sqrt(slots.shape[2])
        attention = torch.einsum("bid,bjd->bij", keys, q).softmax(dim=2) + epsilon
        share = attention / attention.sum(dim=1, keepdim=True)
        updates = torch.einsum("bij,bid->bjd", share, values)
        slots = learned.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
        slots = slots + learned.mlp(slots)
    return slots


def all_to_all(inputs, slots):
    pairs = torch.cartesian_prod(torch.arange(inputs), torch.arange(slots))
    return gc.routing_graph(*pairs.T, weight_index=torch.zeros(len(pairs), dtype=torch.int64))


layer = gc.CapsuleLayer(all_to_all(20, 4), 6, 8, routing=SlotAttention(8), dtype=torch.float64)
x = torch.randn(3, 20, 6, dtype=torch.float64, requires_grad=True)
inputs = [x, *layer.parameters()]
torch.manual_seed(1)
noise = torch.randn(3 * 4, 8, dtype=torch.float64).view(3, 4, 8)
first = layer.routing.mean + layer.routing.log_scale.exp() * noise
results = [slot_attention_dense(x, layer.weight, layer.routing, first)]
dense = with_gradients(results, inputs)
for engine in ENGINES:
    layer.engine = engine
    torch.manual_seed(1)
    torch.testing.assert_close(with_gradients([layer(x)], inputs), dense, rtol=1e-10, atol=1e-10)

# %% [markdown]
# ### Finding clusters
#
# A sample has sixty points in three clusters, at random places on a ring. The net learns to locate
# the clusters without labels: it is trained to maximise the likelihood of the points under a
# mixture of Gaussians whose centres are computed from the slots.


# %%
def draw_points(samples, clusters):
    turns = (torch.arange(clusters) + 0.45 * torch.rand(samples, clusters)) / clusters
    angles = 2 * math.pi * (turns + torch.rand(samples, 1))
    centres = torch.stack([angles.cos(), angles.sin()], dim=2)
    centres = centres * (0.7 + 0.5 * torch.rand(samples, clusters, 1))
    return centres.repeat_interleave(20, dim=1) + 0.15 * torch.randn(samples, 20 * clusters, 2)


def unlikelihood(points, centres):
    return -(-torch.cdist(points, centres).square() / (2 * 0.4**2)).logsumexp(dim=2).mean()


slots = gc.CapsuleLayer(all_to_all(60, 3), 32, 32, routing=SlotAttention(32), engine="fused")
embed = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 32), nn.LayerNorm(32))
centre_of = nn.Linear(32, 2)
parameters = [p for part in (slots, embed, centre_of) for p in part.parameters()]
adam = torch.optim.Adam(parameters)
schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 3e-3, total_steps=500)
for _ in range(500):
    points = draw_points(samples=32, clusters=3)
    loss = unlikelihood(points, centre_of(slots(embed(points))))
    adam.zero_grad()
    loss.backward()
    adam.step()
    schedule.step()

# %% [markdown]
# The learned parameters do not depend on the number of points or slots: they can also be used in a
# layer with four slots. The next cell uses two more iterations than in training, on new samples
# with three clusters, and with four, which did not occur in training:

# %%
layers, shown = {}, {}
for clusters in (3, 4):
    layer = gc.CapsuleLayer(
        all_to_all(20 * clusters, clusters), 32, 32, routing=SlotAttention(32, iterations=5)
    )
    layer.load_state_dict(slots.state_dict())
    points = draw_points(500, clusters)
    with torch.no_grad():
        _, trace = layer(embed(points), return_trace=True)
        centres = centre_of(trace.v)
    own = trace.strongest_parent()  # [iteration, sample, point]
    groups = own[-1].view(500, clusters, 20)
    whole = (groups == groups[:, :, :1]).all(dim=2).all(dim=1)
    apart = groups[:, :, 0].sort(dim=1).values.eq(torch.arange(clusters)).all(dim=1)
    right = whole & apart
    print(f"{clusters} clusters: every point with its own in {int(right.sum())} of 500 samples")
    first = int(right.nonzero()[0])
    shown[clusters] = points[first], own[:, first], centres[:, first]

# %% [markdown]
# The figure shows the first correctly grouped sample of each kind, iteration by iteration. The
# marker of a point is that of the slot with the strongest coupling; crosses are the centres
# computed from the slots.

# %%
figure = Figure(figsize=(10, 5.2), layout="constrained")
rows = figure.subplots(2, 4, sharex=True, sharey=True)
marks = list(zip("osD^", ("#0072b2", "#e69f00", "#009e73", "#cc79a7"), strict=True))
for panels, (clusters, (points, own, centres)) in zip(rows, shown.items(), strict=True):
    panels[0].set_ylabel(f"{clusters} slots")
    for iteration, axes in zip((0, 1, 2, 4), panels, strict=True):
        for j, (marker, color) in enumerate(marks):
            axes.scatter(*points[own[iteration] == j].T, s=14, marker=marker, color=color)
        axes.scatter(*centres[iteration].T, s=90, marker="x", color="black", linewidths=2)
        axes.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[-1, 0, 1], yticks=[-1, 0, 1])
        axes.set_aspect("equal")
        if clusters == 3:
            axes.set_title(f"iteration {iteration + 1}")
figure

# %% [markdown]
# ## Memory
#
# An engine that stores votes saves tensors with a number for each edge and dimension for the
# backward pass of every iteration. `fused` only saves tensors of children and parents, and
# recomputes the votes. The next cell prints the memory that autograd saves beyond inputs and
# matrices, for 16 samples of a layer of 1152 children and 10 parents with Heinsen's routing:

# %%
layer = gc.CapsuleLayer(gc.complete_graph(1152, 10), 9, 16, routing=HeinsenRouting())
u, a = torch.randn(16, 1152, 9, requires_grad=True), torch.randn(16, 1152)
given = {tensor.untyped_storage().data_ptr() for tensor in (u, a, layer.weight)}
kept = {}


def keep(tensor):
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in given:
        kept[storage.data_ptr()] = storage.nbytes()
    return tensor


print(f"the votes alone: {16 * 11520 * 16 * 4 / 1e6:5.1f} MB")
for engine in ("builtin", "scatter", "fused"):
    layer.engine = engine
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        poses, scores = layer(u, a)
    print(f"{engine:7} keeps {sum(kept.values()) / 1e6:7.1f} MB")

# %% [markdown]
# Slot Attention benefits less. Its inputs share one matrix, so a dense form computes a key and a
# value for each input rather than for each edge, whereas `fused` recomputes them for each edge.
# Here the advantage of the layer is the graph, which allows sets of different sizes in one batch.
#
# ## What to try
#
# - Use `p=8 * equal.S / equal.N` in `TwoSteps`: the coupling becomes sharper.
# - Use Heinsen's routing on a pruned graph or a ragged batch: `layer(u, a, graph=...)`.
# - Give each slot its own initial value: a parameter `[T, D]` in `build`, and `edges.of_type` of it
#   in `steps`.
# - Read [routing/README.md](../graphcaps/routing/README.md), which describes everything that
#   `couple` and `edges` can do, and how to add a routing to the library.
