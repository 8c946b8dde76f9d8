"""The figures of a report's page with their words, in the order in which they are shown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor

from graphcaps.functional import multi_hot
from graphcaps.pictures import figures
from graphcaps.pictures.inspection import TWEAKS
from graphcaps.report.records import Example, Records
from graphcaps.routing import ROUTINGS

ROUNDING = 1e-6  # by which equal coupling may differ


@dataclass(frozen=True)
class Section:
    """A figure and the words around it, or words in its place."""

    title: str
    caption: str  # what is seen, in a sentence or two
    alt: str  # the same for those who do not see it
    figure: Figure | None


def sections(records: Records) -> list[Section]:
    """All figures of the page; a new one is added here.

    Args:
        records: what is known of the run.

    Returns:
        The figures with their words, in order.
    """
    return [
        *_of_training(records),
        *_of_routing(records),
        *_of_the_decoder(records),
        *_of_the_engines(records),
    ]


def _of_training(records: Records) -> list[Section]:
    classes, score = records.classes, records.score
    of_class, labels = one_label_each(score.lengths, score.labels)
    of_true = of_class.gather(1, labels[:, None]).median()
    routing = ROUTINGS[str(records.config.routing)]
    is_length = routing.length_is_activation and not routing.activations
    quantity = "length |v|" if is_length else "confidence"
    margins = (0.9, 0.1) if routing.loss == "margin" else ()
    aim = "above 0.9, all others below 0.1 (dashed)" if margins else "larger than all others"
    lengths = Section(
        "Lengths of the class capsules" if is_length else "Confidence in the classes",
        f"The {quantity} of the true class should be {aim}. Boxes hold half of the test images, "
        "whiskers 98 %.",
        f"Box plots for each class. The median for the true class is {of_true:.2f} over all test "
        "images.",
        figures.class_lengths(of_class, labels, classes, quantity=quantity, margins=margins),
    )
    epochs = [record for record in records.metrics if record.get("kind") == "epoch"]
    if not epochs:
        return [lengths]
    curves = Section(
        "Learning curves",
        "Loss and errors from step to step, on training images as they were shifted and on the "
        "validation set after each epoch.",
        f"Two charts over {epochs[-1]['step']:,} steps. Errors on the validation set go from "
        f"{1 - epochs[0]['holdout_accuracy']:.2%} to {1 - epochs[-1]['holdout_accuracy']:.2%}.",
        figures.learning_curves(records.metrics),
    )
    return [curves, lengths]


def _of_routing(records: Records) -> list[Section]:
    parents, shown = records.config.classes, records.examples[0]
    images = records.entropy.shape[1]
    shown_as = multi_hot(records.score.labels[:images], images, parents)
    of_image, labels = shown_as.nonzero().unbind(1)
    means = records.entropy.flatten(1).mean(dim=1)
    strongest = float(records.coupling.max())
    if strongest - float(records.coupling.min()) < ROUNDING:
        return [
            Section(
                "Coupling",
                f"Every child couples to all {parents} classes alike, by 1/{parents}, in every "
                "iteration, so that there is nothing to draw.",
                "",
                None,
            )
        ]
    return [
        Section(
            "Entropy of the coupling",
            f"How undecided the children are, over {images} test images: ln {parents} = "
            f"{math.log(parents):.4f} nats for one that couples to all classes alike, 0 for one "
            f"that has decided. The mean at the last iteration is {means[-1]:.4f}.",
            "Mean entropy by iteration: " + ", ".join(f"{mean:.4f}" for mean in means) + " nats.",
            figures.entropy_by_iteration(
                records.entropy[:, of_image], parents, labels, records.classes
            ),
        ),
        Section(
            "Coupling coefficients",
            f"The share of the edges by their coupling, for the same {images} images. All start "
            f"at 1/{parents}.",
            f"Histograms by iteration; the strongest coupling is {strongest:.2f}.",
            figures.coupling_histogram(records.coupling, parents),
        ),
        Section(
            "The strongest children",
            "The children of one image that couple most to any class, at the last iteration. "
            "Lines are as wide as the coupling.",
            f"A graph of {len(records.graph) - parents} children and {parents} classes for "
            f"{_named(shown, records)}.",
            figures.coupling_graph(records.graph, records.classes),
        ),
    ]


def _of_the_decoder(records: Records) -> list[Section]:
    if records.drawn is None or records.tweaked is None:
        return []
    shown = records.examples[0]
    return [
        Section(
            "Reconstructions",
            "The images above and what the decoder draws from the capsules of the predicted "
            "classes; wrong ones are framed.",
            f"{len(records.examples)} test images with their reconstructions.",
            figures.reconstructions(
                torch.stack([example.image for example in records.examples]) / 255,
                records.drawn,
                [_names(example.labels, records) for example in records.examples],
                [_names(sorted(example.predicted), records) for example in records.examples],
            ),
        ),
        Section(
            "Tweaked poses",
            f"Each dimension of the pose of {records.classes[shown.main]} moved by −0.25 to "
            "0.25, as in figure 4 of the paper.",
            f"A grid of reconstructions of {_named(shown, records)}, a row for each dimension.",
            figures.tweaked_poses(records.tweaked, TWEAKS),
        ),
    ]


def _of_the_engines(records: Records) -> list[Section]:
    if not records.differences:
        return []
    worst = max(max(units.values()) for units in records.differences.values())
    return [
        Section(
            "Engines against dense routing",
            "The largest differences of outputs and gradients from dense routing in float64, for "
            "dense routing in float32 and for each engine, on this net's class capsules.",
            f"No form differs by more than {worst:.1f} units of float32 rounding.",
            figures.differences(records.differences),
        )
    ]


def _named(example: Example, records: Records) -> str:
    return f"test image {example.number}, {_names(example.labels, records)}"


def _names(classes: Sequence[int], records: Records) -> str:
    return " + ".join(records.classes[k] for k in classes) or "none"


def one_label_each(lengths: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """An image with several true classes, once for each, the others' lengths set to 0.

    Args:
        lengths: of all class capsules, `[N, J]`.
        labels: `[N]`, or 0 and 1 in `[N, J]`.

    Returns:
        Lengths, and the true class of each row.

    >>> one_label_each(torch.tensor([[0.8, 0.7, 0.2]]), torch.tensor([[1, 1, 0]]))
    (tensor([[0.8000, 0.0000, 0.2000], [0.0000, 0.7000, 0.2000]]), tensor([0, 1]))
    """
    if labels.dim() == 1:
        return lengths, labels
    image, label = labels.nonzero().unbind(1)
    others = labels[image].bool().scatter(1, label[:, None], False)
    return lengths[image].masked_fill(others, 0), label
