"""The pass over the edges, from poses and matrices: votes are recomputed instead of stored."""

from collections.abc import Sequence

import torch
from torch import Tensor

from graphcaps.kernels import cpu, ops, triton
from graphcaps.kernels.cpu import Edges
from graphcaps.kernels.triton import TritonEdges


class Votes:
    """The votes of one forward pass, `û_e = W_mᵀ u_i` row by row, which are never stored.

    Args:
        u: poses, `[B, I, P·K]`: P rows of K numbers.
        weight: matrices, `[M, K, D]`, in the dtype and on the device of `u`.
        edges: from `prepare`, on the device of `u`.
        a: activations of the children, `[B, I]`; 1 if not given.
        rows: P; 1 for vectors.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
        RuntimeError: no kernel can run on this device; `why_not` says why.

    >>> from graphcaps import complete_graph, kernels
    >>> edges = kernels.prepare(complete_graph(6, 3), kinds=18, device=torch.device("cpu"))
    >>> votes = Votes(torch.rand(2, 6, 16), torch.rand(18, 4, 5), edges, rows=4)
    >>> N, S, _ = votes.couple()
    >>> N.shape, S.shape
    (torch.Size([2, 3]), torch.Size([2, 3, 20]))
    """

    def __init__(
        self,
        u: Tensor,
        weight: Tensor,
        edges: Edges | TritonEdges,
        a: Tensor | None = None,
        rows: int = 1,
    ) -> None:
        check_votes(u, weight, edges, rows)
        self.u, self.weight, self.edges, self.a, self.rows = u, weight, edges, a, rows
        if a is not None:
            self._check("a", a, (u.shape[0], edges.children))

    def couple(
        self,
        k: Tensor | None = None,
        p: Tensor | None = None,
        q: Tensor | None = None,
        r: Tensor | None = None,
        beta: Tensor | None = None,
        prior: Tensor | None = None,
        leak: bool = False,
        squares: bool = False,
        detach_coupling: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One pass over the edges: sums of each parent's votes, weighted by the coupling.

            y_e = û_e − r_j
            b_e = prior_m + k_j + p_j·y_e + q_j·y_e²
            c_e = softmax of b over the edges of a child
            w_e = a_i (c_e + beta_m)
            N_j = Σ w_e,  S_j = Σ w_e y_e,  Q_j = Σ w_e y_e²

        Squares are elementwise. An argument that is not given counts as 0; without k, p, q and
        prior, a child couples equally to all its parents. Only first derivatives are implemented.

        Args:
            k: constant term of the logit, `[B, J]`.
            p: coefficients of the linear term, `[B, J, P·D]`.
            q: coefficients of the quadratic term, `[B, J, P·D]`.
            r: reference points of the parents, `[B, J, P·D]`. If they are near the mean of the
                votes, `Q/N − (S/N)²` does not lose precision.
            beta: a number for each matrix, `[M]`, added to the coupling.
            prior: a number for each matrix, `[M]`, added to the logit.
            leak: add `exp 0` to the sum that softmax divides by.
            squares: compute Q.
            detach_coupling: let no gradient flow through c.

        Returns:
            N `[B, J]`, S `[B, J, P·D]` and Q `[B, J, P·D]`; Q is None without `squares`.

        Raises:
            ValueError: shapes, dtypes or devices do not match.
        """
        parents = (self.u.shape[0], self.edges.parents)
        poses = (*parents, self.rows * self.weight.shape[2])
        kinds = self.weight.shape[:1]
        for name, x, size in (
            ("k", k, parents),
            ("p", p, poses),
            ("q", q, poses),
            ("r", r, poses),
            ("beta", beta, kinds),
            ("prior", prior, kinds),
        ):
            if x is not None:
                self._check(name, x, size)
        N, S, Q, _ = ops.run_couple(
            self.u,
            self.weight,
            self.a,
            r,
            k,
            p,
            q,
            beta,
            prior,
            self.edges.tensors,
            self.edges.parents,
            self.rows,
            leak,
            squares,
            detach_coupling,
        )
        return N, S, Q if squares else None

    def _check(self, name: str, x: Tensor, size: Sequence[int]) -> None:
        if x.shape != tuple(size):
            raise ValueError(f"expected {name} as {list(size)}; got {list(x.shape)}")
        allowed = {self.u.dtype, torch.promote_types(self.u.dtype, torch.float32)}
        if x.dtype not in allowed or x.device != self.u.device:
            raise ValueError(
                f"expected {name} in {names(sorted(allowed, key=str), ' or ')} on {self.u.device}, "
                f"as u; got {names([x.dtype], '')} on {x.device}"
            )


def check_votes(u: Tensor, weight: Tensor, edges: Edges | TritonEdges, rows: int = 1) -> None:
    """Raise ValueError if poses, matrices and edges do not match; kernels do not check again."""
    if rows < 1:
        raise ValueError(f"rows must be at least 1; got {rows}")
    if u.dim() != 3 or u.shape[1] != edges.children or u.shape[2] % rows:
        pose = "K" if rows == 1 else f"{rows}·K"
        raise ValueError(f"expected u as [batch, {edges.children}, {pose}]; got {list(u.shape)}")
    child_dim = u.shape[2] // rows
    if weight.dim() != 3 or weight.shape[:2] != (edges.kinds, child_dim):
        raise ValueError(
            f"expected weight as [{edges.kinds}, {child_dim}, D]; got {list(weight.shape)}"
        )
    kernel = triton if isinstance(edges, TritonEdges) else cpu
    if u.dtype not in kernel.DTYPES or weight.dtype != u.dtype:
        raise ValueError(
            f"expected u and weight both in {names(kernel.DTYPES, ' or both in ')}; "
            f"got {u.dtype} and {weight.dtype}"
        )
    device = edges.tensors[0].device
    if not u.device == weight.device == device:
        raise ValueError(
            f"u is on {u.device}, weight on {weight.device}, edges on {device}; "
            "move all to one device"
        )


def names(dtypes: Sequence[torch.dtype], between: str) -> str:
    """Names of dtypes joined for a sentence, such as `float32 or both in float64`."""
    return between.join(str(dtype).removeprefix("torch.") for dtype in dtypes)
