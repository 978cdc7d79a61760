"""The trainer behind `python -m vitkernels train` and `demo`."""

from vitkernels.settings import TrainConfig, resume_config
from vitkernels.train.demo import demo_config
from vitkernels.train.model import Trained, load_model
from vitkernels.train.run import train
from vitkernels.train.stopping import Stopped

__all__ = ["Stopped", "TrainConfig", "Trained", "demo_config", "load_model", "resume_config", "train"]
