"""Data sets generated from MNIST's digits, and nets that predict several classes in an image."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import graphcaps as gc
from graphcaps import cli
from graphcaps.data import datasets, made
from graphcaps.data.datasets import load_dataset
from graphcaps.data.splits import Split
from graphcaps.nets.model import PRESETS, CapsNet, CapsNetConfig
from graphcaps.training.evaluation import Score

DIGITS = Path(__file__).parent / "digits"


@pytest.fixture
def digits():
    return load_dataset(str(DIGITS)).train


def seeded(number=0):
    return torch.Generator().manual_seed(number)


def test_a_pair_is_two_shifted_digits_of_different_classes_added(digits):
    few = Split(digits.images[:40], digits.labels[:40])
    pairs = made.overlay_pairs(few, seeded())
    assert pairs.images.shape == (40, 1, 36, 36) and pairs.images.dtype == torch.uint8
    wide = torch.nn.functional.pad(few.images[:, 0].int(), (8,) * 4)  # 44 × 44
    moved = {  # every digit at every place, [81, 40, 36, 36]
        (down, right): wide[:, 4 - down : 40 - down, 4 - right : 40 - right]
        for down in range(-4, 5)
        for right in range(-4, 5)
    }
    at_every_place = torch.stack(list(moved.values()))
    seen = set()
    for number in range(6):
        image, classes = pairs.images[number, 0].int(), pairs.labels[number].nonzero().flatten()
        assert len(classes) == 2 and few.labels[number] in classes
        found = 0
        for place, own in enumerate(at_every_place[:, number]):
            if (own > image).any():
                continue
            both = (own + at_every_place).clamp(max=255)
            for other_place, other in (both == image).all(dim=(2, 3)).nonzero().tolist():
                if few.labels[other] in classes and few.labels[other] != few.labels[number]:
                    found += 1
                    seen |= {place, other_place}
        assert found == 1
    assert len(seen) > 6


def test_partners_are_drawn_evenly_from_all_digits_of_other_classes():
    count = 3000
    labels = torch.arange(count) % 3
    images = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    pairs = made.overlay_pairs(Split(images, labels), seeded())
    assert (pairs.labels.sum(dim=1) == 2).all()
    partner = (pairs.labels - torch.nn.functional.one_hot(labels)).argmax(dim=1)
    ahead = int(((partner - labels) % 3 == 1).sum())
    assert abs(ahead - count / 2) < 5 * math.sqrt(count) / 2
    with pytest.raises(ValueError, match="two classes or more"):
        made.overlay_pairs(Split(images[:3], torch.zeros(3, dtype=torch.int64)), seeded())


def test_both_digits_of_a_pair_are_moved_by_up_to_4_pixels_evenly():
    dots = torch.zeros(2000, 1, 28, 28, dtype=torch.uint8)
    dots[:, :, 14, 14] = 100
    pairs = made.overlay_pairs(Split(dots, torch.arange(2000) % 2), seeded())
    for axis in (2, 3):
        places = pairs.images.long().sum(dim=(0, 1, 5 - axis)) // 100
        assert places[14:23].sum() == places.sum() == 4000  # 18 ± 4
        assert (places[14:23] - 4000 / 9).abs().max() < 5 * math.sqrt(4000 / 9)


def test_a_placed_digit_loses_no_pixel_and_lies_anywhere(digits):
    placed = made.place(digits, seeded())
    assert placed.images.shape == (294, 1, 40, 40)
    assert_close(placed.images.sum(dim=(1, 2, 3)), digits.images.sum(dim=(1, 2, 3)))
    marked = made.place(
        Split(torch.ones(4000, 1, 28, 28, dtype=torch.uint8), torch.zeros(4000)), seeded()
    )
    for axis in (2, 3):
        first = marked.images.any(dim=5 - axis).squeeze(1).int().argmax(dim=1)
        counts = first.bincount(minlength=13)
        assert len(counts) == 13  # from 0 to 12 of 40 − 28
        assert (counts - 4000 / 13).abs().max() < 5 * math.sqrt(4000 / 13)


def test_affine_maps_are_those_of_the_published_ranges(monkeypatch):
    """Each image's affine matrix is computed from the corners of a warped square with a mark."""
    matrices = []
    warp = made._warp
    monkeypatch.setattr(
        made, "_warp", lambda images, matrix: matrices.append(matrix) or warp(images, matrix)
    )
    square = torch.zeros(2000, 1, 28, 28, dtype=torch.uint8)
    square[:, :, 4:24, 4:24] = 200
    out = made.transform(Split(square, torch.zeros(2000)), seeded()).images
    matrix = matrices[0].double()
    # rotation · shear · scales: the first column is a turned axis, the determinant both scales
    across = matrix[:, :, 0].norm(dim=1)
    angle = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0])
    down = torch.linalg.det(matrix) / across
    back = torch.stack([angle.cos(), angle.sin()], dim=1)
    shear = (matrix[:, :, 1] * back).sum(dim=1) / down
    for found, (low, high) in (
        (across, (0.8, 1.2)),
        (down, (0.8, 1.2)),
        (shear, (-0.2, 0.2)),
        (angle.rad2deg(), (-20, 20)),
    ):
        assert low <= found.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < found.max() <= high
    areas = out.double().sum(dim=(1, 2, 3)) / square[0].double().sum()
    assert_close(areas, torch.linalg.det(matrix), rtol=0.02, atol=0.0)  # no ink is lost
    edges = out.any(dim=0)[0]
    assert edges[0].any() and edges[-1].any() and edges[:, 0].any() and edges[:, -1].any()


def test_a_warped_image_is_the_map_applied_to_every_pixel():
    image = torch.zeros(1, 1, 41, 41, dtype=torch.uint8)
    image[0, 0, 20, 30] = 255  # 10 to the right of the centre
    quarter = made._turn(torch.tensor([math.pi / 2]))
    assert made._warp(image, quarter)[0, 0, 30, 20] == 255  # 10 below it
    wide = made._warp(image, torch.diag_embed(torch.tensor([[1.5, 1.0]])))
    assert wide[0, 0].nonzero().tolist()[1] == [20, 35]


def test_rotated_digits_turn_by_any_angle(digits):
    bar = torch.zeros(3000, 1, 29, 29, dtype=torch.uint8)
    bar[:, :, 14, 15:27] = 255  # from the centre to the right
    out = made.rotate(Split(bar, torch.zeros(3000)), seeded()).images[:, 0].double()
    y, x = (torch.arange(29.0, dtype=torch.float64) - 14 for _ in range(2))
    angles = torch.atan2((out * y[:, None]).sum(dim=(1, 2)), (out * x).sum(dim=(1, 2)))
    counts = ((angles + math.pi) / (2 * math.pi) * 12).long().clamp(0, 11).bincount(minlength=12)
    assert (counts - 250).abs().max() < 5 * math.sqrt(250)


@pytest.fixture
def mnist(monkeypatch):
    """Replace MNIST by the digits in tests/."""
    monkeypatch.setattr(datasets, "_load_torchvision", lambda *_: datasets._load_folder(DIGITS))


@pytest.mark.usefixtures("mnist")
@pytest.mark.parametrize(
    ("name", "side", "labels"),
    [("multi-mnist", 36, 2), ("affine-mnist", 40, 1), ("rotated-mnist", 28, 1)],
)
def test_made_sets_are_drawn_anew_for_training_and_stay_for_hold_out_and_test(name, side, labels):
    one, again = (load_dataset(name) for _ in range(2))
    assert one.test.images.shape == (100, 1, side, side)
    assert one.labels_per_image == labels and one.shift == 0
    for part in ("train", "holdout", "test"):
        assert torch.equal(getattr(one, part).images, getattr(again, part).images)
    drawn = [one.redraw(seeded(number)) for number in (1, 1, 2)]
    assert torch.equal(drawn[0].images, drawn[1].images)
    assert not torch.equal(drawn[0].images, drawn[2].images)
    assert drawn[0].images.shape == one.train.images.shape
    assert load_dataset(name, image_size=(20, 24)).redraw(seeded()).images.shape[2:] == (20, 24)


@pytest.mark.usefixtures("mnist")
def test_affine_digits_are_trained_on_as_they_are_and_tested_on_under_maps():
    data = load_dataset("affine-mnist")
    plain = load_dataset(str(DIGITS))
    for part in ("train", "holdout"):
        ink = [getattr(d, part).images.sum(dim=(1, 2, 3)) for d in (data, plain)]
        assert torch.equal(*ink)
    changed = data.test.images.sum(dim=(1, 2, 3)) / plain.test.images.sum(dim=(1, 2, 3))
    assert changed.std() > 0.1


def test_a_score_of_several_classes_is_that_of_exact_matches():
    lengths = torch.tensor([[0.9, 0.8, 0.1], [0.9, 0.2, 0.7], [0.1, 0.6, 0.7]])
    labels = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 1, 1]])
    score = Score(lengths, labels, 0.0, labels_per_image=2)
    assert score.predicted.tolist() == [[1, 1, 0], [1, 0, 1], [0, 1, 1]]
    assert (score.errors, score.wrong.tolist()) == (1, [False, True, False])
    assert score.confusion().tolist() == [[2, 0, 0], [0, 2, 1], [0, 0, 1]]
    some = Score(lengths, labels, 0.0, labels_per_image=0)  # those beyond 0.5
    assert some.predicted.tolist() == score.predicted.tolist()


def test_a_net_of_several_classes_draws_all_that_it_predicts():
    config = CapsNetConfig(conv_channels=4, capsule_maps=1, decoder_hidden=(8,), labels_per_image=2)
    model, images = CapsNet(config), torch.rand(3, 1, 28, 28)
    output = model(images)
    longest = output.lengths.topk(2).indices
    mask = torch.zeros(3, 10).scatter(1, longest, 1)
    assert torch.equal(output.reconstruction, model(images, mask).reconstruction)


@pytest.fixture
def graphcaps(monkeypatch, capsys):
    def run(*arguments, status=0):
        monkeypatch.setattr(sys, "argv", ["graphcaps", *map(str, arguments)])
        capsys.readouterr()
        assert cli.main() == status, capsys.readouterr().err
        out, err = capsys.readouterr()
        return err if status else out

    tiny = dict(conv_channels=8, capsule_maps=2, kernel_size=7, decoder_hidden=(8,))
    monkeypatch.setitem(PRESETS, "small", CapsNetConfig(**tiny))
    return run


@pytest.mark.usefixtures("mnist")
def test_two_digits_in_an_image_are_trained_evaluated_predicted_and_reported(
    graphcaps, tmp_path, monkeypatch
):
    monkeypatch.setattr("graphcaps.report.records.differences_from_dense", lambda *_: {})
    monkeypatch.setattr("graphcaps.report.sections", lambda _: [])  # figures take long
    run = tmp_path / "run"
    asked = ("--device", "cpu", "--engine", "scatter")
    graphcaps("train", "--dataset", "multi-mnist", "--run-dir", run, "--epochs", 2, *asked)
    config = CapsNet.load(run / "best").config
    assert (config.labels_per_image, config.image_shape) == (2, (1, 36, 36))
    assert json.loads((run / "result.json").read_text())["test_images"] == 100
    told = graphcaps("evaluate", run, "--data-dir", tmp_path, *asked)
    assert "errors in 100 images of multi-mnist" in told
    picture = load_dataset("multi-mnist").test.images[0, 0].numpy()
    Image.fromarray(picture).save(tmp_path / "two.png")
    first = graphcaps("predict", tmp_path / "two.png", "--run-dir", run).splitlines()[0]
    names = first.removeprefix(f"{tmp_path / 'two.png'}: ").split(" + ")
    assert len(names) == 2 and all(name in "0123456789" for name in names)
    graphcaps("report", run, "--data-dir", tmp_path, *asked)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert '"labelsPerImage":2' in page
    err = graphcaps("evaluate", run, "--dataset", DIGITS, status=1)
    assert "shape [1, 36, 36]" in err


@pytest.mark.usefixtures("mnist")
def test_every_epoch_of_a_resumed_run_has_the_images_that_it_would_have_had(tmp_path, monkeypatch):
    from graphcaps.training import loop
    from graphcaps.training.settings import TrainSettings

    tiny = CapsNetConfig(conv_channels=4, capsule_maps=1, decoder_hidden=None)
    monkeypatch.setitem(PRESETS, "small", tiny)
    seen = []
    draw = loop.Trainer._draw_images
    monkeypatch.setattr(
        loop.Trainer,
        "_draw_images",
        lambda self, epoch: draw(self, epoch) or seen.append((epoch, self._images.sum().item())),
    )
    asked = TrainSettings(
        dataset="rotated-mnist", run_dir=tmp_path / "run", epochs=2, device="cpu", engine="scatter"
    )
    loop.train(asked)
    whole = dict(seen)
    assert whole[0] != whole[1]
    (tmp_path / "run" / "result.json").unlink()
    last = max((tmp_path / "run" / "checkpoints").iterdir())
    for path in last.iterdir():
        path.unlink()
    last.rmdir()
    seen.clear()
    loop.train(TrainSettings(run_dir=tmp_path / "run", resume=True))
    assert dict(seen) == {1: whole[1]}


def test_a_net_is_trained_further_for_other_classes_from_a_run_or_a_name(graphcaps, tmp_path):
    start = CapsNet.from_preset("small")
    start.save(tmp_path / "net")
    images = np.random.default_rng(0).integers(0, 256, (60, 20, 22), dtype=np.uint8)
    np.savez(tmp_path / "three.npz", images=images, labels=np.arange(60) % 3)
    asked = ("--epochs", 1, "--device", "cpu", "--engine", "scatter", "--learning-rate", "1e-9")
    asked += ("--dataset", tmp_path / "three.npz")
    out = graphcaps("train", "--from", tmp_path / "net", "--run-dir", tmp_path / "run", *asked)
    assert f"Training the net of {tmp_path / 'net'} further" in out
    net = CapsNet.load(tmp_path / "run" / "best")
    assert net.config.names == ("0", "1", "2") and net.config.image_shape == (1, 28, 28)
    # a learning rate of nothing leaves what came from the start
    assert_close(net.conv[0].weight, start.conv[0].weight, atol=1e-6, rtol=0.0)
    assert net.capsules.weight.shape[0] == 3 * start.capsules.weight.shape[0] // 10
    run = tmp_path / "run"
    for left in (run / "result.json", *(tmp_path / "net").iterdir()):
        left.unlink()
    again = graphcaps("train", "--run-dir", run, "--resume")  # where it came from is gone
    assert "Test accuracy" in again
    for arguments, said in (
        (("--from", tmp_path / "nowhere"), "no trained net at"),
        (("--from", "mnist-small", "--routing", "em"), "has routing dynamic, not em"),
    ):
        assert said in graphcaps("train", "--run-dir", tmp_path / "x", *arguments, *asked, status=1)
    assert gc.CapsNet.from_pretrained("mnist-small", classes=3).config.classes == 3
