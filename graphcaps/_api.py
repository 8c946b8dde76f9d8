"""The public names of graphcaps, which `graphcaps/__init__.py` imports on first use."""

from graphcaps import reference
from graphcaps.conversion import graph_from_edge_index
from graphcaps.convolution import ConvCapsules, conv_graph
from graphcaps.engines import bind
from graphcaps.functional import length, squash
from graphcaps.graph import batch_graph, complete_graph, routing_graph
from graphcaps.layers import CapsuleLayer, Capsules, PrimaryCapsules
from graphcaps.nets import (
    CapsNet,
    CapsNetConfig,
    CapsNetOutput,
    CapsuleMaps,
    Convolution,
    Decoder,
    capsnet_loss,
    margin_loss,
    nll_loss,
    reconstruction_loss,
    spread_loss,
)
from graphcaps.routing import (
    ROUTINGS,
    DynamicRouting,
    EMRouting,
    InvertedAttention,
    Iteration,
    Routing,
    SelfAttention,
    SelfRouting,
    Trace,
    UniformRouting,
    VariationalBayes,
    dynamic_routing,
    uniform_routing,
)

__all__ = [
    "ROUTINGS",
    "CapsNet",
    "CapsNetConfig",
    "CapsNetOutput",
    "CapsuleLayer",
    "CapsuleMaps",
    "Capsules",
    "ConvCapsules",
    "Convolution",
    "Decoder",
    "DynamicRouting",
    "EMRouting",
    "InvertedAttention",
    "Iteration",
    "PrimaryCapsules",
    "Routing",
    "SelfAttention",
    "SelfRouting",
    "Trace",
    "UniformRouting",
    "VariationalBayes",
    "batch_graph",
    "bind",
    "capsnet_loss",
    "complete_graph",
    "conv_graph",
    "dynamic_routing",
    "graph_from_edge_index",
    "length",
    "margin_loss",
    "nll_loss",
    "reconstruction_loss",
    "reference",
    "routing_graph",
    "spread_loss",
    "squash",
    "uniform_routing",
]
