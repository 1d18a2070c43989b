"""The experiment of this project: its task, its data and its defaults."""

from bn_lightning.data.image_data import ImageData
from bn_lightning.runs.experiment import Experiment
from bn_lightning.tasks.classifier import Classifier

EXPERIMENT = Experiment(
    task=Classifier,
    data=ImageData,
    name="lenet",
    defaults={"trainer.max_epochs": 10},
)
