"""The passes over the edges with the numbers of a pose in lanes.

They serve small batches, and edges of several children that compete. They compute the same sums and
gradients as couple_passes.py and dynamic_passes.py, where samples are in lanes. Edges are sorted by
competition, then by child; a *group* is the edges that compete. Each group is processed for a few
samples in turn, so that its matrices stay in cache. Arrays are flat:

    u, a               [B, I, P·K], [B, I]         start                  of groups, in edges
    weight             [M, K, width]               child, parent, kind    of edges
    r, p, q, S, Q      [B, J, width]               beta, prior            [M]
    k, N               [B, J]

Arrays of scratch have one row for each edge of a group. `width` is 16 for each entry of the tuple
`lanes`, and so is known at compile time. `groups` is the first group of a range and one past its
last.
"""

import numpy as np

from graphcaps.kernels.cpu.by_pose import LANE, SAMPLES
from graphcaps.kernels.cpu.compiled import compiled, entry, inlined
from graphcaps.kernels.cpu.lanes import get, put
from graphcaps.kernels.cpu.pose_steps import (
    add_gradients,
    add_matrices,
    add_pose_gradient,
    add_rest,
    add_scaled,
    add_slopes,
    add_to_parent,
    count_matrices,
    count_terms,
    dot,
    dot_with_squares,
    lay_pose,
    logit_gradients,
    scale,
    softmax,
    vote,
)
from graphcaps.kernels.cpu.steps import terms_of_a_sum
from graphcaps.kernels.cpu.vectors import plus, put_row, row, spread, times


@entry
def couple_pass(u, weight, inputs, edges, groups, sizes, leak, lanes, scratch, sums, totals):
    """Add the terms of a range of groups to the totals N, S and Q."""
    y, c, a = scratch.y, scratch.c, scratch.a
    B, J, K = sizes.samples, sizes.parents, sizes.child_dim
    width = LANE * len(lanes)
    pose_of_child = sizes.rows * K
    coupled, with_a = _is_coupled(inputs), inputs.a.size > 0
    for sample in range(0, B, SAMPLES):
        samples = min(SAMPLES, B - sample)
        for group in range(groups[0], groups[1]):
            first, degree = edges.start[group], edges.start[group + 1] - edges.start[group]
            if degree == 0:
                continue
            for s in range(samples):
                at = (sample + s) * J
                last = np.int64(-1)
                for e in range(degree):
                    i = np.int64(get(edges.child, first + e))
                    m, j = np.int64(get(edges.kind, first + e)), at + get(edges.parent, first + e)
                    if i != last:
                        last = i
                        lay_pose(
                            u,
                            ((sample + s) * sizes.children + i) * pose_of_child,
                            sizes,
                            scratch.x,
                            width,
                        )
                    vote(scratch.x, weight, m, K, width, inputs.r, j, y, e)
                    if coupled:
                        put(c, e, _logit(y, e, inputs, m, j, width))
                    if with_a:
                        put(a, e, get(inputs.a, (sample + s) * sizes.children + i))
                if coupled:
                    softmax(c, np.int64(0), degree, leak, scratch.rows, lanes[:1])
                else:
                    _couple_equally(c, np.int64(0), degree, leak)
                for e in range(degree):
                    m = np.int64(get(edges.kind, first + e))
                    w = _weigh(c, e, inputs.beta, m, with_a, a)
                    add_to_parent(sums, s * J + get(edges.parent, first + e), w, y, e, width)
            count_terms(
                totals,
                sums,
                edges.terms_of_parent,
                edges.parent,
                first,
                degree,
                sample * J,
                samples,
                J,
                width,
            )
        add_rest(totals, sums, sample * J, samples, J, width)


@entry
def couple_gradient_pass(  # noqa: PLR0912, PLR0915, each term may be absent
    u,
    weight,
    inputs,
    edges,
    groups,
    sizes,
    leak,
    detach_coupling,
    gradients,
    lanes,
    scratch,
    sums,
    totals,
    matrix_sums,
    outputs,
):
    """Add up the gradients of a range of groups from `gradients`, those of N, S and Q.

    `totals` holds the gradients of k, p and q, `outputs` the others; empty arrays are skipped.
    """
    y, c, a, g, dy = scratch.y, scratch.c, scratch.a, scratch.g, scratch.dy
    B, J, K = sizes.samples, sizes.parents, sizes.child_dim
    width = LANE * len(lanes)
    pose_of_child = sizes.rows * K
    coupled, with_a = _is_coupled(inputs), inputs.a.size > 0
    of_pose, of_weight = outputs.u.size > 0, outputs.weight.size > 0
    of_votes = of_pose or of_weight
    of_weights = outputs.a.size > 0 or outputs.beta.size > 0
    apart = matrix_sums.weight.size == 0
    dweight = outputs.weight if apart else matrix_sums.weight
    for sample in range(0, B, SAMPLES):
        samples = min(SAMPLES, B - sample)
        for group in range(groups[0], groups[1]):
            first, degree = edges.start[group], edges.start[group + 1] - edges.start[group]
            with_rivals = coupled and degree + leak > 1  # a single edge has a coupling of 1
            of_logits = with_rivals and not detach_coupling
            if degree == 0 or not (of_logits or of_votes or of_weights):
                continue
            with_g = of_logits or of_weights
            with_y = with_g or with_rivals or gradients.Q.size > 0
            for s in range(samples):
                at, nodes = (sample + s) * J, (sample + s) * sizes.children
                last = np.int64(-1)
                for e in range(degree):
                    i = np.int64(get(edges.child, first + e))
                    m, j = np.int64(get(edges.kind, first + e)), at + get(edges.parent, first + e)
                    if i != last:
                        last = i
                        lay_pose(u, (nodes + i) * pose_of_child, sizes, scratch.x, width)
                    put(a, e, get(inputs.a, nodes + i) if with_a else a.dtype.type(1))
                    if with_y:
                        vote(scratch.x, weight, m, K, width, inputs.r, j, y, e)
                    if with_rivals:
                        put(c, e, _logit(y, e, inputs, m, j, width))
                    if with_g:
                        put(g, e, _weight_gradient(y, e, gradients, j, width))
                if with_rivals:
                    softmax(c, np.int64(0), degree, leak, scratch.rows, lanes[:1])
                else:
                    _couple_equally(c, np.int64(0), degree, leak)
                if of_weights:
                    _weigh_gradients(c, g, a, inputs.beta, edges, first, degree, nodes, outputs)
                if of_logits:
                    for e in range(degree):
                        put(g, e, get(g, e) * get(a, e))
                    logit_gradients(c, g, np.int64(0), degree)
                    for e in range(degree):
                        m = np.int64(get(edges.kind, first + e))
                        j = s * J + get(edges.parent, first + e)
                        add_to_parent(sums, j, get(g, e), y, e, width)
                        if outputs.prior.size:
                            outputs.prior[m] += get(g, e)
                if not of_votes:
                    continue
                begin, terms = 0, terms_of_a_sum(degree)
                while begin < degree:
                    i = np.int64(get(edges.child, first + begin))
                    end = begin
                    while (
                        end < degree and end < begin + terms and get(edges.child, first + end) == i
                    ):
                        m, j = (
                            np.int64(get(edges.kind, first + end)),
                            at + get(edges.parent, first + end),
                        )
                        w = _weigh(c, end, inputs.beta, m, with_a, a)
                        _vote_gradient(
                            dy,
                            (end - begin) * width,
                            y,
                            end,
                            w,
                            get(g, end),
                            gradients,
                            inputs,
                            j,
                            width,
                            of_logits,
                        )
                        end += 1
                    if i != last:
                        last = i
                        lay_pose(u, (nodes + i) * pose_of_child, sizes, scratch.x, width)
                    add_gradients(
                        dweight,
                        of_weight,
                        scratch.dx,
                        of_pose,
                        scratch.x,
                        weight,
                        edges.kind,
                        first + begin,
                        end - begin,
                        K,
                        width,
                        dy,
                    )
                    if of_pose:
                        o = (nodes + i) * pose_of_child
                        add_pose_gradient(outputs.u, o, sizes, scratch.dx, width)
                    begin = end
            if of_logits:
                count_terms(
                    totals,
                    sums,
                    edges.terms_of_parent,
                    edges.parent,
                    first,
                    degree,
                    sample * J,
                    samples,
                    J,
                    width,
                )
            if not apart:
                count_matrices(
                    outputs.weight,
                    matrix_sums,
                    edges.terms_of_kind,
                    edges.kind,
                    first,
                    degree,
                    samples,
                    K * width,
                )
        add_rest(totals, sums, sample * J, samples, J, width)
    add_matrices(outputs.weight, matrix_sums, K * width)


@entry
def dynamic_gradient_pass(  # noqa: PLR0912, PLR0915, as above
    u,
    weight,
    edges,
    groups,
    sizes,
    V,
    q,
    iterations,
    lanes,
    scratch,
    matrix_sums,
    du,
    dweight,
):
    """`∂û_e = Σ_r (c^r_e q^r + l^r_e V_{r-1})`, and from it `∂u += W ∂û` and `∂W += u ⊗ ∂û`.

    Args:
        u, weight, edges, groups, sizes: as for the other passes.
        V: of all iterations but the last, `[R − 1, B, J, width]`.
        q: the gradients of s, `[R, B, J, width]`; or those of the last iteration only, in which
            case l counts as 0.
        iterations: R.
        scratch: c and g hold R rows of a group.
        matrix_sums: zeros.
        du, dweight: added to; skipped if empty.
    """
    y, c, g, dy = scratch.y, scratch.c, scratch.g, scratch.dy
    B, J, K = sizes.samples, sizes.parents, sizes.child_dim
    width = LANE * len(lanes)
    through_all = len(q) == iterations * B * J * width
    start = 0 if through_all else iterations - 1
    none = V[:0]
    apart = matrix_sums.weight.size == 0
    to = dweight if apart else matrix_sums.weight
    for sample in range(0, B, SAMPLES):
        samples = min(SAMPLES, B - sample)
        for group in range(groups[0], groups[1]):
            first, degree = edges.start[group], edges.start[group + 1] - edges.start[group]
            stride = (degree + LANE - 1) // LANE * LANE  # of one iteration in c and g
            for s in range(samples):
                nodes = (sample + s) * sizes.children
                last = np.int64(-1)
                for e in range(degree):
                    i, m = (
                        np.int64(get(edges.child, first + e)),
                        np.int64(get(edges.kind, first + e)),
                    )
                    if i != last:
                        last = i
                        lay_pose(u, (nodes + i) * K, sizes, scratch.x, width)
                    vote(scratch.x, weight, m, K, width, none, np.int64(0), y, e)
                for t in range(start, iterations):
                    at = ((t if through_all else 0) * B + sample + s) * J
                    before = ((t - 1) * B + sample + s) * J
                    o = (t - start) * stride
                    of_logits = through_all and t > 0 and degree > 1
                    if t == 0 or degree == 1:
                        _couple_equally(c, o, degree, False)
                    else:
                        for e in range(degree):
                            j = before + get(edges.parent, first + e)
                            put(c, o + e, dot(y, e * width, V, j * width, width))
                        softmax(c, o, degree, False, scratch.rows, lanes[:1])
                    if of_logits:
                        for e in range(degree):
                            j = at + get(edges.parent, first + e)
                            put(g, o + e, dot(y, e * width, q, j * width, width))
                        logit_gradients(c, g, o, degree)
                begin, terms = 0, terms_of_a_sum(degree)
                while begin < degree:
                    i = np.int64(get(edges.child, first + begin))
                    end = begin
                    while (
                        end < degree and end < begin + terms and get(edges.child, first + end) == i
                    ):
                        j = sample * J + s * J + get(edges.parent, first + end)
                        _sum_of_iterations(
                            dy,
                            (end - begin) * width,
                            c,
                            g,
                            end,
                            stride,
                            V,
                            q,
                            j,
                            B * J,
                            iterations,
                            start,
                            through_all and degree > 1,
                            width,
                        )
                        end += 1
                    if i != last:
                        last = i
                        lay_pose(u, (nodes + i) * K, sizes, scratch.x, width)
                    add_gradients(
                        to,
                        dweight.size > 0,
                        scratch.dx,
                        du.size > 0,
                        scratch.x,
                        weight,
                        edges.kind,
                        first + begin,
                        end - begin,
                        K,
                        width,
                        dy,
                    )
                    if du.size:
                        add_pose_gradient(du, (nodes + i) * K, sizes, scratch.dx, width)
                    begin = end
            if not apart:
                count_matrices(
                    dweight,
                    matrix_sums,
                    edges.terms_of_kind,
                    edges.kind,
                    first,
                    degree,
                    samples,
                    K * width,
                )
    add_matrices(dweight, matrix_sums, K * width)


@inlined
def _is_coupled(inputs):
    """Whether there are logits; without them, the coupling is equal."""
    return inputs.k.size > 0 or inputs.p.size > 0 or inputs.q.size > 0 or inputs.prior.size > 0


@inlined
def _couple_equally(c, o, degree, leak):
    share = c.dtype.type(1 / (degree + leak))
    for e in range(o, o + degree):
        put(c, e, share)


@inlined
def _logit(y, e, inputs, m, j, width):
    """`b_e = prior_m + k_j + p_j·y_e + q_j·y_e²`."""
    b = y.dtype.type(0)
    if inputs.k.size:
        b += get(inputs.k, j)
    if inputs.prior.size:
        b += get(inputs.prior, m)
    if inputs.p.size:
        b += dot(y, e * width, inputs.p, j * width, width)
    if inputs.q.size:
        b += dot_with_squares(inputs.q, j * width, y, e * width, width)
    return b


@inlined
def _weigh(c, e, beta, m, with_a, a):
    """`a (c + beta)`."""
    w = get(c, e)
    if beta.size:
        w += get(beta, m)
    if with_a:
        w *= get(a, e)
    return w


@inlined
def _weight_gradient(y, e, gradients, j, width):
    """`g_e = ∂N_j + ∂S_j·y_e + ∂Q_j·y_e²`, the gradient of w."""
    g = dot(y, e * width, gradients.S, j * width, width)
    if gradients.N.size:
        g += get(gradients.N, j)
    if gradients.Q.size:
        g += dot_with_squares(gradients.Q, j * width, y, e * width, width)
    return g


@compiled
def _weigh_gradients(c, g, a, beta, edges, first, degree, nodes, outputs):
    """`∂a_i += Σ (c + beta) g` over the edges of each child, and `∂beta_m += Σ a g`."""
    part, terms = c.dtype.type(0), terms_of_a_sum(degree)
    for e in range(degree):
        m = np.int64(get(edges.kind, first + e))
        if outputs.beta.size:
            outputs.beta[m] += get(a, e) * get(g, e)
        if outputs.a.size:
            i = np.int64(get(edges.child, first + e))
            part += (get(c, e) + (beta[m] if beta.size else c.dtype.type(0))) * get(g, e)
            if (e + 1) % terms == 0 or e + 1 == degree or get(edges.child, first + e + 1) != i:
                put(outputs.a, nodes + i, get(outputs.a, nodes + i) + part)
                part = c.dtype.type(0)


@inlined
def _vote_gradient(dy, o, y, e, w, g, gradients, inputs, j, width, of_logits):
    """`∂y_e = w (∂S + 2 ∂Q∘y) + g (p + 2 q∘y)`, with g the gradient of the logit."""
    scale(dy, o, w, gradients.S, j * width, width)
    if gradients.Q.size:
        add_slopes(dy, o, w, gradients.Q, j * width, y, e * width, width)
    if inputs.p.size and of_logits:
        add_scaled(dy, o, g, inputs.p, j * width, width)
    if inputs.q.size and of_logits:
        add_slopes(dy, o, g, inputs.q, j * width, y, e * width, width)


@inlined
def _sum_of_iterations(dy, o, c, g, e, stride, V, q, j, nodes, iterations, start, of_logits, width):
    """`∂û_e = Σ_r (c^r_e q^r + l^r_e V_{r-1})`."""
    for begin in range(0, width, LANE):
        total = times(spread(get(c, e)), row(q, j * width + begin))
        for t in range(start + 1, iterations):
            i, at = ((t - start) * nodes + j) * width + begin, (t - start) * stride + e
            total = plus(total, times(spread(get(c, at)), row(q, i)))
            if of_logits:
                total = plus(total, times(spread(get(g, at)), row(V, i - nodes * width)))
        put_row(dy, o + begin, total)
