"""The pretrained nets: the claims of their model cards, and their use without a network."""

import re
import socket
from pathlib import Path

import pytest
import torch

import graphcaps as gc
from graphcaps.data.datasets import Split, load_dataset
from graphcaps.demo import MISTAKES, shipped_gallery
from graphcaps.nets.model import PRETRAINED, pretrained_names
from graphcaps.training.evaluation import evaluate

DIGITS = Path(__file__).parent / "digits"


@pytest.fixture(params=pretrained_names())
def name(request):
    return request.param


def card_of(name):
    return (PRETRAINED / name / "README.md").read_text()


@pytest.fixture
def offline(monkeypatch):
    def refused(*_):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.mark.usefixtures("offline")
def test_the_shipped_net_reads_the_shipped_digits_without_a_network():
    model = gc.CapsNet.from_pretrained("mnist-small")
    assert not model.training
    score = evaluate(model, load_dataset(str(DIGITS)).test)
    assert score.images == 100
    assert score.errors <= 2  # of 100; the card says fewer than 1 in 200


@pytest.mark.parametrize("engine", ["builtin", "scatter"])
def test_the_shipped_net_runs_on_the_engine_asked_for(engine):
    model = gc.CapsNet.from_pretrained("mnist-small", engine=engine)
    assert model.capsules.engine == engine
    assert model.capsules.weight.dtype == torch.float32


def test_what_the_gallery_calls_mistakes_are_mistakes(name):
    found = shipped_gallery(name)
    said = re.search(r"\((\d+) errors\)", card_of(name))
    assert found.mistakes.sum() <= int(said[1])
    if int(said[1]) <= MISTAKES:
        assert found.mistakes.sum() == int(said[1])
    images = Split(found.images, found.labels)
    score = evaluate(gc.CapsNet.from_pretrained(name), images)
    assert (score.wrong != found.mistakes).sum() <= 2  # at the edge, on another processor


def test_the_first_images_of_the_gallery_are_read_about_as_well_as_the_card_says(name):
    found = shipped_gallery(name)
    first = found.numbers == torch.arange(len(found.numbers))
    said = float(re.search(r"test set \| (\d+\.\d+)%", card_of(name))[1])
    wrong = int(found.mistakes[first].sum())
    expected = (1 - said / 100) * int(first.sum())
    assert abs(wrong - expected) < 4 * (expected**0.5 + 1)  # four standard deviations


def test_the_shipped_nets_are_small_and_have_a_card(name):
    assert (PRETRAINED / name / "model.safetensors").stat().st_size < 5e6
    for word in ("accuracy", "data", "recipe", "graphcaps train --preset ", "seed", "Limits"):
        assert word in card_of(name)


def test_all_nets_together_are_smaller_than_12_mb():
    assert sum(file.stat().st_size for file in PRETRAINED.rglob("*") if file.is_file()) < 12e6


def test_the_card_of_mnist_small_says_99_6_or_more():
    assert float(re.search(r"test set \| (\d+\.\d+)%", card_of("mnist-small"))[1]) >= 99.6


def test_an_unknown_net_is_named_with_those_there_are():
    names = "fashion-mnist-efficient, mnist-small, multi-mnist-efficient"
    with pytest.raises(ValueError, match=f"unknown trained net 'mnist'; choose one of {names}"):
        gc.CapsNet.from_pretrained("mnist")
