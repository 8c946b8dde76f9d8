"""Draw the README's figure of the pretrained net on one test digit.

python scripts/draw_readme_picture.py
"""

from pathlib import Path

import torch

from graphcaps import CapsNet
from graphcaps.data import load_dataset
from graphcaps.pictures import figures
from graphcaps.pictures.inspection import contribution_map
from graphcaps.training import as_input

HERE = Path(__file__).parent
CLASS = 4
CHILDREN_SHOWN = 14


@torch.no_grad()
def main() -> None:
    """Draw it."""
    model = CapsNet.from_pretrained("mnist-small")
    digits = load_dataset(str(HERE.parent / "tests" / "digits")).test
    image = as_input(digits.images[digits.labels == CLASS][:1], model)
    output, trace = model(image, return_trace=True)
    votes = contribution_map(trace.contributions()[-1, 0], CLASS, model.config)
    last = len(trace.c) - 1
    shown = trace.children_by_parent(0, last, trace.strongest_children(0, last, CHILDREN_SHOWN))
    graphs = [trace.networkx(0, iteration, children=shown) for iteration in (0, last)]
    figure = figures.at_a_glance(image[0], votes, graphs, output.reconstruction[0])
    figure.savefig(HERE.parent / "notebooks" / "at_a_glance.png", dpi=120)


if __name__ == "__main__":
    main()
