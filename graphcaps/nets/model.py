"""CapsNet: from images to class capsules, their lengths and a reconstruction."""

from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from graphcaps.files import json_bytes, named_in_errors, read_record, record, write_whole
from graphcaps.functional import length, multi_hot
from graphcaps.graph import complete_graph
from graphcaps.layers import CapsuleLayer, Capsules, PrimaryCapsules
from graphcaps.nets.decoder import Decoder
from graphcaps.nets.weights import first_difference, load_weights, read_shapes, save_weights
from graphcaps.routing import (
    ROUTINGS,
    DynamicRouting,
    Routing,
    Sizes,
    Trace,
    make_routing,
    options_of,
)

WEIGHTS, CONFIG = "model.safetensors", "model.json"
PRETRAINED = Path(__file__).parent / "pretrained"

PRIMARY_STRIDE = 2  # pixels from one primary capsule to the next (Sabour et al. 2017, section 4)

MOST_ITERATIONS = 1000  # limit for nets read from files, so that a bad file cannot run for days


@record
@dataclass(frozen=True)
class CapsNetConfig:
    """Sizes of a CapsNet; the defaults are the paper's (Sabour et al. 2017, section 4).

    Args:
        image_channels: channels of an image.
        image_size: height and width of an image, in pixels.
        classes: number of classes, hence of class capsules, J.
        conv_channels: channels of the first convolution.
        kernel_size: height and width of the kernels of both convolutions, in pixels.
        capsule_maps: maps of primary capsules.
        child_dim: numbers in the pose of a primary capsule.
        parent_dim: numbers in the pose of a class capsule.
        routing: a name in `ROUTINGS`.
        iterations: routing iterations, if the routing has any.
        decoder_hidden: sizes of the decoder's hidden layers, or None for no decoder.
        rows: rows of a pose; 1 for vectors.

    Raises:
        ValueError: a size below 1, an unknown routing, poses that `rows` does not divide.

    >>> CapsNetConfig(image_size=32, image_channels=3).grid_size()
    8
    """

    image_channels: int = 1
    image_size: int = 28
    classes: int = 10
    conv_channels: int = 256
    kernel_size: int = 9
    capsule_maps: int = 32
    child_dim: int = 8
    parent_dim: int = 16
    routing: str = "dynamic"
    iterations: int = 3
    decoder_hidden: tuple[int, ...] | None = (512, 1024)
    rows: int = 1

    def __post_init__(self) -> None:
        options_of(self.routing)
        sizes = [(name, size) for name, size in vars(self).items() if type(size) is int]
        for name, size in [*sizes, *(("decoder_hidden", s) for s in self.decoder_hidden or ())]:
            if size < 1:
                raise ValueError(f"{name} must be at least 1; got {size}")
        if self.iterations > MOST_ITERATIONS:
            raise ValueError(f"iterations must be at most {MOST_ITERATIONS}; got {self.iterations}")
        if self.child_dim % self.rows or self.parent_dim % self.rows:
            raise ValueError(
                f"poses of {self.rows} rows need child_dim and parent_dim to be multiples of "
                f"{self.rows}; got {self.child_dim} and {self.parent_dim}"
            )

    def make_routing(self) -> Routing:
        """The routing of the class capsules, with the configured number of iterations."""
        has_iterations = "iterations" in options_of(self.routing)
        return make_routing(
            self.routing, **({"iterations": self.iterations} if has_iterations else {})
        )

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
        """Height and width, in pixels, of the receptive field of a primary capsule."""
        return 2 * self.kernel_size - 1

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter of a net of these sizes, by its name in the state dict.

        Raises:
            ValueError: images too small for the convolutions.
        """
        routing, k = self.make_routing(), self.kernel_size
        channels = self.capsule_maps * (self.child_dim + routing.activations)
        edges = self.capsule_maps * self.grid_size() ** 2 * self.classes
        with torch.device("meta"):
            routing.build(Sizes(edges, self.classes, self.rows, self.parent_dim))
        shapes: dict[str, tuple[int, ...]] = {
            "conv.0.weight": (self.conv_channels, self.image_channels, k, k),
            "conv.0.bias": (self.conv_channels,),
            "primary.conv.weight": (channels, self.conv_channels, k, k),
            "primary.conv.bias": (channels,),
            "capsules.weight": (
                edges,
                self.child_dim // self.rows,
                self.parent_dim // self.rows + routing.vote_columns,
            ),
            **{
                f"capsules.routing.{name}": tuple(parameter.shape)
                for name, parameter in routing.named_parameters()
            },
        }
        if _needs_score(routing):
            shapes |= {"score.weight": (1, self.parent_dim), "score.bias": (1,)}
        if self.decoder_hidden is not None:
            pixels = self.image_channels * self.image_size**2
            sizes = (self.classes * self.parent_dim, *self.decoder_hidden, pixels)
            for number, (entering, leaving) in enumerate(pairwise(sizes)):
                shapes[f"decoder.layers.{2 * number}.weight"] = (leaving, entering)
                shapes[f"decoder.layers.{2 * number}.bias"] = (leaving,)
        return shapes


PRESETS = {
    "paper": CapsNetConfig(),
    "small": CapsNetConfig(conv_channels=64, capsule_maps=8),
}
MATRIX_POSES = dict(child_dim=16, parent_dim=16, rows=4)  # 4×4, as in the papers


def _needs_score(routing: Routing) -> bool:
    return not routing.activations and not routing.length_is_activation


def _options(routing: Routing) -> str:
    return f"{type(routing).__name__}({routing.extra_repr()})"


class CapsNetOutput(NamedTuple):
    """The output of a CapsNet for a batch of images.

    Attributes:
        poses: class capsules v, `[B, J, D]`.
        lengths: how sure the net is of each class, from 0 to 1: |v| or activations, `[B, J]`.
        reconstruction: `[B, C, H, W]`, or None without a decoder.

    >>> import torch
    >>> output = CapsNet.from_preset("small")(torch.rand(2, 1, 28, 28))
    >>> output.poses.shape
    torch.Size([2, 10, 16])
    """

    poses: Tensor
    lengths: Tensor
    reconstruction: Tensor | None


class CapsNet(nn.Module):
    """Convolution, primary capsules, class capsules routed on a DGL graph, and a decoder.

    The confidence in a class depends on the routing: it is the length of the class capsule, or its
    activation if the routing has activations, or for `attention` the sigmoid of a linear function
    of the pose that all classes share (`score`).

    Args:
        config: the sizes.
        engine: how messages are passed, see `CapsuleLayer`; not part of a checkpoint.

    Raises:
        ValueError: images too small for the convolutions, or an unknown engine.

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
        routing = config.make_routing()
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
            activations=routing.activations,
        )
        self.capsules = CapsuleLayer(
            complete_graph(children, config.classes),
            config.child_dim,
            config.parent_dim,
            routing=routing,
            rows=config.rows,
            engine=engine,
        )
        self.score = nn.Linear(config.parent_dim, 1) if _needs_score(routing) else None
        self.decoder = (
            None
            if config.decoder_hidden is None
            else Decoder(
                config.classes, config.parent_dim, self._image_shape, config.decoder_hidden
            )
        )

    @classmethod
    def from_preset(cls, preset: str, *, engine: str = "auto", **changes: Any) -> "CapsNet":
        """Make a net of a known size with random weights.

        Args:
            preset: `"paper"` (8,215,568 parameters) or `"small"` (2,117,072).
            engine: see `CapsuleLayer`.
            changes: fields of `CapsNetConfig` that differ from the preset. With a `routing` whose
                paper uses pose matrices (em, variational_bayes), poses are 4×4 by default.

        Raises:
            ValueError: an unknown preset or routing, sizes that do not fit.

        >>> model = CapsNet.from_preset("paper", classes=5)
        >>> model.config.classes
        5
        """
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
        if ROUTINGS.get(changes.get("routing", "dynamic"), DynamicRouting).matrix_poses:
            changes = MATRIX_POSES | changes
        return cls(replace(PRESETS[preset], **changes), engine=engine)

    @classmethod
    def from_pretrained(cls, name: str = "mnist-small", *, engine: str = "auto") -> "CapsNet":
        """Load a trained net that ships with the library; README.md in its folder describes it.

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
        """Load a net that `save` wrote, on the CPU.

        Args:
            folder: holds `model.safetensors` and `model.json`.
            engine: see `CapsuleLayer`.

        Returns:
            The net, in training mode like every new module.

        Raises:
            FileNotFoundError: one of the files is missing.
            ValueError: a damaged file, or the weights of another model.
        """
        folder = Path(folder)
        config = read_record(folder / CONFIG, CapsNetConfig)
        try:
            expected = config.parameter_shapes()
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from None
        # before anything is allocated: a bad configuration may ask for more memory than there is
        found = read_shapes(folder / WEIGHTS)
        different = first_difference(expected, {name: found.get(name) for name in expected})
        if different is not None:
            raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG} beside it: {different}")
        model = cls(config, engine=engine)
        load_weights(folder / WEIGHTS, model)
        return model

    def save(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write `model.safetensors` and, beside it, the configuration as `model.json`.

        Args:
            folder: created if needed.
            dtype: type to which the weights are rounded; unchanged by default.

        Raises:
            ValueError: the model no longer matches its configuration, as after replacing a layer.
            OSError: a full disk, no permission.
        """
        self._check_told_by_config()
        folder = Path(folder)
        with named_in_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CONFIG, json_bytes(asdict(self.config)))
        save_weights(folder / WEIGHTS, self, dtype)

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, return_trace: bool = False
    ) -> CapsNetOutput | tuple[CapsNetOutput, Trace]:
        """Route images to class capsules and reconstruct them.

        Args:
            images: in 0…1, `[B, C, H, W]`.
            labels: the capsules to reconstruct from: in training the true classes, `[B]`, or 0
                and 1 in `[B, J]`; by default the longest capsule, as in evaluation.
            return_trace: also return what every iteration of the routing computed.

        Returns:
            Poses, lengths and reconstruction; with `return_trace`, these and a `Trace`.

        Raises:
            ValueError: images whose shape, dtype or device is not the model's, or labels that do
                not match them.
        """
        given = self.primary_capsules(images)
        if return_trace:
            capsules, trace = self.capsules(*given, return_trace=True)
        else:
            capsules, trace = self.capsules(*given), None
        poses, activations = capsules if isinstance(capsules, Capsules) else (capsules, None)
        lengths = self.confidence(poses, activations)
        reconstruction = None
        if self.decoder is not None:
            chosen = lengths.argmax(dim=1) if labels is None else labels
            reconstruction = self.decoder(
                poses, multi_hot(chosen, images.shape[0], self.config.classes)
            )
        output = CapsNetOutput(poses, lengths, reconstruction)
        return output if trace is None else (output, trace)

    def primary_capsules(self, images: Tensor) -> tuple[Tensor, ...]:
        """The primary capsules of images `[B, C, H, W]`, the input of the class capsules.

        Returns:
            Poses, `[B, I, child_dim]`; with a routing that has activations, these, `[B, I]`, too.

        Raises:
            ValueError: as `forward`.
        """
        self._check_images(images)
        found = self.primary(self.conv(images))
        return found if isinstance(found, Capsules) else (found,)

    def confidence(self, poses: Tensor, activations: Tensor | None = None) -> Tensor:
        """The confidence in each class, from 0 to 1.

        Args:
            poses: of class capsules, `[..., J, parent_dim]`.
            activations: theirs, `[..., J]`, of a routing that has them.

        Returns:
            `[..., J]`.
        """
        if self.score is not None:
            return self.score(poses).squeeze(-1).sigmoid()
        return length(poses) if activations is None else activations

    @property
    def loss(self) -> Literal["margin", "spread", "nll"]:
        """The kind of class loss that suits the routing, see `capsnet_loss`."""
        return self.capsules.routing.loss

    def _check_told_by_config(self) -> None:
        """Refuse to save what `load` could not restore."""
        here = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        different = first_difference(self.config.parameter_shapes(), here)
        told, found = map(_options, (self.config.make_routing(), self.capsules.routing))
        if different is None and told != found:
            different = f"the configuration has {told}, the model {found}"
        if different is None and not self.capsules.structure.complete:
            different = "the class capsules are not fully connected"
        if different is not None:
            raise ValueError(
                f"the model does not match its config and could not be loaded again: "
                f"{different}; save its state_dict(), or give the model a config that fits"
            )

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
