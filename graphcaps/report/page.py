"""The page of a report: one HTML text with all that it needs, all of a run's words escaped."""

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from graphcaps.explorer import base64_of, fill, geometry, halves
from graphcaps.report.records import Example, Records
from graphcaps.report.sections import Section
from graphcaps.routing import ROUTINGS, options_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_SVG = 400_000  # bytes of a figure
DECIMALS = 4  # of lengths and poses


def render(records: Records, sections: Sequence[Section]) -> str:
    """Fill the page's template.

    Args:
        records: what is known of the run.
        sections: figures, in order.

    Returns:
        HTML that loads nothing from anywhere.
    """
    return fill(
        "graphcaps.report",
        ("report.js",),
        json.dumps(explorer_data(records), separators=(",", ":")),
        note=_decoder_note(records),
        name=escape(records.name),
        lead=_lead(records),
        notice=_notice(records),
        figures="".join(_figure(section) for section in sections),
        shades=_shades(records),
        confusion=_confusion_table(records),
        epochs=_epochs_table(records),
        settings=_settings_tables(records),
    )


def explorer_data(records: Records) -> dict[str, Any]:
    """What the page's script works on: plain numbers, and long arrays as base64.

    Args:
        records: what is known of the run.

    Returns:
        Values that JSON has. Coupling, amounts and the decoder's weights are float16, images
        bytes.
    """
    config = records.config
    return {
        **geometry(config, records.classes),
        "routing": config.routing,
        "rounds": len(records.coupling),
        "decoder": [
            {"weight": halves(weight), "bias": halves(bias)} for weight, bias in records.decoder
        ],
        "examples": [_example(example) for example in records.examples],
    }


def _example(example: Example) -> dict[str, Any]:
    return {
        "number": example.number,
        "labels": example.labels,
        "predicted": example.predicted,
        "main": example.main,
        "image": base64_of(example.image.numpy().tobytes()),
        "poses": _rounded(example.poses),
        "lengths": _rounded(example.lengths),
        "coupling": halves(example.coupling),
        "amounts": halves(example.amounts),
    }


def _rounded(numbers: Tensor) -> Any:
    # through float64, whose shortest form has no digits beyond those asked for
    return np.round(numbers.double().numpy(), DECIMALS).tolist()


def rounding_error(records: Records) -> float:
    """How far the page's rounded weights and poses are from the net's.

    Args:
        records: of a net with a decoder.

    Returns:
        The largest difference of a pixel in the examples' reconstructions, in grey levels of 255.
    """
    rounded = [(weight.half().float(), bias.half().float()) for weight, bias in records.decoder]
    largest = 0.0
    for example in records.examples:
        masked = torch.zeros_like(example.poses)
        masked[:, example.main] = example.poses[:, example.main]
        exact = _decode(records.decoder, masked.flatten(1))
        here = _decode(rounded, masked.flatten(1).round(decimals=DECIMALS))
        largest = max(largest, 255 * float((exact - here).abs().max()))
    return largest


def _decode(layers: Sequence[tuple[Tensor, Tensor]], entering: Tensor) -> Tensor:
    (weight, bias), *others = layers
    image = torch.nn.functional.linear(entering, weight, bias)
    for weight, bias in others:
        image = torch.nn.functional.linear(image.relu(), weight, bias)
    return image.sigmoid()


def _decoder_note(records: Records) -> str:
    if not records.decoder:
        return ""
    return (
        "The decoder runs in this page, on rounded numbers: that changes no pixel of "
        f"these reconstructions by more than {max(rounding_error(records), 0.01):.2f} of 255 "
        "grey levels."
    )


def _lead(records: Records) -> str:
    images, errors = records.score.images, records.score.errors
    result = records.result or {}
    # another data set was named, or another device rounds otherwise
    differs = errors != result.get("test_errors", errors)
    tested = (
        f" The run's own test, in result.json, found {result['test_errors']:,} errors."
        if differs
        else ""
    )
    best = _best_epoch(records)
    weights = "" if best is None else f", weights of epoch {best}, the best on the validation set"
    found = (
        f" of {images:,} test images of {records.data} classified correctly: {errors:,} "
        f"{'error' if errors == 1 else 'errors'}. "
        f"{records.parameters:,} parameters, {_routing(records)}{weights}.{tested}"
    )
    return f"<strong>{records.score.accuracy:.2%}</strong>{escape(found)}"


def _routing(records: Records) -> str:
    config = records.config
    if config.routing in ROUTINGS and "iterations" not in options_of(config.routing):
        return f"{config.routing} routing"
    times = "iteration" if config.iterations == 1 else "iterations"
    return f"{config.iterations} {times} of {config.routing} routing"


def _notice(records: Records) -> str:
    if records.result is not None:
        return ""
    done = len(_epochs(records))
    planned = records.settings.get("recipe", {}).get("epochs", "?")
    how_far = f"{done} of {planned} epochs are done. What is shown is its best epoch so far."
    return f'<p class="notice"><strong>This run is not finished:</strong> {escape(how_far)}</p>'


def _figure(section: Section) -> str:
    title, caption = escape(section.title), escape(section.caption)
    if section.figure is None:
        return f'<div class="plate"><h3>{title}</h3><p>{caption}</p></div>\n'
    kind, image = _picture(section.figure)
    return (
        f'<figure class="plate"><h3>{title}</h3>'
        f'<div class="wide" role="region" aria-label="{title}" tabindex="0">'
        f'<img alt="{escape(section.alt)}" '
        f'src="data:image/{kind};base64,{base64_of(image)}"></div>'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _picture(figure: "Figure") -> tuple[str, bytes]:
    """A figure as lines that stay sharp, or as pixels where it has very many points."""
    svg = io.BytesIO()
    figure.savefig(svg, format="svg", bbox_inches="tight", metadata={"Date": None})
    if len(svg.getvalue()) <= LARGEST_SVG:
        return "svg+xml", svg.getvalue()
    png = io.BytesIO()
    figure.savefig(png, format="png", bbox_inches="tight", dpi=200)
    return "png", png.getvalue()


def _confusion_table(records: Records) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in records.classes)
    most = _most_mistakes(records)
    rows = []
    for true, counts in enumerate(records.score.confusion().tolist()):
        cells = "".join(
            _count(number, true == predicted, most) for predicted, number in enumerate(counts)
        )
        accuracy = f"{counts[true] / sum(counts):.2%}" if sum(counts) else "no image"
        rows.append(
            f'<tr><th scope="row">{escape(records.classes[true])}</th>{cells}'
            f"<td>{accuracy}</td></tr>"
        )
    return (
        '<table class="confusion"><thead><tr><th scope="col">true ↓ predicted →</th>'
        f'{head}<th scope="col">accuracy</th></tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _count(number: int, right: bool, most: int) -> str:
    if right:
        return f'<td class="right">{number:,}</td>'
    if not number:
        return '<td class="none">0</td>'
    return f'<td class="mistakes" style="--share:{number / most:.3f}">{number:,}</td>'


def _most_mistakes(records: Records) -> int:
    """How often the most frequent mistake was made."""
    counts = records.score.confusion()
    return int((counts - counts.diag().diag()).max())


def _shades(records: Records) -> str:
    most = _most_mistakes(records)
    if not most:
        return "There is no mistake."
    times = "once" if most == 1 else f"{most:,} times"
    return f"The more frequent a mistake, the darker its cell; the most frequent was made {times}."


def _epochs(records: Records) -> list[dict[str, Any]]:
    return [record for record in records.metrics if record.get("kind") == "epoch"]


def _best_epoch(records: Records) -> int | None:
    """The first of those with the highest validation accuracy, as training chooses it."""
    epochs = _epochs(records)
    if not epochs:
        return None
    return max(epochs, key=lambda record: record["holdout_accuracy"])["epoch"]


def _epochs_table(records: Records) -> str:
    epochs = _epochs(records)
    if not epochs:
        return "<p>The run's metrics.jsonl holds no epoch.</p>"
    best = _best_epoch(records)
    return _table(
        (
            "epoch",
            "training loss",
            "training accuracy",
            "validation loss",
            "validation accuracy",
            "best",
        ),
        (
            (
                str(record["epoch"]),
                f"{record['train_loss']:.4f}",
                f"{record['train_accuracy']:.2%}",
                f"{record['holdout_loss']:.4f}",
                f"{record['holdout_accuracy']:.2%}",
                "best" if record["epoch"] == best else "",
            )
            for record in epochs
        ),
    )


def _settings_tables(records: Records) -> str:
    parts = {name: part for name, part in records.settings.items() if isinstance(part, dict)}
    parts["net"] = asdict(records.config)
    if records.result is not None:
        parts["result"] = records.result
    return "".join(
        f"<table><caption>{escape(part)}</caption><tbody>"
        + "".join(
            f'<tr><th scope="row">{escape(name)}</th><td>{escape(_written(value))}</td></tr>'
            for name, value in values.items()
        )
        + "</tbody></table>"
        for part, values in parts.items()
    )


def _written(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{body}</tbody></table>"
