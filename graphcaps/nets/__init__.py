"""Whole nets: images to class capsules and reconstructions, and their losses."""

from graphcaps.nets.decoder import Decoder
from graphcaps.nets.losses import (
    capsnet_loss,
    margin_loss,
    nll_loss,
    reconstruction_loss,
    spread_loss,
)
from graphcaps.nets.model import CapsNet, CapsNetConfig, CapsNetOutput, CapsuleMaps, Convolution
from graphcaps.nets.verdict import Verdict, judge, judge_images

__all__ = [
    "CapsNet",
    "CapsNetConfig",
    "CapsNetOutput",
    "CapsuleMaps",
    "Convolution",
    "Decoder",
    "Verdict",
    "capsnet_loss",
    "judge",
    "judge_images",
    "margin_loss",
    "nll_loss",
    "reconstruction_loss",
    "spread_loss",
]
