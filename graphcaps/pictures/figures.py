"""Matplotlib figures of routing, reconstructions and training; none of them runs a net.

Every function returns a `Figure` or an animation, and does not use pyplot and its global state.
Save a figure with `figure.savefig(path)`; `gif(animation)` encodes an animation. Darker means more,
in a single hue that keeps its order in greyscale and for colour-blind readers.
"""

import math
import tempfile
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import networkx
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from graphcaps.pictures.inspection import VoteMap

AMOUNT = colormaps["Blues"]  # light for little, dark for much
INK, PALE, ACCENT = "#222222", "#9a9a9a", "#08306b"
AGAINST = "#5e3c99"  # of negative amounts, which are also drawn hollow
FRAMES_PER_SECOND = 1
MOST_LABELLED_CHILDREN = 40
IMAGES_IN_A_ROW = 10
SHARE_BELOW_ALL = 1e-12  # where bars on a logarithmic axis start


def entropy_by_iteration(
    entropy: Tensor, parents: int, labels: Tensor | None = None, classes: Sequence[str] = ()
) -> Figure:
    """Entropy of the children's coupling at each iteration.

    Args:
        entropy: of each child's coupling, in nats, `[R, B, I]`, as `Trace.entropy` gives it.
        parents: J; ln J is the entropy of a child that does not decide.
        labels: the class of each sample, `[B]`; adds a second panel with one row for each class.
        classes: their names; numbers if not given.

    Returns:
        Mean, range of 90 % of the children, and minimum; with labels, also the mean per class.
    """
    rounds = np.arange(1, len(entropy) + 1)
    per_child = _numbers(entropy.flatten(1))
    low, high = np.quantile(per_child, [0.05, 0.95], axis=1)
    figure = _figure(10 if labels is not None else 5.5, 4)
    axes, *others = figure.subplots(1, 1 if labels is None else 2, squeeze=False)[0]
    axes.axhline(math.log(parents), color=PALE, linestyle="--", label=f"undecided: ln {parents}")
    axes.fill_between(rounds, low, high, color=PALE, alpha=0.35, label="90 % of the children")
    axes.plot(rounds, per_child.mean(axis=1), "o-", color=ACCENT, label="mean")
    axes.plot(rounds, per_child.min(axis=1), "v:", color=INK, label="most decided child")
    axes.set(
        xlabel="iteration",
        ylabel="entropy of the coupling (nats)",
        ylim=(0, 1.05 * math.log(parents)),
        title="How undecided children are",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    if labels is not None:
        present = labels.unique()
        means = torch.stack([entropy[:, labels == k].mean(dim=(1, 2)) for k in present])
        names = [_name(classes, k) for k in present.tolist()]
        _table(others[0], means, "{:.3f}", "mean entropy (nats)", math.log(parents))
        others[0].set_xticks(range(len(rounds)), rounds)
        others[0].set_yticks(range(len(names)), names)
        others[0].set(xlabel="iteration", ylabel="class of the image", title="The same per class")
    return figure


def coupling_histogram(c: Tensor, parents: int | None = None, bins: int = 25) -> Figure:
    """Histogram of the coupling coefficients, with one row for each iteration.

    Args:
        c: coupling, `[R, ...]`.
        parents: J, to mark the initial coupling 1/J; not marked if not given.
        bins: number of bins from 0 to 1.

    Returns:
        Fraction of the edges by their coupling, on a logarithmic axis.
    """
    shares, edges = coupling_shares(c, bins)
    figure = _figure(6.5, 0.8 * len(shares) + 1)
    rows = figure.subplots(len(shares), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for number, (axes, share) in enumerate(zip(rows, shares, strict=True), start=1):
        axes.stairs(share, edges, fill=True, color=ACCENT, baseline=SHARE_BELOW_ALL)
        _mark_equal_coupling(axes, parents, named=number == 1)
        axes.annotate(
            f"iteration {number}", (0.99, 0.95), xycoords="axes fraction", ha="right", va="top"
        )
        _name_histogram(axes, shares)
        axes.set(xlabel="", ylabel="")
    rows[-1].set_xlabel("coupling c")
    figure.supylabel("share of the edges", size="medium")
    return figure


def coupling_histogram_animation(
    c: Tensor, parents: int | None = None, bins: int = 25
) -> FuncAnimation:
    """Histogram of the coupling coefficients, animated with one frame for each iteration.

    Args:
        c: coupling, `[R, ...]`.
        parents: J, to mark 1/J; not marked if not given.
        bins: number of bins from 0 to 1.

    Returns:
        An animation of R frames.
    """
    shares, edges = coupling_shares(c, bins)
    figure = _figure(6.5, 4)
    axes = figure.subplots()
    stairs = axes.stairs(shares[0], edges, fill=True, color=ACCENT, baseline=SHARE_BELOW_ALL)
    _mark_equal_coupling(axes, parents)
    _name_histogram(axes, shares)

    def draw(number: int) -> list[Any]:
        stairs.set_data(shares[number])
        axes.set_title(f"Coupling at iteration {number + 1} of {len(shares)}")
        return [stairs]

    return _animation(figure, draw, len(shares))


def coupling_graph(
    graph: networkx.MultiGraph, classes: Sequence[str] = (), title: str = ""
) -> Figure:
    """Coupling graph: children below, parents above; edges are wide and dark for strong coupling.

    Order the children by `Trace.children_by_parent`, so that few edges cross.

    Args:
        graph: one sample at one iteration, from `Trace.networkx`, which can group the children of
            large graphs.
        classes: names of the parents; numbers if not given.
        title: title above the graph.

    Returns:
        The graph; the area of a parent shows its length |v|.
    """
    figure, axes = _graph_axes(graph)
    _draw_graph(axes, graph, classes, title)
    return figure


def coupling_graph_animation(
    graphs: Sequence[networkx.MultiGraph], classes: Sequence[str] = ()
) -> FuncAnimation:
    """Coupling graph, animated with one frame for each iteration.

    Args:
        graphs: one sample's graph at every iteration, from `Trace.networkx`.
        classes: names of the parents; numbers if not given.

    Returns:
        An animation with a frame for each graph.
    """
    figure, axes = _graph_axes(graphs[0])

    def draw(number: int) -> list[Any]:
        axes.clear()
        title = f"Coupling at iteration {number + 1} of {len(graphs)}"
        return _draw_graph(axes, graphs[number], classes, title)

    return _animation(figure, draw, len(graphs))


def vote_maps(
    image: Tensor,
    maps: Sequence[VoteMap],
    titles: Sequence[str],
    label: str = "coupling × length",
) -> Figure:
    """Map of the positions in an image from which the votes for a class come.

    Args:
        image: in 0…1, `[C, H, W]`.
        maps: one for each panel, all on the same scale.
        titles: titles of the panels.
        label: label of the quantity that the maps show.

    Returns:
        The image with a disc at the centre of each position's receptive field. Its area and
        darkness show the amount, summed over the position's children; negative ones are hollow. A
        frame shows the receptive field of the strongest position.
    """
    most = max(float(votes.amount.max()) for votes in maps) or 1.0
    figure = _figure(2.6 * len(maps) + 1, 3)
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    for axes, votes, title in zip(panels, maps, titles, strict=True):
        discs = _draw_votes(axes, image, votes, most)
        axes.set_title(title)
    figure.colorbar(discs, ax=panels, label=label, shrink=0.8)
    return figure


def at_a_glance(
    image: Tensor,
    votes: VoteMap,
    graphs: Sequence[networkx.MultiGraph],
    drawn: Tensor,
    classes: Sequence[str] = (),
) -> Figure:
    """One image in the whole net: the positions that carry it, the routing, the reconstruction.

    Args:
        image: in 0…1, `[C, H, W]`.
        votes: contributions to the longest class capsule, see `contribution_map`.
        graphs: the coupling at the iterations to show, from `Trace.networkx`.
        drawn: the reconstruction, `[C, H, W]`.
        classes: names of the parents; numbers if not given.

    Returns:
        A panel for the image, one for each graph, and one for the reconstruction.
    """
    figure = _figure(5 + 3.6 * len(graphs), 3.4)
    widths = [2.2, *[3.6] * len(graphs), 2.2]
    first, *middle, last = figure.subplots(1, len(widths), width_ratios=widths)
    _draw_votes(first, image, votes, float(votes.amount.max()) or 1.0)
    carried = float(votes.amount.sum())
    first.set(title=f"an image, and who carries\nits capsule, |s| = {carried:.2f}")
    for number, (axes, graph) in enumerate(zip(middle, graphs, strict=True)):
        when = "first" if number == 0 else "last" if number == len(graphs) - 1 else "a later"
        _draw_graph(axes, graph, classes, f"coupling at the {when} iteration")
    lengths = [length for _, length in graphs[-1].nodes(data="length") if length is not None]
    winner = int(np.argmax(lengths))
    _show(last, drawn)
    name = _name(classes, winner)
    last.set(title=f"drawn from the pose of\nthe longest capsule, {name}")
    return figure


def reconstructions(
    images: Tensor,
    drawn: Tensor,
    labels: Tensor | Sequence[str],
    predicted: Tensor | Sequence[str],
    classes: Sequence[str] = (),
) -> Figure:
    """Images above the reconstructions from the capsules of their predicted classes.

    Args:
        images: in 0…1, `[N, C, H, W]`.
        drawn: reconstructions, of the same shape.
        labels: true classes, `[N]`, or strings to show instead.
        predicted: predicted classes, `[N]`, or strings to show instead.
        classes: their names; numbers if not given.

    Returns:
        Pairs of rows of up to ten columns; errors are framed and marked.
    """
    columns = min(len(images), IMAGES_IN_A_ROW)
    pairs = math.ceil(len(images) / columns)
    figure = _figure(max(4, 1.1 * columns), 3 * pairs)
    panels = figure.subplots(2 * pairs, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    named = [
        [_name(classes, k) for k in given.tolist()] if isinstance(given, Tensor) else given
        for given in (labels, predicted)
    ]
    for number, (true, seen) in enumerate(zip(*named, strict=True)):
        pair, column = divmod(number, columns)
        above, below = panels[2 * pair : 2 * pair + 2, column]
        _show(above, images[number])
        _show(below, drawn[number])
        wrong = true != seen
        above.set_title(f"is {true}")
        below.set_xlabel(f"read {seen}" + ("\n(wrong)" if wrong else ""))
        for side in below.spines.values():
            side.set(visible=wrong, linewidth=2, color=INK)
        if column == 0:
            above.set_ylabel("image")
            below.set_ylabel("reconstruction")
    return figure


def drawn_capsules(
    image: Tensor, drawn: Tensor, lengths: Sequence[float], names: Sequence[str]
) -> Figure:
    """An image beside the reconstructions from several of its class capsules.

    Args:
        image: in 0…1, `[C, H, W]`.
        drawn: reconstructions, `[N, C, H, W]`.
        lengths: lengths of the capsules, `[N]`.
        names: names of their classes, `[N]`.

    Returns:
        A panel for the image and one for each capsule.
    """
    figure = _figure(1.9 * (len(drawn) + 1), 2.4)
    first, *others = figure.subplots(1, len(drawn) + 1)
    _show(first, image)
    first.set_title("image")
    for axes, one, length, name in zip(others, drawn, lengths, names, strict=True):
        _show(axes, one)
        axes.set_title(f"from capsule {_name(names, names.index(name))}")
        axes.set_xlabel(f"length {length:.2f}")
    return figure


def pose_by_change(
    images: Tensor,
    drawn: Tensor,
    poses: Tensor,
    lengths: Tensor,
    *,
    changes: Sequence[float],
    label: str,
) -> Figure:
    """Pose, length and reconstruction of a capsule while its object is transformed.

    Args:
        images: the transformed object, in 0…1, `[N, C, H, W]`.
        drawn: reconstructions from the capsule, `[N, C, H, W]`.
        poses: poses of the capsule, `[N, D]`.
        lengths: lengths of all class capsules, `[N, J]`.
        changes: parameter of the transformation, such as an angle, for each image, `[N]`.
        label: name and unit of that parameter.

    Returns:
        Images above reconstructions; the dimensions of the pose, with those that change most in
        colour; and the lengths, with that of the longest capsule at the change nearest to 0 in
        colour.
    """
    count = len(images)
    figure = _figure(0.9 * count + 1, 6.4)
    parts = figure.subfigures(3, 1, squeeze=False, height_ratios=[2.2, 2.6, 2])
    above, middle, below = parts[:, 0]
    rows = above.subplots(2, count)
    for column in range(count):
        for row, shown in enumerate((images, drawn)):
            _show(rows[row, column], shown[column])
        rows[0, column].set_title(f"{changes[column]:g}")
    rows[0, 0].set_ylabel("image")
    rows[1, 0].set_ylabel("drawn")
    axes = middle.subplots()
    pose = _numbers(poses)
    spread = pose.max(axis=0) - pose.min(axis=0)
    for rank, d in enumerate(np.argsort(spread)):
        weakest_named = pose.shape[1] - 3
        style: dict[str, Any] = dict(color=PALE, linewidth=0.7, alpha=0.6)
        if rank >= weakest_named:
            shade = AMOUNT(0.5 + 0.25 * (rank - weakest_named))
            style = dict(color=shade, linewidth=2, label=f"dimension {d}")
        axes.plot(changes, pose[:, d], **style)
    axes.set_ylabel("pose")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes = below.subplots()
    values = _numbers(lengths)
    middle_column = int(np.abs(np.asarray(changes)).argmin())
    winner = int(values[middle_column].argmax())
    for j in range(values.shape[1]):
        if j != winner:
            axes.plot(changes, values[:, j], color=PALE, linewidth=0.7)
    axes.plot(changes, values[:, winner], color=ACCENT, label=f"capsule {winner}")
    axes.set(xlabel=label, ylabel="length |v|", ylim=(0, 1))
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def tweaked_poses(drawn: Tensor, offsets: Sequence[float]) -> Figure:
    """The effect of each dimension of a pose: Sabour et al. 2017, figure 4.

    Args:
        drawn: reconstructions, a row per dimension and a column per offset, `[D, T, C, H, W]`.
        offsets: the numbers that were added to each dimension, `[T]`.

    Returns:
        A grid of D by T images.
    """
    rows, columns = drawn.shape[:2]
    figure = _figure(0.62 * columns + 0.8, 0.62 * rows + 0.8)
    axes = figure.subplots()
    size = drawn.shape[-1]
    grid = drawn.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # [D·H, T·W, C]
    axes.imshow(_numbers(grid), cmap="gray_r", vmin=0, vmax=1)
    axes.set_xticks([(t + 0.5) * size for t in range(columns)], [f"{x:+.2f}" for x in offsets])
    axes.set_yticks([(d + 0.5) * size for d in range(rows)], [str(d) for d in range(rows)])
    axes.tick_params(length=0)
    axes.set(xlabel="added to the dimension", ylabel="dimension of the pose")
    for number in range(1, columns):
        axes.axvline(number * size, color="white", linewidth=1.5)
    for number in range(1, rows):
        axes.axhline(number * size, color="white", linewidth=1.5)
    return figure


def learning_curves(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Learning curves: loss and error rate of a training run by step.

    Args:
        metrics: the records of a run's metrics.jsonl, see `RunFolder.metrics`.

    Returns:
        Loss on the left, error rate in percent on the right; lines for the training set, dots for
        the validation set after every epoch.
    """
    steps = [record for record in metrics if record["kind"] == "step"]
    epochs = [record for record in metrics if record["kind"] == "epoch"]
    figure = _figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    left.plot(
        [r["step"] for r in steps],
        [r["loss"] for r in steps],
        color=PALE,
        linewidth=0.8,
        label="training batches",
    )
    at = [r["step"] for r in epochs]
    for axes, name, scale in ((left, "loss", 1), (right, "accuracy", 100)):
        for part, marker, color in (("train", "s--", PALE), ("holdout", "o-", ACCENT)):
            values = [r[f"{part}_{name}"] for r in epochs]
            shown = values if name == "loss" else [scale * (1 - value) for value in values]
            said = "validation" if part == "holdout" else "training, mean of the epoch"
            axes.plot(at, shown, marker, color=color, markeredgecolor=INK, label=said)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("training step")
    left.set(ylabel="loss per image", title="Loss")
    right.set(ylabel="errors (% of the images)", title="Errors")
    right.legend(frameon=False)
    left.legend(frameon=False)
    return figure


def confusion_matrix(counts: Tensor, classes: Sequence[str] = ()) -> Figure:
    """Confusion matrix of true and predicted classes.

    Args:
        counts: images of each true class (row) predicted as each class (column), `[J, J]`.
        classes: their names; numbers if not given.

    Returns:
        The counts, with errors shaded by their share of the row; the diagonal is not shaded.
    """
    names = [_name(classes, k) for k in range(len(counts))]
    share = counts.double() / counts.sum(dim=1, keepdim=True).clamp(min=1)
    off_diagonal = share * (1 - torch.eye(len(counts), dtype=share.dtype))
    figure = _figure(0.55 * len(names) + 2, 0.5 * len(names) + 1.4)
    axes = figure.subplots()
    picture = axes.imshow(100 * _numbers(off_diagonal), cmap=AMOUNT, vmin=0)
    half = float(off_diagonal.max()) / 2
    for row in range(len(names)):
        for column in range(len(names)):
            count = int(counts[row, column])
            if count:
                dark = bool(off_diagonal[row, column] > half)
                axes.text(
                    column, row, str(count), ha="center", va="center", size=8,
                    color="white" if dark else INK,
                )  # fmt: skip
    axes.set_xticks(range(len(names)), names, rotation=0 if max(map(len, names)) < 3 else 90)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="read as", ylabel="true class")
    figure.colorbar(picture, ax=axes, label="errors (% of the row)", shrink=0.8)
    return figure


def class_lengths(
    lengths: Tensor,
    labels: Tensor,
    classes: Sequence[str] = (),
    *,
    quantity: str = "length |v|",
    margins: Sequence[float] = (0.9, 0.1),
) -> Figure:
    """Lengths of the capsule of the true class and of the longest other capsule.

    Args:
        lengths: lengths of the class capsules, or another confidence in the classes, `[N, J]`.
        labels: true classes, `[N]`.
        classes: their names; numbers if not given.
        quantity: what `lengths` are, for the axis.
        margins: drawn as dashed lines; by default those of the margin loss.

    Returns:
        Two boxes per class: quartiles, with whiskers over 98 % of the images.
    """
    present = labels.unique().tolist()
    of_true = lengths.gather(1, labels[:, None])[:, 0]
    others = lengths.scatter(1, labels[:, None], -1).amax(dim=1)
    figure = _figure(0.8 * len(present) + 2, 3.8)
    axes = figure.subplots()
    for values, name, color, shift in (
        (of_true, "of the true class", ACCENT, -0.18),
        (others, "largest of the others", PALE, 0.18),
    ):
        boxes = axes.boxplot(
            [_numbers(values[labels == k]) for k in present],
            positions=[x + shift for x in range(len(present))],
            widths=0.3,
            whis=(1, 99),
            showfliers=False,
            patch_artist=True,
            medianprops=dict(color="white" if color == ACCENT else INK),
        )
        for box in boxes["boxes"]:
            box.set(facecolor=color, edgecolor=INK)
        boxes["boxes"][0].set_label(name)
    for margin in margins:
        axes.axhline(margin, color=INK, linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(present)), [_name(classes, k) for k in present])
    axes.set(xlabel="class of the image", ylabel=quantity, ylim=(0, 1))
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def differences(units: Mapping[str, Mapping[str, float]]) -> Figure:
    """Differences between each form in float32 and dense routing in float64.

    Args:
        units: for each form, the largest difference of the output and of each gradient, in units of
            float32 rounding, from `inspection.differences_from_dense`.

    Returns:
        A row for each form with a mark for each quantity.
    """
    forms = list(units)
    quantities = list(units[forms[0]])
    columns = 3 if len(quantities) < 4 else 2  # "gradient of …" is long
    figure = _figure(7, 0.5 * len(units) + 1.4 + 0.2 * math.ceil(len(quantities) / columns))
    axes = figure.subplots()
    for number, (quantity, marker) in enumerate(zip(quantities, cycle("osD^vP*X"))):
        axes.plot(
            [units[form][quantity] for form in forms],
            [row + 0.12 * (number - (len(quantities) - 1) / 2) for row in range(len(forms))],
            marker,
            color=AMOUNT(0.35 + 0.65 * number / max(1, len(quantities) - 1)),
            markeredgecolor=INK,
            label=quantity,
        )
    axes.set_yticks(range(len(forms)), forms)
    axes.invert_yaxis()
    axes.set(
        xlim=(0, None),
        xlabel="largest difference from float64 (in 2⁻²³ of the largest value)",
    )
    axes.grid(axis="x", color="#e5e5e5")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, ncols=columns, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def gif(animation: FuncAnimation) -> bytes:
    """Encode an animation as a looping GIF; returns the bytes of the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "animation.gif"
        writer = PillowWriter(fps=FRAMES_PER_SECOND)
        animation.save(path, writer=writer, dpi=80)
        return path.read_bytes()


def coupling_shares(c: Tensor, bins: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The fraction of the edges in each bin from 0 to 1, for each iteration, and the bin edges.

    >>> shares, edges = coupling_shares(torch.tensor([[0.1, 0.2, 0.9, 1.0]]), bins=2)
    >>> shares[0].tolist(), edges.tolist()
    ([0.5, 0.5], [0.0, 0.5, 1.0])
    """
    edges = np.linspace(0, 1, bins + 1)
    counts = [np.histogram(_numbers(one).clip(0, 1), edges)[0] for one in c.flatten(1)]
    return [count / count.sum() for count in counts], edges


def _figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    return Figure(figsize=(width, height), layout="constrained", dpi=100)


def _animation(figure: Figure, draw: Any, frames: int) -> FuncAnimation:
    interval = 1000 / FRAMES_PER_SECOND  # milliseconds
    return FuncAnimation(figure, draw, frames, interval=interval, init_func=lambda: draw(0))


def _name(classes: Sequence[str], number: int) -> str:
    """The name of a class for matplotlib, with $ escaped and missing glyphs replaced."""
    name = classes[number] if classes else str(number)
    return "".join(c if c.isprintable() else "\ufffd" for c in name).replace("$", r"\$")


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().cpu().numpy()


def _mark_equal_coupling(axes: Axes, parents: int | None, *, named: bool = True) -> None:
    if parents is None:
        return
    axes.axvline(1 / parents, color=PALE, linestyle=":")
    if named:
        place = (1 / parents, 1.02)
        axes.annotate(
            f"1/{parents}", place, xycoords=("data", "axes fraction"), ha="center", size=9
        )


def _name_histogram(axes: Axes, shares: Sequence[np.ndarray]) -> None:
    least = min(share[share > 0].min() for share in shares)
    axes.set(
        xlabel="coupling c",
        ylabel="share of the edges",
        xlim=(0, 1),
        yscale="log",
        ylim=(least / 2, 1.5),
    )


def _show(axes: Axes, image: Tensor, *, dimmed: bool = False) -> None:
    """Show an image without ticks: one channel dark on light, three channels in colour."""
    pixels = _numbers(image.permute(1, 2, 0))
    axes.imshow(pixels, cmap="gray_r", vmin=0, vmax=3 if dimmed else 1)
    axes.set(xticks=[], yticks=[])
    axes.set_axis_on()
    axes.spines[:].set_visible(dimmed)


def _draw_votes(axes: Axes, image: Tensor, votes: VoteMap, most: float) -> PathCollection:
    """Draw discs over the image, and a frame around the strongest receptive field.

    The largest disc stands for `most`; negative amounts are hollow.
    """
    _show(axes, image, dimmed=True)
    amount = _numbers(votes.amount.flatten())
    row, column = (_numbers(centre) for centre in votes.centres())
    discs = axes.scatter(
        column,
        row,
        s=150 * amount.clip(0) / most,
        c=amount,
        cmap=AMOUNT,
        vmin=0,
        vmax=most,
        edgecolors="white",
        linewidths=0.6,
    )
    against = amount < 0
    axes.scatter(
        column[against],
        row[against],
        s=-150 * amount[against] / most,
        facecolors="none",
        edgecolors=AGAINST,
        linewidths=1,
    )
    strongest, side = amount.argmax(), votes.field
    corner = (column[strongest] - side / 2, row[strongest] - side / 2)
    axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=ACCENT, linestyle="--"))
    return discs


def _table(axes: Axes, values: Tensor, form: str, label: str, most: float) -> None:
    """Draw a table of numbers in cells that are shaded from 0 to `most`."""
    cells = _numbers(values)
    picture = axes.imshow(cells, cmap=AMOUNT, aspect="auto", vmin=0, vmax=most)
    middle = most / 2
    for (row, column), value in np.ndenumerate(cells):
        color = "white" if value > middle else INK
        axes.text(column, row, form.format(value), ha="center", va="center", color=color, size=8)
    assert axes.figure is not None
    axes.figure.colorbar(picture, ax=axes, label=label)


def _graph_axes(graph: networkx.MultiGraph) -> tuple[Figure, Axes]:
    widest = max(sum(1 for kind, _ in graph if kind == side) for side in ("child", "parent"))
    figure = _figure(min(12, max(5, 0.4 * widest)), 4.2)
    return figure, figure.subplots()


def _draw_graph(
    axes: Axes, graph: networkx.MultiGraph, classes: Sequence[str], title: str
) -> list[Any]:
    place = graph.nodes(data="pos")
    edges = sorted(graph.edges(data="weight"), key=lambda edge: edge[2])  # strong ones on top
    weights = np.array([weight for *_, weight in edges])
    lines = LineCollection(
        [(place[child], place[parent]) for child, parent, _ in edges],
        linewidths=0.2 + 4 * weights,
        colors=AMOUNT(weights),
        zorder=1,
    )
    axes.add_collection(lines)
    children = [node for node in graph if node[0] == "child"]
    parents = [node for node in graph if node[0] == "parent"]
    lengths = np.array([graph.nodes[node]["length"] for node in parents])
    axes.scatter(*_columns(place, children), s=25, color=INK, zorder=2)
    discs = axes.scatter(
        *_columns(place, parents),
        s=40 + 360 * lengths,
        color="white",
        edgecolors=INK,
        zorder=2,
    )
    for (_, j), length in zip(parents, lengths, strict=True):
        name = _name(classes, j)
        axes.annotate(
            f"{name}\n{length:.2f}",
            place["parent", j],
            (0, 13),
            textcoords="offset points",
            ha="center",
            size=9,
        )
    if len(children) <= MOST_LABELLED_CHILDREN:
        for _, i in children:
            axes.annotate(
                str(i), place["child", i], (0, -14), textcoords="offset points", ha="center", size=8
            )
    size = graph.nodes[children[0]]["size"]
    below = "children" if size == 1 else f"groups of {size} children"
    axes.set(xlim=(0, 1), ylim=(-0.15, 1.45), xticks=[], title=title, xlabel=below)
    axes.set_yticks([])
    axes.text(
        0.5, 1, "parents and their lengths |v|", transform=axes.transAxes, ha="center", va="top"
    )
    axes.spines[:].set_visible(False)
    return [lines, discs]


def _columns(place: Mapping[Any, tuple[float, float]], nodes: Sequence[Any]) -> tuple[list, list]:
    return [place[node][0] for node in nodes], [place[node][1] for node in nodes]
