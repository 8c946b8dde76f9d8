"""Draw the README's figures: a pretrained net on one test digit, another on overlapping digits.

python scripts/draw_readme_picture.py
"""

from pathlib import Path

import torch
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from graphcaps import CapsNet
from graphcaps.data import load_dataset
from graphcaps.demo import shipped_gallery
from graphcaps.pictures import figures
from graphcaps.pictures.inspection import contribution_map
from graphcaps.training import as_input

HERE = Path(__file__).parent
CLASS = 4
CHILDREN_SHOWN = 14
PAIRS_SHOWN = 10
COLORS = ("#b35806", "#542788")


def main() -> None:
    """Draw them."""
    notebooks = HERE.parent / "notebooks"
    at_a_glance().savefig(notebooks / "at_a_glance.png", dpi=120)
    overlapping().savefig(notebooks / "overlapping.png", dpi=120)


@torch.no_grad()
def at_a_glance() -> Figure:
    """One digit in the whole net."""
    model = CapsNet.from_pretrained("mnist-small")
    digits = load_dataset(str(HERE.parent / "tests" / "digits")).test
    image = as_input(digits.images[digits.labels == CLASS][:1], model)
    output, trace = model(image, return_trace=True)
    votes = contribution_map(trace.contributions()[-1, 0], CLASS, model.config)
    last = len(trace.c) - 1
    shown = trace.children_by_parent(0, last, trace.strongest_children(0, last, CHILDREN_SHOWN))
    graphs = [trace.networkx(0, iteration, children=shown) for iteration in (0, last)]
    return figures.at_a_glance(image[0], votes, graphs, output.reconstruction[0])


@torch.no_grad()
def overlapping() -> Figure:
    """The first test images of MultiMNIST, and what the capsules of both classes draw."""
    model = CapsNet.from_pretrained("multi-mnist-efficient")
    images = as_input(shipped_gallery("multi-mnist-efficient").images[:PAIRS_SHOWN], model)
    assert model.decoder is not None
    output = model(images)
    predicted = model.classify(output.lengths)
    figure = Figure(figsize=(PAIRS_SHOWN, 3.2), layout="constrained")
    rows = figure.subplots(3, PAIRS_SHOWN)
    for n, (above, *below) in enumerate(rows.T):
        above.imshow(images[n, 0], cmap="gray_r", vmin=0, vmax=1)
        for axes, k, color in zip(
            below, predicted[n].nonzero().flatten().tolist(), COLORS, strict=True
        ):
            drawn = model.decoder(output.poses[[n]], torch.eye(model.config.classes)[k : k + 1])
            ink = LinearSegmentedColormap.from_list("ink", ["white", color])
            axes.imshow(drawn[0, 0], cmap=ink, vmin=0, vmax=1)
            axes.set_title(str(k), fontsize=10, color=color)
    for axes in rows.flat:
        axes.set_axis_off()
    return figure


if __name__ == "__main__":
    main()
