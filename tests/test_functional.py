import pytest
import torch
from torch.testing import assert_close

import graphcaps as gc
from graphcaps import reference
from graphcaps.functional import exponential_squash, multi_hot


@pytest.mark.parametrize("length", [1e-6, 0.1, 1.0, 3.0, 1e4])
def test_squash_keeps_the_direction_and_maps_the_length_to_l2_over_1_plus_l2(length):
    direction = torch.tensor([2.0, -3.0, 6.0], dtype=torch.float64) / 7
    squashed = gc.squash(length * direction)
    assert_close(squashed, direction * length**2 / (1 + length**2))


def test_squash_equals_the_one_of_the_reference():
    s = torch.randn(5, 7, 3, dtype=torch.float64)
    assert_close(gc.squash(s), reference.squash(s))


@pytest.mark.parametrize("function", [gc.squash, gc.length, lambda s: gc.length(gc.squash(s))])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-20, 1e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_squash_and_length_and_their_gradients_are_finite(function, value, dtype):
    s = torch.full((2, 4), value, dtype=dtype, requires_grad=True)
    result = function(s)
    result.sum().backward()
    assert result.isfinite().all()
    assert s.grad.isfinite().all()
    if value == 0:
        assert result.eq(0).all()
        assert s.grad.eq(0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_length_of_a_vector_that_is_not_finite_is_not_finite(bad):
    v = torch.tensor([[3.0, 4.0], [3.0, bad], [0.0, 0.0]])
    lengths = gc.length(v)
    assert not lengths[1].isfinite()
    assert lengths[[0, 2]].tolist() == [5, 0]


@pytest.mark.parametrize("function", [gc.squash, exponential_squash])
@pytest.mark.parametrize("length", [1e-8, 1.0, 1e4, 1e14, 1e15, 1e18])
def test_gradients_of_squash_in_float32_are_those_in_float64_whatever_the_length(function, length):
    direction, functional = torch.tensor([0.6, 0.0, -0.8]), torch.tensor([0.3, -0.7, 0.2])
    gradients = []
    for dtype in (torch.float32, torch.float64):
        s = (length * direction).to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad((function(s) * functional.to(dtype)).sum(), s)
        gradients.append(gradient.double())
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_the_squash_of_efficient_capsnet_equals_the_one_of_the_reference():
    s = torch.randn(5, 3, dtype=torch.float64)
    assert_close(exponential_squash(s), reference.exponential_squash(s))
    zero = torch.zeros(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(exponential_squash(zero).sum(), zero)
    assert torch.equal(gradient, torch.ones(2, 3))


def test_gradients_of_squash_are_those_of_finite_differences():
    s = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gc.squash, (s,))
    assert torch.autograd.gradcheck(gc.length, (s,))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.tensor([3]), "labels from 0 to 2; got 3"),
        (torch.tensor([-1]), "labels from 0 to 2; got -1"),
        (torch.tensor([0.0]), "as integers"),
        (torch.zeros(2, 4), r"in \[2, 3\]"),
    ],
)
def test_labels_that_name_no_class_are_refused(labels, said):
    with pytest.raises(ValueError, match=said):
        multi_hot(labels, batch=len(labels), classes=3)


def test_one_label_for_many_samples_is_refused_not_broadcast():
    for labels in (torch.tensor([1]), torch.tensor([[0, 1, 0]])):
        with pytest.raises(ValueError, match=r"integers \[4\]"):
            multi_hot(labels, batch=4, classes=3)


@pytest.mark.parametrize("function", [gc.squash, gc.length])
def test_second_derivatives_are_those_of_finite_differences_and_finite_at_zero(function):
    s = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(function, (s,))
    zero = torch.zeros(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(function(zero).sum(), zero, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), zero)
    assert second.isfinite().all()
