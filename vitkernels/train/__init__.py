"""The trainer behind `python -m vitkernels train` and `demo`."""

from vitkernels.settings import TrainConfig, resume_config
from vitkernels.train.demo import demo_config
from vitkernels.train.model import load_model
from vitkernels.train.run import train

__all__ = ["TrainConfig", "demo_config", "load_model", "resume_config", "train"]
