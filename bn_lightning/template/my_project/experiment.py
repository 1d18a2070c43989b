"""Bind the network and the data. Change the defaults of the settings here."""

from bn_lightning import Classifier, Experiment, ImageData

EXPERIMENT = Experiment(
    task=Classifier,
    data=ImageData,
    name="my_project",
    defaults={
        # To train on your own pictures, replace the next line by
        # "data.dataset": "folder", "data.dataset_args": {"path": "pictures"},
        "data.dataset": "my_project.data.load",
        # `fit --help` lists all settings.
        "data.batch_size": 64,
        "data.normalize": True,
        "model.network": "my_project.network.ConvNet",
        "model.norm": "custom",
        "model.optimizer_args": {"momentum": 0.9},
        "model.lr": 0.05,
        "trainer.max_epochs": 5,
    },
)
