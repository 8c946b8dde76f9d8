"""Export a trained net to an ONNX file, and compare its predictions on test images with torch's.

python scripts/export_onnx.py mnist-small.onnx --half
python scripts/export_onnx.py digits.onnx --net runs/NAME/best

The file only needs an ONNX runtime, because routing on engine scatter uses torch's own operations.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import tyro
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from tyro.conf import Positional

from graphcaps import CapsNet, CapsNetOutput
from graphcaps.data import load_dataset

BATCH = 100


@dataclass(frozen=True)
class Options:
    """Export a net to ONNX, and compare its predictions in onnxruntime with torch's."""

    output: Positional[Path]
    """The file to be written."""
    net: Path | None = None
    """A folder that CapsNet.load takes; the net that ships, if not given."""
    half: bool = False
    """Store the weights in half precision; they are computed with in single precision."""
    dataset: str = "mnist"
    """Data set whose test images are classified: a name, or a folder with IDX files."""


def export(model: CapsNet, path: Path) -> None:
    """Export a net with engine scatter and a dynamic batch size."""
    images = torch.rand(2, *model.config.image_shape)
    torch.onnx.export(
        model.eval(),
        (images,),
        path,
        dynamo=True,
        external_data=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=[*CapsNetOutput._fields],
    )


def halve(path: Path) -> None:
    """Store a net's matrices and kernels in half precision; a Cast node converts each to single."""
    model = onnx.load(path)
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and tensor.name.endswith(".weight"):
            name, numbers = tensor.name, numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(numbers.astype(np.float16), f"{name}.half"))
            cast = helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT)
            graph.node.insert(0, cast)
    onnx.save(model, path)


def read(path: Path, images: Tensor) -> CapsNetOutput:
    """Run the file on images in onnxruntime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    batches = (session.run(None, {"images": x.numpy()}) for x in images.split(BATCH))
    return CapsNetOutput(*(torch.from_numpy(np.concatenate(x)) for x in zip(*batches, strict=True)))


def main() -> None:
    """Write the file, classify the test images, and print how the results agree."""
    options = tyro.cli(Options)
    if options.net is None:
        model = CapsNet.from_pretrained("mnist-small", engine="scatter")
    else:
        model = CapsNet.load(options.net, engine="scatter")
    export(model, options.output)
    if options.half:
        halve(options.output)
    images = load_dataset(options.dataset).test.images / 255
    found = read(options.output, images)
    model.capsules.engine = "auto"
    with torch.inference_mode():
        lengths = torch.cat([model(x).lengths for x in images.split(BATCH)])
    alike = int((found.lengths.argmax(dim=1) == lengths.argmax(dim=1)).sum())
    print(
        f"{options.output}: {options.output.stat().st_size / 1e6:.2f} MB; {alike:,} of "
        f"{len(images):,} test images have the same prediction, and lengths differ by at most "
        f"{float((found.lengths - lengths).abs().max()):.1e}"
    )


if __name__ == "__main__":
    main()
