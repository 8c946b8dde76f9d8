import pytest
import torch
from torch import nn
from torch.testing import assert_close

import graphcaps as gc
from graphcaps.data.splits import Dataset, Split
from graphcaps.training.evaluation import Score, as_input, evaluate, fitted


class Scripted(gc.CapsNet):
    """Predicts the class from the first pixel, and records its calls."""

    def __init__(self):
        super().__init__(gc.CapsNetConfig(conv_channels=1, capsule_maps=1, decoder_hidden=(2,)))
        self.calls = []

    def forward(self, images, labels=None):
        self.calls.append((len(images), labels, self.training))
        told = (images[:, 0, 0, 0] * 255).round().long()
        lengths = nn.functional.one_hot(told, 10).to(images)
        return gc.CapsNetOutput(lengths.unsqueeze(-1), lengths, None)


@pytest.fixture
def split():
    """Five images, of which the net misclassifies the last."""
    images = torch.zeros(5, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([3, 1, 4, 1, 5])
    return Split(images, torch.tensor([3, 1, 4, 1, 9]))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 100])
def test_errors_and_loss_are_those_of_all_images_whatever_the_batches(split, batch_size):
    score = evaluate(Scripted(), split, batch_size=batch_size)
    assert (score.images, score.errors, score.accuracy) == (5, 1, 0.8)
    wrong = 0.9**2 + 0.5 * 0.9**2  # the right capsule has length 0, another one 1
    assert_close(score.loss, wrong / 5, rtol=1e-6, atol=0.0)


def test_evaluation_never_tells_the_net_the_labels(split):
    model = Scripted()
    evaluate(model, split, batch_size=2)
    assert [labels for _, labels, _ in model.calls] == [None, None, None]


def test_evaluation_is_in_evaluation_mode_and_leaves_the_mode_as_it_was(split):
    model = Scripted()
    for mode in (True, False):
        model.train(mode)
        evaluate(model, split)
        assert not model.calls[-1][2]
        assert model.training == mode


def test_pixels_become_numbers_from_0_to_1_in_the_models_dtype():
    model = Scripted().double()
    expected = torch.tensor([0, 0.2, 1], dtype=torch.float64)
    assert_close(as_input(torch.tensor([0, 51, 255], dtype=torch.uint8), model), expected)


def test_nothing_to_evaluate_on_is_refused(split):
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(Scripted(), Split(split.images[:0], split.labels[:0]))


def test_a_score_counts_errors_and_what_was_taken_for_what():
    read = torch.tensor([0, 2, 2, 1, 0, 2, 1, 1])
    labels = torch.tensor([0, 2, 1, 1, 0, 2, 2, 1])
    score = Score(nn.functional.one_hot(read, 3).float(), labels, loss=0.0)
    assert (score.images, score.errors, score.accuracy) == (8, 2, 0.75)
    assert score.confusion().tolist() == [[2, 0, 0], [0, 2, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("images", "classes", "said"),
    [
        ((5, 1, 28, 27), 10, r"shape \[1, 28, 28\], but those of mine have \[1, 28, 27\]"),
        ((5, 3, 28, 28), 10, r"those of mine have \[3, 28, 28\]"),
        ((5, 1, 28, 28), 11, "the net has 10 classes, but mine has 11"),
    ],
)
def test_data_that_a_net_cannot_tell_are_named(split, images, classes, said):
    split = split._replace(images=torch.zeros(images, dtype=torch.uint8))
    data = Dataset("mine", tuple(map(str, range(classes))), split, split, split)
    with pytest.raises(ValueError, match=said):
        fitted(data, Scripted())


def test_classes_of_other_data_are_found_by_their_names(split):
    net = Scripted()
    net.config = gc.CapsNetConfig(classes=3, class_names=("bird", "cat", "dog"))
    part = Split(split.images[:2], torch.tensor([1, 0]))
    data = Dataset("mine", ("cat", "dog"), part, part, part)
    assert fitted(data, net).test.labels.tolist() == [2, 1]
    assert fitted(data, net).classes == ("bird", "cat", "dog")
    with pytest.raises(ValueError, match=r"not know these classes of mine: emu; it knows bird, c"):
        fitted(Dataset("mine", ("cat", "emu"), part, part, part), net)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_net_whose_lengths_are_not_finite_has_no_score(split, bad):
    net = Scripted()
    forward = net.forward
    net.forward = lambda *_: forward(*_)._replace(lengths=torch.full((5, 10), bad))
    with pytest.raises(gc.layers.NonFinitePosesError, match="not finite for 5 of 5 images"):
        evaluate(net, split)
