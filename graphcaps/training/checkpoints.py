"""The folder of a training run: settings, metrics, checkpoints and the result.

A run's folder holds

    settings.json                   what the run was started with
    metrics.jsonl                   one JSON object a line, as training goes
    checkpoints/step-00000550/      model.safetensors, model.json, training.pt, and SHA256SUMS with
                                    their checksums; the last two checkpoints are kept
    best/                           model.safetensors, model.json of the best epoch so far
    result.json                     the evaluation on the test set, once the run is finished
    .lock                           while a process trains in the folder

Every file and folder is written under a temporary name, flushed to disk and then renamed, so that
under its own name it is either complete or absent.
"""

import errno
import fcntl
import hashlib
import io
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import torch
from pydantic import Field
from torch import Tensor

from graphcaps.files import (
    UNFINISHED,
    flush_folder,
    json_bytes,
    named_in_errors,
    open_regular,
    parse_record,
    read_bounded,
    read_record,
    record,
    write_whole,
)
from graphcaps.nets.model import BEST, CONFIG, WEIGHTS, CapsNet
from graphcaps.nets.weights import load_weights
from graphcaps.training.settings import RunSettings, as_json, check_started

logger = logging.getLogger(__name__)

TRAINING, CHECKSUMS = "training.pt", "SHA256SUMS"
KEPT = 2  # checkpoints: if the last is damaged, training resumes from the one before
TRIES = 100  # to take a lock that others remove
LONGEST_LINE = 10_000  # bytes of a line of metrics.jsonl, which has some 200
_LONGEST_NAME = f"checkpoints/.step-00000000{UNFINISHED}/.{WEIGHTS}.4194304{UNFINISHED}"
# what flock answers on a file system that has no locks
_NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@record
@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """A line of metrics.jsonl: the result of one step."""

    kind: Literal["step"] = "step"
    step: int  # from 1
    seconds: float  # of training so far
    epoch: int  # from 1
    loss: float
    accuracy: float
    learning_rate: float


@record
@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """A line of metrics.jsonl: the result of an epoch, on the training and validation sets."""

    kind: Literal["epoch"] = "epoch"
    step: int
    seconds: float
    epoch: int
    train_loss: float
    train_accuracy: float
    holdout_loss: float
    holdout_accuracy: float


@record
@dataclass(frozen=True)
class Result:
    """The result of a finished run, the content of its result.json."""

    dataset: str
    preset: str
    test_accuracy: float
    test_errors: int
    test_images: int
    test_loss: float
    best_epoch: int
    holdout_accuracy: float
    epochs: int
    seconds: float
    run: str


# Any, because type checkers do not accept a union as a type
METRICS: Any = Annotated[StepMetrics | EpochMetrics, Field(discriminator="kind")]


class RunLockedError(RuntimeError):
    """Another process trains in a run's folder."""


class RunFolder:
    """The folder of one training run.

    Args:
        path: the folder; need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / BEST
        self._settings = path / "settings.json"
        self._checkpoints = path / "checkpoints"
        self._metrics = path / "metrics.jsonl"
        self._result = path / "result.json"
        self._lock = path / ".lock"

    def create(self, started: RunSettings) -> None:
        """Write settings.json into the locked folder.

        Raises:
            FileExistsError: there is something already.
            OSError: no permission, a full disk.
        """
        self.check_free()
        write_whole(self._settings, json_bytes(as_json(started)))

    def check_free(self) -> None:
        """Check that a run can start in the folder.

        It can if the folder is empty, or if an earlier start was killed before it wrote settings.

        Raises:
            FileExistsError: there is something already.
            OSError: the folder cannot be read.
        """
        if self._settings.exists():
            raise FileExistsError(
                f"{self.path} exists already; add --resume to continue that run, "
                "or choose another folder with --run-dir"
            )
        if self.path.exists() and not (
            self.path.is_dir() and all(self._is_left_over(path) for path in self.path.iterdir())
        ):
            raise FileExistsError(
                f"{self.path} exists already and is not a run; choose another folder with --run-dir"
            )

    def _is_left_over(self, path: Path) -> bool:
        return path == self._lock or (path.name[0] == "." and path.name.endswith(UNFINISHED))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder, creating it if needed, so that no other process trains in it.

        On exit the lock is removed, and the folder too if it was created here and is empty.

        Raises:
            RuntimeError: another process trains in it.
            OSError: the folder cannot be created or written, or its path is too long.
        """
        with named_in_errors(self.path):
            made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            (self.path / _LONGEST_NAME).exists()  # raises where that is too long
            self.path.mkdir(parents=True, exist_ok=True)
        try:
            file = self._take_lock()
            try:
                yield
            finally:
                with suppress(OSError):
                    self._lock.unlink(missing_ok=True)
                file.close()
        finally:
            with suppress(OSError):  # not empty
                for folder in made:
                    folder.rmdir()

    def _take_lock(self) -> BinaryIO:
        for _ in range(TRIES):
            with named_in_errors(self._lock):
                file = self._lock.open(
                    "ab"
                )  # NFS and CIFS cannot lock a file that is open for reading
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), self._lock.stat()):
                    return file
            except FileNotFoundError:
                pass  # the process that held it was about to remove it
            except (BlockingIOError, PermissionError):
                file.close()
                break
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    logger.warning(
                        "%s cannot be locked (%s): make sure that no other process trains in it",
                        self.path,
                        error.strerror,
                    )
                    return file
                file.close()
                raise
            file.close()
        raise RunLockedError(f"another process is training in {self.path}")

    def settings(self) -> RunSettings:
        """What the run was started with.

        Raises:
            FileNotFoundError: there is no run.
            ValueError: settings.json is damaged.
        """
        if not self._settings.is_file():
            raise FileNotFoundError(
                f"no run at {self.path}: expected a folder that graphcaps train made"
            )
        started = read_record(self._settings, RunSettings)
        try:
            check_started(started)
        except ValueError as error:
            raise ValueError(f"{self._settings}: {error}") from None
        return started

    def checkpoints(self) -> list[Path]:
        """The checkpoints, the last one first."""
        return sorted(filter(_is_checkpoint, self._checkpoints.glob("*")), key=_step, reverse=True)

    def last_checkpoint(self) -> Path | None:
        """The checkpoint of the latest step, or None before the first."""
        return next(iter(self.checkpoints()), None)

    def save_checkpoint(self, step: int, model: CapsNet, training: dict[str, Any]) -> Path:
        """Write a checkpoint, then remove older ones except the last.

        Args:
            step: number of steps taken.
            model: its weights are saved.
            training: the rest of the state: plain values, tensors, lists and dicts.

        Returns:
            The checkpoint's folder.

        Raises:
            OSError: a full disk, no permission; the checkpoints before are still there.
        """
        final = self._checkpoints / _name(step)
        unfinished = self._checkpoints / f".{final.name}{UNFINISHED}"
        try:
            model.save(unfinished)
            buffer = io.BytesIO()
            torch.save(training, buffer)
            write_whole(unfinished / TRAINING, buffer.getvalue())
            write_whole(unfinished / CHECKSUMS, _checksums(unfinished).encode())
            _make_way(final)
            os.replace(unfinished, final)
            flush_folder(self._checkpoints)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        self._keep_last(step)
        return final

    def _keep_last(self, step: int) -> None:
        """Remove all checkpoints up to a step except the last two."""
        before = [checkpoint for checkpoint in self.checkpoints() if _step(checkpoint) <= step]
        for checkpoint in before[KEPT:]:
            shutil.rmtree(checkpoint, ignore_errors=True)

    def load_checkpoint(self, checkpoint: Path, model: CapsNet) -> dict[str, Any]:
        """Load a checkpoint's weights into `model` and return its `training`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a damaged file, or the weights of another model.
        """
        if (checkpoint / CHECKSUMS).exists():  # graphcaps 0.1.0 wrote none
            _check_sums(checkpoint)
        load_weights(checkpoint / WEIGHTS, model)
        try:
            with open_regular(checkpoint / TRAINING) as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch may raise any exception for damaged bytes
            raise ValueError(
                f"{checkpoint / TRAINING} is missing, truncated or not a checkpoint; "
                f"the weights beside it can still be evaluated: {error}"
            ) from error

    def log(self, metrics: StepMetrics | EpochMetrics) -> None:
        """Append a line to metrics.jsonl."""
        with named_in_errors(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(metrics)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, up to the first that a kill or power cut damaged."""
        return [asdict(metrics) for _, metrics in self._lines_of_metrics()]

    def _lines_of_metrics(self) -> Iterator[tuple[bytes, StepMetrics | EpochMetrics]]:
        if not self._metrics.exists():
            return
        with open_regular(self._metrics) as file:
            lines = iter(lambda: file.readline(LONGEST_LINE), b"")
            for number, line in enumerate(lines, start=1):
                where = f"{self._metrics}, line {number}"
                try:
                    yield line, parse_record(line, METRICS, where)
                except ValueError as error:
                    logger.warning("%s; this line and those after it are ignored", error)
                    return

    def forget_after(self, step: int) -> None:
        """Remove what a resumed run will write again, and unfinished files."""
        for left in sorted(self.path.rglob(f".*{UNFINISHED}"), reverse=True):
            _remove(left)
        for checkpoint in self.checkpoints():
            if _step(checkpoint) > step:  # damaged: the run resumes from an earlier one
                _remove(checkpoint)
        self._keep_last(step)
        kept = [line for line, metrics in self._lines_of_metrics() if metrics.step <= step]
        write_whole(self._metrics, b"".join(line.rstrip(b"\n") + b"\n" for line in kept))

    def finish(self, result: Result) -> None:
        """Write result.json, which marks the run as finished."""
        write_whole(self._result, json_bytes(asdict(result)))

    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None while the run is not finished.

        Raises:
            ValueError: result.json is damaged.
        """
        return asdict(read_record(self._result, Result)) if self._result.exists() else None


def check_alike(found: Any, expected: Any, name: str) -> None:
    """Check that a value that was read has the form of one that would be written.

    Args:
        found: what was read; a dict may have more keys than `expected`.
        expected: a plain value, a tensor, or lists and dicts of these.
        name: its name in messages.

    Raises:
        ValueError: another type, another shape, another length, a missing key.

    >>> check_alike({"rate": "fast"}, {"rate": 0.1}, "optimizer")
    Traceback (most recent call last):
    ValueError: expected float as optimizer.rate, got str
    """
    if type(expected) is float and type(found) is int:
        return
    if _form(found) != _form(expected):
        raise ValueError(f"expected {_form(expected)} as {name}, got {_form(found)}")
    if isinstance(expected, dict):
        for key, value in expected.items():
            if key not in found:
                raise ValueError(f"{name} lacks {key!r}")
            check_alike(found[key], value, f"{name}.{key}")
    elif isinstance(expected, list | tuple):
        for number, value in enumerate(expected):
            check_alike(found[number], value, f"{name}.{number}")


def _form(value: Any) -> str:
    match value:
        case Tensor():
            return f"{value.dtype} {list(value.shape)}"
        case None | bool():
            return "bool or None"
        case list() | tuple():
            return f"{len(value)} values"
    return type(value).__name__


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _is_checkpoint(path: Path) -> bool:
    """Whether this is a checkpoint: a folder, not a link, with the right name and files."""
    return (
        re.fullmatch("step-[0-9]{8,18}", path.name) is not None
        and path.name == _name(_step(path))
        and path.is_dir()
        and not path.is_symlink()
        and any((path / name).exists() for name in (CONFIG, WEIGHTS, TRAINING, CHECKSUMS))
    )


def _make_way(path: Path) -> None:
    """Remove a checkpoint that will be replaced; move anything else aside."""
    if _is_checkpoint(path):
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        aside = path.with_name(f"{path.name}-{time.time_ns()}")
        path.rename(aside)
        logger.warning("%s is not a checkpoint: moved to %s", path, aside)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _checksums(checkpoint: Path) -> str:
    """The SHA-256 of a checkpoint's files as `sha256sum --check` reads them."""
    lines = []
    for name in (CONFIG, WEIGHTS, TRAINING):
        with open_regular(checkpoint / name) as file:
            digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
            lines.append(f"{digest.hexdigest()}  {name}\n")
    return "".join(lines)


def _check_sums(checkpoint: Path) -> None:
    noted = read_bounded(checkpoint / CHECKSUMS, 1000).decode(errors="replace").splitlines()
    for line in _checksums(checkpoint).splitlines():
        if line not in noted:
            raise ValueError(
                f"{checkpoint / line.split()[1]} is damaged: its SHA-256 is not the one in "
                f"{CHECKSUMS} beside it"
            )
