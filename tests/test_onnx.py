"""The pretrained net as an ONNX file in onnxruntime."""

from pathlib import Path

import onnx
import pytest
import torch
from torch.testing import assert_close

import graphcaps as gc
from graphcaps.data import load_dataset

ROOT = Path(__file__).parents[1]


@pytest.fixture
def export_onnx(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import export_onnx

    return export_onnx


def test_the_net_that_ships_reads_digits_alike_in_onnxruntime(export_onnx, tmp_path):
    model = gc.CapsNet.from_pretrained("mnist-small", engine="scatter")
    single, half = tmp_path / "single.onnx", tmp_path / "half.onnx"
    export_onnx.export(model, single)
    half.write_bytes(single.read_bytes())
    export_onnx.halve(half)
    added = {n.op_type for n in onnx.load(single).graph.node if n.op_type.startswith("Scatter")}
    assert added == {"ScatterElements"}  # in ScatterND, onnxruntime's threads lose terms
    assert single.stat().st_size < 9e6
    assert half.stat().st_size < 5e6
    images = load_dataset(str(ROOT / "tests" / "digits")).test.images / 255
    with torch.inference_mode():
        expected = model(images)
    assert images.shape[0] == 100
    for path in (single, half):  # the weights that ship are in half precision
        for got, right in zip(export_onnx.read(path, images), expected, strict=True):
            assert_close(got, right, rtol=0, atol=1e-5)
        assert_close(export_onnx.read(path, images[:1]).lengths, expected.lengths[:1])
