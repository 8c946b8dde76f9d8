"""The pretrained net: the claims of its model card, and its use without a network."""

import re
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import graphcaps as gc
from graphcaps.data.datasets import Split, load_dataset
from graphcaps.nets.model import PRETRAINED
from graphcaps.training.evaluation import evaluate

DIGITS = Path(__file__).parent / "digits"
FOLDER = PRETRAINED / "mnist-small"


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


def test_what_the_card_calls_mistakes_are_mistakes():
    found = load_file(FOLDER / "mistakes.safetensors")
    said = re.search(r"\((\d+) errors\)", (FOLDER / "README.md").read_text())
    assert len(found["labels"]) == int(said[1])
    score = evaluate(gc.CapsNet.from_pretrained(), Split(found["images"], found["labels"]))
    assert score.errors >= score.images - 1  # one may stand at the edge, on another processor


def test_the_shipped_weights_are_small_and_have_a_card():
    assert (FOLDER / "model.safetensors").stat().st_size < 5e6
    card = (FOLDER / "README.md").read_text()
    for word in ("accuracy", "data", "recipe", "graphcaps train --preset small", "seed", "Limits"):
        assert word in card
    accuracy = float(re.search(r"test set \| (\d+\.\d+)%", card)[1])
    assert accuracy >= 99.6


def test_an_unknown_net_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="unknown trained net 'mnist'; choose one of mnist-small"):
        gc.CapsNet.from_pretrained("mnist")
