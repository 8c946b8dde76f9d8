"""The cache of compiled CPU loops: files are written and reused, and no failure stops a program."""

import errno
import resource
import signal
import warnings

import numba
import numpy as np
import pytest

from graphcaps.kernels.cpu import compiled, lanes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    compiled._warn_once.cache_clear()
    return tmp_path


def start(function=lanes.lay_in_lanes):
    """Start as a new process would, without the code that this one has compiled."""
    return compiled.entry(function.py_func)


def works(dispatcher):
    x, out = np.arange(6, dtype=np.float32), np.full(48, 9, np.float32)
    dispatcher(x, 2, 1, 3, out, (0,))
    return np.array_equal(out.reshape(3, 16)[:, :3], [[0, 3, 0], [1, 4, 0], [2, 5, 0]])


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def half(content):
    return content[: len(content) // 2]


def nothing(content):
    return b""


def a_bit_flipped(content):
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


def other_bytes(content):
    return b"\x80\x04}\x94." * 100


def test_compiled_code_is_found_again(folder):
    first, again = start(), start()
    assert works(first) and works(again)
    assert len(files(folder)) == 1
    assert (sum(first.stats.cache_hits.values()), sum(again.stats.cache_hits.values())) == (0, 1)


def test_compiled_code_is_that_of_all_files_together(folder, monkeypatch):
    assert works(start())
    monkeypatch.setattr(compiled, "_text_of_files", lambda: "another")
    changed = start()
    assert works(changed)
    assert not changed.stats.cache_hits


@pytest.mark.parametrize("broken", [half, nothing, a_bit_flipped, other_bytes])
def test_a_broken_file_is_thrown_away_and_told(folder, broken):
    assert works(start())
    (path,) = files(folder)
    path.write_bytes(broken(path.read_bytes()))
    with pytest.warns(RuntimeWarning, match="is damaged: it is deleted and compiled again"):
        assert works(start())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mended = start()
        assert works(mended)
    assert sum(mended.stats.cache_hits.values()) == 1


def test_many_broken_files_are_told_once(folder):
    there_and_back = (lanes.lay_in_lanes, lanes.lay_in_samples)
    arguments = (np.zeros(48, np.float32), 2, 1, 3, np.zeros(48, np.float32), (0,))
    for function in there_and_back:
        start(function)(*arguments)
    for path in files(folder):
        path.write_bytes(half(path.read_bytes()))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for function in there_and_back:
            start(function)(*arguments)
    assert len(told) == 1


def test_a_full_disk_is_told_and_the_program_goes_on(folder):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write gives EFBIG
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.warns(
            RuntimeWarning, match="cannot be cached in .*File too large.*NUMBA_CACHE"
        ):
            assert works(start())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert files(folder) == []


def test_a_folder_that_is_gone_or_cannot_be_written_is_told(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    dispatcher = start()
    monkeypatch.setattr(compiled.Path, "write_bytes", refuse)
    with pytest.warns(RuntimeWarning, match="Read-only file system"):
        assert works(dispatcher)


def test_a_file_that_cannot_be_read_is_compiled_anew(folder, monkeypatch):
    assert works(start())

    def refuse(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(compiled.Path, "read_bytes", refuse)
    monkeypatch.setattr(compiled, "_text_of_files", lambda: "known")
    again = start()
    assert works(again)
    assert not again.stats.cache_hits
