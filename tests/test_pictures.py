"""Users' images in folders by class and in .npz files, from reading to prediction."""

import re
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from graphcaps import cli
from graphcaps.data import splits
from graphcaps.data.datasets import load_dataset
from graphcaps.data.images import read_picture
from graphcaps.nets.model import PRESETS, CapsNet, CapsNetConfig

CLASSES = ("apple", "Birne", "çekirdek")
COLOURS = {"apple": (200, 20, 30), "Birne": (20, 190, 40), "çekirdek": (30, 10, 180)}


def write_picture(path, colour=(200, 20, 30), size=(24, 20), mode="RGB"):
    """A picture of one colour; size is width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)
    return path


@pytest.fixture
def fruit(tmp_path):
    """Three classes in train/ and test/, with colour images in several formats."""
    folder = tmp_path / "fruit"
    for name, colour in COLOURS.items():
        for part, count in (("train", 8), ("test", 2)):
            for number in range(count):
                ending = ("png", "jpg", "BMP", "webp")[number % 4]
                write_picture(folder / part / name / f"{number}.{ending}", colour)
    return folder


def test_pictures_are_read_by_class_with_their_names(fruit):
    data = load_dataset(str(fruit))
    assert data.classes == tuple(sorted(CLASSES))
    assert data.image_kind == "picture"
    assert data.train.images.shape == (22, 3, 20, 24)  # of 24, 2 are held out
    assert data.train.images.dtype == torch.uint8
    assert data.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for split in (data.train, data.holdout, data.test):
        for image, label in zip(split.images, split.labels, strict=True):
            expected = torch.tensor(COLOURS[data.classes[label]])
            assert (image.float().mean(dim=(1, 2)) - expected).abs().max() < 12  # JPEG is not exact


def test_without_a_test_folder_one_in_six_is_tested_on_whatever_the_seed(tmp_path):
    for number in range(24):
        for name in ("a", "b"):
            write_picture(tmp_path / "all" / name / "deeper" / f"{number}.png", (number, 0, 0))
    zero, one = (load_dataset(str(tmp_path / "all"), seed=seed) for seed in (0, 1))
    assert [len(part.labels) for part in (zero.train, zero.holdout, zero.test)] == [37, 3, 8]
    assert zero.test.labels.bincount().tolist() == [4, 4]
    seen = [
        (int(label), int(image[0, 0, 0]))
        for part in (zero.train, zero.holdout, zero.test)
        for image, label in zip(part.images, part.labels, strict=True)
    ]
    assert sorted(seen) == [(label, number) for label in (0, 1) for number in range(24)]
    assert torch.equal(zero.test.images, one.test.images)
    assert not torch.equal(zero.holdout.images, one.holdout.images)


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3), ("I;16", 1)]
)
def test_grey_pictures_have_one_channel_and_all_others_three(tmp_path, mode, channels):
    path = write_picture(
        tmp_path / "picture.png", (90, 90, 90), mode="L" if mode[0] == "I" else mode
    )
    if mode == "P":
        Image.new("RGB", (24, 20), (90, 90, 90)).quantize(2).save(path)
    if mode == "I;16":
        Image.fromarray(np.full((20, 24), 90 * 256 + 7, np.uint16)).save(path)
    picture = read_picture(path)
    assert picture.shape == (channels, 20, 24)
    assert set(picture.unique().tolist()) <= ({0, 255} if mode == "1" else {90})


def test_what_is_transparent_is_white_and_a_picture_is_turned_upright(tmp_path):
    clear = Image.new("RGBA", (4, 3), (9, 9, 9, 0))
    clear.putpixel((1, 2), (10, 20, 30, 255))
    clear.save(tmp_path / "clear.png")
    picture = read_picture(tmp_path / "clear.png")
    assert picture[:, 2, 1].tolist() == [10, 20, 30] and picture[:, 0, 0].tolist() == [255] * 3
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter to the right
    Image.new("RGB", (8, 4)).save(tmp_path / "lying.jpg", exif=exif)
    assert read_picture(tmp_path / "lying.jpg").shape == (3, 8, 4)


def test_one_grey_picture_among_coloured_ones_gets_three_channels(fruit):
    write_picture(fruit / "test" / "apple" / "1.jpg", (70, 70, 70), mode="L")
    data = load_dataset(str(fruit))
    assert data.test.images.shape[1] == 3
    assert data.test.images[3].unique().tolist() == [70]
    grey = load_dataset(str(fruit), channels=1)
    assert grey.test.images.shape[1] == 1
    luminance = 0.299 * 200 + 0.587 * 20 + 0.114 * 30
    assert abs(int(grey.test.images[2, 0, 0, 0]) - luminance) <= 1


def test_pictures_are_scaled_to_the_size_that_is_asked_for(fruit):
    half = Image.new("RGB", (60, 40))
    half.paste((255, 255, 255), (0, 0, 30, 40))
    half.save(fruit / "test" / "apple" / "0.png")
    with pytest.raises(ValueError, match=r"1 of 30 pictures .* 20 × 24 pixels.*--image-size"):
        load_dataset(str(fruit))
    images = load_dataset(str(fruit), image_size=(10, 15)).test.images
    assert images.shape == (6, 3, 10, 15)
    assert (images[2, :, :, :7] == 255).all() and (images[2, :, :, 8:] == 0).all()
    assert images[2, 0, 5, 7] in (127, 128)  # averaged over what it stands for


def test_all_bad_files_are_named_at_once(fruit):
    bad = [fruit / "train" / "apple" / "broken.png", fruit / "test" / "Birne" / "text.jpg"]
    bad[0].write_bytes((fruit / "train" / "apple" / "0.png").read_bytes()[:60])
    bad[1].write_text("a letter")
    (fruit / "train" / "apple" / "notes.txt").write_text("no picture, and not taken for one")
    (fruit / "train" / "apple" / ".hidden.png").write_text("")
    (fruit / "train" / "empty").mkdir()
    write_picture(fruit / "test" / "plum" / "0.png")
    with pytest.raises(ValueError, match="cannot be used") as raised:
        load_dataset(str(fruit))
    lines = str(raised.value).splitlines()
    assert len(lines) == 5
    for named in (*bad, fruit / "train" / "empty", fruit / "test" / "plum"):
        assert sum(line.startswith(f"  {named}: ") for line in lines) == 1, named


def test_a_folder_that_holds_no_classes_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="or pictures in folders by class"):
        load_dataset(str(tmp_path))
    (tmp_path / "cats").mkdir()
    with pytest.raises(ValueError, match=r"expected pictures, found none"):
        load_dataset(str(tmp_path))


def test_images_that_no_memory_holds_are_refused_before_they_are_read(fruit, monkeypatch):
    monkeypatch.setattr(splits.os, "sysconf", lambda name: 100 if "SIZE" in name else 400)
    with pytest.raises(ValueError, match=r"this machine has 0.0 GiB.*--image-size"):
        load_dataset(str(fruit))


def arrays(count=24, shape=(9, 7), **others):
    images = np.arange(count * shape[0] * shape[1]).reshape(count, *shape).astype(np.uint8)
    made = dict(x_train=images, y_train=np.arange(count) % 3, x_test=images[:6])
    return made | {"y_test": np.arange(6) % 3} | others


def save(path, made):
    np.savez_compressed(path, **{name: array for name, array in made.items() if array is not None})
    return str(path)


def test_an_npz_file_is_read_as_it_is(tmp_path):
    made = arrays(classes=np.array(["x", "y", "z"]))
    data = load_dataset(save(tmp_path / "data.npz", made))
    assert data.classes == ("x", "y", "z") and data.image_kind == "picture"
    assert data.train.images.shape == (22, 1, 9, 7)
    assert np.array_equal(data.test.images[:, 0].numpy(), made["x_test"])
    assert data.test.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_an_npz_file_in_colour_with_a_holdout_and_several_labels_is_read(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (8, 5, 6, 3), dtype=np.uint8)
    labels = np.random.default_rng(0).integers(0, 2, (8, 4))
    made = {
        f"{part}_{what}": array[:n]
        for part, n in (("train", 8), ("val", 3), ("test", 2))
        for what, array in (("images", images), ("labels", labels))
    }
    data = load_dataset(save(tmp_path / "data.npz", made))
    assert [len(part.labels) for part in (data.train, data.holdout, data.test)] == [8, 3, 2]
    assert np.array_equal(data.train.images.permute(0, 2, 3, 1).numpy(), images)
    assert np.array_equal(data.train.labels.numpy(), labels)
    assert data.classes == ("0", "1", "2", "3")


def test_an_npz_file_of_images_alone_is_split(tmp_path):
    made = {"images": arrays()["x_train"], "labels": arrays()["y_train"][:, None]}
    data = load_dataset(save(tmp_path / "data.npz", made), image_size=(4, 4), channels=3)
    assert [len(part.labels) for part in (data.train, data.holdout, data.test)] == [19, 1, 4]
    assert data.train.images.shape == (19, 3, 4, 4)


BAD_ARRAYS = {
    "other names": ({"a": np.zeros(3)}, "expected arrays x_train, y_train; or .* found a"),
    "no labels": (arrays(y_train=None), "y_train: expected this array beside x_train"),
    "floats": (arrays(x_test=np.zeros((6, 9, 7))), r"x_test: expected uint8 .*got float64 \[6, 9"),
    "channels first": (arrays(x_test=np.zeros((6, 3, 9, 7), np.uint8)), r"uint8 \[6, 3, 9, 7\]"),
    "too few labels": (arrays(y_test=np.arange(5)), "y_test: expected one for each of 6 images"),
    "negative": (arrays(y_test=-np.arange(6)), "y_test: expected numbers from 0, got -5 to 0"),
    "not 0 and 1": (arrays(y_test=np.full((6, 3), 2)), "y_test: expected 0 and 1, got 2 to 2"),
    "objects": (arrays(y_test=np.array([{}] * 6)), "y_test: .*allow_pickle"),
    "other sizes": (arrays(x_test=np.zeros((6, 9, 8), np.uint8)), "images of one shape"),
    "too few names": (arrays(classes=np.array(["x", "y"])), "names of 3 classes, got 2"),
}


@pytest.mark.parametrize(("made", "said"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_an_array_that_is_not_what_it_should_be_is_named(tmp_path, made, said):
    path = save(tmp_path / "data.npz", made)
    with pytest.raises(ValueError, match=said) as raised:
        load_dataset(path)
    assert path in str(raised.value)


def test_all_that_is_wrong_with_an_npz_file_is_told_at_once(tmp_path):
    made = arrays(y_train=-np.arange(24), x_test=np.zeros((6, 2)))
    with pytest.raises(ValueError, match=r"(?s)y_train: .*x_test: "):
        load_dataset(save(tmp_path / "data.npz", made))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more"])
def test_a_file_that_is_no_npz_is_named(tmp_path, content):
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.npz is not a whole \.npz file"):
        load_dataset(str(tmp_path / "data.npz"))


def test_an_npz_file_that_unpacks_to_more_than_there_is_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "data.npz", arrays())
    unpacked = sum(member.file_size for member in zipfile.ZipFile(path).infolist())
    monkeypatch.setattr(splits.os, "sysconf", lambda name: 1 if "SIZE" in name else unpacked - 1)
    with pytest.raises(ValueError, match=f"{re.escape(path)}: its images take"):
        load_dataset(path)


@pytest.fixture
def graphcaps(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["graphcaps", *map(str, arguments)])
        capsys.readouterr()
        status = cli.main()
        out, err = capsys.readouterr()
        assert status == 0, err
        return out

    tiny = dict(conv_channels=8, capsule_maps=2, kernel_size=5, decoder_hidden=(8,))
    monkeypatch.setitem(PRESETS, "small", CapsNetConfig(**tiny))
    return run


def test_names_of_classes_are_kept_from_training_to_every_command(fruit, graphcaps, tmp_path):
    run = tmp_path / "run"
    asked = ("--run-dir", run, "--device", "cpu", "--epochs", "16", "--batch-size", "11")
    asked += ("--engine", "scatter")
    graphcaps("train", "--dataset", fruit, "--image-size", "18", "22", *asked)
    net = CapsNet.load(run / "best")
    assert net.config.image_shape == (3, 18, 22)
    assert net.config.class_names == tuple(sorted(CLASSES))
    trained = (run / "result.json").read_text()
    assert '"test_errors": 0' in trained
    assert "(0 errors in 6 images" in graphcaps("evaluate", run, "--device", "cpu")
    large = write_picture(tmp_path / "large.png", COLOURS["çekirdek"], size=(100, 90))
    out = graphcaps("predict", large, "--run-dir", run)
    assert out.startswith(f"{large}: çekirdek\n")
    assert all(f"{name}: 0." in out for name in CLASSES)
    # data of another size that lack two of the classes
    other = tmp_path / "other"
    for part in ("train", "test"):
        write_picture(other / part / "Birne" / "0.png", COLOURS["Birne"], size=(50, 31))
    out = graphcaps("evaluate", run, "--device", "cpu", "--dataset", other)
    assert "(0 errors in 1 images" in out
