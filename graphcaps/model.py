"""Images enter, class capsules, their lengths and a reconstruction leave."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from graphcaps.decoder import Decoder
from graphcaps.files import json_bytes, named_in_errors, read_json, write_whole
from graphcaps.functional import length, multi_hot
from graphcaps.graph import complete_graph
from graphcaps.layers import CapsuleLayer, PrimaryCapsules
from graphcaps.routing import Trace
from graphcaps.weights import load_weights, save_weights

WEIGHTS, CONFIG = "model.safetensors", "model.json"
PRETRAINED = Path(__file__).parent / "pretrained"

PRIMARY_STRIDE = 2  # pixels from one primary capsule to the next (Sabour et al. 2017, section 4)


@dataclass(frozen=True)
class CapsNetConfig:
    """Sizes of a CapsNet; the defaults are the paper's (Sabour et al. 2017, section 4)."""

    image_channels: int = 1
    image_size: int = 28  # pixels, height and width
    classes: int = 10
    conv_channels: int = 256
    kernel_size: int = 9  # pixels, of both convolutions
    capsule_maps: int = 32
    child_dim: int = 8
    parent_dim: int = 16
    routing: Literal["dynamic", "uniform"] = "dynamic"
    iterations: int = 3
    decoder_hidden: tuple[int, ...] | None = (512, 1024)  # None: no decoder

    def grid_size(self) -> int:
        """Height and width, in capsules, of each capsule map."""
        after_conv = self.image_size - self.kernel_size + 1
        after_primary = (after_conv - self.kernel_size) // PRIMARY_STRIDE + 1
        if after_primary < 1:
            raise ValueError(
                f"images of {self.image_size} pixels are too small for two convolutions of "
                f"{self.kernel_size}: they need at least {2 * self.kernel_size - 1}"
            )
        return after_primary

    def receptive_field(self) -> int:
        """Height and width, in pixels, of what a primary capsule sees of the image."""
        return 2 * self.kernel_size - 1


PRESETS = {
    "paper": CapsNetConfig(),
    "small": CapsNetConfig(conv_channels=64, capsule_maps=8),
}


class CapsNetOutput(NamedTuple):
    """What a CapsNet gives for a batch of images."""

    poses: Tensor  # class capsules v, [B, J, D]
    lengths: Tensor  # |v|, [B, J]
    reconstruction: Tensor | None  # [B, C, H, W], or None without a decoder


class CapsNet(nn.Module):
    """Convolution, primary capsules, class capsules routed on a DGL graph, and a decoder.

    Args:
        config: the sizes.
        engine: how messages are passed, see `CapsuleLayer`; not part of a checkpoint.

    >>> import torch
    >>> model = CapsNet.from_preset("small")
    >>> output = model(torch.rand(2, 1, 28, 28))
    >>> output.lengths.shape, output.reconstruction.shape
    (torch.Size([2, 10]), torch.Size([2, 1, 28, 28]))
    """

    def __init__(self, config: CapsNetConfig, *, engine: str = "auto") -> None:
        super().__init__()
        self.config = config
        children = config.capsule_maps * config.grid_size() ** 2
        self.conv = nn.Sequential(
            nn.Conv2d(config.image_channels, config.conv_channels, config.kernel_size),
            nn.ReLU(),
        )
        self.primary = PrimaryCapsules(
            config.conv_channels,
            config.capsule_maps,
            config.child_dim,
            config.kernel_size,
            PRIMARY_STRIDE,
        )
        self.capsules = CapsuleLayer(
            complete_graph(children, config.classes),
            config.child_dim,
            config.parent_dim,
            routing=config.routing,
            iterations=config.iterations,
            engine=engine,
        )
        self.decoder = (
            None
            if config.decoder_hidden is None
            else Decoder(
                config.classes, config.parent_dim, self._image_shape, config.decoder_hidden
            )
        )

    @classmethod
    def from_preset(cls, preset: str, *, engine: str = "auto", **changes: Any) -> "CapsNet":
        """A net of known sizes with fresh weights.

        Args:
            preset: `"paper"` (8,215,568 parameters) or `"small"` (2,117,072).
            engine: see `CapsuleLayer`.
            changes: fields of `CapsNetConfig` to set otherwise.

        Raises:
            ValueError: an unknown preset.

        >>> model = CapsNet.from_preset("paper", classes=5)
        >>> model.config.classes
        5
        """
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
        return cls(replace(PRESETS[preset], **changes), engine=engine)

    @classmethod
    def from_pretrained(cls, name: str = "mnist-small", *, engine: str = "auto") -> "CapsNet":
        """A trained net that comes with the library; its folder holds a model card, README.md.

        Args:
            name: `"mnist-small"`, the small preset trained on MNIST.
            engine: see `CapsuleLayer`.

        Returns:
            The net on the CPU, in evaluation mode.

        Raises:
            ValueError: an unknown name.

        >>> CapsNet.from_pretrained("mnist-small").config.capsule_maps
        8
        """
        names = sorted(folder.name for folder in PRETRAINED.iterdir() if folder.is_dir())
        if name not in names:
            raise ValueError(f"unknown trained net {name!r}; choose one of {', '.join(names)}")
        return cls.load(PRETRAINED / name, engine=engine).eval()

    @classmethod
    def load(cls, folder: Path | str, *, engine: str = "auto") -> "CapsNet":
        """The net that `save` wrote, on the CPU.

        Args:
            folder: where `model.safetensors` and `model.json` are.
            engine: see `CapsuleLayer`.

        Returns:
            The net, in training mode as every new module.

        Raises:
            FileNotFoundError: one of the files is not there.
            ValueError: one of them is broken, or the weights are those of another model.
        """
        folder = Path(folder)
        settings = read_json(folder / CONFIG)
        known = {field.name for field in fields(CapsNetConfig)}
        if set(settings) != known:
            raise ValueError(
                f"{folder / CONFIG} is not the configuration of a CapsNet: "
                f"expected the fields {sorted(known)}, got {sorted(settings)}"
            )
        try:
            hidden = settings["decoder_hidden"]
            settings["decoder_hidden"] = None if hidden is None else tuple(hidden)
            model = cls(CapsNetConfig(**settings), engine=engine)
        except TypeError as error:
            raise ValueError(
                f"{folder / CONFIG} is not the configuration of a CapsNet: {error}"
            ) from None
        load_weights(folder / WEIGHTS, model)
        return model

    def save(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write `model.safetensors` and, beside it, the configuration as `model.json`.

        Args:
            folder: made if it is not there.
            dtype: what the weights are rounded to; as they are, if not given.

        Raises:
            OSError: a full disk, no permission.
        """
        folder = Path(folder)
        with named_in_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CONFIG, json_bytes(asdict(self.config)))
        save_weights(folder / WEIGHTS, self, dtype)

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, return_trace: bool = False
    ) -> CapsNetOutput | tuple[CapsNetOutput, Trace]:
        """Route images to class capsules and draw them again.

        Args:
            images: in 0…1, `[B, C, H, W]`.
            labels: which capsules are drawn: in training the true classes, `[B]` or 0 and 1 in
                `[B, J]`; without labels, in evaluation, the longest capsule.
            return_trace: give what every iteration of the routing computed, too.

        Returns:
            Poses, lengths and reconstruction; with `return_trace`, these and a `Trace`.

        Raises:
            ValueError: images of another shape, dtype or device than the model's, or labels
                that do not fit them.
        """
        self._check_images(images)
        u = self.primary(self.conv(images))
        if return_trace:
            poses, trace = self.capsules(u, return_trace=True)
        else:
            poses, trace = self.capsules(u), None
        lengths = length(poses)
        reconstruction = None
        if self.decoder is not None:
            chosen = lengths.argmax(dim=1) if labels is None else labels
            reconstruction = self.decoder(
                poses, multi_hot(chosen, len(images), self.config.classes)
            )
        output = CapsNetOutput(poses, lengths, reconstruction)
        return output if trace is None else (output, trace)

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        size = self.config.image_size
        return self.config.image_channels, size, size

    def _check_images(self, images: Tensor) -> None:
        weight = self.capsules.weight
        if images.dim() != 4 or images.shape[1:] != self._image_shape:
            raise ValueError(
                f"expected images of shape [batch, {', '.join(map(str, self._image_shape))}]; "
                f"got {list(images.shape)}"
            )
        if images.dtype != weight.dtype or images.device != weight.device:
            raise ValueError(
                f"expected images in {weight.dtype} from 0 to 1 on {weight.device}, as the model; "
                f"got {images.dtype} on {images.device}"
            )
