"""Functions of plain tensors: squash and length of capsules, labels and predictions."""

import torch
from torch import Tensor

from graphcaps.tracing import is_traced


def length(v: Tensor) -> Tensor:
    """Euclidean length of every capsule, which is the probability that its entity is present.

    At the zero vector, the length, its gradient and its second derivative are 0 rather than NaN.
    A vector that contains NaN has the length NaN.

    Args:
        v: capsules, `[..., D]`.

    Returns:
        Lengths, `[...]`.

    >>> length(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([5., 0.])
    """
    square = v.square().sum(dim=-1)
    # sqrt has no derivative at 0, and torch.where alone would give NaN as the gradient
    zero = square == 0
    return torch.where(zero, 1, square).sqrt().masked_fill(zero, 0)


def squash(s: Tensor) -> Tensor:
    """Shrink every vector to a length below 1 and keep its direction.

    `squash(s) = |s|²/(1+|s|²) · s/|s|`, Sabour et al. 2017, equation 1, computed as
    `s · |s|/(1+|s|²)`: nothing is divided by a length, so no ε is needed at zero.

    Args:
        s: vectors, `[..., D]`.

    Returns:
        Squashed vectors, `[..., D]`.

    >>> squash(torch.tensor([0.0, 3.0]))
    tensor([0.0000, 0.9000])
    """
    norm = length(s).unsqueeze(-1)
    unit = s / torch.where(norm > 0, norm, 1)
    # no power of |s| above the second, also in the gradient: it would overflow for long vectors
    return unit * (norm.square() / (1 + norm.square()))


def exponential_squash(s: Tensor) -> Tensor:
    """Shrink every vector to a length below 1; steeper at 0 than `squash`.

    `(1 − e^−|s|) s/|s|`, Mazzia et al. 2021, equation 8; 0 at 0, where its derivative is the
    identity.

    Args:
        s: vectors, `[..., D]`.

    Returns:
        Squashed vectors, `[..., D]`.

    >>> exponential_squash(torch.tensor([0.0, 2.0]))
    tensor([0.0000, 0.8647])
    """
    norm = length(s).unsqueeze(-1)
    positive = torch.where(norm > 0, norm, 1)
    return s * torch.where(norm > 0, -torch.expm1(-positive) / positive, 1)


def multi_hot(labels: Tensor, batch: int, classes: int) -> Tensor:
    """Convert labels to 0 and 1 for every class, for losses and the decoder's mask.

    Args:
        labels: the class of each sample, integers `[B]`, or already 0 and 1, `[B, classes]`.
        batch: number of samples, B.
        classes: number of classes.

    Returns:
        `[B, classes]`; int64 if `labels` is `[B]`, otherwise `labels` itself.

    Raises:
        ValueError: the labels have another shape, are not integers, or are outside
            `0 … classes − 1` (checked only on the CPU, where this needs no synchronisation, and
            not in traces).

    >>> multi_hot(torch.tensor([2, 0]), batch=2, classes=3)
    tensor([[0, 0, 1],
            [1, 0, 0]])
    """
    if labels.shape == (batch, classes):
        return labels
    if labels.shape != (batch,) or labels.is_floating_point():
        raise ValueError(
            f"expected labels as integers [{batch}] or as 0 and 1 in [{batch}, {classes}]; "
            f"got {labels.dtype} {list(labels.shape)}"
        )
    visible = labels.device.type == "cpu" and not is_traced(labels)
    if visible and batch and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(
            f"expected labels from 0 to {classes - 1}; "
            f"got {int(labels.min())} to {int(labels.max())}"
        )
    numbers = torch.arange(classes, device=labels.device)
    return (labels.unsqueeze(-1) == numbers).long()


def all_right(predicted: Tensor, labels: Tensor) -> Tensor:
    """Whether exactly the true classes of each sample are predicted, `[B]`.

    Args:
        predicted: from `predicted_classes`.
        labels: of the same shape, `[B]` or `[B, J]`.
    """
    return predicted == labels if labels.dim() == 1 else (predicted == labels).all(dim=1)


def predicted_classes(lengths: Tensor, labels_per_image: int = 1) -> Tensor:
    """The classes predicted by the lengths of class capsules.

    Args:
        lengths: the confidence in each class, `[B, J]`.
        labels_per_image: number of classes to predict for a sample; 0 for all classes with a
            confidence above 0.5.

    Returns:
        For one label per image, the class of the longest capsule, `[B]`; otherwise 0 and 1 for
        every class, `[B, J]`.

    >>> lengths = torch.tensor([[0.1, 0.9, 0.6]])
    >>> predicted_classes(lengths), predicted_classes(lengths, 2), predicted_classes(lengths, 0)
    (tensor([1]), tensor([[0, 1, 1]]), tensor([[0, 1, 1]]))
    """
    if labels_per_image == 1:
        return lengths.argmax(dim=1)
    if labels_per_image == 0:
        return (lengths > 0.5).long()
    longest = lengths.topk(labels_per_image, dim=1).indices
    return torch.zeros_like(lengths, dtype=torch.int64).scatter(1, longest, 1)
