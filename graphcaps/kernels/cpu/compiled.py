"""How loops are compiled: by numba, when first called, and kept on disk where possible."""

import contextlib
import functools
import hashlib
import os
import pickle
import sys
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numba.extending
from numba.core.caching import FunctionCache
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.serialize import dumps

# numba's stubs do not know all options, nor that an intrinsic's first argument is not given.
njit: Any = numba.njit
intrinsic: Any = numba.extending.intrinsic

# Sums may be taken in any order; NaN and infinity stay what they are.
ANY_ORDER = {"contract", "reassoc"}
IN_ORDER = {"contract"}


@functools.cache
def _say_once_that_it_compiles() -> None:
    if sys.stderr.isatty() or "ipykernel" in sys.modules:  # somebody waits and wonders
        print("graphcaps: compiling kernels for this processor, some seconds", file=sys.stderr)


class _Apart(CompilerBase):
    """Tells LLVM that arguments do not overlap; else each loop over lanes asks that first."""

    def define_pipelines(self) -> list:
        _say_once_that_it_compiles()
        self.state.flags.noalias = True
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]


def _compile(function: Callable, fastmath: set[str], **options: Any) -> Any:
    return njit(
        nogil=True,
        error_model="numpy",
        fastmath=fastmath,
        pipeline_class=_Apart,
        _nrt=False,  # nothing is allocated; else each use of an array would count its users
        no_cfunc_wrapper=True,
        **options,
    )(function)


def compiled(function: Callable) -> Any:
    """A function for compiled code."""
    return _compile(function, ANY_ORDER, no_cpython_wrapper=True)


def inlined(function: Callable) -> Any:
    """One that is short, or called often: a call of it would cost as much as it does."""
    return _compile(function, ANY_ORDER, no_cpython_wrapper=True, forceinline=True)


def inlined_in_order(function: Callable) -> Any:
    """The same, whose sums are taken as they are written."""
    return _compile(function, IN_ORDER, no_cpython_wrapper=True, forceinline=True)


def entry(function: Callable) -> Any:
    """A function for Python. What it is compiled to is kept on disk, if that can be written."""
    dispatcher = _compile(function, ANY_ORDER)
    with contextlib.suppress(RuntimeError):  # there is no folder that can be written
        dispatcher._cache = _KeptCode(function)
    return dispatcher


class _KeptCode(FunctionCache):
    """numba's cache, which never fails: what cannot be read or written is compiled anew.

    It is bound to the text of all files here, not of the one file alone, as others are compiled
    into it.
    """

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        self._cache_file: Any = _Files(Path(self.cache_path), self._impl.filename_base)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # whatever the bytes of a broken file lead to
            self._cache_file.flush()
            _warn_once(
                f"compiled code kept in {self.cache_path} is broken: it is thrown away, "
                "and compiled again"
            )
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn_once(
                f"compiled code cannot be kept in {self.cache_path} ({error.strerror}): it is "
                "compiled again at each start; NUMBA_CACHE_DIR names another folder"
            )


@functools.cache  # for Python's own filter numba makes each warning the first
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)


class _Files:
    """One file for each signature of a function, with a checksum; in the place of numba's index."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name

    def load(self, key: Any) -> Any:
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        checksum, data = content[:32], content[32:]
        if hashlib.sha256(data).digest() != checksum:
            raise ValueError("the checksum of a file is wrong")
        return pickle.loads(data)

    def save(self, key: Any, data: Any) -> None:
        path, content = self._path(key), dumps(data)
        unfinished = path.with_suffix(f".{uuid.uuid4().hex[:16]}")
        try:
            unfinished.write_bytes(hashlib.sha256(content).digest() + content)
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)

    def flush(self) -> None:
        """Remove the files of this function."""
        for path in self.folder.glob(f"{self.name}.*"):
            with contextlib.suppress(OSError):
                path.unlink()

    def _path(self, key: Any) -> Path:
        what = repr((numba.__version__, _text_of_files(), key))
        return self.folder / f"{self.name}.{hashlib.sha256(what.encode()).hexdigest()[:16]}.nbc"


@functools.cache
def _text_of_files() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
