"""The experiment of this project: its task, its data and its defaults."""

from bn_lightning.data.fashion_mnist import FashionMNIST
from bn_lightning.runs.experiment import Experiment
from bn_lightning.tasks.classifier import Classifier

EXPERIMENT = Experiment(
    task=Classifier,
    data=FashionMNIST,
    name="lenet",
    defaults={"trainer.max_epochs": 10},
)
