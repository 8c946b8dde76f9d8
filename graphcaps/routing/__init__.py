"""Routing algorithms, each written once for every graph and engine."""

from graphcaps.routing.attention import InvertedAttention
from graphcaps.routing.base import Iteration, Routing, Sizes
from graphcaps.routing.dynamic import DynamicRouting
from graphcaps.routing.edges import Edges, EdgesWithoutVotes, EdgesWithVotes, Sums
from graphcaps.routing.em import EMRouting
from graphcaps.routing.on_votes import dynamic_routing, uniform_routing
from graphcaps.routing.registry import ROUTINGS, make_routing, options_of
from graphcaps.routing.self_attention import SelfAttention
from graphcaps.routing.self_routing import SelfRouting
from graphcaps.routing.trace import Trace
from graphcaps.routing.uniform import UniformRouting
from graphcaps.routing.variational_bayes import VariationalBayes

__all__ = [
    "ROUTINGS",
    "DynamicRouting",
    "EMRouting",
    "Edges",
    "EdgesWithVotes",
    "EdgesWithoutVotes",
    "InvertedAttention",
    "Iteration",
    "Routing",
    "SelfAttention",
    "SelfRouting",
    "Sizes",
    "Sums",
    "Trace",
    "UniformRouting",
    "VariationalBayes",
    "dynamic_routing",
    "make_routing",
    "options_of",
    "uniform_routing",
]
