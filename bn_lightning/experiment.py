"""The experiment of this project: the one file that binds its parts together."""

from bn_lightning.data.fashion_mnist import FashionMNIST
from bn_lightning.runs.experiment import Experiment
from bn_lightning.tasks.classifier import Classifier

EXPERIMENT = Experiment(
    task=Classifier,
    data=FashionMNIST,
    name="lenet",
    defaults={"trainer.max_epochs": 10},
)
