"""Dense reference routings on votes `[B, I, J, D]`, with which every engine is compared.

They are written from the papers with plain tensor operations, and work in any dtype. They import
nothing from the rest of the library, so that they do not share its errors.
"""

from collections.abc import Callable

from torch import Tensor

from graphcaps.reference.agreement import (
    dynamic_routing,
    inverted_attention_routing,
    uniform_routing,
)
from graphcaps.reference.dense import Routed, squash, votes
from graphcaps.reference.mixtures import em_routing, variational_bayes_routing
from graphcaps.reference.one_pass import (
    exponential_squash,
    self_attention_routing,
    self_routing,
)

ROUTINGS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "dynamic": dynamic_routing,
    "uniform": uniform_routing,
    "em": em_routing,
    "attention": inverted_attention_routing,
    "self_attention": self_attention_routing,
    "self_routing": self_routing,
    "variational_bayes": variational_bayes_routing,
}

__all__ = [
    "ROUTINGS",
    "Routed",
    "dynamic_routing",
    "em_routing",
    "exponential_squash",
    "inverted_attention_routing",
    "self_attention_routing",
    "self_routing",
    "squash",
    "uniform_routing",
    "variational_bayes_routing",
    "votes",
]
