"""Loaders of published data sets, on generated files in their formats."""

import gzip
import hashlib
import pickle
import sys

import numpy as np
import pytest
import torch
from scipy.io import savemat
from test_data import FILES, made_files, write
from torchvision.datasets import CIFAR10, SVHN

from graphcaps.data import datasets
from graphcaps.data.datasets import load_dataset
from graphcaps.data.published import NORB

BYTES, INTEGERS = 0x1E3D4C55, 0x1E3D4C54


def norb_matrix(magic, array):
    sizes = [*array.shape, *[1] * (3 - array.ndim)]
    head = np.array([magic, array.ndim, *sizes], "<i4").tobytes()
    return head + array.astype("u1" if magic == BYTES else "<i4").tobytes()


@pytest.fixture
def norb(tmp_path):
    """Image n of a camera is filled with 10 n, or 10 n + 1 for the right one."""
    for name, count in zip(NORB.values(), (30, 10), strict=True):
        images = 10 * np.arange(count)[:, None, None, None] % 250 + np.zeros((1, 2, 96, 96))
        images[:, 1] += 1
        (tmp_path / name.format("dat")).write_bytes(norb_matrix(BYTES, images))
        categories = norb_matrix(INTEGERS, np.arange(count) % 5)
        (tmp_path / f"{name.format('cat')}.gz").write_bytes(gzip.compress(categories))
    return tmp_path


def test_small_norb_is_read_with_both_cameras(norb):
    data = load_dataset(str(norb), image_size=(48, 48))
    assert data.classes == ("animal", "human", "airplane", "truck", "car")
    assert data.test.images.shape == (10, 2, 48, 48) and data.image_kind == "picture"
    assert data.test.labels.tolist() == [0, 1, 2, 3, 4] * 2
    assert data.test.images[3].flatten(1).unique(dim=1).tolist() == [[30], [31]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content[:-1], "bytes, as its header says, got"),
        (lambda content: b"\0" + content[1:], "expected a matrix of bytes or integers"),
        (lambda content: content[:3], "expected a matrix of bytes or integers"),
    ],
)
def test_a_file_of_small_norb_that_is_not_whole_is_named(norb, change, said):
    path = norb / NORB["testing"].format("dat")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"testing-dat.mat: .*{said}"):
        load_dataset(str(norb))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"testing-dat\.mat\.gz in"):
        load_dataset(str(norb))


def affnist(path, count=12):
    path.parent.mkdir(exist_ok=True)
    images = np.zeros((1600, count), np.uint8)
    images[3 * 40 + 7] = np.arange(count)  # row 3, column 7
    fields = {"image": images, "label_int": np.arange(count, dtype=np.uint8)[None] % 10}
    savemat(path, {"affNISTdata": fields})


def test_affnist_is_read_with_or_without_what_to_train_on(tmp_path):
    affnist(tmp_path / "test.mat")
    data = load_dataset(str(tmp_path))
    assert data.test.images.shape == (12, 1, 40, 40)
    assert data.test.images[5, 0].nonzero().tolist() == [[3, 7]]
    assert data.test.labels.tolist() == [*range(10), 0, 1]
    assert len(data.train.labels) == len(data.holdout.labels) == 0
    for number in (1, 2):
        affnist(tmp_path / "training_and_validation_batches" / f"{number}.mat", 24)
    data = load_dataset(str(tmp_path))
    assert [len(part.labels) for part in (data.train, data.holdout)] == [44, 4]
    (tmp_path / "test.mat").write_bytes(b"?" * 200)
    with pytest.raises(ValueError, match=r"test\.mat: expected affNISTdata"):
        load_dataset(str(tmp_path))


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar10_is_read_as_torchvision_keeps_it(tmp_path, monkeypatch):
    folder = tmp_path / "CIFAR10" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    batch = {"data": images.reshape(12, -1), "labels": [*range(10), 3, 4]}
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(pickle.dumps(batch))
    names = [f"class {number}" for number in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", md5(folder / "data_batch_1")]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    data = load_dataset("cifar10", tmp_path)
    assert torch.equal(data.test.images, torch.from_numpy(images))
    assert data.test.labels.tolist() == batch["labels"]
    assert data.classes == tuple(names) and data.image_kind == "picture"


def test_svhn_is_read_as_torchvision_keeps_it(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 12), dtype=np.uint8)
    (tmp_path / "SVHN").mkdir()
    files = {}
    for part in ("train", "test"):
        path = tmp_path / "SVHN" / f"{part}_32x32.mat"
        savemat(path, {"X": images, "y": np.arange(1, 13)[:, None] % 10 + 1})
        files[part] = ["nowhere", path.name, md5(path)]
    monkeypatch.setattr(SVHN, "split_list", files)
    data = load_dataset("svhn", tmp_path)
    assert torch.equal(data.test.images[4, 2], torch.from_numpy(images[:, :, 2, 4]))
    assert data.test.labels.tolist() == [(n % 10 + 1) % 10 for n in range(1, 13)]


def test_kmnist_is_read_as_torchvision_keeps_it(tmp_path):
    write(tmp_path / "KMNIST" / "raw", made_files())
    data = load_dataset("kmnist", tmp_path)
    assert len(data.test.labels) == 4 and data.classes[:2] == ("o", "ki")


@pytest.mark.parametrize("name", ["kmnist", "cifar10", "svhn"])
def test_what_cannot_be_fetched_says_where_it_was_looked_for(name, tmp_path, monkeypatch):
    asked = []

    def ask(places, file):
        asked.extend(places)
        return dict.fromkeys(places, "no answer")

    monkeypatch.setattr(datasets, "_ask", ask)
    with pytest.raises(ConnectionError, match=rf"{name} could not be downloaded") as raised:
        load_dataset(name, tmp_path)
    assert asked and all(f"{place}: no answer" in str(raised.value) for place in asked)
    assert f"into {tmp_path}" in str(raised.value)


def test_a_missing_package_is_named_for_each_set_that_needs_it(tmp_path, monkeypatch):
    affnist(tmp_path / "test.mat")
    for name, package in ((str(tmp_path), "scipy.io"), ("cifar10", "torchvision")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(RuntimeError, match=rf"{package[:5]}.*graphcaps\[train\]"):
                load_dataset(name, tmp_path)
    assert len(FILES) == 4
