"""A trained network as it is served: restored from a checkpoint, with its preprocessing."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from bn_lightning.errors import UserError
from bn_lightning.runs import experiment as experiments
from bn_lightning.runs import trust
from bn_lightning.runs.experiment import Experiment
from bn_lightning.training import checkpoints
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.task import Task

Run = Callable[[Tensor], Tensor]  # from raw samples to outputs
Part = TypeVar("Part", Task, DataModule)

# Settings that only training needs. `network` and `metrics` are no settings of the base class: what
# a checkpoint has under these names belongs to a subclass.
OF_TRAINING = frozenset(
    f"model.{name}"
    for name in inspect.signature(Task).parameters
    if name not in ("network", "metrics")
)


class Served(nn.Module):
    """Preprocessing and network: from raw samples (N, ...) to the outputs of the network.

    Attributes:
        input_name, output_name: the names that an exported file has for them.
        noun: what one calls the samples.
        classifies: whether the largest output names the class.
    """

    input_name, output_name, noun = "inputs", "outputs", "samples"
    classifies = False

    def __init__(self, preprocessing: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(self.preprocessing(inputs))  # type: ignore[no-any-return]


class ServedClassifier(Served):
    """The same with the names of a classifier. torch.export names inputs after the parameters."""

    input_name, output_name, noun = "images", "logits", "images"
    classifies = True

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds, built again.

    Attributes:
        path: the file, downloaded where an address was given.
        checkpoint: its content.
        task: in eval mode, with the trained weights in float32.
        data: with the settings of the checkpoint, not yet prepared.
    """

    path: Path
    checkpoint: dict[str, Any]
    task: Task
    data: DataModule

    def serve(self, network: nn.Module | None = None) -> Served:
        """Return the task's network, or another one in its place, with the preprocessing."""
        served = Served if self.data.classes is None else ServedClassifier
        network = self.task.network if network is None else network
        return served(self.data.preprocessing, network).eval()


def restore(
    ckpt_path: str,
    reference: str,
    chosen: Mapping[str, str] | None = None,
    data_settings: Mapping[str, Any] | None = None,
) -> Restored:
    """Build the task and the data module of a checkpoint, and load the weights.

    Optimizer and scheduler, which may be import paths, are not built.

    Args:
        ckpt_path: a file or an address.
        reference: of the experiment, `package.module:NAME`.
        chosen: import paths that the user trusts, by their settings: `{"model.norm": "my.Norm"}`.
        data_settings: settings of the data that override those of the checkpoint.

    Raises:
        UserError: a checkpoint that cannot be loaded, does not fit the experiment, or names code
            that is not trusted.
    """
    local, checkpoint = checkpoints.load(ckpt_path)
    experiment = experiments.load(reference)
    settings = _settings(experiment, checkpoint)
    chosen = dict(chosen or {})
    flags = import_flags(experiment)
    _refuse_another(experiment, ckpt_path, settings, chosen, flags)
    used = {name: settings[name] for name in flags if name in settings}
    trusted = dict(experiment.defaults) | chosen
    package = experiments.package_of(reference)
    trust.refuse_untrusted(ckpt_path, used, trusted, package, flags)
    task = _build(experiment.task, _section("model", settings), ckpt_path)
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise _does_not_fit(ckpt_path, experiment.task, error) from error
    of_data = _section("data", settings) | dict(data_settings or {})
    data = _build(experiment.data, of_data, ckpt_path)
    return Restored(Path(local), checkpoint, task.eval().requires_grad_(False), data)


def import_flags(experiment: Experiment) -> dict[str, str]:
    """Return the flag by which the user names each setting that is imported: `--norm`."""
    names = [name for name in trust.import_paths(experiment) if name not in OF_TRAINING]
    return {name: f"--{name.partition('.')[2]}" for name in names}


def _settings(experiment: Experiment, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of network and data: defaults of the experiment < checkpoint."""
    model = checkpoint.get("hyper_parameters", {})
    data = checkpoint.get("datamodule_hyper_parameters", {})
    of_machine = experiment.data.machine_settings
    settings = {
        **experiment.defaults,
        **{f"model.{name}": value for name, value in model.items()},
        **{f"data.{name}": value for name, value in data.items() if name not in of_machine},
    }
    return {name: value for name, value in settings.items() if name not in OF_TRAINING}


def _section(section: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of one section, `model` or `data`, by their names in it."""
    prefix = f"{section}."
    return {
        name.removeprefix(prefix): value
        for name, value in settings.items()
        if name.startswith(prefix)
    }


def _refuse_another(
    experiment: Experiment,
    path: str,
    settings: Mapping[str, Any],
    chosen: Mapping[str, str],
    flags: Mapping[str, str],
) -> None:
    """Refuse code that the user names and the checkpoint was not trained with."""
    for name, value in chosen.items():
        section, _, key = name.partition(".")
        part = experiment.task if section == "model" else experiment.data
        used = settings.get(name, default_of(part, key))
        if value != used:
            raise UserError(
                f"{flags[name]} is {value!r}, and {path!r} was trained with {used!r}: leave it "
                "out, or name that."
            )


def default_of(part: type[Task] | type[DataModule], name: str) -> Any:
    """Return the default of a setting; None without a default, or without such a setting."""
    parameter = inspect.signature(part).parameters.get(name)
    has_default = parameter is not None and parameter.default is not parameter.empty
    return parameter.default if parameter is not None and has_default else None


def _build(cls: type[Part], settings: dict[str, Any], path: str) -> Part:
    try:
        return cls(**settings)
    except (KeyError, TypeError, RuntimeError) as error:
        raise _does_not_fit(path, cls, error) from error


def _does_not_fit(path: str, cls: type[Task] | type[DataModule], error: Exception) -> UserError:
    return UserError(f"{path!r} does not fit {cls.__name__}: {error}")
