"""The terms of one edge for a block of samples: û, y, b, c, w, g and λ, in registers.

Values per sample are [BLOCK_B], values per pose [BLOCK_B·BLOCK_P, BLOCK_D], both padded with zeros
beyond B, P and D. Offsets that depend on a sample or a matrix are int64.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations  # tl.constexpr is not there without triton

from graphcaps.kernels.triton.arguments import Block, Edge
from graphcaps.kernels.triton.device import jit, tl


@jit
def program(run, nodes):
    """The node of a program and its samples; adjacent programs have the same samples."""
    place = tl.program_id(0)
    return place % nodes, block_of_samples(run, place // nodes)


@jit
def block_of_samples(run, number):
    """The samples of block `number`."""
    first = tl.cast(number, tl.int64) * run.size.BLOCK_B
    sample = first + tl.arange(0, run.size.BLOCK_B)
    place = tl.arange(0, run.size.BLOCK_B * run.size.BLOCK_P)
    sample_of_row, row = first + place // run.size.BLOCK_P, place % run.size.BLOCK_P
    row_there = (sample_of_row < run.inputs.B) & (row < run.size.P)
    return Block(sample, sample < run.inputs.B, sample_of_row, row, row_there)


@jit
def edge_of(run, block, child, parent, kind):
    """An edge for a block of samples; `child` or `parent` may be 0 if it is not used."""
    at_child = block.sample * run.inputs.I + child
    at_parent = block.sample * run.inputs.J + parent
    row = (block.sample_of_row * run.inputs.J + parent) * run.size.P + block.row
    d = tl.arange(0, run.size.BLOCK_D)
    at_pose, pose_there = row[:, None] * run.size.D + d, block.row_there[:, None] & (d < run.size.D)
    return Edge(block, child, parent, kind, at_child, at_parent, at_pose, pose_there)


@jit
def moved(run, edge, number):
    """The same edge in feature `number` of several features that are stacked."""
    number = tl.cast(number, tl.int64) * run.inputs.B
    parents = number * run.inputs.J
    return Edge(
        edge.block,
        edge.child,
        edge.parent,
        edge.kind,
        edge.at_child + number * run.inputs.I,
        edge.at_parent + parents,
        edge.at_pose + parents * run.size.P * run.size.D,
        edge.pose_there,
    )


@jit
def group(count, terms):
    """The number of summands, of `terms` terms each, in a partial sum.

    A partial sum has about the square root of all terms, and at least 32: one long sum in float32
    would lose precision.
    """
    root = tl.sqrt(tl.cast(count, tl.float32) / terms).to(tl.int32)
    return tl.maximum(root, tl.cdiv(32, terms))


@jit
def dot(a, b, total):
    """`total + a @ b` in full float32, not in TensorFloat-32; bfloat16 is converted exactly."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")


@jit
def zeros_of_poses(run):
    """Zeros for a tile of parents' poses."""
    return tl.zeros([run.size.BLOCK_B * run.size.BLOCK_P, run.size.BLOCK_D], tl.float32)


@jit
def over_pose(run, x):
    """Sum over the numbers of each sample's pose, [BLOCK_B]."""
    total = tl.sum(x, 1)
    if run.size.BLOCK_P > 1:
        total = tl.sum(tl.reshape(total, [run.size.BLOCK_B, run.size.BLOCK_P]), 1)
    return total


@jit
def along_pose(run, x):
    """Broadcast a number for each sample to the rows of its pose, [BLOCK_B·BLOCK_P, 1]."""
    if run.size.BLOCK_P > 1:
        x = tl.broadcast_to(x[:, None], [run.size.BLOCK_B, run.size.BLOCK_P])
        x = tl.reshape(x, [run.size.BLOCK_B * run.size.BLOCK_P])
    return x[:, None]


@jit
def of_child(feature, edge, other=0.0):
    """A feature of the child, from [B, I]."""
    return tl.load(feature + edge.at_child, mask=edge.block.there, other=other).to(tl.float32)


@jit
def of_parent(feature, edge):
    """A feature of the parent, from [B, J]."""
    return tl.load(feature + edge.at_parent, mask=edge.block.there, other=0.0).to(tl.float32)


@jit
def pose_of_parent(feature, edge):
    """A feature of the parent, from [B, J, P·D]."""
    return tl.load(feature + edge.at_pose, mask=edge.pose_there, other=0.0).to(tl.float32)


@jit
def places_of_child(run, block, child, first_k):
    """Offsets of BLOCK_K numbers of each row of a child's poses, and which of them exist."""
    row = (block.sample_of_row * run.inputs.I + child) * run.size.P + block.row
    k = first_k + tl.arange(0, run.size.BLOCK_K)
    return row[:, None] * run.size.K + k, block.row_there[:, None] & (k < run.size.K)


@jit
def pose_of_child(run, block, child, first_k):
    """BLOCK_K numbers of each row of a child's poses, [BLOCK_B·BLOCK_P, BLOCK_K]."""
    place, there = places_of_child(run, block, child, first_k)
    return tl.load(run.inputs.u + place, mask=there, other=0.0)


@jit
def places_in_matrix(run, kind, first_k):
    """Offsets of BLOCK_K rows of a matrix, and which of their numbers exist."""
    k, d = first_k + tl.arange(0, run.size.BLOCK_K), tl.arange(0, run.size.BLOCK_D)
    place = (tl.cast(kind, tl.int64) * run.size.K + k)[:, None] * run.size.D + d
    return place, (k < run.size.K)[:, None] & (d < run.size.D)


@jit
def matrix(run, kind, first_k):
    """BLOCK_K rows of W, [BLOCK_K, BLOCK_D]."""
    place, there = places_in_matrix(run, kind, first_k)
    return tl.load(run.inputs.weight + place, mask=there, other=0.0)


@jit
def votes(run, edge):
    """û = Wᵀu, row by row."""
    u_hat = zeros_of_poses(run)
    for first_k in range(0, run.size.K, run.size.BLOCK_K):
        pose = pose_of_child(run, edge.block, edge.child, first_k)
        u_hat = dot(pose, matrix(run, edge.kind, first_k), u_hat)
    return u_hat


@jit
def from_reference(run, edge, u_hat):
    """y = û − r"""
    y = u_hat
    if run.inputs.r is not None:
        y -= pose_of_parent(run.inputs.r, edge)
    return y


@jit
def value(run, edge, form, y):
    """constant + linear·y + square·y²"""
    total = tl.zeros([run.size.BLOCK_B], tl.float32)
    if form.linear is not None or form.square is not None:
        factor = _slope(edge, form, y, 1)
        total += over_pose(run, factor * y)
    if form.constant is not None:
        total += of_parent(form.constant, edge)
    return total


@jit
def slope(edge, form, y):
    """The derivative of `value` by y, linear + 2 square∘y; at most one term may be absent."""
    return _slope(edge, form, y, 2)


@jit
def _slope(edge, form, y, POWER: tl.constexpr):
    if form.square is not None:
        factor = POWER * pose_of_parent(form.square, edge) * y
        if form.linear is not None:
            factor += pose_of_parent(form.linear, edge)
    else:
        factor = pose_of_parent(form.linear, edge)
    return factor


@jit
def logit(run, edge, y):
    """b = prior + k + p·y + q·y²"""
    b = value(run, edge, run.logits, y)
    if run.inputs.prior is not None:
        b += tl.load(run.inputs.prior + edge.kind).to(tl.float32)
    return b


@jit
def coupling(run, edge, y):
    """c = exp(b − most) / total; NaN in one logit reaches c through the total of the child."""
    if run.softmax.most is None:
        c = tl.full([run.size.BLOCK_B], 1.0, tl.float32)
        c /= tl.load(run.softmax.total + edge.child)
    else:
        above = logit(run, edge, y) - of_child(run.softmax.most, edge)
        c = tl.exp(tl.minimum(above, 0.0))  # rounding may lift b above the largest logit
        c /= of_child(run.softmax.total, edge, other=1.0)
    return c


@jit
def weight_of_vote(run, edge, c):
    """w = a (c + beta)"""
    w = c
    if run.inputs.beta is not None:
        w += tl.load(run.inputs.beta + edge.kind).to(tl.float32)
    return times_activation(run, edge, w)


@jit
def gradient_of_logit(run, edge, y, c):
    """λ = c a (g − Σ c g)"""
    g = value(run, edge, run.gradients, y)
    return times_activation(run, edge, c * (g - of_child(run.softmax.mean, edge)))


@jit
def times_activation(run, edge, x):
    """a x"""
    if run.inputs.a is not None:
        x *= of_child(run.inputs.a, edge)
    return x
