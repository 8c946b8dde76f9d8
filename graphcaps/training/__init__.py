"""Training that survives a kill, and the errors of a trained net."""

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
