"""The names of the routings, for layers, nets, settings and the program."""

import inspect
from typing import Any

from graphcaps.routing.attention import InvertedAttention
from graphcaps.routing.base import Routing
from graphcaps.routing.dynamic import DynamicRouting
from graphcaps.routing.em import EMRouting
from graphcaps.routing.self_attention import SelfAttention
from graphcaps.routing.self_routing import SelfRouting
from graphcaps.routing.uniform import UniformRouting
from graphcaps.routing.variational_bayes import VariationalBayes

ROUTINGS: dict[str, type[Routing]] = {
    kind.name: kind
    for kind in (
        DynamicRouting,
        UniformRouting,
        EMRouting,
        InvertedAttention,
        SelfAttention,
        SelfRouting,
        VariationalBayes,
    )
}


def options_of(routing: str) -> tuple[str, ...]:
    """Names of the options that a routing takes.

    Raises:
        ValueError: an unknown name.

    >>> options_of("attention")
    ('iterations',)
    """
    if routing not in ROUTINGS:
        raise ValueError(f"unknown routing {routing!r}; choose one of {', '.join(ROUTINGS)}")
    parameters = inspect.signature(ROUTINGS[routing]).parameters.values()
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def make_routing(routing: str | Routing, **options: Any) -> Routing:
    """Create a routing from its name, or return a routing that is given as an object.

    Args:
        routing: a name in `ROUTINGS`, or a routing.
        options: options of the named class.

    Raises:
        ValueError: the name is unknown, the routing does not have an option, or options are given
            with a routing object.

    >>> make_routing("dynamic", iterations=2)
    DynamicRouting(iterations=2, gradients='all')
    """
    if isinstance(routing, Routing):
        if options:
            raise ValueError(
                f"got a {type(routing).__name__} and options for one, {', '.join(options)}: "
                "give them to the routing itself"
            )
        return routing
    known = options_of(routing)
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(
            f"{routing} routing has no option {', '.join(unknown)}; "
            f"it takes {', '.join(known) or 'none'}"
        )
    return ROUTINGS[routing](**options)
