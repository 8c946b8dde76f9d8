"""The explorer that the live demo and the report share: a net's routing, drawn in a browser."""

import base64
import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from graphcaps.files import named_in_errors, remove_unfinished, write_whole
from graphcaps.nets.model import CapsNet, CapsNetConfig
from graphcaps.nets.verdict import LARGEST_ERROR, LENGTH_OF_PRESENT, has_verdict

SCRIPTS = (
    "numbers.js",
    "routings.js",
    "net.js",
    "equations.js",
    "verdict.js",
    "canvas.js",
    "explorer.js",
)
SHARED = files("graphcaps.explorer")


def fill(package: str, scripts: Sequence[str], data: str, *, note: str = "", **parts: str) -> str:
    """Fill the template `page.html` of a page with the explorer's parts, scripts and style.

    Args:
        package: where the template and the page's own scripts and `style.css` are.
        scripts: names of these scripts, in order.
        data: JSON that they read.
        note: HTML that is said of the decoder.
        parts: what else the template has places for.

    Returns:
        HTML that loads nothing from anywhere.
    """
    own = files(package)
    return Template(_text(own, "page.html")).substitute(
        style=_text(SHARED, "style.css") + _text(own, "style.css"),
        script="\n".join(
            [_text(SHARED, name) for name in SCRIPTS] + [_text(own, name) for name in scripts]
        ),
        data=data.replace("<", "\\u003c"),  # no text of a file can end the script element
        steps=_text(SHARED, "steps.html"),
        answer=_text(SHARED, "answer.html"),
        views=Template(_text(SHARED, "views.html")).substitute(note=note),
        **parts,
    )


def _text(folder: Any, name: str) -> str:
    return folder.joinpath(name).read_text(encoding="utf-8")


def geometry(config: CapsNetConfig, classes: tuple[str, ...]) -> dict[str, Any]:
    """What the explorer has to know of a net, as JSON has it.

    Args:
        config: sizes of the net.
        classes: names of its classes.
    """
    rows, columns = config.grid_size()
    return {
        "classes": list(classes),
        "labelsPerImage": config.labels_per_image,
        "hasVerdict": has_verdict(config),
        "image": dict(zip(("channels", "height", "width"), config.image_shape, strict=True)),
        "children": {"maps": config.child_maps, "rows": rows, "columns": columns},
        "field": {
            "side": config.receptive_field(),
            "step": config.field_stride(),
            "start": config.field_start(),
        },
        "thresholds": {"lengthOfPresent": LENGTH_OF_PRESENT, "largestError": LARGEST_ERROR},
    }


def pack_decoder(model: CapsNet) -> list[dict[str, Any]]:
    """The decoder's layers; none without a decoder."""
    if model.decoder is None:
        return []
    return [pack(layer) for layer in model.decoder.layers if isinstance(layer, torch.nn.Linear)]


def pack(layer: torch.nn.Linear | torch.nn.Conv2d) -> dict[str, Any]:
    """Weight, bias and options of a layer, as the function `unpack` of the scripts expects them."""
    packed: dict[str, Any] = {"weight": halves(layer.weight)}
    assert layer.bias is not None
    packed["bias"] = halves(layer.bias)
    if isinstance(layer, torch.nn.Conv2d):
        (kernel, _), (stride, _) = layer.kernel_size, layer.stride
        packed |= {"kernel": kernel, "stride": stride, "padding": int(layer.padding[0])}
        packed["groups"] = layer.groups
    return packed


def halves(numbers: Tensor) -> str:
    """Numbers in half precision, little-endian, in base64."""
    return base64_of(numbers.detach().cpu().float().numpy().astype("<f2").tobytes())


def base64_of(content: bytes) -> str:
    """Bytes as text."""
    return base64.b64encode(content).decode("ascii")


def write_page(page: str, output: Path) -> None:
    """Write a page whole, or leave what was there.

    Args:
        page: HTML.
        output: the file; its folder is made if it is not there. A link is followed, a device or a
            pipe is written into.

    Raises:
        ValueError: `output` cannot be a file.
        OSError: `output` cannot be written; what was there is untouched.
    """
    check_writable(output)
    content = page.encode(errors="backslashreplace")  # names of files need not be text
    if output.exists() and not output.is_file():
        with named_in_errors(output):
            output.write_bytes(content)
        return
    output = output.resolve()
    with named_in_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(output.parent)
    write_whole(output, content)


def check_writable(output: Path) -> None:
    """See whether a page can be written, before the work for it.

    Raises:
        ValueError: `output` cannot be a file.
        OSError: no permission, a name that is too long.
    """
    with named_in_errors(output):
        if output.is_dir():
            raise ValueError(f"expected the name of a file to write, got the folder {output}")
        if output.exists() and not output.is_file():
            return
        file = output.resolve()
        folder = next(parent for parent in file.parents if parent.exists())
        if not folder.is_dir():
            raise ValueError(f"{output} cannot be written: {folder} is not a folder")
        for name in file.relative_to(folder).parts:
            with suppress(FileNotFoundError):
                (folder / name).lstat()  # raises where the name is too long
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
