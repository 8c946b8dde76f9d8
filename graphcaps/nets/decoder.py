"""The decoder, which reconstructs images from the poses of class capsules."""

import math
from itertools import pairwise

import torch
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

    def draw_over(self, v: Tensor, mask: Tensor, most: int) -> Tensor:
        """Reconstruct images of several classes: each capsule by itself, laid over each other.

        A pixel x̂ is `1 − Π_j (1 − x̂_j)` over the selected capsules j: light where one of them is.

        Args:
            v: poses, `[B, J, D]`.
            mask: 0 and 1, `[B, J]`.
            most: of an image, how many capsules are selected at most.

        Returns:
            Images in 0…1, `[B, C, H, W]`.

        >>> import torch
        >>> decoder, v = Decoder(3, 4, (1, 8, 8), hidden=(5,)), torch.rand(1, 3, 4)
        >>> first, second = (decoder(v, mask) for mask in torch.eye(3)[:2, None])
        >>> both = decoder.draw_over(v, torch.tensor([[1, 1, 0]]), most=2)
        >>> torch.allclose(both, first + second - first * second)
        True
        """
        selected, capsules = mask.topk(most, dim=1)  # [B, most]
        one = torch.arange(v.shape[1], device=v.device) == capsules.unsqueeze(-1)
        each = self(v.repeat_interleave(most, dim=0), one.flatten(0, 1)).unflatten(0, (-1, most))
        paper = 1 - each * selected.to(v.dtype)[..., None, None, None]
        return 1 - paper.prod(dim=1)
