"""Models and the state of a training enter, files that survive a kill leave, and back again.

A run's folder holds

    settings.json                   what the run was started with
    metrics.jsonl                   one JSON object a line, as training goes
    checkpoints/step-00000550/      model.safetensors, model.json, training.pt: to go on from
    best/                           model.safetensors, model.json of the best epoch so far
    result.json                     the one evaluation on the test set, when the run is finished

Every file and folder is written under another name, flushed to the disk and then renamed: under
its own name it is whole or not there.
"""

import fcntl
import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from graphcaps.files import (
    UNFINISHED,
    flush_folder,
    json_bytes,
    named_in_errors,
    read_json,
    write_whole,
)
from graphcaps.model import WEIGHTS, CapsNet
from graphcaps.weights import load_weights

TRAINING = "training.pt"


class RunFolder:
    """The folder of one training run.

    Args:
        path: the folder; need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.best = path / "best"
        self._checkpoints = path / "checkpoints"
        self._metrics = path / "metrics.jsonl"

    def create(self, settings: dict[str, Any]) -> None:
        """Make the folder and note what the run is started with.

        Raises:
            FileExistsError: there is something already.
            OSError: no permission, a full disk.
        """
        self.check_free()
        with named_in_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / "settings.json", json_bytes(settings))

    def check_free(self) -> None:
        """Raise FileExistsError where there is something already; an empty folder is nothing."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FileExistsError(
                f"{self.path} exists already; add --resume to go on with that run, "
                "or choose another folder with --run-dir"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from training in this folder.

        Raises:
            RuntimeError: one does so already.
        """
        with (self.path / "settings.json").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RuntimeError(f"another process is training in {self.path}") from None
            yield

    def settings(self) -> dict[str, Any]:
        """What the run was started with.

        Raises:
            FileNotFoundError: there is no run.
            ValueError: settings.json is broken.
        """
        if not (self.path / "settings.json").is_file():
            raise FileNotFoundError(
                f"no run at {self.path}: expected a folder that graphcaps train made"
            )
        return read_json(self.path / "settings.json")

    def last_checkpoint(self) -> Path | None:
        """The checkpoint of the latest step, or None before the first."""
        return max(self._checkpoints.glob("step-*"), default=None)

    def save_checkpoint(self, step: int, model: CapsNet, training: dict[str, Any]) -> Path:
        """Write a checkpoint, then remove the one before.

        Args:
            step: how many steps were taken.
            model: its weights are saved.
            training: what else it takes to go on: plain values, tensors, lists and dicts.

        Returns:
            The checkpoint's folder.

        Raises:
            OSError: a full disk, no permission; the checkpoint before is still there.
        """
        final = self._checkpoints / f"step-{step:08d}"
        if not final.exists():  # it does if a run is interrupted again before its next step
            self._write_checkpoint(final, model, training)
        for other in self._checkpoints.glob("step-*"):
            if other.name < final.name:
                shutil.rmtree(other)
        return final

    def _write_checkpoint(self, final: Path, model: CapsNet, training: dict[str, Any]) -> None:
        unfinished = self._checkpoints / f".{final.name}{UNFINISHED}"
        try:
            model.save(unfinished)
            buffer = io.BytesIO()
            torch.save(training, buffer)
            write_whole(unfinished / TRAINING, buffer.getvalue())
            os.replace(unfinished, final)
            flush_folder(self._checkpoints)
        except OSError:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise

    def load_checkpoint(self, checkpoint: Path, model: CapsNet) -> dict[str, Any]:
        """Put a checkpoint's weights into `model`; returns its `training`.

        Raises:
            ValueError: a broken file, or the weights of another model.
        """
        load_weights(checkpoint / WEIGHTS, model)
        try:
            return torch.load(checkpoint / TRAINING, map_location="cpu", weights_only=True)
        except Exception as error:  # what torch raises for damaged bytes is anything
            raise ValueError(
                f"{checkpoint / TRAINING} is missing, truncated or not a checkpoint; "
                f"the weights beside it can still be evaluated: {error}"
            ) from error

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl."""
        with named_in_errors(self._metrics), self._metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, up to one that a kill or a power cut damaged."""
        records: list[dict[str, Any]] = []
        if not self._metrics.is_file():
            return records
        for line in self._metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                records.append({"step": record["step"], **record})
            except (json.JSONDecodeError, KeyError, TypeError):
                break
        return records

    def forget_after(self, step: int) -> None:
        """Drop the records that a resumed run will write again, and what a kill left half-done."""
        for left in sorted(self.path.rglob(f".*{UNFINISHED}"), reverse=True):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()
        kept = [record for record in self.metrics() if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_whole(self._metrics, text.encode())

    def finish(self, result: dict[str, Any]) -> None:
        """Write result.json, which says that the run is finished."""
        write_whole(self.path / "result.json", json_bytes(result))

    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None while the run is not finished."""
        path = self.path / "result.json"
        return read_json(path) if path.is_file() else None
