"""A trained network for inference: restored from a checkpoint, with its preprocessing."""

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
from bn_lightning.training import checkpoints, initial_weights
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.task import Task

Forward = Callable[[Tensor], Tensor]  # from raw samples to outputs
Part = TypeVar("Part", Task, DataModule)

# Settings that only training needs. `network` and `metrics` are excluded: the base
# class has no such settings, so in a checkpoint these names belong to a subclass.
TRAINING_SETTINGS = frozenset(
    f"model.{name}"
    for name in inspect.signature(Task).parameters
    if name not in ("network", "metrics")
)


class Served(nn.Module):
    """Preprocessing followed by the network: raw samples (N, ...) to outputs.

    Attributes:
        input_name: the name of the input in an exported file.
        output_name: the name of the output in an exported file, and in messages.
        sample_noun: the plural noun for samples in messages.
        has_classes: whether the index of the largest output is the predicted class.
    """

    input_name, output_name, sample_noun = "inputs", "outputs", "samples"
    has_classes = False

    def __init__(self, preprocessing: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.network = network

    def forward(self, inputs: Tensor) -> Tensor:
        return self.network(self.preprocessing(inputs))  # type: ignore[no-any-return]


class ServedClassifier(Served):
    """Preprocessing followed by a classifier: raw images (N, ...) to logits (N, C)."""

    input_name, output_name, sample_noun = "images", "logits", "images"
    has_classes = True

    # torch.export names the input after the parameter.
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


@dataclass(frozen=True)
class Restored:
    """A checkpoint with the task and the data module that it was trained with.

    Attributes:
        path: the local file; a remote checkpoint has been downloaded.
        checkpoint: the content of the file.
        task: the task in eval mode, with the trained weights in float32.
        data: the data module with the settings of the checkpoint, not yet prepared.
    """

    path: Path
    checkpoint: dict[str, Any]
    task: Task
    data: DataModule

    def serve(self, network: nn.Module | None = None) -> Served:
        """Return the preprocessing followed by `network`. None stands for the task's network."""
        served_class = Served if self.data.classes is None else ServedClassifier
        network = self.task.network if network is None else network
        return served_class(self.data.preprocessing, network).eval()


def restore(
    ckpt_path: str,
    reference: str,
    trusted: Mapping[str, str] | None = None,
    data_settings: Mapping[str, Any] | None = None,
) -> Restored:
    """Build the task and the data module of a checkpoint, and load the weights.

    The optimizer and the scheduler are not imported or built.

    Args:
        ckpt_path: a path or URL.
        reference: the experiment, `package.module:NAME`.
        trusted: import paths that the user trusts, by setting: `{"model.norm":
            "my.Norm"}`.
        data_settings: settings of the data module that override those of the
            checkpoint.

    Raises:
        UserError: the checkpoint cannot be loaded, does not match the experiment, or
            contains an import path that is not trusted.
    """
    local, checkpoint = checkpoints.load(ckpt_path)
    experiment = experiments.load(reference)
    settings = _settings(experiment, checkpoint)
    trusted = dict(trusted or {})
    flags = import_flags(experiment)
    _refuse_mismatch(experiment, ckpt_path, settings, trusted, flags)
    imported = {name: settings[name] for name in flags if name in settings}
    package = experiments.package_of(reference)
    chosen, registered = dict(experiment.defaults) | trusted, trust.registered(experiment)
    trust.refuse_untrusted(ckpt_path, imported, chosen, package, registered, flags)
    arguments = initial_weights.without(experiment.task.start_only, _section("model", settings))
    task = _build(experiment.task, arguments, ckpt_path)
    try:
        task.load_state_dict(checkpoints.weights_to_evaluate(checkpoint))
    except RuntimeError as error:
        raise _mismatch_error(ckpt_path, experiment.task, error) from error
    data_arguments = _section("data", settings) | dict(data_settings or {})
    data = _build(experiment.data, data_arguments, ckpt_path)
    return Restored(Path(local), checkpoint, task.eval().requires_grad_(False), data)


def import_flags(experiment: Experiment) -> dict[str, str]:
    """Return the flag of each setting that may be an import path, such as `--model.norm`."""
    names = [name for name in trust.import_paths(experiment) if name not in TRAINING_SETTINGS]
    return {name: f"--{name}" for name in names}


def _settings(experiment: Experiment, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the network and the data.

    The checkpoint takes precedence over the defaults of the experiment. Settings that
    belong to the machine are not taken from the checkpoint.
    """
    model = checkpoint.get("hyper_parameters", {})
    data = checkpoint.get("datamodule_hyper_parameters", {})
    machine_settings = experiment.data.machine_settings
    settings = {
        **experiment.defaults,
        **{f"model.{name}": value for name, value in model.items()},
        **{f"data.{name}": value for name, value in data.items() if name not in machine_settings},
    }
    return {name: value for name, value in settings.items() if name not in TRAINING_SETTINGS}


def _section(section: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a section, `model` or `data`, without the prefix of the section."""
    prefix = f"{section}."
    return {
        name.removeprefix(prefix): value
        for name, value in settings.items()
        if name.startswith(prefix)
    }


def _refuse_mismatch(
    experiment: Experiment,
    path: str,
    settings: Mapping[str, Any],
    trusted: Mapping[str, str],
    flags: Mapping[str, str],
) -> None:
    """Refuse a flag whose value differs from the checkpoint's setting."""
    for name, value in trusted.items():
        section, _, key = name.partition(".")
        part = experiment.task if section == "model" else experiment.data
        used = settings.get(name, default_of(part, key))
        if value != used:
            raise UserError(
                f"{flags[name]} is {value!r}, but {path!r} was trained with {used!r}. Remove "
                f"{flags[name]}, or use {flags[name]} {used}."
            )


def default_of(part: type[Task] | type[DataModule], name: str) -> Any:
    """Return the default of a setting, or None if there is no default or no such setting."""
    parameter = inspect.signature(part).parameters.get(name)
    has_default = parameter is not None and parameter.default is not parameter.empty
    return parameter.default if parameter is not None and has_default else None


def _build(cls: type[Part], settings: dict[str, Any], path: str) -> Part:
    try:
        return cls(**settings)
    except (KeyError, TypeError, RuntimeError) as error:
        raise _mismatch_error(path, cls, error) from error


def _mismatch_error(path: str, cls: type[Task] | type[DataModule], error: Exception) -> UserError:
    return UserError(
        f"Checkpoint {path!r} does not match {cls.__name__}: {error}\n"
        "Use a checkpoint that fit has written with this version of the project."
    )
