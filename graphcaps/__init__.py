"""Capsule networks whose routing is message passing on batched bipartite DGL graphs."""

import sys

__version__ = "0.1.0"

if "graphcaps.install_dgl" not in sys.orig_argv:  # `python -m` of it must work without DGL
    from graphcaps import reference
    from graphcaps.decoder import Decoder
    from graphcaps.functional import length, squash
    from graphcaps.graph import batch_graph, complete_graph, routing_graph
    from graphcaps.layers import CapsuleLayer, PrimaryCapsules
    from graphcaps.losses import capsnet_loss, margin_loss, reconstruction_loss
    from graphcaps.model import CapsNet, CapsNetConfig, CapsNetOutput
    from graphcaps.passing import bind
    from graphcaps.routing import Iteration, Trace, dynamic_routing, uniform_routing

__all__ = [
    "CapsNet",
    "CapsNetConfig",
    "CapsNetOutput",
    "CapsuleLayer",
    "Decoder",
    "Iteration",
    "PrimaryCapsules",
    "Trace",
    "batch_graph",
    "bind",
    "capsnet_loss",
    "complete_graph",
    "dynamic_routing",
    "length",
    "margin_loss",
    "reconstruction_loss",
    "reference",
    "routing_graph",
    "squash",
    "uniform_routing",
]
