"""Record the README's animation of the live demo in a headless Chromium.

python scripts/record_demo.py
"""

import io
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tyro
from PIL import Image

from graphcaps import CapsNet
from graphcaps.demo import shipped_gallery, write_demo

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

from browser import Page, find_chromium  # noqa: E402

WIDTH, HEIGHT = 1100, 915  # of the window, in pixels
MILLISECONDS = 60  # per frame
STEP = 900  # milliseconds per iteration
LAST = 2500  # milliseconds of the last frame
LARGEST = 1_500_000  # bytes
COLOURS = 128
ITERATIONS = 3  # of the net that ships
STEPS = 7  # positions of the pen between two points

# the part of the page that is recorded, without the panels between drawing and routing
LEFT_OUT = (
    ".gallery, #routing-title, #trained, header, #said, .panels figcaption, .coupling .choice"
)
# strokes on a sheet of 280 × 280 units
FOUR = (
    ((168, 38), (138, 82), (104, 126), (76, 164), (118, 167), (170, 165), (224, 162)),
    ((176, 98), (173, 150), (170, 200), (167, 246)),
)


@dataclass(frozen=True)
class Options:
    """Draw a digit in the demo and record it as an animation."""

    output: Path = HERE.parent / "notebooks" / "demo.gif"
    """The file to write."""


def main() -> None:
    """Write the animation and print its size."""
    options = tyro.cli(Options)
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("no chromium on PATH")
    page = Page(chromium)
    try:
        with tempfile.TemporaryDirectory() as folder:
            demo = Path(folder) / "demo.html"
            names = tuple("0123456789")
            write_demo(CapsNet.from_pretrained(), names, shipped_gallery(), demo, "mnist-small")
            page.open(demo, WIDTH, HEIGHT)
            frames = record(page)
    finally:
        page.close()
    save(frames, options.output)
    size = options.output.stat().st_size
    print(f"{options.output}: {len(frames)} frames, {size / 1e6:.2f} MB")
    if size > LARGEST:
        raise SystemExit(f"expected at most {LARGEST / 1e6:.1f} MB")


def record(page: Page) -> list[tuple[Image.Image, int]]:
    """Draw the strokes, then step through the iterations; return frames and their durations."""
    page.run(
        "new Promise(done => { const look = () => 'ready' in document.documentElement.dataset"
        " ? done() : setTimeout(look, 10); look() })"
    )
    page.run("document.getElementById('clear').click()")
    page.run(
        f"document.querySelectorAll({LEFT_OUT!r}).forEach(part => part.style.display = 'none');"
        "document.body.style.padding = '1rem 2rem'"
    )
    left, top, width = page.run(
        "(() => { const box = document.getElementById('sheet').getBoundingClientRect();"
        " return [box.left, box.top, box.width] })()"
    )
    frames = [(frame(page), STEP)]
    for stroke in FOUR:
        points = [
            (
                left + width / 280 * (x + (to_x - x) * step / STEPS),
                top + width / 280 * (y + (to_y - y) * step / STEPS),
            )
            for (x, y), (to_x, to_y) in pairwise(stroke)
            for step in range(STEPS)
        ]
        mouse(page, "mousePressed", points[0])
        for point in points[1:]:
            mouse(page, "mouseMoved", point)
            frames.append((frame(page), MILLISECONDS))
        mouse(page, "mouseReleased", points[-1])
    for iteration in range(1, ITERATIONS + 1):
        page.run(f"graphcaps.explorer.chooseIteration({iteration - 1})")
        frames.append((frame(page), STEP if iteration < ITERATIONS else LAST))
    return frames


def mouse(page: Page, kind: str, place: tuple[float, float]) -> None:
    """Send an event of the left button."""
    page.call(
        "Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", buttons=1
    )


def frame(page: Page) -> Image.Image:
    """Take a screenshot once the drawing has been routed."""
    page.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")


def save(frames: list[tuple[Image.Image, int]], output: Path) -> None:
    """Write frames as a GIF with a single palette."""
    palette = frames[-1][0].quantize(COLOURS)
    first, *others = [
        image.quantize(palette=palette, dither=Image.Dither.NONE) for image, _ in frames
    ]
    durations = [milliseconds for _, milliseconds in frames]
    first.save(
        output, save_all=True, append_images=others, duration=durations, loop=0, optimize=True
    )


if __name__ == "__main__":
    main()
