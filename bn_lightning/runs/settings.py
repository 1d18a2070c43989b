"""Settings of a run. Their precedence is: defaults < checkpoint < --config < flags."""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from bn_lightning import lookup, terminal
from bn_lightning.errors import UserError
from bn_lightning.runs import experiment, folder, threads, trust
from bn_lightning.runs.parser import Parser, TrainerHelp
from bn_lightning.runs.schema import PrintSchema
from bn_lightning.training import checkpoints, initial_weights

# Defaults of every experiment.
TRAINER_DEFAULTS = {"default_root_dir": "runs", "log_every_n_steps": 10}


class SettingsCLI(LightningCLI):
    """Lightning's command line with the settings of an experiment.

    Args:
        reference: import path of the experiment, `package.module:NAME`.
        arguments: a command and its settings.

    Attributes:
        experiment: the imported experiment.
        ckpt_path: file of the checkpoint that is loaded, or None.
        folder: folder of the run that is resumed, or None.
        resuming: whether a run is resumed in its folder.
        resumes_at: step at which the run is resumed.
        was_finished: whether the resumed run had ended, so nothing is trained again.
    """

    # Each command is a method of a subclass. --help shows the first line of its
    # docstring.
    commands: tuple[str, ...] = ("fit", "validate", "test")

    ckpt_path: str | None = None
    folder: Path | None = None
    resuming: bool = False
    resumes_at: int = 0
    was_finished: bool = False
    _found_in_data: Mapping[str, Any] = MappingProxyType({})  # of the loaded checkpoint

    def __init__(self, reference: str, arguments: list[str], **settings: Any) -> None:
        self.reference = reference
        self.experiment = experiment.load(reference)
        # A parser takes 0.2 s to build. Those of the other commands are not needed.
        if arguments[0] in self.commands:
            self.commands = (arguments[0],)
        program = terminal.program()
        parsers = {
            name: {
                "usage": f"{program} {name} [settings]",
                "description": (getattr(self, name).__doc__ or name).partition("\n")[0],
            }
            for name in self.commands
        }
        super().__init__(
            self.experiment.task,
            self.experiment.data,
            args=_files_first(arguments),
            save_config_callback=None,
            parser_class=Parser,
            parser_kwargs={"prog": program} | parsers,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            **settings,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        # Checkpoints are always loaded with weights_only=True.
        # Metrics are printed by this project instead of Lightning (`verbose`).
        # --ckpt_path is added below, with a help text that fits each command.
        skipped = {"weights_only", "verbose", "return_predictions", "ckpt_path"}
        return {name: LightningCLI.subcommands()[name] | skipped for name in self.commands}

    # Flags

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--help.trainer",
            action=TrainerHelp,
            help="Show all settings of the trainer and exit.",
        )
        parser.add_argument(
            "--name",
            type=str,
            default=self.experiment.name,
            help="Name of a series of runs. Run number N is stored in runs/NAME/N.",
        )
        parser.add_argument(
            "--seed_everything",
            metavar="SEED",
            type=int,
            default=0,
            help="Seed of the weights, the data split and the shuffling.",
        )
        parser.add_argument(
            "--threads",
            metavar="N",
            type=PositiveInt | None,
            default=None,
            help="CPU threads of each process; PyTorch's default is one per core. Use 1 if other "
            "programs use the cores too.",
        )
        parser.add_argument(
            "--ckpt_path",
            metavar="FILE",
            type=str | None,
            default=None,
            help="Checkpoint to load: a path, a URL, or `last` for the last checkpoint of the "
            "newest run in runs/NAME. Its settings are used unless flags override them.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("seed_everything", "data.seed")
        for name in self.experiment.task.stated_by_data:
            parser.link_arguments(f"data.{name}", f"model.{name}", apply_on="instantiate")
        for name in self.experiment.data.found_in_data:
            parser.link_arguments("ckpt_path", f"data.{name}", partial(self._found_value, name))
        for name, value in self.experiment.defaults.items():
            try:
                parser.set_defaults({name: value})
            except KeyError as error:
                hint = lookup.did_you_mean(name, list(parser.get_defaults().keys()))
                raise UserError(
                    f"The defaults of {self.reference!r} have an unknown setting: {name}.{hint}\n"
                    "Correct the name in Experiment(defaults=...)."
                ) from error

    def _found_value(self, name: str, ckpt_path: str | None) -> Any:
        """Return what the loaded checkpoint contains of the data; None without a checkpoint."""
        return self._found_in_data.get(name)

    def add_command_arguments(self) -> None:
        """Add the flags that only one command has."""
        if "fit" not in self.commands:
            return
        self._parser("fit").add_argument(
            "--print_schema",
            action=PrintSchema,
            help="Print a JSON Schema of the settings and exit.",
        )
        self._parser("fit").add_argument(
            "--resume",
            metavar="FOLDER",
            type=str | None,
            default=None,
            help="Folder of the run to resume, runs/NAME/N. It continues from last.ckpt with the "
            "same settings.",
        )
        self._parser("fit").add_argument(
            "--checkpoint.every_n_train_steps",
            metavar="N",
            type=NonNegativeInt,
            default=0,
            help="Write last.ckpt every N steps, in addition to once per epoch; 0 to disable.",
        )
        self._parser("fit").add_argument(
            "--precise_statistics",
            metavar="N",
            type=NonNegativeInt,
            default=0,
            help="Before each validation and at the end, estimate the running statistics from N "
            "training batches; 0 to disable.",
        )
        self._parser("fit").add_argument(
            "--monitor",
            type=bool,
            default=True,
            help="Log statistics of the norm layers and figures of misclassified samples to "
            "TensorBoard.",
        )

    def before_instantiate_classes(self) -> None:
        threads.set_threads(self.config[self.subcommand].threads)

    # Settings from a checkpoint

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.add_command_arguments()
        super().parse_arguments(parser, args)
        command = self.config.subcommand
        config = self.config[command]
        # Lightning would replace a seed outside this range.
        if not 0 <= config.seed_everything < 2**32:
            raise UserError(
                f"--seed_everything is {config.seed_everything}; it must be from 0 to {2**32 - 1}."
            )
        if command == "fit" and config.resume is not None:
            self._find_run(config)
            # The settings of the run become default config files, so flags override
            # them.
            files = folder.settings_files(Path(config.resume))
            trust.refuse_untrusted_files(files, config.as_dict(), self._package)
            self._parser("fit").default_config_files = list(map(str, files))
            super().parse_arguments(parser, args)
            self._refuse_untrusted(config.resume, config)
            _refuse_resume_without_saving(self.config.fit, str(self.ckpt_path))
            self._ignore_initial_weights()
        elif config.ckpt_path is not None:
            checkpoint = self._find_checkpoint(command, config)
            if checkpoint is not None:
                self._apply_settings(command, checkpoint, parser, args)
                self._ignore_initial_weights()
        elif command != "fit":
            runs = Path(config.trainer.default_root_dir, config.name)
            raise UserError(
                f"{command} needs a checkpoint. Use --ckpt_path with a file, for example "
                f"{runs}/0/checkpoints/best.ckpt, or with `last` for the last checkpoint of the "
                f"newest run in {runs}."
            )

    def _find_run(self, config: Namespace) -> None:
        """Find the checkpoint of the run in --resume."""
        if config.ckpt_path is not None:
            raise UserError(
                "--resume and --ckpt_path cannot be used together: each names the checkpoint from "
                "which training starts. Remove one of them."
            )
        run = Path(config.resume)
        found = folder.checkpoint_to_resume(run, warn=_is_rank_zero())
        checkpoints.refuse_other_versions(*found)
        self._keep_found_in_data(found[1])
        self._resume_in(run, *found)

    def _find_checkpoint(self, command: str, config: Namespace) -> dict[str, Any] | None:
        """Load the checkpoint of --ckpt_path, and resume its run if it is the last.ckpt of a run.

        Returns:
            The checkpoint, or None for `fit --ckpt_path last` if no run has one yet.
        """
        runs = Path(config.trainer.default_root_dir, config.name)
        if config.ckpt_path == "last":
            found = folder.find_newest_checkpoint(runs, warn=_is_rank_zero())
            if found is None and command != "fit":
                raise UserError(
                    f"No run in {str(runs)!r} has a checkpoint. Set --name to the name of "
                    "existing runs, or --ckpt_path to a file."
                )
            if found is None:
                if _is_rank_zero():
                    message = f"No run in {str(runs)!r} has a checkpoint yet: starting a new run."
                    print(message, flush=True)
                return None
        else:
            found = checkpoints.load(config.ckpt_path)
        self.ckpt_path, checkpoint = found
        run = Path(self.ckpt_path).absolute().parent.parent
        trainer = config.trainer
        is_last = config.ckpt_path == "last" or Path(self.ckpt_path).name == "last.ckpt"
        is_saved = not trainer.fast_dev_run and trainer.enable_checkpointing is not False
        is_in_runs = folder.is_run(run) and run.parent == runs.absolute()
        if command == "fit" and is_last and is_saved and is_in_runs:
            self._resume_in(runs / run.name, *found)
        return checkpoint

    def _apply_settings(
        self,
        command: str,
        checkpoint: dict[str, Any],
        parser: LightningArgumentParser,
        args: ArgsType,
    ) -> None:
        """Parse again, with the settings in the checkpoint as defaults."""
        path, chosen = str(self.ckpt_path), self.config[command]
        self._keep_found_in_data(checkpoint)
        data = self.experiment.data
        try:
            settings = settings_in(checkpoint, (*data.machine_settings, *data.found_in_data))
            for name in self.experiment.task.stated_by_data:
                settings.pop(f"model.{name}", None)
            trust.refuse_objects(path, settings)
            self._parser(command).set_defaults(settings)
        except KeyError as error:
            raise UserError(
                f"{path!r} was not written by this project. It has an unknown setting: {error}\n"
                "Use a checkpoint that fit has written."
            ) from error
        super().parse_arguments(parser, args)
        if command == "fit":
            checkpoints.refuse_other_versions(path, checkpoint)
        self._refuse_untrusted(path, chosen)

    def _keep_found_in_data(self, checkpoint: dict[str, Any]) -> None:
        data = checkpoint.get("datamodule_hyper_parameters", {})
        names = self.experiment.data.found_in_data
        self._found_in_data = {name: data[name] for name in names if name in data}

    def _ignore_initial_weights(self) -> None:
        """Remove the settings of initial weights, because the checkpoint has the weights."""
        model = self.config[self.config.subcommand].model
        start_only = self.experiment.task.start_only
        for name, value in initial_weights.without(start_only, vars(model)).items():
            model[name] = value

    def _refuse_untrusted(self, path: str, chosen: Namespace) -> None:
        """Refuse import paths in the settings that are not in those `chosen` by the user."""
        used = self.config[self.config.subcommand]
        registered = trust.registered(self.experiment)
        trust.refuse_untrusted(
            path, self._paths_in(used), self._paths_in(chosen), self._package, registered
        )

    def _paths_in(self, settings: Namespace) -> dict[str, Any]:
        return {name: settings.get(name) for name in trust.import_paths(self.experiment)}

    @property
    def _package(self) -> str:
        return experiment.package_of(self.reference)

    def resume_command(self) -> str:
        """Return the command that resumes the run, with the import paths that it must name."""
        used, defaults = self._paths_in(self.config.fit), self._paths_in(self.defaults())
        registered = trust.registered(self.experiment)
        named = trust.untrusted(used, defaults, self._package, registered)
        flags = "".join(f" --{name} {value}" for name, value in named.items())
        return f"{terminal.program()} fit --resume {self.folder}{flags}"

    def defaults(self) -> Any:
        """Return the default settings of `fit`."""
        return self._parser("fit").get_defaults()

    def _resume_in(self, run: Path, ckpt_path: str, checkpoint: dict[str, Any]) -> None:
        self.resuming, self.folder, self.ckpt_path = True, run, ckpt_path
        self.resumes_at = checkpoint["global_step"]
        self.was_finished = bool(checkpoint.get("between_steps", {}).get("finished"))

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's settings override flags.
        # `parse_arguments` has applied them already.
        pass


def _files_first(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of a command with its files first, so that flags override them.

    The parser applies arguments in their order. `--config` has settings of all groups,
    and `--model`, for example, has those of one group. Both may be a file.
    """
    command, *rest = arguments
    flags: list[list[str]] = []  # each with its values
    for argument in rest:
        if not flags or argument.startswith(("--", "-c")):
            flags.append([])
        flags[-1].append(argument)

    def rank(flag: list[str]) -> int:
        name = flag[0].partition("=")[0]
        if name == "--print_schema":
            # It is printed even if a config is invalid.
            return -1
        is_config = name == "--config" or name.startswith("-c")
        return 0 if is_config else 1 + ("." in name)

    flags.sort(key=rank)
    return [command, *itertools.chain.from_iterable(flags)]


def settings_in(checkpoint: dict[str, Any], left_out: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings in a checkpoint by the names of their flags.

    Args:
        left_out: data settings that depend on the machine, or are not flags.
    """
    data = dict(checkpoint.get("datamodule_hyper_parameters", {}))
    for name in left_out:
        data.pop(name, None)
    seed = {"seed_everything": data.pop("seed")} if "seed" in data else {}
    model = checkpoint.get("hyper_parameters", {})
    return (
        seed
        | {f"data.{name}": value for name, value in data.items()}
        | {f"model.{name}": value for name, value in model.items()}
    )


def _is_rank_zero() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _refuse_resume_without_saving(config: Namespace, ckpt_path: str) -> None:
    if config.trainer.fast_dev_run or config.trainer.enable_checkpointing is False:
        raise UserError(
            "--resume writes checkpoints to the run's folder. Remove --trainer.fast_dev_run and "
            "--trainer.enable_checkpointing false.\n"
            f"To start a new run from its weights: --ckpt_path {ckpt_path} --name trial"
        )
