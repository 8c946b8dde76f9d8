"""The flags of each command, with their defaults and help; this file does not import torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from graphcaps.files import record


def _optional(metavar: str, default: str, name: str | None = None) -> Any:
    """The help for an optional flag: the name of its value, and the default in words."""
    return tyro.conf.arg(name=name, metavar=metavar, help_behavior_hint=f"(default: {default})")


# Comments that start with #: are the help of the field below them, and its text in the
# documentation. A line that does not start with a letter is not joined with the one before it.

SHIPPED = "mnist-small"  # the net of predict and demo

Engine = Literal["auto", "fused", "udf", "builtin", "scatter"]
Preset = Literal[
    "paper",
    "small",
    "efficient",
    "efficient-multi",
    "em-small",
    "em",
    "deep",
    "photo",
    "cnn",
    "cnn-paper",
]
Switch = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


@record
@dataclass(frozen=True)
class TrainSettings:
    """Train a CapsNet, test it once, and write everything to the run's folder."""

    #: The net and its training recipe: the paper's, or a smaller one for CPUs; efficient, em-small
    #: and em are those of other papers, and efficient-multi is for two digits in an image; deep has
    #: three layers of routed capsules, photo is for images of 224 by 224 pixels, and cnn and
    #: cnn-paper are controls without capsules. With auto, it is paper if there is a CUDA device,
    #: otherwise small.
    preset: Literal["auto"] | Preset = "auto"
    #: One of mnist, fashion-mnist, kmnist, cifar10, svhn and mnist-5k (5,000 digits that need no
    #: download); one generated from MNIST: multi-mnist (two digits in an image), rotated-mnist or
    #: affine-mnist (tested on rotated, sheared and scaled digits); or your own: a folder of image
    #: files by class (train/CLASS/ and test/CLASS/, or CLASS/), an .npz file, or a folder with the
    #: files of smallNORB or affNIST or with four IDX files.
    dataset: Annotated[str, tyro.conf.arg(metavar="NAME|PATH")] = "mnist"
    #: Height and width in pixels to which all images are scaled, or one number for both.
    image_size: Annotated[
        tuple[int, ...] | None, _optional("INT [INT]", "that of the images, if all have one")
    ] = None
    #: Folder for downloaded data sets.
    data_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("data")
    #: The run's folder.
    run_dir: Annotated[Path | None, _optional("DIR", "runs/DATASET-PRESET-DATE-TIME")] = None
    #: Continue the run in --run-dir from its last checkpoint, on the same images and with the
    #: settings it was started with. Only --data-dir, --engine, --device and --tensorboard may
    #: differ; --cuda-graph must be given again.
    resume: Switch = False
    #: Fine-tune a net: a run's folder, a folder with model.safetensors, or the name of a net that
    #: ships with graphcaps, such as mnist-small. Images are converted to its size and channels; for
    #: other classes it gets new class capsules. The preset then only selects the training recipe.
    start_from: Annotated[
        str | None, _optional("RUN-DIR|NAME", "a net with random weights", name="from")
    ] = None
    #: Passes over the training images.
    epochs: Annotated[int | None, _optional("INT", "paper 30, small 4; 400 steps or more")] = None
    #: Images per step, summed over all processes.
    batch_size: Annotated[
        int | None, _optional("INT", "paper 128, small 100, or all images if there are fewer")
    ] = None
    #: Learning rate of Adam; with preset small, the peak of the one-cycle schedule. The paper's
    #: rate decays by a factor of 0.96 every 2000 steps.
    learning_rate: Annotated[float | None, _optional("FLOAT", "paper 0.001, small 0.003")] = None
    #: Routing algorithm: dynamic, em, attention, self_attention, self_routing, variational_bayes,
    #: or uniform, which couples all capsules equally, as a control.
    routing: Annotated[str | None, _optional("NAME", "the preset's; paper and small dynamic")] = (
        None
    )
    #: Routing iterations, for routings that iterate.
    iterations: Annotated[int | None, _optional("INT", "the preset's; paper and small 3")] = None
    #: Training images are shifted by up to this many pixels.
    shift: Annotated[int | None, _optional("INT", "2; 0 for data sets generated from MNIST")] = None
    #: Mirror half of the training images, drawn at random for each epoch: for objects that look the
    #: same from both sides, not for digits.
    flip: Switch = False
    #: How messages are passed. Affects speed, not results; see graphcaps info.
    engine: Engine = "auto"
    #: Device to train on: auto, cpu, cuda, cuda:1 and so on.
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"
    #: With bf16, convolutions and decoder compute in bfloat16; votes and routing stay in float32.
    amp: Literal["off", "bf16"] = "off"
    #: Capture the forward and backward pass of a step as a CUDA graph and replay it. Needs one
    #: GPU and engine fused. Affects speed, not results.
    cuda_graph: Switch = False
    #: Seed of the weights, the order of the images, and how they are shifted and mirrored.
    seed: int = 0
    #: Stop after the first epoch with at least this accuracy on the validation set, from 0 to 1.
    until_accuracy: Annotated[float | None, _optional("FLOAT", "train all epochs")] = None
    #: Steps between checkpoints, in addition to the one after every epoch.
    checkpoint_every: int = 200
    #: Also write TensorBoard files to the run's folder.
    tensorboard: Switch = False


@dataclass(frozen=True)
class EvaluateSettings:
    """Evaluate a trained net on the test set."""

    #: Folder of a run, whose best epoch is evaluated; or, with --dataset, a folder with
    #: model.safetensors or the name of a net that ships with graphcaps.
    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN-DIR|NAME")]
    #: Data set, as for train.
    dataset: Annotated[str | None, _optional("NAME|PATH", "the run's")] = None
    #: Folder for downloaded data sets.
    data_dir: Annotated[Path | None, _optional("DIR", "the run's")] = None
    #: How messages are passed. Affects speed, not results; see graphcaps info.
    engine: Engine = "auto"
    #: Device to evaluate on: auto, cpu, cuda, cuda:1 and so on.
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"


@dataclass(frozen=True)
class PredictSettings:
    """Classify each image and print the lengths of all class capsules."""

    #: PNG or JPEG files of any size. Digits may be dark on light or light on dark.
    images: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="IMAGE ...", help_behavior_hint=""),
    ]
    #: Folder of a run, whose best epoch is used; a folder with model.safetensors; or the name of a
    #: net that ships with graphcaps.
    run_dir: Annotated[Path, tyro.conf.arg(metavar="RUN-DIR|NAME")] = Path(SHIPPED)
    #: How messages are passed. Affects speed, not results; see graphcaps info.
    engine: Engine = "auto"


@dataclass(frozen=True)
class ReportSettings:
    """Write an interactive report of a run as one HTML file that needs no network."""

    #: Folder of a run that has finished at least one epoch; its best epoch is shown.
    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN-DIR")]
    #: The file to write.
    output: Annotated[Path | None, _optional("FILE", "report.html in the run's folder")] = None
    #: Data set, as for train.
    dataset: Annotated[str | None, _optional("NAME|PATH", "the run's")] = None
    #: Folder for downloaded data sets.
    data_dir: Annotated[Path | None, _optional("DIR", "the run's")] = None
    #: How messages are passed. Affects speed, not results; see graphcaps info.
    engine: Engine = "auto"
    #: Device to compute on: auto, cpu, cuda, cuda:1 and so on.
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"


@dataclass(frozen=True)
class DemoSettings:
    """Write a net as one HTML page on which digits are drawn and routed live."""

    #: Folder of a run, whose best epoch is shown; a folder with model.safetensors; or the name of a
    #: net that ships with graphcaps.
    run_dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="[RUN-DIR|NAME]")] = Path(
        "mnist-small"
    )
    #: The file to write.
    output: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("demo.html")
    #: Data set, as for train.
    dataset: Annotated[str | None, _optional("NAME|PATH", "the run's")] = None
    #: Folder for downloaded data sets.
    data_dir: Annotated[Path | None, _optional("DIR", "the run's")] = None


@dataclass(frozen=True)
class CompareSettings:
    """Train all nets of a table on its data sets with its seeds, and write the table."""

    #: TOML file with data sets, seeds, rows of settings and a control, such as
    #: results/routings.toml. Each result is written to a folder of its name, the table to NAME.md.
    #: The same command continues an interrupted table, and several processes may work on one.
    table: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TABLE.toml")]
    #: Folder for the runs.
    runs_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("runs/compare")
    #: Folder for downloaded data sets.
    data_dir: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("data")
    #: How messages are passed. Affects speed, not results; see graphcaps info.
    engine: Engine = "auto"
    #: Device to train on: auto, cpu, cuda, cuda:1 and so on.
    device: Annotated[str, tyro.conf.arg(metavar="DEVICE")] = "auto"


@dataclass(frozen=True)
class InfoSettings:
    """Show versions and devices, and for each engine whether it can run, or why not."""


Settings = (
    TrainSettings
    | EvaluateSettings
    | PredictSettings
    | ReportSettings
    | DemoSettings
    | CompareSettings
    | InfoSettings
)
Command = (
    Annotated[TrainSettings, tyro.conf.subcommand("train")]
    | Annotated[EvaluateSettings, tyro.conf.subcommand("evaluate")]
    | Annotated[PredictSettings, tyro.conf.subcommand("predict")]
    | Annotated[ReportSettings, tyro.conf.subcommand("report")]
    | Annotated[DemoSettings, tyro.conf.subcommand("demo")]
    | Annotated[CompareSettings, tyro.conf.subcommand("compare")]
    | Annotated[InfoSettings, tyro.conf.subcommand("info")]
)


@dataclass(frozen=True)
class Program:
    """The whole command line."""

    command: tyro.conf.OmitArgPrefixes[tyro.conf.OmitSubcommandPrefixes[Command]]
    #: Show the traceback of an error that ends the program.
    traceback: Switch = False


def parse(arguments: list[str]) -> Program:
    """Parse a command line, given without the program's name.

    Raises:
        SystemExit: the help or an error message has been printed.
    """
    return tyro.cli(
        Program,
        prog="graphcaps",
        description="Capsule networks routed by message passing on DGL graphs.\n\n"
        "COMMAND --help shows the flags of a command, --version the version.",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.CascadeSubcommandArgs),
    )
