"""The decoder, which reconstructs images from the poses of class capsules."""

import math
from itertools import pairwise

from torch import Tensor, nn


class Decoder(nn.Module):
    """Three fully connected layers that reconstruct an image from the poses of class capsules.

    Sabour et al. 2017, section 4.1 and figure 2: two hidden layers with ReLU and a sigmoid
    output; the poses of all but the selected capsules are masked with zeros.

    Args:
        parents: number of capsules, J.
        parent_dim: length of a pose, D.
        image_shape: channels, height and width of the image.
        hidden: sizes of the hidden layers.

    >>> import torch
    >>> decoder = Decoder(parents=10, parent_dim=16, image_shape=(1, 28, 28))
    >>> decoder(torch.rand(2, 10, 16), torch.eye(10)[[3, 7]]).shape
    torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        parents: int,
        parent_dim: int,
        image_shape: tuple[int, int, int],
        hidden: tuple[int, ...] = (512, 1024),
    ) -> None:
        super().__init__()
        self.image_shape = image_shape
        sizes = (parents * parent_dim, *hidden)
        layers: list[nn.Module] = []
        for entering, leaving in pairwise(sizes):
            layers += [nn.Linear(entering, leaving), nn.ReLU()]
        layers += [nn.Linear(sizes[-1], math.prod(image_shape)), nn.Sigmoid()]
        self.layers = nn.Sequential(*layers)

    def forward(self, v: Tensor, mask: Tensor) -> Tensor:
        """Args: v, `[B, J, D]`; mask, 0 and 1, `[B, J]`. Returns: images in 0…1, `[B, C, H, W]`."""
        chosen = v * mask.unsqueeze(-1).to(v.dtype)
        image = self.layers(chosen.flatten(1)).to(v.dtype)  # bfloat16 under autocast
        return image.unflatten(1, self.image_shape)
