"""DGL can be imported with any version of torch."""

import importlib
import sys

import pytest
import torch

from graphcaps import _dgl, _graphbolt


@pytest.fixture
def dgl_2(tmp_path, monkeypatch):
    """A folder like DGL 2's, with a library for this torch and an old torchdata."""
    graphbolt = tmp_path / "dgl" / "graphbolt"
    graphbolt.mkdir(parents=True)
    release = torch.__version__.split("+")[0]
    (graphbolt / f"libgraphbolt_pytorch_{release}.so").touch()
    for package in ("torchdata", "torchdata/datapipes"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.split(".")[0] == "torchdata"]:
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path / "dgl"
    for name in [n for n in sys.modules if n.split(".")[0] == "torchdata"]:
        del sys.modules[name]


def test_graphbolt_is_left_alone_where_it_would_import(dgl_2):
    assert not _graphbolt._would_fail(dgl_2)


def test_graphbolt_is_stood_in_for_without_a_library_for_this_torch(dgl_2):
    (library,) = (dgl_2 / "graphbolt").iterdir()
    library.rename(library.with_name("libgraphbolt_pytorch_2.0.0.so"))
    assert _graphbolt._would_fail(dgl_2)


def test_graphbolt_is_stood_in_for_without_the_pipes_of_torchdata(dgl_2):
    (dgl_2.parent / "torchdata" / "datapipes" / "__init__.py").unlink()
    (dgl_2.parent / "torchdata" / "datapipes").rmdir()
    assert _graphbolt._would_fail(dgl_2)


def test_whoever_imports_dgl_after_graphcaps_gets_the_stand_in(dgl_2, monkeypatch):
    (library,) = (dgl_2 / "graphbolt").iterdir()
    library.unlink()
    (dgl_2 / "__init__.py").touch()
    for name in ("dgl", "dgl.graphbolt"):
        monkeypatch.setitem(sys.modules, name, None)  # so that what was there comes back
        monkeypatch.delitem(sys.modules, name)
    _graphbolt.stand_in()
    assert isinstance(sys.modules["dgl.graphbolt"], _graphbolt._Graphbolt)


def test_dgl_1_has_no_graphbolt_to_fail(tmp_path):
    assert not _graphbolt._would_fail(tmp_path)


def test_the_stand_in_says_what_it_is_when_touched():
    stand_in = _graphbolt._Graphbolt("dgl.graphbolt")
    with pytest.raises(RuntimeError, match=r"dgl\.graphbolt\.ItemSet is not available"):
        _ = stand_in.ItemSet
    assert not hasattr(stand_in, "__wrapped__")


def test_a_missing_dgl_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="DGL is not installed"):
        importlib.reload(_dgl)


@pytest.mark.parametrize(
    ("device", "cuda", "reason"),
    [
        ("cpu", False, None),
        ("cuda", True, None),
        ("cuda", False, "without CUDA"),
        ("mps", True, "not on mps"),
    ],
)
def test_why_dgl_cannot_compute_somewhere(device, cuda, reason, monkeypatch):
    monkeypatch.setattr(_dgl, "has_cuda", lambda: cuda)
    said = _dgl.why_not_on(torch.device(device))
    assert said is None if reason is None else reason in said
