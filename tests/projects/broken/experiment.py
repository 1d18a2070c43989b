"""The experiments: the sound one, and one of the name of each broken network and task."""

from broken import networks, tasks
from broken.sound import Classification, Images, Network

from bn_lightning import Experiment


def experiment(task):
    defaults = {"model.lr": 0.05, "model.optimizer_args": {"momentum": 0.9}}
    return Experiment(task, Images, "broken", {**defaults, "data.batch_size": 40})


def task_with(network):
    """Return the sound task with another network."""
    return type("Classification", (Classification,), {"network_class": network})


def variants(module, base):
    """Return the subclasses of a class that a module defines, by name."""
    found = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    return {n: c for n, c in found.items() if issubclass(c, base) and c is not base}


SOUND = experiment(Classification)
BROKEN = {name: experiment(task_with(c)) for name, c in variants(networks, Network).items()}
BROKEN |= {name: experiment(task) for name, task in variants(tasks, Classification).items()}
globals().update(BROKEN)
