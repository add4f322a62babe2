"""Following a training run from its own process: progress, history, MLflow, `/metrics`, cost, and backups."""

from nvila_platform.training.observing import TrainingObserver, observe_training

__all__ = ["TrainingObserver", "observe_training"]
