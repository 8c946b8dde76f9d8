"""CapsNet: from images to class capsules, their lengths and a reconstruction."""

import math
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphcaps.convolution import ConvCapsules, places
from graphcaps.files import (
    json_bytes,
    named_in_errors,
    parse_record,
    read_record,
    record,
    write_whole,
)
from graphcaps.functional import (
    exponential_squash,
    length,
    multi_hot,
    predicted_classes,
    squash,
)
from graphcaps.graph import complete_graph, routing_graph
from graphcaps.layers import CapsuleLayer, Capsules, PrimaryCapsules
from graphcaps.nets.control import FullyConnected
from graphcaps.nets.decoder import Decoder
from graphcaps.nets.weights import (
    check_weights,
    first_difference,
    load_weights,
    read_shapes,
    save_weights,
)
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
BEST = "best"  # the folder of a run's best epoch, in the run's folder
PRETRAINED = Path(__file__).parent / "pretrained"

SQUASHES = {"squash": squash, "exponential_squash": exponential_squash}

MOST_ITERATIONS = 1000  # limit for nets read from files, so that a bad file cannot run for days


@record
@dataclass(frozen=True)
class Convolution:
    """A convolution of the encoder, with ReLU and then, if asked for, batch normalisation.

    Args:
        channels: of its output.
        kernel_size: height and width of its kernels, in pixels.
        stride: in pixels.
        padding: zeros on every side, in pixels.
        batch_norm: normalise its output over the batch.

    >>> config = CapsNetConfig(convolutions=(Convolution(32, 5, stride=2), Convolution(64, 3)))
    >>> config.grid_size()
    (1, 1)
    """

    channels: int
    kernel_size: int
    stride: int = 1
    padding: int = 0
    batch_norm: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self, may_be_0=("padding",))


@record
@dataclass(frozen=True)
class CapsuleMaps:
    """A layer of convolutional capsules between primary and class capsules.

    Args:
        maps: capsules at each position.
        kernel_size: rows and columns of a window, in positions.
        stride: in positions.

    >>> CapsNetConfig(hidden=(CapsuleMaps(8, 3),)).grid_size()
    (4, 4)
    """

    maps: int
    kernel_size: int
    stride: int = 1

    def __post_init__(self) -> None:
        _check_sizes(self, may_be_0=())


@record
@dataclass(frozen=True)
class CapsNetConfig:
    """Sizes of a CapsNet; the defaults are the paper's (Sabour et al. 2017, section 4).

    Args:
        image_channels: channels of an image.
        image_size: height and width of an image, in pixels; one number for both if they are equal.
        classes: number of classes, hence of class capsules, J.
        conv_channels: channels of the first convolution, without `convolutions`.
        kernel_size: height and width of its kernels and those of the primary capsules, in pixels.
        capsule_maps: maps of primary capsules.
        child_dim: numbers in the pose of a primary or hidden capsule.
        parent_dim: numbers in the pose of a class capsule.
        routing: a name in `ROUTINGS`; None for fully connected layers instead of capsules.
        iterations: routing iterations, if the routing has any.
        decoder_hidden: sizes of the decoder's hidden layers, or None for no decoder.
        rows: rows of a pose; 1 for vectors.
        convolutions: the encoder; by default one convolution of `conv_channels`.
        primary_kernel: height and width of the primary capsules' kernels, in pixels; `kernel_size`
            by default.
        primary_stride: of the primary capsules' convolution, in pixels.
        primary_padding: of the primary capsules' convolution, in pixels.
        depthwise: primary capsules do not mix the encoder's channels.
        primary_squash: squash of the primary capsules' poses.
        hidden: layers of convolutional capsules between primary and class capsules.
        shared: one matrix for each capsule map and class; votes then have coordinates.
        class_names: names of the classes; their numbers by default.
        image_kind: how an image file is read, see `read_digit`, `read_item` and `read_picture` of
            `graphcaps.data`.
        labels_per_image: number of classes to predict, those of the longest capsules; 0 for all
            classes with a capsule longer than 0.5.

    Raises:
        ValueError: a size below 1, an unknown routing, poses that `rows` does not divide.

    >>> CapsNetConfig(image_size=32, image_channels=3).grid_size()
    (8, 8)
    """

    image_channels: int = 1
    image_size: int | tuple[int, int] = 28
    classes: int = 10
    conv_channels: int = 256
    kernel_size: int = 9
    capsule_maps: int = 32
    child_dim: int = 8
    parent_dim: int = 16
    routing: str | None = "dynamic"
    iterations: int = 3
    decoder_hidden: tuple[int, ...] | None = (512, 1024)
    rows: int = 1
    convolutions: tuple[Convolution, ...] = ()
    primary_kernel: int | None = None
    primary_stride: int = 2
    primary_padding: int = 0
    depthwise: bool = False
    primary_squash: Literal["squash", "exponential_squash"] = "squash"
    hidden: tuple[CapsuleMaps, ...] = ()
    shared: bool = False
    class_names: tuple[str, ...] | None = None
    image_kind: Literal["digit", "item", "picture"] = "digit"
    labels_per_image: int = 1

    def __post_init__(self) -> None:
        if self.routing is not None:
            options_of(self.routing)
        elif self.hidden or self.shared:
            raise ValueError("a net without routing has no hidden capsules and shares no matrices")
        if self.depthwise and self.primary.channels % self.encoder[-1].channels:
            raise ValueError(
                f"depthwise primary capsules need a multiple of the encoder's "
                f"{self.encoder[-1].channels} channels; got {self.primary.channels}"
            )
        _check_sizes(self, may_be_0=("primary_padding", "labels_per_image"))
        if isinstance(self.image_size, tuple) and self.image_size[0] == self.image_size[1]:
            object.__setattr__(self, "image_size", self.image_size[0])
        if self.iterations > MOST_ITERATIONS:
            raise ValueError(f"iterations must be at most {MOST_ITERATIONS}; got {self.iterations}")
        if self.child_dim % self.rows or self.parent_dim % self.rows:
            raise ValueError(
                f"poses of {self.rows} rows need child_dim and parent_dim to be multiples of "
                f"{self.rows}; got {self.child_dim} and {self.parent_dim}"
            )
        if self.class_names is not None and len(self.class_names) != self.classes:
            raise ValueError(
                f"expected names of {self.classes} classes; got {len(self.class_names)}"
            )
        if self.labels_per_image > self.classes:
            raise ValueError(
                f"labels_per_image must be at most the {self.classes} classes; "
                f"got {self.labels_per_image}"
            )

    def make_routing(self) -> Routing:
        """The routing of a layer of capsules, with the configured number of iterations.

        Raises:
            ValueError: a net without capsules.
        """
        if self.routing is None:
            raise ValueError("this net has no routing")
        has_iterations = "iterations" in options_of(self.routing)
        return make_routing(
            self.routing, **({"iterations": self.iterations} if has_iterations else {})
        )

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, or their numbers."""
        return self.class_names or tuple(map(str, range(self.classes)))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.image_channels, height, width

    @property
    def has_activations(self) -> bool:
        """Whether capsules have activations beside their poses."""
        return self.routing in ROUTINGS and ROUTINGS[self.routing].activations

    @property
    def child_maps(self) -> int:
        """Maps of the capsules that vote for the class capsules."""
        return self.hidden[-1].maps if self.hidden else self.capsule_maps

    @property
    def encoder(self) -> tuple[Convolution, ...]:
        """The convolutions before the primary capsules."""
        return self.convolutions or (Convolution(self.conv_channels, self.kernel_size),)

    @property
    def primary(self) -> Convolution:
        """The convolution of the primary capsules."""
        return Convolution(
            self.capsule_maps * (self.child_dim + self.has_activations),
            self.primary_kernel or self.kernel_size,
            self.primary_stride,
            self.primary_padding,
        )

    @property
    def _windows(self) -> tuple["Convolution | CapsuleMaps", ...]:
        """All layers with windows, from the image to the capsules that vote for classes."""
        return (*self.encoder, self.primary, *self.hidden)

    def grid_size(self) -> tuple[int, int]:
        """Rows and columns, in capsules, of each map of capsules that vote for classes.

        Raises:
            ValueError: images too small for the convolutions.
        """
        layers, (_, *size) = self._windows, self.image_shape
        grid = [_positions(number, layers) for number in size]
        if min(grid) < 1:
            least = 1
            for layer in reversed(layers):
                least = (least - 1) * layer.stride + layer.kernel_size
                least = max(1, least - 2 * _padding(layer))
            pixels = " × ".join(map(str, size if size[0] != size[1] else size[:1]))
            raise ValueError(
                f"images of {pixels} pixels are too small for the convolutions of this net: they "
                f"need at least {least}"
            )
        return grid[0], grid[1]

    def receptive_field(self) -> int:
        """Height and width, in pixels, of the receptive field of such a capsule."""
        side, step = 1, 1
        for layer in self._windows:
            side += (layer.kernel_size - 1) * step
            step *= layer.stride
        return side

    def field_stride(self) -> int:
        """Pixels from the receptive field of one such capsule to the next."""
        return math.prod(layer.stride for layer in self._windows)

    def field_start(self) -> int:
        """First row and column, in pixels, of the first receptive field; negative with padding."""
        start, step = 0, 1
        for layer in self._windows:
            start -= _padding(layer) * step
            step *= layer.stride
        return start

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor in the state dict of a net of these sizes, by its name.

        Raises:
            ValueError: images too small for the convolutions.
        """
        children, pose = (
            self.child_maps * math.prod(self.grid_size()),
            self.classes * self.parent_dim,
        )
        shapes: dict[str, tuple[int, ...]] = {}
        entering, number = self.image_channels, 0
        for layer in self.encoder:
            shapes |= _shapes_of(layer, entering, f"conv.{number}")
            if layer.batch_norm:
                for name in ("weight", "bias", "running_mean", "running_var"):
                    shapes[f"conv.{number + 2}.{name}"] = (layer.channels,)
                shapes[f"conv.{number + 2}.num_batches_tracked"] = ()
            entering, number = layer.channels, number + 2 + layer.batch_norm
        groups = entering if self.depthwise else 1
        shapes |= _shapes_of(self.primary, entering // groups, "primary.conv")
        maps = self.capsule_maps
        for number, hidden in enumerate(self.hidden):
            kinds = hidden.kernel_size**2 * maps * hidden.maps
            sizes = Sizes(kinds, hidden.maps, self.rows, self.child_dim)
            shapes |= self._layer_shapes(sizes, f"hidden.{number}.layer")
            maps = hidden.maps
        if self.routing is None:
            shapes |= {
                "capsules.hidden.weight": (pose, children * self.child_dim),
                "capsules.hidden.bias": (pose,),
                "capsules.classes.weight": (self.classes, pose),
                "capsules.classes.bias": (self.classes,),
            }
        else:
            kinds = self.classes * (self.child_maps if self.shared else children)
            sizes = Sizes(kinds, self.classes, self.rows, self.parent_dim)
            shapes |= self._layer_shapes(sizes, "capsules")
            if self.shared:
                shapes["capsules.coordinates"] = (children, 2)
        if _needs_score(self):
            shapes |= {"score.weight": (1, self.parent_dim), "score.bias": (1,)}
        if self.decoder_hidden is not None:
            layers = pairwise((pose, *self.decoder_hidden, math.prod(self.image_shape)))
            for number, (entering, leaving) in enumerate(layers):
                shapes[f"decoder.layers.{2 * number}.weight"] = (leaving, entering)
                shapes[f"decoder.layers.{2 * number}.bias"] = (leaving,)
        return shapes

    def _layer_shapes(self, sizes: Sizes, name: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the parameters of a capsule layer whose children have `child_dim`."""
        routing, rows = self.make_routing(), self.rows
        with torch.device("meta"):
            routing.build(sizes)
        k, d = self.child_dim // rows, sizes.parent_dim // rows + routing.vote_columns
        learned = routing.named_parameters()
        of_routing = {f"{name}.routing.{key}": tuple(value.shape) for key, value in learned}
        return {f"{name}.weight": (sizes.kinds, k, d)} | of_routing


def _padding(layer: Convolution | CapsuleMaps) -> int:
    return layer.padding if isinstance(layer, Convolution) else 0


def _check_sizes(config: Any, may_be_0: tuple[str, ...]) -> None:
    for name, value in vars(config).items():
        for size in value if isinstance(value, tuple) else (value,):
            if type(size) is int and size < (name not in may_be_0):
                raise ValueError(f"{name} must be at least {int(name not in may_be_0)}; got {size}")


def _positions(size: int, layers: tuple[Convolution | CapsuleMaps, ...]) -> int:
    for layer in layers:
        size = (size + 2 * _padding(layer) - layer.kernel_size) // layer.stride + 1
        if size < 1:
            return 0
    return size


def _shapes_of(layer: Convolution, entering: int, name: str) -> dict[str, tuple[int, ...]]:
    size = layer.kernel_size
    return {
        f"{name}.weight": (layer.channels, entering, size, size),
        f"{name}.bias": (layer.channels,),
    }


_SMALL = CapsNetConfig(conv_channels=64, capsule_maps=8)
_MATRICES = CapsNetConfig(
    child_dim=16,
    parent_dim=16,
    rows=4,
    routing="em",
    iterations=2,
    decoder_hidden=None,
    primary_kernel=1,
    primary_stride=1,
    shared=True,
)
_EFFICIENT = CapsNetConfig(
    convolutions=(
        Convolution(32, 5, batch_norm=True),
        Convolution(64, 3, batch_norm=True),
        Convolution(64, 3, batch_norm=True),
        Convolution(128, 3, stride=2, batch_norm=True),
    ),
    capsule_maps=16,
    primary_kernel=9,
    primary_stride=1,
    depthwise=True,
    primary_squash="exponential_squash",
    routing="self_attention",
)
PRESETS = {
    "paper": CapsNetConfig(),
    "small": _SMALL,
    # Mazzia, Salvetti & Chiaberge 2021: 161,824 parameters without the decoder
    "efficient": _EFFICIENT,
    # the same paper's net for MultiMNIST, 154,656 parameters without the decoder on 32 × 32 pixels
    "efficient-multi": replace(
        _EFFICIENT,
        convolutions=(
            *_EFFICIENT.convolutions[:2],
            Convolution(64, 3, stride=2, batch_norm=True),
            _EFFICIENT.convolutions[3],
        ),
        primary_kernel=5,
        decoder_hidden=(128, 256),
    ),
    # Hinton, Sabour & Frosst 2018, section 4: A = 64, B = 8, C = D = 16; and 32 for all of them
    "em-small": replace(
        _MATRICES,
        convolutions=(Convolution(64, 5, stride=2),),
        capsule_maps=8,
        hidden=(CapsuleMaps(16, 3, stride=2), CapsuleMaps(16, 3)),
    ),
    "em": replace(
        _MATRICES,
        convolutions=(Convolution(32, 5, stride=2),),
        hidden=(CapsuleMaps(32, 3, stride=2), CapsuleMaps(32, 3)),
    ),
    # three layers of routed capsules
    "deep": CapsNetConfig(
        convolutions=(Convolution(32, 5, stride=2), Convolution(64, 3)),
        capsule_maps=8,
        child_dim=16,
        rows=4,
        primary_kernel=3,
        primary_stride=1,
        hidden=(CapsuleMaps(8, 3, stride=2), CapsuleMaps(8, 3)),
        routing="attention",
        iterations=2,
    ),
    # pictures of 224 × 224 pixels in colour
    "photo": CapsNetConfig(
        image_channels=3,
        image_size=224,
        convolutions=(
            Convolution(64, 7, stride=4, padding=3, batch_norm=True),
            Convolution(128, 3, stride=2, padding=1, batch_norm=True),
            Convolution(256, 3, stride=2, padding=1, batch_norm=True),
            Convolution(256, 3, stride=2, padding=1, batch_norm=True),
        ),
        capsule_maps=16,
        primary_kernel=3,
        primary_stride=1,
        primary_padding=1,
        decoder_hidden=None,
    ),
    # controls without capsules: the same convolutions, decoder and number of parameters
    "cnn": replace(_SMALL, routing=None),
    "cnn-paper": CapsNetConfig(routing=None),
}
OF_A_CLASS = ("capsules.", "decoder.layers.0.")  # weights that belong to classes
MATRIX_POSES = dict(child_dim=16, parent_dim=16, rows=4)  # 4×4, as in the papers


def pretrained_names() -> list[str]:
    """The names of the trained nets that ship with the library."""
    return sorted(folder.name for folder in PRETRAINED.iterdir() if folder.is_dir())


def find_net(name: Path | str) -> Path:
    """The folder of a trained net.

    Args:
        name: a run's folder, whose best epoch is used; a folder with `model.safetensors`; or the
            name of a net that ships with the library.

    Raises:
        FileNotFoundError: there is no such net.
    """
    for folder in (Path(name), Path(name) / BEST, PRETRAINED / Path(name).name):
        if (folder / CONFIG).exists() and (folder.parent != PRETRAINED or str(name) == folder.name):
            return folder
    raise FileNotFoundError(
        f"no trained net at {name}: expected the folder of a run that has finished an epoch "
        "(graphcaps train makes one), one with model.safetensors and model.json, or the name of a "
        f"net that comes with graphcaps ({', '.join(pretrained_names())})"
    )


def _needs_score(config: CapsNetConfig) -> bool:
    if config.routing is None:
        return False
    routing = ROUTINGS[config.routing]
    return not routing.activations and not routing.length_is_activation


def _make_encoder(config: CapsNetConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    entering = config.image_channels
    for layer in config.encoder:
        layers += [
            nn.Conv2d(entering, layer.channels, layer.kernel_size, layer.stride, layer.padding),
            nn.ReLU(),
        ]
        if layer.batch_norm:
            layers.append(nn.BatchNorm2d(layer.channels))
        entering = layer.channels
    return nn.Sequential(*layers)


def _make_primary(config: CapsNetConfig, channels: int) -> PrimaryCapsules:
    convolution = config.primary
    end = F.relu if config.routing is None else SQUASHES[config.primary_squash]
    return PrimaryCapsules(
        channels,
        config.capsule_maps,
        config.child_dim,
        convolution.kernel_size,
        convolution.stride,
        padding=convolution.padding,
        activations=config.has_activations,
        depthwise=config.depthwise,
        squash=end,
    )


def _make_hidden(config: CapsNetConfig, grid: tuple[int, int], engine: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    maps, (rows, columns) = config.capsule_maps, grid
    for layer in config.hidden:
        made = ConvCapsules(
            rows,
            columns,
            maps,
            layer.maps,
            child_dim=config.child_dim,
            parent_dim=config.child_dim,
            kernel_size=layer.kernel_size,
            stride=layer.stride,
            routing=config.make_routing(),
            rows=config.rows,
            engine=engine,
        )
        maps, rows, columns = layer.maps, made.height, made.width
        layers.append(made)
    return nn.Sequential(*layers)


def _draw_larger(layer: CapsuleLayer) -> None:
    """Initialise matrices from N(0, n/4K) for n votes per parent and rows of K numbers.

    The mean of n independent votes is then half as large as a child's pose. With a standard
    deviation of 0.1, poses shrink from layer to layer to far below the smallest variance of EM, and
    the net does not learn.
    """
    votes = layer.structure.edges / layer.structure.parents
    nn.init.normal_(layer.weight, std=math.sqrt(votes / layer.weight.shape[1]) / 2)


def _make_class_capsules(
    config: CapsNetConfig, grid: tuple[int, int], engine: str
) -> CapsuleLayer | FullyConnected:
    maps, (rows, columns) = config.child_maps, grid
    children = maps * rows * columns
    if config.routing is None:
        return FullyConnected(children, config.child_dim, config.classes, config.parent_dim)
    graph, coordinates = complete_graph(children, config.classes), None
    if config.shared:
        of_map = torch.arange(maps).repeat_interleave(rows * columns)
        child, parent = graph.edges()
        graph = routing_graph(
            child, parent, weight_index=of_map[child.long()] * config.classes + parent.long()
        )
        coordinates = places(rows, columns, maps)
    return CapsuleLayer(
        graph,
        config.child_dim,
        config.parent_dim,
        routing=config.make_routing(),
        rows=config.rows,
        engine=engine,
        coordinates=coordinates,
    )


def _make_decoder(config: CapsNetConfig) -> Decoder | None:
    if config.decoder_hidden is None:
        return None
    return Decoder(config.classes, config.parent_dim, config.image_shape, config.decoder_hidden)


def _features_of(encoder: nn.Module, config: CapsNetConfig) -> tuple[int, ...]:
    """Channels, rows and columns of what an encoder computes from an image."""
    weight = next(encoder.parameters(), torch.empty(0))
    was_training = encoder.training
    with torch.no_grad():
        features = encoder.eval()(weight.new_zeros(1, *config.image_shape))
    encoder.train(was_training)
    if not isinstance(features, Tensor) or features.dim() != 4 or len(features) != 1:
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise ValueError(
            f"expected an encoder that gives feature maps [batch, channels, rows, columns] for "
            f"images [batch, {', '.join(map(str, config.image_shape))}]; got {got} for one image"
        )
    return tuple(features.shape[1:])


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
        encoder: computes feature maps, `[B, channels, rows, columns]`, from images, instead of the
            configuration's convolutions; it is called once with an image of zeros. A net with an
            encoder of your own cannot be saved by `save`.

    Raises:
        ValueError: images too small for the convolutions, an unknown engine, or an encoder whose
            output is not a feature map.

    >>> import torch
    >>> model = CapsNet.from_preset("small")
    >>> output = model(torch.rand(2, 1, 28, 28))
    >>> output.lengths.shape, output.reconstruction.shape
    (torch.Size([2, 10]), torch.Size([2, 1, 28, 28]))
    >>> encoder = nn.Sequential(nn.Conv2d(3, 32, 3, stride=4), nn.ReLU())
    >>> config = CapsNetConfig(3, image_size=(64, 96), classes=2, capsule_maps=4)
    >>> CapsNet(config, encoder=encoder)(torch.rand(2, 3, 64, 96)).lengths.shape
    torch.Size([2, 2])
    """

    def __init__(
        self, config: CapsNetConfig, *, engine: str = "auto", encoder: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.conv: nn.Module = _make_encoder(config) if encoder is None else encoder
        if encoder is None:
            channels = config.encoder[-1].channels
            size = [_positions(number, config.encoder) for number in config.image_shape[1:]]
            config.grid_size()  # which refuses images that are too small
        else:
            channels, *size = _features_of(encoder, config)
            if min(_positions(number, (config.primary, *config.hidden)) for number in size) < 1:
                raise ValueError(
                    f"the encoder's feature maps of {size[0]} × {size[1]} are too small for "
                    f"primary capsules of {config.primary.kernel_size} pixels and what follows"
                )
        self.primary = _make_primary(config, channels)
        rows, columns = (_positions(number, (config.primary,)) for number in size)
        self.hidden = _make_hidden(config, (rows, columns), engine)
        self._primary_grid = (config.capsule_maps, rows, columns)
        rows, columns = (_positions(number, config.hidden) for number in (rows, columns))
        # a CapsuleLayer; of a control without capsules, FullyConnected
        self.capsules: Any = _make_class_capsules(config, (rows, columns), engine)
        if config.hidden and config.has_activations:
            for layer in self.modules():
                if isinstance(layer, CapsuleLayer):
                    _draw_larger(layer)
        self.score = nn.Linear(config.parent_dim, 1) if _needs_score(config) else None
        self.decoder = _make_decoder(config)

    @classmethod
    def from_preset(
        cls,
        preset: str,
        *,
        engine: str = "auto",
        encoder: nn.Module | None = None,
        **changes: Any,
    ) -> "CapsNet":
        """Make a net of a known size with random weights.

        Args:
            preset: `"paper"` (Sabour et al. 2017; 8,215,568 parameters), `"small"` (2,117,072),
                `"efficient"` (Mazzia et al. 2021; 161,824 without the decoder),
                `"efficient-multi"` (the same for two digits in an image), `"em-small"` and
                `"em"` (Hinton et al. 2018), `"deep"` (three layers of routed capsules), `"photo"`
                (for 224 × 224 pixels in colour), or `"cnn"` and `"cnn-paper"`, controls without
                capsules, of the sizes of small and paper.
            engine: see `CapsuleLayer`.
            encoder: used instead of the preset's convolutions, see `CapsNet`.
            changes: fields of `CapsNetConfig` that differ from the preset. With a `routing` whose
                paper uses pose matrices (em, variational_bayes), poses are 4×4 by default.

        Raises:
            ValueError: an unknown preset or routing, or sizes that do not match.

        >>> model = CapsNet.from_preset("paper", classes=5)
        >>> model.config.classes
        5
        """
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
        if ROUTINGS.get(changes.get("routing", "dynamic"), DynamicRouting).matrix_poses:
            changes = MATRIX_POSES | changes
        return cls(replace(PRESETS[preset], **changes), engine=engine, encoder=encoder)

    @classmethod
    def from_pretrained(
        cls, name: str = "mnist-small", *, engine: str = "auto", **changes: Any
    ) -> "CapsNet":
        """Load a trained net that ships with the library; README.md in its folder describes it.

        Args:
            name: of data set and preset: `"mnist-small"`, `"fashion-mnist-efficient"` or
                `"multi-mnist-efficient"`.
            engine: see `CapsuleLayer`.
            changes: fields of the configuration that differ, such as `classes`, to train further
                on other images; see `load`.

        Returns:
            The net on the CPU, in evaluation mode.

        Raises:
            ValueError: an unknown name, or sizes that do not match.

        >>> CapsNet.from_pretrained("mnist-small").config.capsule_maps
        8
        >>> CapsNet.from_pretrained("mnist-small", classes=3).capsules.graph.num_nodes("parent")
        3
        """
        names = pretrained_names()
        if name not in names:
            raise ValueError(f"unknown trained net {name!r}; choose one of {', '.join(names)}")
        return cls.load(PRETRAINED / name, engine=engine, **changes).eval()

    @classmethod
    def load(cls, folder: Path | str, *, engine: str = "auto", **changes: Any) -> "CapsNet":
        """Load a net that `save` wrote, on the CPU.

        Args:
            folder: holds `model.safetensors` and `model.json`.
            engine: see `CapsuleLayer`.
            changes: fields of the configuration to change, to train the net further. Weights whose
                shape changes are initialised again. If `classes` is given, or `class_names` differ,
                so are all weights that belong to a class: the class capsules' matrices, the
                parameters of their routing, and the decoder's first layer.

        Returns:
            The net, in training mode like every new module.

        Raises:
            FileNotFoundError: one of the files is missing.
            ValueError: a damaged file, the weights of another model, or changes that do not fit.
        """
        folder = Path(folder)
        config = read_record(folder / CONFIG, CapsNetConfig)
        try:
            expected = config.parameter_shapes()
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from None
        # checked before allocation, as a bad configuration may need more memory than there is
        found = read_shapes(folder / WEIGHTS)
        different = first_difference(expected, {name: found.get(name) for name in expected})
        if different is not None:
            raise ValueError(f"{folder / WEIGHTS} does not fit {CONFIG} beside it: {different}")
        model = cls(config, engine=engine)
        load_weights(folder / WEIGHTS, model)
        return model._changed(changes) if changes else model

    def save(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write `model.safetensors` and, beside it, the configuration as `model.json`.

        Args:
            folder: created if needed.
            dtype: type to which the weights are rounded; unchanged by default.

        Raises:
            ValueError: `load` could not restore the model: a layer or an encoder is not that of its
                configuration, weights are not finite, or `dtype` is not a floating-point type.
            OSError: a full disk, no permission.
        """
        self.check_can_be_loaded_again()
        check_weights(self, dtype)
        folder = Path(folder)
        with named_in_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CONFIG, json_bytes(asdict(self.config)))
        save_weights(folder / WEIGHTS, self, dtype)

    def _changed(self, changes: dict[str, Any]) -> "CapsNet":
        """A net with another configuration, and with those weights whose shape is unchanged."""
        if "classes" in changes:  # then the names of the classes are no longer valid
            changes = {"class_names": None, "labels_per_image": 1} | changes
        config = replace(self.config, **changes)
        other = "classes" in changes or config.names != self.config.names
        engine = getattr(self.capsules, "engine", "auto")
        changed = type(self)(config, engine=engine)
        weights = changed.state_dict()
        for name, tensor in self.state_dict().items():
            of_class = other and name.startswith(OF_A_CLASS)
            if name in weights and weights[name].shape == tensor.shape and not of_class:
                weights[name] = tensor
        changed.load_state_dict(weights)
        return changed

    def forward(
        self, images: Tensor, labels: Tensor | None = None, *, return_trace: bool = False
    ) -> CapsNetOutput | tuple[CapsNetOutput, Trace]:
        """Route images to class capsules and reconstruct them.

        Args:
            images: in 0…1, `[B, C, H, W]`.
            labels: the capsules to reconstruct from: in training the true classes, `[B]`, or 0
                and 1 in `[B, J]`; by default the classes of `classify`, as in evaluation. If images
                show several classes, see `Decoder.draw_over`.
            return_trace: also return what every iteration of the routing computed.

        Returns:
            Poses, lengths and reconstruction; with `return_trace`, these and a `Trace`.

        Raises:
            ValueError: images whose shape, dtype or device is not the model's, or labels that do
                not match them.
        """
        given = self.primary_capsules(images)
        if return_trace:
            if self.config.routing is None:
                raise ValueError("this net has no capsules whose routing could be traced")
            capsules, trace = self.capsules(*given, return_trace=True)
        else:
            capsules, trace = self.capsules(*given), None
        poses, activations = capsules if isinstance(capsules, Capsules) else (capsules, None)
        lengths = self.confidence(poses, activations)
        reconstruction = None
        if self.decoder is not None:
            chosen = self.classify(lengths) if labels is None else labels
            mask = multi_hot(chosen, images.shape[0], self.config.classes)
            if (most := self.config.labels_per_image) == 1:
                reconstruction = self.decoder(poses, mask)
            else:
                reconstruction = self.decoder.draw_over(poses, mask, most or self.config.classes)
        output = CapsNetOutput(poses, lengths, reconstruction)
        return output if trace is None else (output, trace)

    def primary_capsules(self, images: Tensor) -> tuple[Tensor, ...]:
        """The capsules of images `[B, C, H, W]` that vote for the classes.

        They are the input of `capsules`: the primary capsules, or those of the last hidden layer of
        capsules if there is one.

        Returns:
            Poses, `[B, I, child_dim]`, and activations, `[B, I]`, if the routing has them.

        Raises:
            ValueError: as `forward`.
        """
        self._check_images(images)
        found = self.primary(self.conv(images))
        if self.config.hidden:
            grid = self._primary_grid
            if isinstance(found, Capsules):
                poses, activations = self.hidden(Capsules(*(x.unflatten(1, grid) for x in found)))
                return poses.flatten(1, 3), activations.flatten(1, 3)
            return (self.hidden(found.unflatten(1, grid)).flatten(1, 3),)
        return found if isinstance(found, Capsules) else (found,)

    def confidence(self, poses: Tensor, activations: Tensor | None = None) -> Tensor:
        """The confidence in each class, from 0 to 1.

        Args:
            poses: poses of the class capsules, `[..., J, parent_dim]`.
            activations: their activations, `[..., J]`, if the routing has them.

        Returns:
            `[..., J]`.
        """
        if self.score is not None:
            return self.score(poses).squeeze(-1).sigmoid()
        return length(poses) if activations is None else activations

    def classify(self, lengths: Tensor) -> Tensor:
        """Predict classes, `[B]` or `[B, J]`, from lengths `[B, J]`; see `predicted_classes`."""
        return predicted_classes(lengths, self.config.labels_per_image)

    @property
    def loss(self) -> Literal["margin", "spread", "nll"]:
        """The kind of class loss that suits the net, see `capsnet_loss`."""
        routing = self.config.routing
        return "nll" if routing is None else ROUTINGS[routing].loss

    def check_can_be_loaded_again(self) -> None:
        """Raise ValueError if `load` could not restore the model from its configuration."""
        try:
            expected = self.config.parameter_shapes()
            again = parse_record(json_bytes(asdict(self.config)), CapsNetConfig, CONFIG)
            different = None if again == self.config else f"{CONFIG} would say {again}"
        except (ValueError, TypeError) as error:
            raise ValueError(f"the model's config could not be read again: {error}") from None
        if different is None:
            here = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
            different = first_difference(expected, here)
        if different is None:
            different = self._first_other_part()
        if different is not None:
            raise ValueError(
                f"the model does not match its config and could not be loaded again: "
                f"{different}; save its state_dict(), or give the model a config that fits"
            )

    def _first_other_part(self) -> str | None:
        config = self.config
        with torch.device("meta"):
            parts = {
                "conv": (_make_encoder(config), self.conv),
                "primary": (_make_primary(config, config.encoder[-1].channels), self.primary),
                "decoder": (_make_decoder(config), self.decoder),
            }
        for layer in (*(hidden.layer for hidden in self.hidden), self.capsules):
            if isinstance(layer, CapsuleLayer):
                told, found = map(_options, (config.make_routing(), layer.routing))
                if told != found:
                    return f"the configuration has {told}, the model {found}"
        for name, (expected, here) in parts.items():
            if repr(expected) != repr(here):
                return f"for {name} the configuration has {expected}, the model {here}"
        layer = self.capsules
        if isinstance(layer, CapsuleLayer) and not config.shared and not layer.structure.complete:
            return "the class capsules are not fully connected"
        return None

    def _check_images(self, images: Tensor) -> None:
        weight = next(self.parameters())
        shape = self.config.image_shape
        if images.dim() != 4 or images.shape[1:] != shape:
            raise ValueError(
                f"expected images of shape [batch, {', '.join(map(str, shape))}]; "
                f"got {list(images.shape)}"
            )
        if images.dtype != weight.dtype or images.device != weight.device:
            raise ValueError(
                f"expected images in {weight.dtype} from 0 to 1 on {weight.device}, as the model; "
                f"got {images.dtype} on {images.device}"
            )
