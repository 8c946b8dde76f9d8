"""Convolutional capsules: their graph, and a layer between grids of capsules."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from graphcaps._dgl import dgl
from graphcaps.graph import made_to_be_kept, routing_graph
from graphcaps.layers import CapsuleLayer, Capsules
from graphcaps.routing import Routing
from graphcaps.routing.base import check_at_least_1, check_choice

COMPETITIONS = ("image", "window", "map")
Competition = Literal["image", "window", "map"]


def conv_graph(  # noqa: PLR0917, the same order everywhere
    height: int,
    width: int,
    child_maps: int,
    parent_maps: int,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
    competition: Competition = "image",
) -> dgl.DGLGraph:
    """Create a graph in which every parent is connected to the children in one window of the grid.

    Children are ordered by map, row and column, as in `PrimaryCapsules`, and so are parents, on a
    grid of `(height + 2·padding − kernel_size) // stride + 1` rows. The matrix of an edge depends
    on the maps of its ends and on the position of the child in the window, so that all windows
    share `kernel_size² · child_maps · parent_maps` matrices, which are ordered by position first.
    Parents of one map have the same type.

    `competition` defines the edges over which the coupling sums to 1:

        "image"    all edges of a child, to the parents of all maps in all windows that contain it
                   (Hinton et al. 2018, section 2.1)
        "window"   the edges of a child to the parents of one window: a child in four windows counts
                   four times
        "map"      all edges of all children of one map

    A child in no window, which a stride may leave at the border, has no edges and no effect.
    Padding adds positions without children, so that windows at the border have fewer edges. For
    dynamic routing this is equivalent to children with zero poses; for EM, to children with
    activation 0.

    Args:
        height, width: height and width of the children's grid.
        child_maps, parent_maps: capsules at each position.
        kernel_size: rows and columns of a window.
        stride: rows, and columns, from one window to the next.
        padding: rows and columns of positions without children on every side.
        competition: `"image"`, `"window"` or `"map"`.

    Returns:
        A graph in the form of `routing_graph`, in child-major order.

    Raises:
        ValueError: sizes below 1, a negative padding or one that would leave windows without
            children, windows larger than the padded grid, another competition.

    >>> graph = conv_graph(14, 14, child_maps=32, parent_maps=32, kernel_size=3, stride=2)
    >>> graph.num_nodes("child"), graph.num_nodes("parent"), graph.num_edges()
    (6272, 1152, 331776)
    """
    for name, number in (
        ("height", height),
        ("width", width),
        ("child_maps", child_maps),
        ("parent_maps", parent_maps),
        ("kernel_size", kernel_size),
        ("stride", stride),
    ):
        check_at_least_1(name, number)
    if not 0 <= padding < kernel_size:
        raise ValueError(
            f"padding must be from 0 to kernel_size − 1, {kernel_size - 1}, so that no window is "
            f"without children; got {padding}"
        )
    if min(height, width) + 2 * padding < kernel_size:
        raise ValueError(
            f"a window of {kernel_size} rows and columns does not fit on a grid of "
            f"{height}×{width} with padding {padding}"
        )
    check_choice("competition", competition, COMPETITIONS)
    rows, columns = (grid_of_parents(n, kernel_size, stride, padding) for n in (height, width))
    with made_to_be_kept():
        sizes = (child_maps, height, width, kernel_size, kernel_size, parent_maps)
        i, y, x, dy, dx, j = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
        # the parent's row times the stride, and its column's
        top, left = y + padding - dy, x + padding - dx
        there = (top >= 0) & (top % stride == 0) & (top // stride < rows)
        there &= (left >= 0) & (left % stride == 0) & (left // stride < columns)
        i, y, x, dy, dx, j, top, left = (n[there] for n in (i, y, x, dy, dx, j, top, left))
        window = top // stride * columns + left // stride
        child = (i * height + y) * width + x
        competing: Tensor | None = None
        if competition == "window":
            competing = child * (rows * columns) + window
        elif competition == "map":
            competing = i
        return routing_graph(
            child,
            j * (rows * columns) + window,
            children=child_maps * height * width,
            parents=parent_maps * rows * columns,
            weight_index=((dy * kernel_size + dx) * child_maps + i) * parent_maps + j,
            parent_type=torch.arange(parent_maps).repeat_interleave(rows * columns),
            competition=competing,
        )


def grid_of_parents(size: int, kernel_size: int, stride: int, padding: int) -> int:
    """The number of windows along one axis of a grid."""
    return (size + 2 * padding - kernel_size) // stride + 1


class ConvCapsules(nn.Module):
    """Convolutional capsules: a grid of capsules routed to a grid of capsules.

    This is a `CapsuleLayer` on `conv_graph`; the poses of a child in several windows are not
    copied. Layers with activations take and return `Capsules`, so that they can be combined by
    `nn.Sequential`.

    With `coordinates`, votes contain the position of the child, which shared matrices cannot
    encode: its row and column, from 0 to 1, are added to the first two numbers of a vector, or to
    the last number of the first two rows of a matrix (Hinton et al. 2018, section 4.1).

    Args:
        height, width: height and width of the children's grid.
        child_maps, parent_maps: capsules at each position.
        child_dim: numbers in the pose of a child.
        parent_dim: numbers in the pose of a parent.
        kernel_size, stride, padding, competition: see `conv_graph`.
        coordinates: add the child's position to its votes.
        routing, rows, engine, device, dtype, options: see `CapsuleLayer`.

    Attributes:
        layer: the `CapsuleLayer`.
        height, width: height and width of the parents' grid.

    Raises:
        ValueError: as `conv_graph` and `CapsuleLayer`.

    >>> poses = dict(child_dim=16, parent_dim=16, rows=4)
    >>> net = nn.Sequential(
    ...     ConvCapsules(14, 14, 8, 4, kernel_size=3, stride=2, routing="em", **poses),
    ...     ConvCapsules(6, 6, 4, 2, kernel_size=3, routing="em", **poses),
    ... )
    >>> poses, activations = net(Capsules(torch.rand(5, 8, 14, 14, 16), torch.rand(5, 8, 14, 14)))
    >>> poses.shape, activations.shape
    (torch.Size([5, 2, 4, 4, 16]), torch.Size([5, 2, 4, 4]))
    """

    def __init__(
        self,
        height: int,
        width: int,
        child_maps: int,
        parent_maps: int,
        *,
        child_dim: int,
        parent_dim: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        competition: Competition = "image",
        coordinates: bool = False,
        routing: str | Routing = "dynamic",
        rows: int = 1,
        engine: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        graph = conv_graph(
            height, width, child_maps, parent_maps, kernel_size, stride, padding, competition
        )
        self.layer = CapsuleLayer(
            graph,
            child_dim,
            parent_dim,
            routing=routing,
            rows=rows,
            engine=engine,
            coordinates=places(height, width, child_maps) if coordinates else None,
            device=device,
            dtype=dtype,
            **options,
        )
        self.children_grid = (child_maps, height, width)
        self.height, self.width = (
            grid_of_parents(n, kernel_size, stride, padding) for n in (height, width)
        )

    def forward(self, u: Tensor | Capsules, a: Tensor | None = None) -> Tensor | Capsules:
        """Route a grid of capsules to the next.

        Args:
            u: poses, `[B, child_maps, height, width, child_dim]`, or `Capsules` of poses and
                activations.
            a: activations, `[B, child_maps, height, width]`, for a routing that has them; 1 if not
                given.

        Returns:
            Poses of the parents, `[B, parent_maps, height, width, parent_dim]`, on their grid; for
            a routing with activations, `Capsules`.

        Raises:
            ValueError: the capsules are on another grid, activations are given twice, or as
                `CapsuleLayer`.
        """
        if isinstance(u, Capsules):
            if a is not None:
                raise ValueError("got activations twice: in the capsules, and as a")
            u, a = u
        for name, x, dims in (("u", u, 5), ("a", a, 4)):
            if x is not None and (x.dim() != dims or x.shape[1:4] != self.children_grid):
                grid = ", ".join(map(str, self.children_grid))
                pose = ", child_dim" if name == "u" else ""
                raise ValueError(f"expected {name} as [batch, {grid}{pose}]; got {list(x.shape)}")
        found = self.layer(u.flatten(1, 3), None if a is None else a.flatten(1, 3))
        if isinstance(found, Capsules):
            return Capsules(*map(self._on_grid, found))
        return self._on_grid(found)

    def _on_grid(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.height, self.width))

    def extra_repr(self) -> str:
        """Sizes of both grids, for `print(layer)`."""
        maps, height, width = self.children_grid
        return f"{maps}×{height}×{width} to {self.layer.structure.parents} capsules"


def places(height: int, width: int, maps: int) -> Tensor:
    """The centre of each child's row and column, from 0 to 1, `[I, 2]`."""
    y, x = ((torch.arange(n) + 0.5) / n for n in (height, width))
    return torch.cartesian_prod(y, x).repeat(maps, 1)
