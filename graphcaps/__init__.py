"""Capsule networks whose routing is message passing on batched bipartite DGL graphs."""

import sys

from graphcaps import _interrupt  # noqa: F401, before what takes long

__version__ = "0.1.0"

if "graphcaps.install_dgl" not in sys.orig_argv:  # `python -m` of it must work without DGL
    from graphcaps import reference
    from graphcaps.convolution import ConvCapsules, conv_graph
    from graphcaps.engines import bind
    from graphcaps.functional import length, squash
    from graphcaps.graph import batch_graph, complete_graph, routing_graph
    from graphcaps.layers import CapsuleLayer, Capsules, PrimaryCapsules
    from graphcaps.nets import (
        CapsNet,
        CapsNetConfig,
        CapsNetOutput,
        Convolution,
        Decoder,
        capsnet_loss,
        margin_loss,
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
    "length",
    "margin_loss",
    "reconstruction_loss",
    "reference",
    "routing_graph",
    "spread_loss",
    "squash",
    "uniform_routing",
]
