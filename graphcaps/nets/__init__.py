"""Whole nets: images to class capsules and reconstructions, and their losses."""

from graphcaps.nets.decoder import Decoder
from graphcaps.nets.losses import capsnet_loss, margin_loss, reconstruction_loss, spread_loss
from graphcaps.nets.model import CapsNet, CapsNetConfig, CapsNetOutput, Convolution

__all__ = [
    "CapsNet",
    "CapsNetConfig",
    "CapsNetOutput",
    "Convolution",
    "Decoder",
    "capsnet_loss",
    "margin_loss",
    "reconstruction_loss",
    "spread_loss",
]
