"""The content of figures: the data in their artists, their titles and frames."""

import io
import math
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, StepPatch
from PIL import Image

import graphcaps as gc
from graphcaps.pictures import figures
from graphcaps.pictures.inspection import VoteMap


def traced(children=6, parents=3, iterations=3, samples=4):
    layer = gc.CapsuleLayer(gc.complete_graph(children, parents), 4, 5, iterations=iterations)
    with torch.no_grad():
        layer.weight.mul_(10)
        _, trace = layer(torch.randn(samples, children, 4), return_trace=True)
    return trace


def line(axes, label):
    (found,) = [x for x in axes.lines if x.get_label() == label]
    return found


def texts(axes):
    return [text.get_text() for text in axes.texts]


def frames(animation):
    picture = Image.open(io.BytesIO(figures.gif(animation)))
    return getattr(picture, "n_frames", 1)


def close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=1e-6)


def drawn(figure) -> np.ndarray:
    """Render a figure, which raises the errors of drawing."""
    assert isinstance(figure, Figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return np.asarray(Image.open(buffer).convert("L"))


def test_entropy_is_shown_with_mean_least_and_spread_over_the_children():
    entropy = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.2, 0.4], [0.6, 0.8]]])
    figure = figures.entropy_by_iteration(entropy, parents=3)
    (axes,) = figure.axes
    assert line(axes, "mean").get_xdata().tolist() == [1, 2]
    assert line(axes, "mean").get_ydata() == pytest.approx([1, 0.5])
    assert line(axes, "most decided child").get_ydata() == pytest.approx([1, 0.2])
    assert line(axes, "undecided: ln 3").get_ydata()[0] == pytest.approx(math.log(3))
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.2 + 0.05 * 0.6)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("iteration", "entropy of the coupling (nats)")
    drawn(figure)


def test_entropy_per_class_is_the_mean_over_the_images_of_the_class():
    entropy = torch.tensor([[[1.0], [2.0], [3.0]], [[0.5], [1.0], [2.0]]])
    labels = torch.tensor([4, 7, 4])
    figure = figures.entropy_by_iteration(entropy, 10, labels)
    table = figure.axes[1]
    cells = table.images[0].get_array()
    close(cells, np.array([[2.0, 1.25], [2.0, 1.0]]))
    assert texts(table) == ["2.000", "1.250", "2.000", "1.000"]
    assert [label.get_text() for label in table.get_yticklabels()] == ["4", "7"]
    drawn(figure)


def test_a_histogram_has_a_row_for_each_iteration_with_the_shares_of_the_edges():
    c = torch.tensor([[[0.5, 0.5, 0.5, 0.5]], [[0.05, 0.95, 1.0, 0.0]]])
    figure = figures.coupling_histogram(c, parents=2, bins=10)
    assert [texts(axes)[-1] for axes in figure.axes] == ["iteration 1", "iteration 2"]
    shares = [axes.patches[0].get_data().values for axes in figure.axes]
    assert shares[0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert shares[1].tolist() == [0.5, 0, 0, 0, 0, 0, 0, 0, 0, 0.5]
    assert figure.axes[0].lines[0].get_xdata() == [0.5, 0.5]
    assert "1/2" in texts(figure.axes[0])
    assert figure.axes[1].get_xlabel() == "coupling c"
    drawn(figure)


def test_the_histogram_moves_an_iteration_a_frame():
    c = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.15, 0.85]])
    animation = figures.coupling_histogram_animation(c, parents=2, bins=10)
    assert frames(animation) == 3
    animation._func(1)
    (axes,) = animation._fig.axes
    assert axes.get_title() == "Coupling at iteration 2 of 3"
    (stairs,) = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
    assert np.flatnonzero(stairs.get_data().values).tolist() == [2, 7]


def test_edges_of_the_graph_are_as_wide_as_their_coupling():
    trace = traced()
    graph = trace.networkx(sample=1, iteration=2)
    figure = figures.coupling_graph(graph, classes=("a", "b", "c"), title="six to three")
    (axes,) = figure.axes
    (lines,) = [x for x in axes.collections if isinstance(x, LineCollection)]
    width = {
        (round(float(start[0]), 6), round(float(end[0]), 6)): w
        for (start, end), w in zip(lines.get_segments(), lines.get_linewidths(), strict=True)
    }
    for edge, c in enumerate(trace.c[2, 1].tolist()):
        x = (round((edge // 3 + 0.5) / 6, 6), round((edge % 3 + 0.5) / 3, 6))
        assert width[x] == pytest.approx(0.2 + 4 * c)
    assert all(start[1] == 0 and end[1] == 1 for start, end in lines.get_segments())
    lengths = trace.v[2, 1].norm(dim=-1)
    for name, length in zip("abc", lengths, strict=True):
        assert f"{name}\n{length:.2f}" in texts(axes)
    assert (axes.get_title(), axes.get_xlabel()) == ("six to three", "children")
    drawn(figure)


def test_a_large_graph_is_drawn_by_groups_that_say_how_many_they_are():
    graph = traced(children=90).networkx(0, 2, groups=torch.arange(90) // 30)
    (axes,) = figures.coupling_graph(graph).axes
    assert axes.get_xlabel() == "groups of 30 children"
    (lines,) = [x for x in axes.collections if isinstance(x, LineCollection)]
    assert len(lines.get_segments()) == 9


def test_the_graph_moves_an_iteration_a_frame():
    trace = traced(iterations=4)
    graphs = [trace.networkx(0, r) for r in range(4)]
    animation = figures.coupling_graph_animation(graphs)
    assert frames(animation) == 4
    animation._func(3)
    (axes,) = animation._fig.axes
    assert axes.get_title() == "Coupling at iteration 4 of 4"
    (lines,) = [x for x in axes.collections if isinstance(x, LineCollection)]
    widest = 0.2 + 4 * float(trace.c[3, 0].max())
    assert max(lines.get_linewidths()) == pytest.approx(widest)


def test_votes_are_discs_at_the_centres_of_receptive_fields():
    votes = VoteMap(torch.tensor([[0.0, 1.0], [2.0, 4.0]]), stride=2, field=17)
    figure = figures.vote_maps(torch.rand(1, 28, 28), [votes], ["iteration 1"])
    axes, scale = figure.axes
    discs = axes.collections[0]
    assert discs.get_offsets().tolist() == [[8, 8], [10, 8], [8, 10], [10, 10]]
    assert discs.get_array().tolist() == [0, 1, 2, 4]
    sizes = discs.get_sizes()
    assert sizes / sizes[-1] == pytest.approx([0, 0.25, 0.5, 1])
    (frame,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert (*frame.get_xy(), frame.get_width()) == (1.5, 1.5, 17)
    assert scale.get_ylabel() == "coupling × length"
    drawn(figure)


def test_what_counts_against_a_class_is_hollow_and_as_large_as_its_amount():
    votes = VoteMap(torch.tensor([[-1.0, 1.0], [-2.0, 4.0]]), stride=2, field=17)
    figure = figures.vote_maps(torch.rand(1, 28, 28), [votes], [""])
    filled, hollow = figure.axes[0].collections
    assert (filled.get_sizes() / filled.get_sizes()[-1]).tolist() == [0, 0.25, 0, 1]
    assert hollow.get_offsets().tolist() == [[8, 8], [8, 10]]
    close(hollow.get_sizes(), filled.get_sizes()[-1] * np.array([0.25, 0.5]))
    assert len(hollow.get_facecolors()) == 0
    drawn(figure)


def test_a_map_without_votes_is_drawn_too():
    nothing = VoteMap(torch.zeros(2, 2), stride=2, field=17)
    drawn(figures.vote_maps(torch.zeros(3, 28, 28), [nothing], [""]))


def test_a_net_at_a_glance_goes_from_the_image_to_what_is_drawn():
    trace = traced()
    graphs = [trace.networkx(0, 0), trace.networkx(0, 2)]
    votes = VoteMap(torch.rand(2, 2), stride=2, field=17)
    image, redrawn = torch.rand(2, 1, 28, 28)
    figure = figures.at_a_glance(image, votes, graphs, redrawn, classes=("a", "b", "c"))
    first, before, after, last = figure.axes
    close(first.images[0].get_array(), image[0].numpy())
    assert before.get_title() == "coupling at the first iteration"
    assert after.get_title() == "coupling at the last iteration"
    longest = "abc"[int(trace.v[2, 0].norm(dim=-1).argmax())]
    assert last.get_title() == f"drawn from the pose of\nthe longest capsule, {longest}"
    close(last.images[0].get_array(), redrawn[0].numpy())
    drawn(figure)


def test_reconstructions_stand_below_their_images_and_wrong_ones_say_so():
    images, redrawn = torch.rand(2, 1, 28, 28), torch.rand(2, 1, 28, 28)
    figure = figures.reconstructions(images, redrawn, torch.tensor([3, 5]), torch.tensor([3, 6]))
    above, below = figure.axes[:2], figure.axes[2:]
    for n in range(2):
        close(above[n].images[0].get_array(), images[n, 0].numpy())
        close(below[n].images[0].get_array(), redrawn[n, 0].numpy())
    assert [axes.get_title() for axes in above] == ["is 3", "is 5"]
    assert [axes.get_xlabel() for axes in below] == ["read 3", "read 6\n(wrong)"]
    assert [axes.spines["top"].get_visible() for axes in below] == [False, True]
    drawn(figure)


def test_many_reconstructions_stand_in_rows_of_ten():
    images, labels = torch.rand(12, 1, 28, 28), torch.arange(12) % 10
    figure = figures.reconstructions(images, 1 - images, labels, labels)
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 24
    close(shown[20].images[0].get_array(), images[10, 0].numpy())
    close(shown[23].images[0].get_array(), 1 - images[11, 0].numpy())
    drawn(figure)


def test_capsules_are_drawn_beside_their_image_with_their_lengths():
    image, *redrawn = torch.rand(3, 1, 28, 28)
    figure = figures.drawn_capsules(image, torch.stack(redrawn), [0.9, 0.25], ["a", "b"])
    first, *others = figure.axes
    close(first.images[0].get_array(), image[0].numpy())
    assert [axes.get_title() for axes in others] == ["from capsule a", "from capsule b"]
    assert [axes.get_xlabel() for axes in others] == ["length 0.90", "length 0.25"]
    for axes, right in zip(others, redrawn, strict=True):
        close(axes.images[0].get_array(), right[0].numpy())
    drawn(figure)


def test_a_pose_by_change_marks_what_changes_most_and_the_longest_capsule():
    changes = [-1.0, 0.0, 2.0]
    poses = torch.zeros(3, 5)
    poses[:, 3], poses[:, 1], poses[:, 0] = torch.tensor([[0, 1, 2], [0, 0.5, 1], [0, 0.1, 0.2]])
    lengths = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.9, 0.1]])
    images, redrawn = torch.rand(2, 3, 1, 28, 28)
    figure = figures.pose_by_change(
        images, redrawn, poses, lengths, changes=changes, label="shift (pixels)"
    )
    *pictures, pose, length = figure.axes
    assert [axes.get_title() for axes in pictures[:3]] == ["-1", "0", "2"]
    close(pictures[5].images[0].get_array(), redrawn[2, 0].numpy())
    named = {x.get_label() for x in pose.lines if x.get_label().startswith("dim")}
    assert named == {"dimension 3", "dimension 1", "dimension 0"}
    assert line(pose, "dimension 3").get_ydata().tolist() == [0, 1, 2]
    close(line(length, "capsule 1").get_ydata(), [0.1, 0.8, 0.1])
    assert length.get_xlabel() == "shift (pixels)"
    drawn(figure)


def test_a_tweaked_pose_is_a_grid_of_dimensions_and_offsets():
    redrawn = torch.rand(3, 2, 1, 28, 28)
    figure = figures.tweaked_poses(redrawn, (-0.25, 0.25))
    (axes,) = figure.axes
    grid = axes.images[0].get_array()
    assert grid.shape == (3 * 28, 2 * 28)
    close(grid[28:56, 28:56], redrawn[1, 1, 0].numpy())
    assert [label.get_text() for label in axes.get_xticklabels()] == ["-0.25", "+0.25"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2"]
    drawn(figure)


def test_learning_curves_are_the_records_of_a_run():
    metrics = [
        {"kind": "step", "step": 20, "loss": 0.5},
        {"kind": "step", "step": 40, "loss": 0.3},
        {
            "kind": "epoch",
            "step": 50,
            "train_loss": 0.4,
            "holdout_loss": 0.2,
            "train_accuracy": 0.75,
            "holdout_accuracy": 0.875,
        },
    ]
    figure = figures.learning_curves(metrics)
    loss, errors = figure.axes
    close(line(loss, "training batches").get_ydata(), [0.5, 0.3])
    close(line(loss, "validation").get_ydata(), [0.2])
    close(line(errors, "validation").get_ydata(), [12.5])
    close(line(errors, "training, mean of the epoch").get_ydata(), [25])
    assert errors.get_ylabel() == "errors (% of the images)"
    drawn(figure)


def test_a_confusion_matrix_shows_counts_and_shades_errors_alone():
    counts = torch.tensor([[8, 2], [0, 5]])
    figure = figures.confusion_matrix(counts, ("cat", "dog"))
    axes = figure.axes[0]
    close(axes.images[0].get_array(), np.array([[0, 20], [0, 0]]))
    assert texts(axes) == ["8", "2", "5"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog"]
    drawn(figure)


def test_class_lengths_part_the_true_class_from_the_longest_other():
    lengths = torch.tensor([[0.9, 0.1, 0.2], [0.7, 0.3, 0.0], [0.4, 0.1, 0.8]])
    figure = figures.class_lengths(lengths, torch.tensor([0, 0, 2]))
    (axes,) = figure.axes
    medians = [x.get_ydata()[0] for x in axes.lines if x.get_color() in ("white", figures.INK)]
    assert pytest.approx(0.8) in medians
    assert pytest.approx(0.25) in medians
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "2"]
    drawn(figure)


def test_class_lengths_may_be_another_confidence():
    lengths = torch.tensor([[0.9, 0.1], [0.3, 0.7]])
    figure = figures.class_lengths(
        lengths, torch.tensor([0, 1]), quantity="confidence", margins=[0.5]
    )
    (axes,) = figure.axes
    dashed = [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert axes.get_ylabel() == "confidence"
    assert dashed == [0.5]
    drawn(figure)


def test_differences_have_a_row_for_each_form_and_a_mark_for_each_quantity():
    units = {"dense": {"v": 2.0, "gradient": 3.0}, "builtin": {"v": 1.0, "gradient": 4.0}}
    figure = figures.differences(units)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["dense", "builtin"]
    close(line(axes, "v").get_xdata(), [2, 1])
    close(line(axes, "gradient").get_xdata(), [3, 4])
    drawn(figure)


def test_differences_of_a_routing_with_many_parameters_are_all_shown():
    quantities = [f"gradient of routing.parameter_{n}" for n in range(9)]
    units = {form: dict.fromkeys(quantities, 1.0) for form in ("dense", "fused", "builtin")}
    figure = figures.differences(units)
    (axes,) = figure.axes
    assert len(axes.lines) == 9
    drawn(figure)
    assert axes.get_position().width > 0.7  # beside the names of the forms, below the legend
    legend = axes.get_legend().get_window_extent().transformed(figure.transFigure.inverted())
    assert legend.x1 <= 1 and legend.y1 <= 1


NAMES = (r"$\frac{$", "$x$, 5 $", "--><b>&", r"a\$b$", "nul \0 and \x1b[2J", "\udcff")
WITH_NAMES = {
    "entropy": lambda: figures.entropy_by_iteration(
        torch.rand(3, 6, 4), 6, torch.arange(6), classes=NAMES
    ),
    "graph": lambda: figures.coupling_graph(traced(parents=6).networkx(0, 2), NAMES),
    "reconstructions": lambda: figures.reconstructions(
        torch.rand(6, 1, 5, 5), torch.rand(6, 1, 5, 5), torch.arange(6), torch.arange(6), NAMES
    ),
    "confusion": lambda: figures.confusion_matrix(torch.eye(6, dtype=torch.int64), NAMES),
    "lengths": lambda: figures.class_lengths(torch.rand(6, 6), torch.arange(6), NAMES),
}


@pytest.mark.parametrize("make", WITH_NAMES.values(), ids=WITH_NAMES.keys())
@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_of_classes_are_drawn_as_they_are_and_are_no_formulas(make):
    svg = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        make().savefig(svg, format="svg")
    written = "".join(ElementTree.fromstring(svg.getvalue()).itertext())
    for name in (*NAMES[:4], "nul \ufffd and \ufffd[2J"):
        assert name in written


def test_drawing_leaves_pyplot_alone():
    import matplotlib.pyplot as plt

    figures.coupling_histogram(torch.rand(2, 5))
    assert plt.get_fignums() == []
