"""Training with checkpoints that survive a kill, and evaluation on labelled images."""

from graphcaps.training.evaluation import Score, as_input, evaluate
from graphcaps.training.loop import TrainingDivergedError, TrainingInterrupt, train
from graphcaps.training.settings import TrainSettings

__all__ = [
    "Score",
    "TrainSettings",
    "TrainingDivergedError",
    "TrainingInterrupt",
    "as_input",
    "evaluate",
    "train",
]
