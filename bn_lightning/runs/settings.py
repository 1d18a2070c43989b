"""Settings of a run, from weak to strong: defaults < checkpoint < --config < flags."""

import difflib
import re
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from bn_lightning import terminal
from bn_lightning.errors import UserError
from bn_lightning.runs import experiment, folder, trust
from bn_lightning.training import checkpoints

# Defaults of every experiment.
TRAINER_DEFAULTS = {"default_root_dir": "runs", "log_every_n_steps": 10}


class Parser(LightningArgumentParser):
    """Reports a mistake with the nearest settings. The usage of `fit` alone fills a screen."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        known = [option for action in parser._actions for option in action.option_strings]
        wrong = re.findall(r"--?([\w.]+)|[Kk]ey ['\"]([\w.]+)", message)
        near = {f"--{n}": None for a, b in wrong for n in _nearest(a or b, known)}
        hint = f"Did you mean {' or '.join(near)}?\n" if near else ""
        program = parser.prog.replace(" [options]", "")
        raise UserError(f"{message}\n{hint}All settings: {program} --help") from ex


def _nearest(name: str, options: list[str]) -> list[str]:
    known = [option.removeprefix("--") for option in options if option.startswith("--")]
    return [] if name in known else difflib.get_close_matches(name, known, n=2, cutoff=0.75)


class SettingsCLI(LightningCLI):
    """Lightning's command line with the settings of this project.

    Args:
        reference: of the experiment, `package.module:NAME`.
        arguments: a sub-command and its settings.

    Attributes:
        experiment: that of the reference.
        ckpt_path: the file of the checkpoint that is used, None without one.
        folder: of the run that is resumed, or None.
        resuming: whether a run is resumed in its folder, and `resumes_at` its step.
    """

    # The sub-commands of this command line; Lightning's others are not its own.
    commands: tuple[str, ...] = ("fit", "validate", "test")

    ckpt_path: str | None = None
    folder: Path | None = None
    resuming: bool = False
    resumes_at: int = 0

    def __init__(self, reference: str, arguments: list[str], **settings: Any) -> None:
        self.reference = reference
        self.experiment = experiment.load(reference)
        program = terminal.program()
        usage = {name: {"usage": f"{program} {name} [settings]"} for name in self.commands}
        super().__init__(
            self.experiment.task,
            self.experiment.data,
            args=arguments,
            save_config_callback=None,
            parser_class=Parser,
            parser_kwargs={"prog": program} | usage,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            **settings,
        )

    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        # A checkpoint is never loaded in any other way than with weights_only=True.
        # Metrics are printed here, so Lightning's table is not.
        skipped = {"weights_only", "verbose", "return_predictions"}
        return {name: LightningCLI.subcommands()[name] | skipped for name in cls.commands}

    # Flags

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=0,
            help="Seed of the weights, the data split and the shuffling.",
        )
        parser.add_argument(
            "--name",
            type=str,
            default=self.experiment.name,
            help="A run's folder is <default_root_dir>/<name>/N.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("seed_everything", "data.seed")
        try:
            parser.set_defaults(dict(self.experiment.defaults))
        except KeyError as error:
            raise UserError(
                f"The defaults of {self.reference!r} have an unknown setting: {error}"
            ) from error

    def add_command_arguments(self) -> None:
        """Add the flags that one sub-command alone has."""
        if "fit" not in self.commands:
            return
        self._parser("fit").add_argument(
            "--checkpoint.every_n_train_steps",
            type=NonNegativeInt,
            default=0,
            help="Write last.ckpt after so many steps too, not only before each epoch; 0 for never.",
        )
        self._parser("fit").add_argument(
            "--resume",
            type=str | None,
            default=None,
            help="Folder of a run, runs/NAME/N, to resume from its last.ckpt with its settings.",
        )
        self._parser("fit").add_argument(
            "--monitor",
            type=bool,
            default=True,
            help="Show in TensorBoard what the norms do, and at the end what is misclassified.",
        )

    # Settings from a checkpoint

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.add_command_arguments()
        super().parse_arguments(parser, args)
        command = self.config.subcommand
        config = self.config[command]
        if not 0 <= config.seed_everything < 2**32:  # Lightning would take another one
            raise UserError(
                f"--seed_everything is {config.seed_everything}; it must be from 0 to {2**32 - 1}."
            )
        if command == "fit" and config.resume is not None:
            self._find_run(config)
            # The settings that the run had are weaker than flags.
            files = map(str, folder.settings_files(Path(config.resume)))
            self._parser("fit").default_config_files = list(files)
            super().parse_arguments(parser, args)
            _refuse_dry_resume(self.config.fit, str(self.ckpt_path))
        elif config.ckpt_path is not None:
            checkpoint = self._find_checkpoint(command, config)
            if checkpoint is not None:
                self._take_settings(command, checkpoint, parser, args)
        elif command != "fit":
            raise UserError(
                f"{command} needs a checkpoint: --ckpt_path "
                f"runs/{self.experiment.name}/0/checkpoints/last.ckpt\n"
                "A run prints the folder of its checkpoints when it ends."
            )

    def _find_run(self, config: Namespace) -> None:
        """Find the checkpoint of the run in --resume."""
        if config.ckpt_path is not None:
            raise UserError(
                "--resume and --ckpt_path are both given; a run resumes from one checkpoint."
            )
        found = folder.last_of(Path(config.resume), _is_first_process())
        checkpoints.refuse_other_versions(*found)
        self._resume_in(Path(config.resume), *found)

    def _find_checkpoint(self, command: str, config: Namespace) -> dict[str, Any] | None:
        """Load the checkpoint of --ckpt_path; `last` without any starts a new run."""
        runs = Path(config.trainer.default_root_dir, config.name)
        if config.ckpt_path == "last":
            found = folder.find_last(runs, _is_first_process())
            if found is None and command != "fit":
                raise UserError(
                    f"There is no checkpoint of a run in {str(runs)!r}. Another place: --name NAME"
                )
            if found is None:
                if _is_first_process():
                    print(
                        f"There is no checkpoint in {str(runs)!r} yet: a new run begins.",
                        flush=True,
                    )
                return None
        else:
            found = checkpoints.load(config.ckpt_path)
        self.ckpt_path, checkpoint = found
        within = Path(self.ckpt_path).absolute().parent.parent
        is_last = config.ckpt_path == "last" or Path(self.ckpt_path).name == "last.ckpt"
        trainer = config.trainer
        is_kept = not trainer.fast_dev_run and trainer.enable_checkpointing is not False
        is_own = folder.is_run(within) and within.parent == runs.absolute()
        if command == "fit" and is_kept and is_last and is_own:
            self._resume_in(runs / within.name, *found)
        return checkpoint

    def _take_settings(
        self,
        command: str,
        checkpoint: dict[str, Any],
        parser: LightningArgumentParser,
        args: ArgsType,
    ) -> None:
        """Parse again, with the settings in the checkpoint as defaults."""
        path = str(self.ckpt_path)
        paths = trust.import_paths(self.experiment)
        chosen = {name: self.config[command].get(name) for name in paths}
        try:
            self._parser(command).set_defaults(
                settings_in(checkpoint, self.experiment.data.machine_settings)
            )
        except KeyError as error:
            raise UserError(
                f"{path!r} was not written by this project: it has a setting unknown here: {error}"
            ) from error
        super().parse_arguments(parser, args)
        if command == "fit":
            checkpoints.refuse_other_versions(path, checkpoint)
        used = {name: self.config[command].get(name) for name in paths}
        trust.refuse_untrusted(path, used, chosen, experiment.package_of(self.reference))

    def _resume_in(self, run: Path, ckpt_path: str, checkpoint: dict[str, Any]) -> None:
        self.resuming, self.folder, self.ckpt_path = True, run, ckpt_path
        self.resumes_at = checkpoint["global_step"]

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's settings override flags. `parse_arguments` has read
        # them already.
        pass


def settings_in(checkpoint: dict[str, Any], machine_settings: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings in a checkpoint by their flags, without those of the machine."""
    data = dict(checkpoint.get("datamodule_hyper_parameters", {}))
    for name in machine_settings:
        data.pop(name, None)
    defaults = {"seed_everything": data.pop("seed")} if "seed" in data else {}
    defaults |= {f"data.{name}": value for name, value in data.items()}
    model = checkpoint.get("hyper_parameters", {})
    return defaults | {f"model.{name}": value for name, value in model.items()}


def _is_first_process() -> bool:
    return getattr(rank_zero_only, "rank", 0) == 0


def _refuse_dry_resume(config: Namespace, ckpt_path: str) -> None:
    if config.trainer.fast_dev_run or config.trainer.enable_checkpointing is False:
        raise UserError(
            "--resume continues a run and saves what is trained: remove --trainer.fast_dev_run and "
            "--trainer.enable_checkpointing.\n"
            f"To try something with its weights: --ckpt_path {ckpt_path} --name trial"
        )
