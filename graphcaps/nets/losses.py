"""Margin and reconstruction losses for capsule networks."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from graphcaps.functional import multi_hot
from graphcaps.nets.model import CapsNetOutput

RECONSTRUCTION_WEIGHT = 0.0005  # of the sum over pixels; for 784 pixels, 0.392 of their mean
SMALLEST_ACTIVATION = 1e-7  # lower bound before a logarithm is taken


def margin_loss(
    lengths: Tensor,
    labels: Tensor,
    *,
    present: float = 0.9,
    absent: float = 0.1,
    down_weight: float = 0.5,
) -> Tensor:
    """Margin loss: the capsules of the classes in the image should be long, the others short.

    `L_k = T_k max(0, m⁺ − |v_k|)² + λ (1 − T_k) max(0, |v_k| − m⁻)²`, Sabour et al. 2017,
    equation 4, summed over classes k, averaged over the batch.

    Args:
        lengths: |v_k|, `[B, J]`.
        labels: the class of each image, integers `[B]`; if images show several classes, 0 and 1
            for every class, `[B, J]`.
        present: m⁺, the length above which a present class costs nothing.
        absent: m⁻, the length below which an absent class costs nothing.
        down_weight: λ, the weight of the absent classes.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: lengths of another rank; labels that do not fit, as `multi_hot`.

    >>> import torch
    >>> margin_loss(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1]))
    tensor(0.4800)
    """
    if lengths.dim() != 2:
        raise ValueError(f"expected lengths of shape [batch, classes]; got {list(lengths.shape)}")
    present_class = multi_hot(labels, *lengths.shape).to(lengths.dtype)
    loss = present_class * (present - lengths).clamp(min=0).square()
    loss = loss + down_weight * (1 - present_class) * (lengths - absent).clamp(min=0).square()
    return _mean_over_batch(loss)


def reconstruction_loss(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Squared error, summed over the pixels of an image and averaged over the batch.

    Args:
        reconstruction: `[B, C, H, W]`.
        images: `[B, C, H, W]`.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: shapes that differ.

    >>> import torch
    >>> reconstruction_loss(torch.full((2, 1, 28, 28), 0.5), torch.zeros(2, 1, 28, 28))
    tensor(196.)
    """
    if reconstruction.shape != images.shape:
        raise ValueError(
            f"expected a reconstruction of the images' shape {list(images.shape)}; "
            f"got {list(reconstruction.shape)}"
        )
    return _mean_over_batch((reconstruction - images).square())


def spread_loss(activations: Tensor, labels: Tensor, margin: float = 0.9) -> Tensor:
    """Spread loss: the true class should be more active than the others by a margin.

    `Σ_{i≠t} max(0, m − (a_t − a_i))²`, averaged over the batch; Hinton, Sabour & Frosst 2018,
    section 3. There m grows from 0.2 to 0.9 during training.

    Args:
        activations: a_k, `[B, J]`.
        labels: true classes, `[B]`, or 0 and 1 in `[B, J]`; with several true classes, each of
            them is compared with each other class.
        margin: m.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: activations of another rank; labels that do not fit, as `multi_hot`.

    >>> import torch
    >>> spread_loss(torch.tensor([[0.9, 0.2, 0.1]]), torch.tensor([0]))
    tensor(0.0500)
    """
    if activations.dim() != 2:
        raise ValueError(
            f"expected activations of shape [batch, classes]; got {list(activations.shape)}"
        )
    present = multi_hot(labels, *activations.shape).to(activations.dtype)
    gap = activations.unsqueeze(2) - activations.unsqueeze(1)  # a_t − a_i, [B, t, i]
    pairs = present.unsqueeze(2) * (1 - present).unsqueeze(1)
    return _mean_over_batch(pairs * (margin - gap).clamp(min=0).square())


def nll_loss(activations: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of the true classes, for activations that sum to one.

    `−Σ_t ln a_t` over the classes t in the image, averaged over the batch; Hahn et al. 2019.
    Activations below 1e-7 count as 1e-7.

    Args:
        activations: a_k, `[B, J]`.
        labels: as `margin_loss`.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: activations of another rank; labels that do not fit, as `multi_hot`.

    >>> import torch
    >>> nll_loss(torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([0]))
    tensor(0.6931)
    """
    if activations.dim() != 2:
        raise ValueError(
            f"expected activations of shape [batch, classes]; got {list(activations.shape)}"
        )
    present = multi_hot(labels, *activations.shape).to(activations.dtype)
    return _mean_over_batch(-present * activations.clamp(min=SMALLEST_ACTIVATION).log())


_OF_CLASSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "margin": margin_loss,
    "spread": spread_loss,
    "nll": nll_loss,
}


def capsnet_loss(
    output: CapsNetOutput,
    images: Tensor,
    labels: Tensor,
    *,
    kind: Literal["margin", "spread", "nll"] = "margin",
    reconstruction_weight: float = RECONSTRUCTION_WEIGHT,
) -> Tensor:
    """Margin loss plus 0.0005 × reconstruction loss, Sabour et al. 2017, section 4.1.

    Args:
        output: the model's output for `images`.
        images: in 0…1, `[B, C, H, W]`.
        labels: as `margin_loss`.
        kind: `"spread"` and `"nll"` use another loss instead of the margin loss; `model.loss` is
            the one that suits the model's routing.
        reconstruction_weight: weight of the reconstruction loss.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: see the loss of this kind and `reconstruction_loss`; an unknown kind.

    >>> import torch
    >>> from graphcaps import CapsNet
    >>> images, labels = torch.rand(2, 1, 28, 28), torch.tensor([3, 7])
    >>> capsnet_loss(CapsNet.from_preset("small")(images, labels), images, labels).shape
    torch.Size([])
    """
    if kind not in _OF_CLASSES:
        raise ValueError(f"unknown kind of loss {kind!r}; choose among {', '.join(_OF_CLASSES)}")
    loss = _OF_CLASSES[kind](output.lengths, labels)
    if output.reconstruction is None:
        return loss
    return loss + reconstruction_weight * reconstruction_loss(output.reconstruction, images)


def _mean_over_batch(loss: Tensor) -> Tensor:
    """Sum over all but the batch dimension, then the mean; 0 for an empty batch."""
    return loss.sum() / max(loss.shape[0], 1)
