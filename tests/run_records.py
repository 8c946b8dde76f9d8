"""Records of runs for the tests, with arbitrary default values."""

from graphcaps.training.checkpoints import EpochMetrics, Result, StepMetrics
from graphcaps.training.settings import RECIPES, RunSettings, TrainSettings

STARTED = RunSettings(TrainSettings(), RECIPES["small"], {"graphcaps": "0.1.0"})


def step_metrics(step):
    return StepMetrics(step=step, seconds=1.0, epoch=1, loss=0.5, accuracy=0.5, learning_rate=1e-3)


def epoch_metrics(epoch, *, train_loss=0.5, train_accuracy=0.5, holdout_accuracy=0.5):
    return EpochMetrics(
        step=10 * epoch,
        seconds=1.0,
        epoch=epoch,
        train_loss=train_loss,
        train_accuracy=train_accuracy,
        holdout_loss=0.2,
        holdout_accuracy=holdout_accuracy,
    )


def result(*, errors):
    return Result(
        dataset="random",
        preset="small",
        test_accuracy=1 - errors / 40,
        test_errors=errors,
        test_images=40,
        test_loss=0.3,
        best_epoch=1,
        holdout_accuracy=0.5,
        epochs=2,
        seconds=60.0,
        run="runs/random",
    )
