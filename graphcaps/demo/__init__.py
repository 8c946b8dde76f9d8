"""The live demo: a trained net in one HTML file, to draw a digit and watch it being routed."""

import io
import json
import math
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from graphcaps.data.splits import Dataset, shift
from graphcaps.explorer import (
    base64_of,
    check_writable,
    fill,
    geometry,
    halves,
    pack,
    pack_decoder,
    write_page,
)
from graphcaps.nets.model import PRETRAINED, CapsNet, CapsNetConfig
from graphcaps.routing import options_of
from graphcaps.training.evaluation import as_input, evaluate, fitted

ROUTED = (  # the routings that the page's script knows
    "dynamic",
    "uniform",
    "attention",
    "self_attention",
    "em",
    "variational_bayes",
    "self_routing",
)
NAMES = {  # where a routing is written in another way than it is chosen
    "self_attention": "self-attention",
    "self_routing": "self-routing",
    "variational_bayes": "variational Bayes",
}
COMPARED = ("dynamic", "uniform")  # these can be tried on the votes of every net
OPTIONS = ("final_inverse_temperature", "min_variance", "alpha0", "kappa0", "psi0", "nu0")
MOST_ITERATIONS = 10  # that the page shows
LAYERS = ("hidden", "shared")  # fields of a configuration whose defaults the page's script needs
IMAGES = 1000  # of the test set that the page holds
MISTAKES = 40  # at most, from anywhere in the test set
APART = ((-4, -1), (4, 1))  # where two digits lie at first, pixels right and down
TRIED = 10  # images, of which the two are chosen that the net sees best together
IN_A_ROW = 25  # images of the sheet in which they are packed


@dataclass(frozen=True)
class Gallery:
    """Test images that come with a page.

    Attributes:
        images: uint8 `[N, C, H, W]`.
        labels: true classes, `[N]`, or 0 and 1 for every class, `[N, J]`.
        numbers: their places in the test set, `[N]`.
        mistakes: which of them the net gets wrong, bool `[N]`.
    """

    images: Tensor
    labels: Tensor
    numbers: Tensor
    mistakes: Tensor


def shipped_gallery(name: str = "mnist-small") -> Gallery:
    """The first images of the test set and all that the net gets wrong, as they ship with it.

    Args:
        name: of the net, see `CapsNet.from_pretrained`.

    >>> len(shipped_gallery().images) > 1000
    True
    """
    return Gallery(**safetensors.torch.load_file(PRETRAINED / name / "gallery.safetensors"))


def gallery_of(model: CapsNet, data: Dataset, images: int = IMAGES) -> Gallery:
    """The first test images of a data set, and those of all that the net gets wrong.

    Args:
        model: the net.
        data: what it was trained on; all test images are evaluated.
        images: how many of the first images.

    Raises:
        ValueError: images or classes that are not those of the net.
    """
    data = fitted(data, model)
    score = evaluate(model, data.test)
    wrong = score.wrong
    chosen = torch.zeros_like(wrong)
    chosen[:images] = True
    chosen[wrong.nonzero().flatten()[:MISTAKES]] = True
    numbers = chosen.nonzero().flatten()
    return Gallery(data.test.images[numbers], score.labels[numbers], numbers, wrong[numbers])


def render(model: CapsNet, classes: tuple[str, ...], gallery: Gallery, name: str) -> str:
    """The page.

    Args:
        model: with a routing that the page knows.
        classes: names of its classes.
        gallery: images to try it on.
        name: of the net, for the title.

    Returns:
        HTML that loads nothing from anywhere.

    Raises:
        ValueError: a net with another routing.
    """
    check_routed(model)
    digits = all(name in set("0123456789") for name in classes)
    drawn = {1: "a digit", 2: "two digits"}.get(model.config.labels_per_image, "digits")
    return fill(
        "graphcaps.demo",
        ("drawing.js", "demo.js"),
        json.dumps(page_data(model, classes, gallery), separators=(",", ":")),
        name=escape(name),
        digit="digit" if digits else "image",
        what=drawn if digits else "an image",
        children=f"{model.config.capsule_maps * math.prod(model.config.grid_size()):,}",
        classes=str(len(classes)),
        trained=_trained(model),
        routing=_in_words(str(model.config.routing)),
        routings=_choices(model.config),
    )


def _trained(model: CapsNet) -> str:
    config = model.config
    routing = _in_words(str(config.routing))
    if "iterations" not in options_of(str(config.routing)):
        return f"{routing}, which has no iterations: all are the same"
    times = "iteration" if config.iterations == 1 else "iterations"
    return f"{config.iterations} {times} of {routing}; here are up to {MOST_ITERATIONS}"


def _choices(config: CapsNetConfig) -> str:
    """Radio buttons of the routings."""
    return "\n".join(
        f'<label><input type="radio" name="routing" value="{name}"> {NAMES.get(name, name)}</label>'
        for name in _routings(config)
    )


def _routings(config: CapsNetConfig) -> list[str]:
    """Those that the page offers, the net's own first."""
    return list(dict.fromkeys([str(config.routing), *COMPARED]))


def _in_words(routing: str) -> str:
    name = NAMES.get(routing, routing)
    return name if name.endswith("routing") else f"{name} routing"


def page_data(model: CapsNet, classes: tuple[str, ...], gallery: Gallery) -> dict[str, Any]:
    """What the page's script works on: plain numbers, and weights in half precision as base64.

    Args:
        model: the net.
        classes: names of its classes.
        gallery: images to try it on.

    Returns:
        Values that JSON has.
    """
    weights = {
        name: halves(tensor)
        for name, tensor in model.state_dict().items()
        if name.startswith(("capsules.", "score."))
    }
    routing = model.capsules.routing
    mistakes = gallery.mistakes.nonzero().flatten()
    return {
        **geometry(model.config, classes),
        "config": asdict(model.config),
        "net": {
            "encoder": _pack_encoder(model.conv),
            "primary": pack(model.primary.conv),
            "decoder": pack_decoder(model),
            "weights": weights,
        },
        "options": {name: getattr(routing, name) for name in OPTIONS if hasattr(routing, name)},
        "routings": _routings(model.config),
        "rounds": MOST_ITERATIONS,
        "gallery": {
            "sheet": base64_of(_sheet(gallery.images)),
            "columns": IN_A_ROW,
            "numbers": gallery.numbers.tolist(),
            "labels": _class_lists(gallery.labels),
            "mistakes": mistakes.tolist(),
            "predicted": _predicted(model, gallery.images[mistakes]),
            "pair": _pair(model, gallery),
            "apart": APART,
        },
    }


def check_routed(model: CapsNet) -> None:
    """See whether the page can compute what a net does.

    Raises:
        ValueError: it cannot.
    """
    model.check_can_be_loaded_again()  # an encoder of one's own, for example, could not
    config, plain = model.config, CapsNetConfig()
    other = [name for name in LAYERS if getattr(config, name) != getattr(plain, name)]
    other += ["image_size"] if isinstance(config.image_size, tuple) else []
    if config.routing is None:
        raise ValueError("the demo shows the routing of capsules, and this net has none")
    if other:
        raise ValueError(
            "the demo computes nets of one layer of routed capsules on square images; this one "
            f"differs in {', '.join(other)}: look inside it with graphcaps report"
        )
    if config.routing not in ROUTED:
        raise ValueError(
            f"the demo knows the routings {', '.join(ROUTED)}, and this net was trained with "
            f"{config.routing}: look inside it with graphcaps report"
        )


def write_demo(
    model: CapsNet, classes: tuple[str, ...], gallery: Gallery, output: Path, name: str
) -> None:
    """Write the page, see `render`.

    Args:
        model, classes, gallery, name: as for `render`.
        output: the file; its folder is made if it is not there.

    Raises:
        ValueError: a net with another routing, or `output` cannot be a file.
        OSError: `output` cannot be written; what was there is untouched.
    """
    write_page(render(model, classes, gallery, name), output)


def _pack_encoder(encoder: torch.nn.Module) -> list[dict[str, Any]]:
    """Convolutions, each with scale and shift of its batch normalisation, if it has one."""
    packed: list[dict[str, Any]] = []
    for layer in encoder.children():
        if isinstance(layer, torch.nn.Conv2d):
            packed.append(pack(layer))
        elif isinstance(layer, torch.nn.BatchNorm2d):
            mean, variance = layer.running_mean, layer.running_var
            assert mean is not None and variance is not None
            scale = layer.weight * (variance + layer.eps).rsqrt()
            packed[-1] |= {"scale": scale.tolist(), "shift": (layer.bias - mean * scale).tolist()}
    return packed


def _class_lists(labels: Tensor) -> list[list[int]]:
    """The classes of each image, from the class of each, or 0 and 1 for every class."""
    if labels.dim() == 1:
        return labels[:, None].tolist()
    return [row.nonzero().flatten().tolist() for row in labels]


@torch.no_grad()
def _predicted(model: CapsNet, images: Tensor) -> list[list[int]]:
    """The predicted classes of some images."""
    if not len(images):
        return []
    return _class_lists(model.classify(model(as_input(images, model)).lengths))


@torch.no_grad()
def _pair(model: CapsNet, gallery: Gallery) -> tuple[int, int]:
    """Two images of different classes, the ones that the net sees best when they overlap.

    The first image twice, if there are none, or if images show several classes already.
    """
    if gallery.labels.dim() > 1:
        return 0, 0
    few = [n for n in range(len(gallery.labels)) if not gallery.mistakes[n]][:TRIED]
    pairs = [(a, b) for a in few for b in few if gallery.labels[a] != gallery.labels[b]]
    if not pairs:
        return 0, 0
    shifts = [torch.tensor([(down, right)]) for right, down in APART]
    moved = [{n: shift(gallery.images[n][None], by) for n in few} for by in shifts]
    over = torch.cat([torch.maximum(moved[0][a], moved[1][b]) for a, b in pairs])
    lengths = model(as_input(over, model)).lengths
    both = gallery.labels[torch.tensor(pairs)]
    shorter = lengths.gather(1, both).amin(dim=1)
    return pairs[int(shorter.argmax())]


def _sheet(images: Tensor) -> bytes:
    """All images in one PNG, row by row."""
    count, channels, size, _ = images.shape
    rows = -(-count // IN_A_ROW)
    sheet = torch.zeros(rows * IN_A_ROW, channels, size, size, dtype=torch.uint8)
    sheet[:count] = images
    tiles = sheet.view(rows, IN_A_ROW, channels, size, size).permute(0, 3, 1, 4, 2)
    pixels = tiles.reshape(rows * size, IN_A_ROW * size, channels).squeeze(-1)
    png = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(png, "PNG", optimize=True)
    return png.getvalue()


__all__ = [
    "Gallery",
    "check_routed",
    "check_writable",
    "gallery_of",
    "page_data",
    "render",
    "shipped_gallery",
    "write_demo",
]
