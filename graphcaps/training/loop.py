"""The training loop: from settings to a tested net in a run folder."""

import math
import platform
import signal
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from graphcaps import __version__
from graphcaps._dgl import dgl
from graphcaps.data.datasets import load_dataset
from graphcaps.data.splits import Dataset, draw_shifts, mirror, shift
from graphcaps.engines import choose as choose_engine
from graphcaps.files import read_record
from graphcaps.functional import all_right
from graphcaps.layers import NonFinitePosesError
from graphcaps.nets.losses import capsnet_loss
from graphcaps.nets.model import CONFIG, CapsNet, CapsNetConfig, find_net
from graphcaps.streams import LenientStream, say
from graphcaps.training.capture import Captured
from graphcaps.training.checkpoints import (
    TRAINING,
    EpochMetrics,
    Result,
    RunFolder,
    StepMetrics,
    check_alike,
)
from graphcaps.training.evaluation import as_input, evaluate
from graphcaps.training.settings import (
    Recipe,
    RunSettings,
    TrainSettings,
    check_data,
    check_settings,
    choose_preset,
    describe_data,
    image_size_of,
    make_recipe,
    make_schedule,
    resume_settings,
    with_absolute_paths,
)
from graphcaps.training.workers import Workers, joined_workers

STEPS_PER_RECORD = 20


class TrainingDivergedError(RuntimeError):
    """The loss is no longer a finite number."""


class TrainingInterrupt(KeyboardInterrupt):
    """A signal ended training; the run in the folder `run` can resume from `checkpoint`."""

    def __init__(self, checkpoint: Path | None, run: Path) -> None:
        saved = "nothing is saved yet" if checkpoint is None else f"saved as {checkpoint}"
        super().__init__(f"stopped; {saved}")
        self.run = run
        self.again: str | None = None  # the command to go on with; None: that of the run


def train(settings: TrainSettings, given: Collection[str] | None = None) -> dict[str, Any]:
    """Train a net and evaluate its best epoch once on the test set.

    The best epoch is the one with the highest accuracy on the validation set. On the main
    thread, SIGINT, SIGTERM and SIGHUP end training after the current step, unless the process
    ignores them.

    Args:
        settings: what to train. Under torchrun every process passes the same.
        given: when resuming, the fields of `settings` that were set explicitly; by default those
            that differ from their default.

    Returns:
        The content of result.json: test accuracy and errors, best epoch, seconds, folder.

    Raises:
        ValueError: settings that are out of range or do not fit the data.
        OSError: the folder cannot be written, or data cannot be fetched.
        RuntimeError: a device or an engine that is not available.
        TrainingDivergedError: the loss is not finite; the last checkpoint is good.
        TrainingInterrupt: a signal ended training; everything is saved.
    """
    if settings.resume:
        return _resume(settings, given)
    settings = with_absolute_paths(settings)
    check_settings(settings)
    with joined_workers(settings.device) as workers:
        preset, why = choose_preset(settings, workers.device)
        run = workers.agree(_new_run(settings, preset))
        with workers.leader_in(run.locked()):
            data = _load_data(settings, workers, run)
            recipe = make_recipe(settings, preset, len(data.train.labels))
            trainer = Trainer(settings, recipe, data, workers, run)
            if workers.leads:
                run.create(RunSettings(settings, recipe, _versions(), describe_data(data)))
            what = f"Training the {preset} net: {why}."
            if settings.start_from is not None:
                what = f"Training the net of {settings.start_from} further, as preset {preset} is."
            return trainer.train(what)


def _resume(asked: TrainSettings, given: Collection[str] | None) -> dict[str, Any]:
    if asked.run_dir is None:
        raise ValueError("--resume needs the folder of the run: add --run-dir FOLDER")
    run = RunFolder(asked.run_dir)
    started = run.settings()
    settings = resume_settings(asked, started, given)
    with joined_workers(settings.device) as workers, workers.leader_in(run.locked()):
        finished = run.result()
        if finished is not None:
            if workers.leads:
                say(f"{run.path} is finished; nothing is left to do")
            return finished
        data = _load_data(settings, workers, run)
        check_data(data, started)
        trainer = Trainer(settings, started.recipe, data, workers, run)
        return trainer.train(trainer.resume())


class Trainer:
    """One run: its model, optimiser, schedule and position.

    Args:
        settings: what was asked for.
        recipe: the numbers that follow from it.
        data: the images; the training images are kept on the device.
        workers: the processes that train together.
        run: the folder for all files.

    Raises:
        ValueError: data that no CapsNet can be trained on; a CUDA graph that cannot be captured.
        RuntimeError: an engine that cannot run on the device.
    """

    def __init__(
        self,
        settings: TrainSettings,
        recipe: Recipe,
        data: Dataset,
        workers: Workers,
        run: RunFolder,
    ) -> None:
        _check_data(data)
        choose_engine(settings.engine, workers.device)
        if recipe.batch_size > len(data.train.labels):
            raise ValueError(
                f"expected at least one batch of {recipe.batch_size} images to train on; "
                f"{data.name} has {len(data.train.labels)}"
            )
        if recipe.batch_size % workers.size:
            raise ValueError(
                f"{workers.size} processes share every batch equally: expected a batch size "
                f"that {workers.size} divides, got {recipe.batch_size}"
            )
        if settings.cuda_graph:
            _check_capture(settings, workers)
        self.settings, self.recipe = settings, recipe
        self.data, self.workers, self.run = data, workers, run
        self.batch_size, self.epochs = recipe.batch_size, recipe.epochs
        self.steps_per_epoch = len(data.train.labels) // self.batch_size
        torch.manual_seed(settings.seed)
        self.model = _make_net(settings, recipe, data, run).to(workers.device)
        self.model.to(memory_format=torch.channels_last)  # mostly faster
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=recipe.learning_rate, fused=True
        )
        self.schedule = make_schedule(self.optimizer, recipe, self.steps_per_epoch)
        self.step = 0
        self.best_epoch, self.best_accuracy = 0, -1.0
        self.epoch_sums = torch.zeros(2, dtype=torch.float64)  # loss, correct
        self._seconds_before, self._started = 0.0, time.monotonic()
        self._signals: list[int] = []
        # a GPU runs asynchronously until a value is copied to the CPU
        self._look_every = 1 if workers.device.type == "cpu" else STEPS_PER_RECORD
        self._unseen: list[
            Tensor
        ] = []  # loss and number of correct images of each step, on the device
        self._steps_seen, self._last_seen, self._stopping = 0, (math.nan, 0.0), False
        self._captured: Captured | None = None
        self._writer: Any = None
        self.parallel = DistributedDataParallel(self.model) if workers.size > 1 else self.model
        self._images = data.train.images.to(workers.device).contiguous()
        self._labels = data.train.labels.to(workers.device)
        self.shift = data.shift if settings.shift is None else settings.shift

    def describe(self) -> str:
        """A description of the run in two lines."""
        parameters = sum(p.numel() for p in self.model.parameters())
        engine = choose_engine(self.settings.engine, self.workers.device)
        return (
            f"{parameters:,} parameters, engine {engine} on {self.workers.device}, "
            f"{len(self._labels):,} images of {self.data.name}, "
            f"{self.epochs} x {self.steps_per_epoch} steps of {self.batch_size} images.\n"
            f"All files are written to {self.run.path}"
        )

    @property
    def seconds(self) -> float:
        """Seconds spent on this run, including before it was resumed."""
        return self._seconds_before + time.monotonic() - self._started

    def resume(self) -> str:
        """Load the run's last checkpoint, or the one before if it is damaged.

        Returns:
            A sentence that says which.

        Raises:
            ValueError: no checkpoint is complete, or they belong to another run.
        """
        damage: list[Exception] = []
        for checkpoint in self.run.checkpoints():
            try:
                self._restore(checkpoint)
                break
            except (ValueError, FileNotFoundError) as error:
                damage.append(error)
        else:
            if damage:
                raise damage[0]
        if self.workers.agree(self.step) != self.step:
            raise RuntimeError("the processes do not see the same checkpoints; try again")
        where = f"Resuming the {self.recipe.preset} net after {self.step} steps."
        return "\n".join(
            [*(f"A damaged checkpoint is skipped: {error}." for error in damage), where]
        )

    def train(self, why: str) -> dict[str, Any]:
        """Train from the present position to the end, then evaluate on the test set.

        Args:
            why: a sentence about the net, printed first.

        Returns, Raises:
            As `graphcaps.training.train`.
        """
        self.workers.wait()  # no process writes before all have read
        if self.workers.leads:
            self.run.forget_after(self.step)
            say(f"{why}\n{self.describe()}")
        return self._train_and_test()

    def _train_and_test(self) -> dict[str, Any]:
        self._started = time.monotonic()
        stderr = LenientStream(sys.stderr)
        bar = tqdm(
            total=self.epochs * self.steps_per_epoch * self.batch_size,
            initial=self.step * self.batch_size,
            unit=" images",
            file=stderr,
            disable=not self.workers.leads,
            dynamic_ncols=True,
            mininterval=0.5 if stderr.isatty() else 30,
        )
        try:
            with bar, self._tensorboard(), _noting_signals(self._signals, bar):
                for epoch in range(self.step // self.steps_per_epoch, self.epochs):
                    if self.best_accuracy >= (self.settings.until_accuracy or math.inf):
                        break
                    bar.set_description(f"epoch {epoch + 1}/{self.epochs}")
                    self._train_epoch(epoch, bar)
                    self._end_epoch(epoch, bar)
            return self._test()
        except KeyboardInterrupt:
            raise TrainingInterrupt(self.run.last_checkpoint(), self.run.path) from None

    def _draw_images(self, epoch: int) -> None:
        """Generate the images of an epoch from seed and epoch, if they differ between epochs."""
        if self.data.redraw is None:
            return
        seed = -1 - (self.settings.seed * 1_000_003 + epoch)  # used by no plan
        images, labels = self.data.redraw(torch.Generator().manual_seed(seed))
        self._images.copy_(images)  # in place, because a CUDA graph reads from fixed addresses
        self._labels.copy_(labels)

    def _train_epoch(self, epoch: int, bar: tqdm) -> None:
        self._draw_images(epoch)
        order, moves = self._plan(epoch)
        for number in range(self.step % self.steps_per_epoch, self.steps_per_epoch):
            chosen = slice(number * self.batch_size, (number + 1) * self.batch_size)
            self._take_step(order[chosen], moves[chosen])
            self.step += 1
            ends = number + 1 == self.steps_per_epoch  # which has a checkpoint of its own
            records = self.step % STEPS_PER_RECORD == 0
            saves = self.step % self.settings.checkpoint_every == 0
            if ends or records or saves:
                self._look()
            if records:
                loss, correct = self._last_seen
                self._log(
                    StepMetrics(
                        step=self.step,
                        seconds=self.seconds,
                        epoch=epoch + 1,
                        loss=loss,
                        accuracy=correct / self.batch_size,
                        learning_rate=self._learning_rate(),
                    )
                )
            if not ends and (saves or self._stopping):
                self._save_checkpoint()
            bar.update(self.batch_size)
            seen = max(1, number + 1 - len(self._unseen))
            bar.set_postfix(
                loss=f"{self.epoch_sums[0] / seen:.4f}",
                accuracy=f"{self.epoch_sums[1] / (seen * self.batch_size):.2%}",
                refresh=False,
            )
            if not ends and self._stopping:
                raise KeyboardInterrupt

    def _plan(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The order and moves of an epoch, which depend only on the seed and its number.

        Returns:
            The images in their order, `[N]`; and for each its shift, down and right, and with
            `flip` 1 if it is mirrored, int64 `[N, 2 or 3]`.
        """
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self._labels), generator=generator)
        moves = draw_shifts(len(order), self.shift, generator)
        if self.settings.flip:
            mirrored = torch.randint(2, (len(order), 1), generator=generator)
            moves = torch.cat([moves, mirrored], dim=1)
        return order.to(self.workers.device), moves.to(self.workers.device)

    def _take_step(self, chosen: Tensor, moves: Tensor) -> None:
        """Take one step on a batch; its loss and number of correct images stay on the device."""
        mine = slice(self.workers.rank, None, self.workers.size)
        batch = chosen[mine], moves[mine]
        if self.settings.cuda_graph:
            if self._captured is None:
                self._captured = Captured(self._loss_and_gradients, batch)
            self._keep(*self._captured(*batch))
        else:
            self.optimizer.zero_grad()
            loss, correct = self._loss(*batch)
            self._keep(loss, correct)  # a loss that is not finite must not reach the backward pass
            loss.backward()
        self.optimizer.step()
        self.schedule.step()

    def _loss(self, chosen: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a batch, and the number of images classified correctly."""
        images = shift(self._images[chosen], moves[:, :2])
        if self.settings.flip:
            images = mirror(images, moves[:, 2])
        images = as_input(images, self.model)
        labels = self._labels[chosen]
        try:
            with torch.autocast(
                self.workers.device.type, torch.bfloat16, enabled=self.settings.amp == "bf16"
            ):
                output = self.parallel(images, labels)
            loss = capsnet_loss(output, images, labels, kind=self.model.loss)
        except NonFinitePosesError:
            return torch.full((), torch.nan), torch.zeros(())
        return loss, all_right(self.model.classify(output.lengths), labels).sum()

    def _loss_and_gradients(self, chosen: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
        self.optimizer.zero_grad()
        loss, correct = self._loss(chosen, moves)
        loss.backward()
        return loss.detach(), correct

    def _keep(self, loss: Tensor, correct: Tensor) -> None:
        self._unseen.append(torch.stack([loss.detach(), correct]).double())
        if len(self._unseen) >= self._look_every:
            self._look()

    def _look(self) -> None:
        """Synchronise: sum losses and correct images over processes, and check whether to stop.

        Raises:
            TrainingDivergedError: one of the losses is not finite.
        """
        if not self._unseen:
            return
        signals = torch.tensor([[len(self._signals), 0]]).to(self._unseen[0])
        numbers = torch.cat([torch.stack(self._unseen), signals])
        *sums, (signalled, _) = self.workers.total(numbers).tolist()
        self._unseen.clear()
        for loss, correct in sums:
            self._steps_seen += 1
            if not math.isfinite(loss):
                raise self._diverged("the loss", self._steps_seen)
            self._last_seen = (loss / self.workers.size, correct)
            self.epoch_sums += torch.tensor(self._last_seen, dtype=torch.float64)
        self._stopping = signalled > 0

    def _end_epoch(self, epoch: int, bar: tqdm) -> None:
        images = self.steps_per_epoch * self.batch_size
        train_loss = float(self.epoch_sums[0]) / self.steps_per_epoch
        train_accuracy = float(self.epoch_sums[1]) / images
        self.epoch_sums.zero_()
        news = ""
        if self.workers.leads:
            self._check_weights()
            try:
                score = evaluate(self.model, self.data.holdout)
            except NonFinitePosesError:
                raise self._diverged("a pose", self.step) from None
            best = score.accuracy > self.best_accuracy
            if best:
                self.best_epoch, self.best_accuracy = epoch + 1, score.accuracy
                self.model.save(self.run.best)
            self._log(
                EpochMetrics(
                    step=self.step,
                    seconds=self.seconds,
                    epoch=epoch + 1,
                    train_loss=train_loss,
                    train_accuracy=train_accuracy,
                    holdout_loss=score.loss,
                    holdout_accuracy=score.accuracy,
                )
            )
            news = (
                f"epoch {epoch + 1}/{self.epochs}: loss {train_loss:.4f}, accuracy "
                f"{train_accuracy:.2%}, validation {score.accuracy:.2%}"
                f"{' (best)' if best else ''}, {self.seconds:.0f} s"
            )
        self._save_checkpoint()
        if self.workers.leads:
            bar.clear()
            say(news)
            bar.refresh()
        if self.workers.total(torch.tensor(float(len(self._signals)))).item():
            raise KeyboardInterrupt

    def _test(self) -> dict[str, Any]:
        result: dict[str, Any] | None = None
        if self.workers.leads:
            best = CapsNet.load(self.run.best, engine=self.settings.engine)
            score = evaluate(best.to(self.workers.device), self.data.test)
            self.run.finish(
                Result(
                    dataset=self.data.name,
                    preset=self.recipe.preset,
                    test_accuracy=score.accuracy,
                    test_errors=score.errors,
                    test_images=score.images,
                    test_loss=score.loss,
                    best_epoch=self.best_epoch,
                    holdout_accuracy=self.best_accuracy,
                    epochs=self.step // self.steps_per_epoch,
                    seconds=round(self.seconds, 1),
                    run=str(self.run.path),
                )
            )
            result = self.run.result()
        return self.workers.agree(result)

    def _save_checkpoint(self) -> None:
        if self.workers.leads:
            self._check_weights()
            self.run.save_checkpoint(self.step, self.model, self._training())
        self.workers.wait()

    def _training(self) -> dict[str, Any]:
        """The training state besides the weights."""
        return {
            "step": self.step,
            "seconds": self.seconds,
            "best_epoch": self.best_epoch,
            "best_accuracy": self.best_accuracy,
            "epoch_sums": self.epoch_sums,
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": self._cuda_rng(),
        }

    def _restore(self, checkpoint: Path) -> None:
        saved = self.run.load_checkpoint(checkpoint, self.model)
        try:
            self._check_training(saved)
            own = self.optimizer.state_dict()
            self.optimizer.load_state_dict({**own, "state": saved["optimizer"]["state"]})
            _lay_out_like_parameters(self.optimizer)
            torch.set_rng_state(saved["rng"])
            if saved["cuda_rng"] is not None and self.workers.device.type == "cuda":
                torch.cuda.set_rng_state(saved["cuda_rng"], self.workers.device)
        except Exception as error:  # torch may raise any exception for a state that it cannot load
            raise ValueError(
                f"{checkpoint / TRAINING} was not written by this version of graphcaps, or for "
                f"other settings: {error}; the weights beside it can still be evaluated"
            ) from error
        self.step, self._seconds_before = saved["step"], saved["seconds"]
        self._steps_seen = self.step
        self.best_epoch, self.best_accuracy = saved["best_epoch"], saved["best_accuracy"]
        self.epoch_sums = saved["epoch_sums"]
        self.schedule = make_schedule(self.optimizer, self.recipe, self.steps_per_epoch, self.step)

    def _check_training(self, saved: Any) -> None:
        expected = self._training()
        del expected["cuda_rng"]  # of the device on which it was saved
        check_alike(saved, {**expected, "optimizer": {}}, "training")
        steps = self.epochs * self.steps_per_epoch
        if not 0 <= saved["step"] <= steps:
            raise ValueError(f"expected a step from 0 to {steps}, got {saved['step']}")
        state = {
            number: {"step": torch.zeros(()), "exp_avg": weight, "exp_avg_sq": weight}
            for number, weight in enumerate(self.model.parameters())
        }
        optimizer = {"state": state if saved["step"] else {}}
        check_alike(saved["optimizer"], optimizer, "training.optimizer")

    def _cuda_rng(self) -> Tensor | None:
        device = self.workers.device
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def _learning_rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def _check_weights(self) -> None:
        """Check before saving that weights are finite, which a finite loss does not imply."""
        if not all(torch.isfinite(p).all() for p in self.model.parameters()):
            raise self._diverged("a weight", self.step)

    def _diverged(self, what: str, step: int) -> TrainingDivergedError:
        checkpoint = self.run.last_checkpoint()
        return TrainingDivergedError(
            f"{what} is not finite at step {step}, "
            f"learning rate {self._learning_rate():.3g}. The last good checkpoint is "
            f"{checkpoint or 'none: no step was saved yet'}. Try a lower --learning-rate"
        )

    def _log(self, metrics: StepMetrics | EpochMetrics) -> None:
        if not self.workers.leads:
            return
        self.run.log(metrics)
        if self._writer is not None:
            for name, value in asdict(metrics).items():
                if name not in ("kind", "step", "seconds"):
                    self._writer.add_scalar(f"{metrics.kind}/{name}", value, self.step)

    @contextmanager
    def _tensorboard(self) -> Iterator[None]:
        if not (self.settings.tensorboard and self.workers.leads):
            yield
            return
        from torch.utils.tensorboard import SummaryWriter

        folder = str(self.run.path / "tensorboard")
        with SummaryWriter(folder, purge_step=self.step or None) as self._writer:
            yield


def _make_net(settings: TrainSettings, recipe: Recipe, data: Dataset, run: RunFolder) -> CapsNet:
    """Create a net for the data, from the preset or from the net to train further."""
    of_data: dict[str, Any] = dict(
        image_channels=data.train.images.shape[1],
        image_size=tuple(data.train.images.shape[2:]),
        classes=len(data.classes),
        class_names=data.classes,
        image_kind=data.image_kind,
        labels_per_image=data.labels_per_image,
    )
    asked: dict[str, Any] = {"routing": settings.routing, "iterations": settings.iterations}
    asked = {name: value for name, value in asked.items() if value is not None}
    if settings.start_from is None:
        return CapsNet.from_preset(recipe.preset, engine=settings.engine, **(of_data | asked))
    folder = _source_of(settings.start_from, run)
    config = read_record(folder / CONFIG, CapsNetConfig)
    if folder.is_relative_to(run.path):
        return CapsNet(config, engine=settings.engine)
    for name, value in asked.items():
        if value != getattr(config, name):
            raise ValueError(
                f"the net of {settings.start_from} has {name} {getattr(config, name)}, not "
                f"{value}: omit --{name}, or train a new net"
            )
    if config.names == data.classes:
        del of_data["classes"]  # otherwise the class capsules would be initialised again
    return CapsNet.load(folder, engine=settings.engine, **of_data)


def _source_of(start_from: str, run: RunFolder | None) -> Path:
    """The folder of the net to train further; if a run is resumed, its last checkpoint."""
    saved = None if run is None else run.last_checkpoint()
    return saved or find_net(start_from)


def _new_run(settings: TrainSettings, preset: str) -> RunFolder:
    """A folder for a new run."""
    path = settings.run_dir
    if path is None:
        name = f"{Path(settings.dataset).stem}-{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        path = Path("runs") / name
    run = RunFolder(path)
    run.check_free()
    return run


def _versions() -> dict[str, str]:
    return {
        "graphcaps": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dgl": dgl.__version__,
        "machine": platform.machine(),
    }


def _load_data(settings: TrainSettings, workers: Workers, run: RunFolder) -> Dataset:
    """Download missing files on the leader, then read the data on every process."""
    if workers.leads:
        data = load_data_of(settings, run)
    workers.wait()
    return data if workers.leads else load_data_of(settings, run)


def load_data_of(settings: TrainSettings, run: RunFolder | None = None) -> Dataset:
    """Load the data for a training with these settings.

    Args:
        settings: settings of the training.
        run: its folder, if a net is trained further.

    Raises:
        As `load_dataset`.
    """
    size, channels = image_size_of(settings), None
    if settings.start_from is not None:
        config = read_record(_source_of(settings.start_from, run) / CONFIG, CapsNetConfig)
        channels, *of_net = config.image_shape
        size = size or (of_net[0], of_net[1])
    return load_dataset(settings.dataset, settings.data_dir, image_size=size, channels=channels)


def _lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer's tensors the strides of their parameters.

    Fused Adam takes the numbers by their place in memory, and version 0.1.0 trained with other
    strides on the CPU.
    """
    for parameter, state in optimizer.state.items():
        for name, x in state.items():
            if x.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(x)


def _check_data(data: Dataset) -> None:
    shape = data.train.images.shape
    for name, split in (("validation", data.holdout), ("test", data.test)):
        if split.images.shape[1:] != shape[1:]:
            raise ValueError(
                f"the {name} images of {data.name} are {list(split.images.shape[1:])}, "
                f"the training images {list(shape[1:])}; they must have the same shape"
            )


def _check_capture(settings: TrainSettings, workers: Workers) -> None:
    """Check that a step can be captured: what it reads must stay at the same address."""
    engine = choose_engine(settings.engine, workers.device)
    for wrong, reason in (
        (workers.device.type != "cuda", f"this is trained on {workers.device}"),
        (workers.size > 1, f"{workers.size} processes train together"),
        (engine != "fused", f"the engine is {engine}"),
    ):
        if wrong:
            raise ValueError(
                f"--cuda-graph is for one process with a CUDA device and engine fused; {reason}"
            )


@contextmanager
def _noting_signals(came: list[int], bar: tqdm) -> Iterator[None]:
    """Append signals that end a program to a list; a second one of a kind ends it at once.

    Outside the main thread, where Python does not allow signal handlers, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: object) -> None:
        came.append(number)
        signal.signal(number, signal.default_int_handler)
        bar.clear()
        print("stopping after this step; once more to stop at once", file=LenientStream(sys.stderr))
        bar.refresh()

    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in ending}
    noted = [number for number in ending if before[number] != signal.SIG_IGN]  # as nohup wants it
    for number in noted:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number in noted:
            signal.signal(number, before[number])
