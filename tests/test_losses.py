"""Losses compared with values computed by hand from the formulas."""

import math

import pytest
import torch
from torch.testing import assert_close

import graphcaps as gc


def test_the_margin_loss_is_squared_summed_over_classes_and_averaged_over_images():
    lengths = torch.tensor([[0.5, 0.3, 0.05], [0.95, 0.2, 0.1]])
    labels = torch.tensor([0, 1])
    first = 0.4**2 + 0.5 * 0.2**2  # 0.9 − 0.5; 0.3 − 0.1; 0.05 is below 0.1
    second = 0.5 * 0.85**2 + 0.7**2  # 0.95 − 0.1; 0.9 − 0.2; 0.1 is at the margin
    assert_close(gc.margin_loss(lengths, labels), torch.tensor((first + second) / 2))


def test_a_length_beyond_its_margin_costs_nothing_and_has_no_gradient():
    lengths = torch.tensor([[0.95, 0.05], [0.02, 0.99]], requires_grad=True)
    loss = gc.margin_loss(lengths, torch.tensor([0, 1]))
    loss.backward()
    assert loss == 0
    assert torch.equal(lengths.grad, torch.zeros(2, 2))


def test_the_margin_loss_takes_several_digits_in_one_image():
    lengths = torch.tensor([[0.5, 0.3, 0.05]])
    several = torch.tensor([[1, 1, 0]])
    assert_close(gc.margin_loss(lengths, several), torch.tensor(0.4**2 + 0.6**2))
    one = torch.tensor([[0, 0, 1]])
    assert_close(gc.margin_loss(lengths, one), gc.margin_loss(lengths, torch.tensor([2])))
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    assert_close(gc.margin_loss(lengths, nothing), torch.tensor(0.5 * (0.4**2 + 0.2**2)))


def test_margins_and_weight_can_be_chosen():
    loss = gc.margin_loss(
        torch.tensor([[0.5, 0.5]]), torch.tensor([0]), present=0.7, absent=0.2, down_weight=0.25
    )
    assert_close(loss, torch.tensor(0.2**2 + 0.25 * 0.3**2))


def test_the_reconstruction_loss_sums_over_pixels_and_averages_over_images():
    images = torch.zeros(2, 1, 28, 28)
    drawn = torch.zeros(2, 1, 28, 28)
    drawn[0] = 0.5
    assert_close(gc.reconstruction_loss(drawn, images), torch.tensor(784 * 0.25 / 2))


def test_the_loss_weighs_reconstruction_by_0_0005_of_the_sum_which_is_0_392_of_the_mean():
    images, labels = torch.rand(3, 1, 28, 28), torch.tensor([1, 2, 0])
    output = gc.CapsNetOutput(torch.rand(3, 3, 4), torch.rand(3, 3), torch.rand(3, 1, 28, 28))
    mean_square = (output.reconstruction - images).square().mean()
    expected = gc.margin_loss(output.lengths, labels) + 0.392 * mean_square
    assert_close(gc.capsnet_loss(output, images, labels), expected)
    without = output._replace(reconstruction=None)
    expected = gc.margin_loss(output.lengths, labels)
    assert_close(gc.capsnet_loss(without, images, labels), expected)


def spread_by_hand(activations, labels, margin):
    """Sums over plain numbers, averaged over the batch."""
    total = 0.0
    for row, true in zip(activations.tolist(), labels.tolist(), strict=True):
        total += sum(
            max(0.0, margin - (row[true] - a)) ** 2 for i, a in enumerate(row) if i != true
        )
    return total / len(labels)


@pytest.mark.parametrize("margin", [0.2, 0.9])
def test_the_spread_loss_equals_loops_over_plain_numbers(margin):
    activations, labels = torch.rand(5, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    expected = spread_by_hand(activations, labels, margin)
    assert gc.spread_loss(activations, labels, margin).item() == pytest.approx(expected)
    present = torch.nn.functional.one_hot(labels, 4)
    assert gc.spread_loss(activations, present, margin).item() == pytest.approx(expected)


def test_a_class_that_is_ahead_by_the_margin_costs_nothing_and_has_no_gradient():
    activations = torch.tensor([[0.95, 0.02, 0.0]], requires_grad=True)
    loss = gc.spread_loss(activations, torch.tensor([0]))
    loss.backward()
    assert loss == 0
    assert activations.grad.eq(0).all()


def test_the_negative_log_likelihood_is_that_of_the_true_classes():
    activations = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
    loss = gc.nll_loss(activations, torch.tensor([1, 0]))
    assert loss.item() == pytest.approx((math.log(4) + math.log(8)) / 2)
    both = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert gc.nll_loss(activations, both).item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    nothing = torch.zeros(1, 2, requires_grad=True)
    loss = gc.nll_loss(nothing, torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1e7)) and nothing.grad.isfinite().all()


def test_the_loss_of_a_net_is_the_one_that_its_routing_is_trained_with():
    images, labels = torch.rand(2, 1, 28, 28), torch.tensor([3, 7])
    for routing, loss in (
        ("dynamic", gc.margin_loss),
        ("em", gc.spread_loss),
        ("self_routing", gc.nll_loss),
    ):
        net = gc.CapsNet.from_preset(
            "small", conv_channels=4, capsule_maps=1, routing=routing, decoder_hidden=None
        )
        output = net(images)
        got = gc.capsnet_loss(output, images, labels, kind=net.loss)
        assert_close(got, loss(output.lengths, labels))
    with pytest.raises(ValueError, match="unknown kind of loss 'ce'; choose among margin, s"):
        gc.capsnet_loss(output, images, labels, kind="ce")


def test_an_empty_batch_costs_nothing():
    lengths = torch.zeros(0, 3, requires_grad=True)
    images = torch.zeros(0, 1, 28, 28)
    labels = torch.zeros(0, dtype=torch.int64)
    loss = gc.capsnet_loss(gc.CapsNetOutput(lengths, lengths, images), images, labels)
    assert loss == 0
    loss.backward()


@pytest.mark.parametrize("loss", [gc.margin_loss, gc.spread_loss, gc.nll_loss])
def test_lengths_without_a_batch_are_refused(loss):
    with pytest.raises(ValueError, match=r"\[batch, classes\]; got \[3\]"):
        loss(torch.zeros(3), torch.tensor([0, 1, 2]))


def test_a_reconstruction_of_another_shape_is_refused_not_broadcast():
    with pytest.raises(ValueError, match="expected a reconstruction of the images' shape"):
        gc.reconstruction_loss(torch.zeros(2, 1, 28, 28), torch.zeros(2, 784))


def test_lengths_of_zero_have_finite_gradients_in_the_loss():
    v = torch.zeros(2, 3, 4, requires_grad=True)
    gc.margin_loss(gc.length(v), torch.tensor([0, 1])).backward()
    assert v.grad.isfinite().all()
