"""Decorators that compile loops with numba on their first call and cache the result on disk."""

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

# numba's stubs lack some options, and callers of an intrinsic do not pass its first argument.
njit: Any = numba.njit
intrinsic: Any = numba.extending.intrinsic

# LLVM may reorder sums, but must not assume that NaN and infinity do not occur.
ANY_ORDER = {"contract", "reassoc"}


@functools.cache
def _say_once_that_it_compiles() -> None:
    if sys.stderr.isatty() or "ipykernel" in sys.modules:  # somebody is waiting
        print(
            "graphcaps: compiling kernels for this processor, which takes some seconds",
            file=sys.stderr,
        )


class _Apart(CompilerBase):
    """Tells LLVM that arguments do not overlap; otherwise each loop over lanes would check it."""

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
        _nrt=False,  # nothing is allocated, and arrays need no reference counting
        no_cfunc_wrapper=True,
        **options,
    )(function)


def compiled(function: Callable) -> Any:
    """Compile a function that is called from compiled code."""
    return _compile(function, ANY_ORDER, no_cpython_wrapper=True)


def inlined(function: Callable) -> Any:
    """The same, inlined: for functions so short that the call would cost as much as the work."""
    return _compile(function, ANY_ORDER, no_cpython_wrapper=True, forceinline=True)


def entry(function: Callable) -> Any:
    """Compile a function that is called from Python, cached on disk if a folder is writable."""
    dispatcher = _compile(function, ANY_ORDER)
    with contextlib.suppress(RuntimeError):  # no folder is writable
        dispatcher._cache = _KeptCode(function)
    return dispatcher


class _KeptCode(FunctionCache):
    """numba's cache, except that a file that cannot be read or written is no error.

    The cache key covers all source files in this folder rather than the function's own file,
    because functions of the other files are compiled into it.
    """

    def __init__(self, function: Callable) -> None:
        super().__init__(function)
        self._cache_file: Any = _Files(Path(self.cache_path), self._impl.filename_base)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a damaged file can raise anything
            self._cache_file.flush()
            _warn_once(
                f"compiled code cached in {self.cache_path} is damaged: it is deleted "
                "and compiled again"
            )
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            _warn_once(
                f"compiled code cannot be cached in {self.cache_path} ({error.strerror}): it will "
                "be compiled again at each start; set NUMBA_CACHE_DIR to use another folder"
            )


@functools.cache  # numba resets the filter that would show a warning once
def _warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=3)


class _Files:
    """One file with a checksum for each signature of a function; replaces numba's index."""

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
