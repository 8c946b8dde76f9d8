"""`read_digit` on digits with many kinds of paper and ink, and `read_item`."""

import itertools
import os
import resource
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

import graphcaps as gc
from graphcaps.data.datasets import load_dataset
from graphcaps.data.images import read_digit, read_item
from graphcaps.demo import shipped_gallery

DIGITS = load_dataset(str(Path(__file__).parent / "digits")).test.images[:20, 0].numpy()
WIDTH, HEIGHT = 280, 200


def draw(digit: np.ndarray, scale: int = 6, left: int = 80, top: int = 12) -> np.ndarray:
    """Amount of ink, 0 to 1, on a sheet with a digit enlarged by `scale`."""
    side = 28 * scale
    large = Image.fromarray(digit).resize((side, side), Image.Resampling.BICUBIC)
    sheet = np.zeros((HEIGHT, WIDTH))
    sheet[top : top + side, left : left + side] = np.asarray(large) / 255
    return sheet


def mix(ink: np.ndarray, dark: tuple[int, ...], paper: tuple[int, ...]) -> Image.Image:
    colours = np.array(paper) + ink[..., None] * (np.array(dark) - np.array(paper))
    return Image.fromarray(colours.round().astype(np.uint8))


def photograph(ink: np.ndarray) -> Image.Image:
    """Grey ink on grainy paper that is darker towards the right."""
    grain = np.random.default_rng(0).normal(0, 10, ink.shape)
    light = 220 - np.linspace(0, 30, WIDTH) - 130 * ink + grain
    return Image.fromarray(light.clip(0, 255).round().astype(np.uint8))


def black_on_white(ink: np.ndarray) -> Image.Image:
    return mix(ink, (0, 0, 0), (255, 255, 255)).convert("L")


def white_on_black(ink: np.ndarray) -> Image.Image:
    return ImageOps.invert(black_on_white(ink))


def see_through(ink: np.ndarray, colour: int) -> Image.Image:
    """Ink of one grey level on a transparent background."""
    alpha = Image.fromarray((255 * ink).round().astype(np.uint8))
    return Image.merge("LA", (Image.new("L", alpha.size, colour), alpha)).convert("RGBA")


def cut_out(ink: np.ndarray) -> Image.Image:
    """Grey paper cropped to the digit."""
    rows, columns = ink.any(1).nonzero()[0], ink.any(0).nonzero()[0]
    sheet = mix(ink, (30, 30, 30), (150, 150, 150))
    return sheet.crop((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


SHEETS = {
    "black on white": (lambda digit: black_on_white(draw(digit)), "png", {}),
    "white on black": (lambda digit: white_on_black(draw(digit)), "png", {}),
    "jpeg": (lambda digit: black_on_white(draw(digit)), "jpg", {"quality": 60}),
    "blue on yellow": (
        lambda digit: mix(draw(digit), (20, 30, 120), (240, 220, 170)),
        "jpg",
        {"quality": 60},
    ),
    "pencil": (lambda digit: mix(draw(digit), (120,) * 3, (170, 165, 160)), "jpg", {"quality": 60}),
    "a photograph": (lambda digit: photograph(draw(digit)), "jpg", {"quality": 60}),
    "small in a corner": (lambda digit: black_on_white(draw(digit, 2, 5, 140)), "png", {}),
    "cut out closely": (lambda digit: cut_out(draw(digit)), "png", {}),
    "black on nothing": (lambda digit: see_through(draw(digit), 0), "png", {}),
    "white on nothing": (lambda digit: see_through(draw(digit), 255), "png", {}),
    "a palette": (lambda digit: black_on_white(draw(digit)).quantize(16), "png", {}),
    "black or white": (lambda digit: black_on_white(draw(digit)).convert("1"), "png", {}),
    "dark on light, 28 x 28": (lambda digit: Image.fromarray(255 - digit), "png", {}),
}


@pytest.mark.parametrize(("sheet", "suffix", "options"), SHEETS.values(), ids=SHEETS.keys())
def test_a_digit_drawn_on_any_paper_comes_back_as_it_was(tmp_path, sheet, suffix, options):
    path = tmp_path / f"digit.{suffix}"
    alike, alike_nearby = [], []
    for digit in DIGITS:
        sheet(digit).save(path, **options)
        found = read_digit(path)[0].numpy()
        alike.append(likeness(found, digit))
        # Where the centre of mass lies half-way between two pixels, either is right.
        moves = itertools.product((-1, 0, 1), repeat=2)
        alike_nearby.append(max(likeness(np.roll(found, move, (0, 1)), digit) for move in moves))
    assert np.mean(alike) > 0.9
    assert min(alike_nearby) > 0.9


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
def test_a_digit_of_mnist_saved_as_png_comes_back_bit_for_bit(tmp_path, mode):
    for digit in DIGITS:
        Image.fromarray(digit).convert(mode).save(tmp_path / "digit.png")
        found = read_digit(tmp_path / "digit.png")
        assert found.dtype == torch.uint8 and found.shape == (1, 28, 28)
        assert np.array_equal(found[0], digit)


def test_black_on_white_and_white_on_black_are_read_alike(tmp_path):
    black_on_white(draw(DIGITS[0])).save(tmp_path / "black.png")
    white_on_black(draw(DIGITS[0])).save(tmp_path / "white.png")
    assert torch.equal(read_digit(tmp_path / "black.png"), read_digit(tmp_path / "white.png"))


@pytest.mark.parametrize(("ink", "unseen"), [(0, 255), (255, 0)])
def test_the_colour_of_pixels_that_are_not_visible_does_not_matter(tmp_path, ink, unseen):
    amount = draw(DIGITS[0])
    see_through(amount, ink).save(tmp_path / "plain.png")
    sheet = np.asarray(see_through(amount, ink)).copy()
    sheet[sheet[..., 3] == 0, :3] = unseen
    Image.fromarray(sheet).save(tmp_path / "unseen.png")
    found = read_digit(tmp_path / "unseen.png")
    assert torch.equal(found, read_digit(tmp_path / "plain.png"))
    assert likeness(found[0].numpy(), DIGITS[0]) > 0.9


def test_it_does_not_matter_where_on_the_sheet_a_digit_stands(tmp_path):
    for name, left, top in [("here", 20, 20), ("there", 120, 60)]:
        black_on_white(draw(DIGITS[1], 4, left, top)).save(tmp_path / f"{name}.png")
    assert torch.equal(read_digit(tmp_path / "here.png"), read_digit(tmp_path / "there.png"))


def test_a_photograph_taken_sideways_is_turned_upright(tmp_path):
    upright = black_on_white(draw(DIGITS[2]))
    upright.save(tmp_path / "upright.png")
    sideways = Image.Exif()
    sideways[0x0112] = 6  # the orientation: turn by 90 degrees clockwise to see it upright
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "turned.png", exif=sideways)
    turned.save(tmp_path / "lying.png")
    digit = read_digit(tmp_path / "upright.png")
    assert torch.equal(read_digit(tmp_path / "turned.png"), digit)
    assert not torch.equal(read_digit(tmp_path / "lying.png"), digit)


@pytest.mark.parametrize("highest", [65535, 4095])
def test_the_levels_beyond_8_bits_are_not_cut_off(tmp_path, highest):
    ink = draw(DIGITS[3])
    deep = Image.fromarray((highest * (1 - ink)).round().astype(np.uint16))
    deep.save(tmp_path / "deep.png")
    assert Image.open(tmp_path / "deep.png").mode.startswith("I")
    black_on_white(ink).save(tmp_path / "plain.png")
    found, expected = (read_digit(tmp_path / f"{name}.png")[0] for name in ("deep", "plain"))
    assert likeness(found.numpy(), expected.numpy()) > 0.99


def draw_shape(path: Path, *boxes: tuple[int, int, int, int], grey: int = 0) -> Path:
    """Rectangles on white paper: left, top, right and bottom, all within."""
    sheet = Image.new("L", (WIDTH, HEIGHT), 255)
    for box in boxes:
        ImageDraw.Draw(sheet).rectangle(box, fill=grey)
    sheet.save(path)
    return path


def test_the_longer_side_becomes_20_pixels_and_the_proportions_stay(tmp_path):
    # 40 by 100 pixels at a fifth are 8 by 20, and 20 is the longest side in MNIST.
    high = read_digit(draw_shape(tmp_path / "high.png", (30, 50, 69, 149)))[0] > 127
    wide = read_digit(draw_shape(tmp_path / "wide.png", (30, 50, 129, 89)))[0] > 127
    for length, breadth in [(high.any(1), high.any(0)), (wide.any(0), wide.any(1))]:
        assert length.nonzero().flatten().tolist() == list(range(4, 24))
        assert breadth.nonzero().flatten().tolist() == list(range(10, 18))


def test_the_centre_of_mass_comes_to_the_centre(tmp_path):
    corner = draw_shape(tmp_path / "corner.png", (50, 20, 79, 179), (50, 150, 209, 179))
    found = read_digit(corner)[0].double()
    place = torch.arange(28.0, dtype=torch.float64)
    for axis in (0, 1):
        centre = (found.sum(1 - axis) * place).sum() / found.sum()
        # All of MNIST's own lie here, on both axes.
        assert 13.5 <= centre < 14.5


def test_a_shape_whose_centre_of_mass_is_far_out_stays_within_the_image(tmp_path):
    lopsided = draw_shape(tmp_path / "flag.png", (20, 20, 259, 31), (20, 20, 60, 179))
    found = read_digit(lopsided)[0]
    columns = (found > 0).any(0).nonzero()
    assert int(columns.max() - columns.min()) + 1 == 20


def test_faint_ink_is_scaled_to_255_and_paper_to_0(tmp_path):
    photograph(draw(DIGITS[4])).save(tmp_path / "faint.jpg", quality=60)
    found = read_digit(tmp_path / "faint.jpg")[0]
    assert found.max() == 255
    outermost = torch.cat([found[:3].flatten(), found[-3:].flatten(), found[:, :3].flatten()])
    assert outermost.max() == 0


def test_thin_pencil_on_a_large_sheet_is_found(tmp_path):
    sheet = Image.new("L", (1000, 800), 230)
    ImageDraw.Draw(sheet).line([(300, 200), (400, 200), (350, 400)], fill=150, width=4)
    grain = np.random.default_rng(0).normal(0, 5, (800, 1000))
    Image.fromarray((sheet + grain).round().astype(np.uint8)).save(tmp_path / "seven.png")
    found = read_digit(tmp_path / "seven.png")[0] > 40
    assert int(found.any(1).sum()) in (19, 20)
    assert int(found.any(0).sum()) in (9, 10, 11)  # half as wide as high


def test_grainy_paper_inside_a_zero_becomes_black(tmp_path):
    ink = np.zeros((HEIGHT, WIDTH))
    ink[20:180, 80:200] = 1
    ink[50:150, 110:170] = 0
    photograph(ink).save(tmp_path / "zero.png")
    found = read_digit(tmp_path / "zero.png")[0]
    # The paper within is 100 by 60 pixels at an eighth; half of that is well clear of the ink.
    assert found[11:17, 12:16].max() == 0
    assert found.max() == 255


def test_a_28_by_28_image_that_is_dark_on_light_is_normalised(tmp_path):
    sheet = Image.new("L", (28, 28), 200)
    ImageDraw.Draw(sheet).rectangle((2, 3, 4, 12), fill=40)
    sheet.save(tmp_path / "one.png")
    found = read_digit(tmp_path / "one.png")[0] > 127
    # 3 by 10 pixels in a corner become 6 by 20 in the middle.
    assert found.any(1).nonzero().flatten().tolist() == list(range(4, 24))
    assert found.any(0).nonzero().flatten().tolist() == list(range(11, 17))


def test_another_size_is_filled_in_the_same_proportion(tmp_path):
    found = read_digit(draw_shape(tmp_path / "bar.png", (30, 50, 69, 149)), size=56)
    assert found.shape == (1, 56, 56)
    rows = (found[0] > 127).any(1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 40


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        read_digit(tmp_path / "nowhere.png")


def test_a_file_that_is_no_image_is_named_with_what_is_expected(tmp_path):
    (tmp_path / "digit.png").write_text("a seven")
    with pytest.raises(ValueError, match=r"digit\.png: expected an image .* PNG or JPEG"):
        read_digit(tmp_path / "digit.png")


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_that_is_cut_short_is_named(tmp_path, suffix):
    path = tmp_path / f"digit.{suffix}"
    photograph(draw(DIGITS[0])).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ValueError, match=rf"digit\.{suffix}: expected an image"):
        read_digit(path)


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 40 40
%%EndComments
(/tmp/graphcaps-was-here) (w) file closefile showpage
"""


@pytest.mark.parametrize("suffix", ["png", "eps"])
def test_a_file_that_is_a_program_for_ghostscript_is_not_opened(tmp_path, monkeypatch, suffix):
    def called(*_: object, **__: object) -> None:
        pytest.fail("a program was started")

    monkeypatch.setattr(subprocess, "Popen", called)
    (tmp_path / f"digit.{suffix}").write_bytes(EPS)
    with pytest.raises(ValueError, match=rf"digit\.{suffix}: expected an image in PNG or JPEG"):
        read_digit(tmp_path / f"digit.{suffix}")


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA"])
def test_pictures_in_other_formats_are_not_opened(tmp_path, form):
    black_on_white(draw(DIGITS[0])).save(tmp_path / "digit.png", format=form)
    with pytest.raises(ValueError, match=r"digit\.png: expected an image in PNG or JPEG"):
        read_digit(tmp_path / "digit.png")


@pytest.mark.parametrize(("width", "height"), [(70_000, 1000), (2**31 - 1, 1), (60_000, 60_000)])
def test_a_picture_too_large_is_refused_before_it_is_unpacked(tmp_path, width, height):
    Image.new("1", (1, 1)).save(tmp_path / "digit.png")
    content = (tmp_path / "digit.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    head = content[:12] + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "digit.png").write_bytes(head + content[33:])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"digit\.png: .* pixels"):
        read_digit(tmp_path / "digit.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000  # kB


def test_a_file_too_large_for_a_picture_is_not_read(tmp_path):
    with (tmp_path / "digit.png").open("wb") as sparse:
        sparse.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"digit\.png: .*at most 134,217,728 bytes"):
        read_digit(tmp_path / "digit.png")


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "digit.png")
    with pytest.raises(ValueError, match=r"digit\.png: expected a regular file"):
        read_digit(tmp_path / "digit.png")


def test_a_very_large_photograph_is_read_as_a_smaller_one(tmp_path):
    small = black_on_white(draw(DIGITS[0]))
    small.save(tmp_path / "small.png")
    small.resize((12 * WIDTH, 12 * HEIGHT), Image.Resampling.BOX).save(tmp_path / "large.png")
    found, expected = (read_digit(tmp_path / f"{name}.png")[0] for name in ("large", "small"))
    assert likeness(found.numpy(), expected.numpy()) > 0.99


def grainy_paper() -> Image.Image:
    grain = np.random.default_rng(0).normal(200, 8, (HEIGHT, WIDTH))
    return Image.fromarray(grain.round().astype(np.uint8))


EMPTY = {
    "white": Image.new("L", (WIDTH, HEIGHT), 255),
    "black": Image.new("L", (28, 28), 0),
    "grainy": grainy_paper(),
    "see-through": Image.new("RGBA", (WIDTH, HEIGHT), (0, 0, 0, 0)),
    "one pixel": Image.new("L", (1, 1), 7),
    "16 bit": Image.fromarray(np.full((HEIGHT, WIDTH), 40000, np.uint16)),
    "half black": Image.fromarray(np.repeat([[0] * 150 + [255] * 130], HEIGHT, 0).astype(np.uint8)),
}


@pytest.mark.parametrize("sheet", EMPTY.values(), ids=EMPTY.keys())
def test_a_sheet_without_a_digit_is_refused(tmp_path, sheet):
    sheet.save(tmp_path / "empty.png")
    with pytest.raises(ValueError, match=r"empty\.png: expected one digit on plain paper"):
        read_digit(tmp_path / "empty.png")


@pytest.mark.parametrize(("item", "paper"), [(40, 250), (230, 20)])
def test_an_item_fills_the_image_and_its_background_is_black(tmp_path, item, paper):
    pixels = np.full((200, 150), paper, np.uint8)
    pixels[30:170, 20:90] = item  # 140 × 70, not in the middle
    Image.fromarray(pixels).save(tmp_path / "dress.png")
    found = read_item(tmp_path / "dress.png")[0]
    assert found.shape == (28, 28)
    inside, outside = found[2:-2, 9:19], torch.cat([found[:, :6], found[:, -6:]], dim=1)
    assert int((inside.int() - abs(paper - item)).abs().max()) <= 2  # its level is kept
    assert int(outside.max()) == 0


def test_an_item_of_the_nets_size_on_black_stays_as_it_is(tmp_path):
    pixels = np.zeros((28, 28), np.uint8)
    pixels[3:20, 5:9] = 200
    Image.fromarray(pixels).save(tmp_path / "shoe.png")
    assert torch.equal(read_item(tmp_path / "shoe.png")[0], torch.from_numpy(pixels))


def test_an_image_without_an_item_is_refused(tmp_path):
    Image.new("L", (90, 80), 200).save(tmp_path / "empty.png")
    with pytest.raises(ValueError, match="expected one item on plain paper, found none"):
        read_item(tmp_path / "empty.png")


def test_the_shipped_net_knows_clothing_from_large_pictures_on_white(tmp_path):
    model = gc.CapsNet.from_pretrained("fashion-mnist-efficient")
    gallery = shipped_gallery("fashion-mnist-efficient")
    assert model.config.image_kind == "item"
    right = 0
    for image, label in zip(gallery.images[:100, 0], gallery.labels[:100], strict=True):
        on_white = Image.fromarray(255 - image.numpy()).resize(
            (140, 140), Image.Resampling.BILINEAR
        )
        on_white.save(tmp_path / "item.png")
        found = read_item(tmp_path / "item.png")
        with torch.no_grad():
            right += int(model(found[None] / 255).lengths.argmax() == label)
    assert right >= 85
