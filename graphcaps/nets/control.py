"""The control without capsules: fully connected layers instead of votes and routing."""

from torch import Tensor, nn

from graphcaps.layers import Capsules


class FullyConnected(nn.Module):
    """The control without capsules: two fully connected layers instead of votes and routing.

    The first, with ReLU, has as many weights as one matrix for each child and class; its output is
    the input of the decoder. The second, with softmax, computes the probabilities of the classes.

    Args:
        children: number of groups of channels.
        child_dim: channels in each group.
        classes: number of classes.
        parent_dim: hidden units for each class.

    >>> import torch
    >>> poses, probabilities = FullyConnected(6, 8, 3, 16)(torch.rand(2, 6, 8))
    >>> poses.shape, probabilities.sum(dim=1).allclose(torch.ones(2))
    (torch.Size([2, 3, 16]), True)
    """

    def __init__(self, children: int, child_dim: int, classes: int, parent_dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(children * child_dim, classes * parent_dim)
        self.classes = nn.Linear(classes * parent_dim, classes)

    def forward(self, u: Tensor) -> Capsules:
        """Args: u, `[B, I, K]`. Returns: hidden units, `[B, J, D]`, and probabilities, `[B, J]`."""
        between = self.hidden(u.flatten(1)).relu().to(u.dtype)
        probabilities = self.classes(between).to(u.dtype).softmax(dim=1)
        return Capsules(between.unflatten(1, (len(self.classes.bias), -1)), probabilities)
