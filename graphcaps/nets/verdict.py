"""Decides whether an image shows one class, two classes, or none that the net knows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphcaps.functional import multi_hot
from graphcaps.nets.model import CapsNet, CapsNetConfig, CapsNetOutput
from graphcaps.routing import ROUTINGS

LENGTH_OF_PRESENT = 0.5  # midway between the margins 0.1 and 0.9 of the loss
LARGEST_ERROR = 0.45  # of a reconstruction, relative to the squares of the image


@dataclass(frozen=True)
class Verdict:
    """The classes that an image shows.

    Attributes:
        classes: none, one or two classes, in ascending order.
        error: the error of the reconstruction, `Σ (x − x̂)² / Σ x²`; None without a decoder.
    """

    classes: tuple[int, ...]
    error: float | None

    def text(self, names: Sequence[str]) -> str:
        """The verdict in words.

        Args:
            names: names of all classes.

        >>> digits = "0123456789"
        >>> Verdict((7,), 0.1).text(digits), Verdict((4, 8), 0.2).text(digits)
        ('7', 'two digits, 4 and 8')
        >>> Verdict((), 0.8).text(digits), Verdict((), None).text(["cat", "dog"])
        ('no digit', 'no class')
        """
        kind = "digit" if all(name in set("0123456789") for name in names) else "class"
        if not self.classes:
            return f"no {kind}"
        if len(self.classes) == 1:
            return names[self.classes[0]]
        both = "two digits" if kind == "digit" else "two classes"
        return f"{both}, {names[self.classes[0]]} and {names[self.classes[1]]}"


def has_verdict(config: CapsNetConfig) -> bool:
    """Whether the thresholds of `judge` are valid for a net, which needs images of single digits.

    They do not hold for routings that are trained with the spread loss, whose activations of absent
    classes may be close to a half.

    >>> has_verdict(CapsNetConfig()), has_verdict(CapsNetConfig(image_kind="picture"))
    (True, False)
    >>> has_verdict(CapsNetConfig(routing="em"))
    False
    """
    if config.routing in ROUTINGS and ROUTINGS[config.routing].loss == "spread":
        return False
    return config.image_kind == "digit" and config.labels_per_image == 1


def judge(lengths: Tensor, image: Tensor, draw: Callable[[list[int]], Tensor] | None) -> Verdict:
    """Decide which classes an image shows from its class capsules and their reconstructions.

    A class is present if its capsule is at least `LENGTH_OF_PRESENT` long; of more than two such
    classes, the two longest count. The reconstructions of the present classes, combined by the
    pixelwise maximum, must resemble the image, `Σ (x − x̂)² ≤ LARGEST_ERROR · Σ x²`; otherwise the
    image shows no class. The reason is that capsules are long for many images that they cannot
    reconstruct (Frosst, Sabour & Hinton 2018, arXiv:1811.06969, detect adversarial images in this
    way). An image without ink shows no class.

    Args:
        lengths: lengths of the class capsules, `[J]`.
        image: in 0…1, `[C, H, W]`.
        draw: reconstructs the image from the capsules of n classes, `[n, C, H, W]`; None without a
            decoder.

    Returns:
        The verdict.

    >>> lengths, image = torch.tensor([0.1, 0.9, 0.6]), torch.ones(1, 2, 2)
    >>> judge(lengths, image, None).classes
    (1, 2)
    >>> judge(lengths, image, lambda classes: torch.zeros(len(classes), 1, 2, 2))
    Verdict(classes=(), error=1.0)
    """
    order = lengths.argsort(descending=True, stable=True).tolist()
    present = [j for j in order if lengths[j] >= LENGTH_OF_PRESENT][:2]
    error = None
    if draw is not None:
        drawn = draw(present or order[:1]).amax(dim=0)
        ink = float(image.double().square().sum())
        difference = float((image.double() - drawn.double()).square().sum())
        error = difference / ink if ink > 0 else float("inf")
    unlike = error is not None and not error <= LARGEST_ERROR
    return Verdict(() if unlike else tuple(sorted(present)), error)


@torch.no_grad()
def judge_images(model: CapsNet, output: CapsNetOutput, images: Tensor) -> list[Verdict]:
    """Decide which classes each image shows, see `judge`.

    Args:
        model: the net.
        output: its output for the images.
        images: in 0…1, `[B, C, H, W]`.

    Returns:
        A verdict for each image.

    >>> model = CapsNet.from_pretrained()
    >>> nothing = torch.zeros(1, 1, 28, 28)
    >>> judge_images(model, model(nothing), nothing)
    [Verdict(classes=(), error=inf)]
    """

    def drawn_from(poses: Tensor) -> Callable[[list[int]], Tensor] | None:
        decoder = model.decoder
        if decoder is None:
            return None

        def draw(classes: list[int]) -> Tensor:
            chosen = torch.tensor(classes, device=poses.device)
            masks = multi_hot(chosen, len(classes), len(poses))
            return decoder(poses.expand(len(classes), -1, -1), masks)

        return draw

    return [
        judge(lengths, image, drawn_from(poses))
        for lengths, image, poses in zip(output.lengths, images, output.poses, strict=True)
    ]
