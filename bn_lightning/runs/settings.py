"""What is asked for: the settings of a run, from weak to strong.

Defaults in the code, what the checkpoint of --ckpt_path or the run of --resume remembers, --config, flags.
"""

import difflib
import re
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse.typing import NonNegativeInt
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from bn_lightning.deploy import predictions
from bn_lightning.errors import UserError
from bn_lightning.runs import folder
from bn_lightning.training import checkpoints

PROGRAM = "python -m bn_lightning"


class Parser(LightningArgumentParser):
    """Ends with the mistake and the nearest settings, where the usage of `fit` alone is longer than a screen."""

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
    """Lightning's command line, with the settings that are this project's own.

    Attributes:
        ckpt_path: the file of the checkpoint that is used, None without one.
        folder: of the run that goes on, or None.
        goes_on: whether one does.
        pictures: for predict, the pictures that are given, or None, and whether to invert them.
    """

    ckpt_path: str | None = None
    folder: Path | None = None
    goes_on: bool = False
    pictures: tuple[list[str] | None, bool | None] = (None, None)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        # A checkpoint is never loaded in any other way than with weights_only=True.
        # Figures are printed here, so Lightning's table is not.
        skipped = {"weights_only", "verbose", "return_predictions"}
        return {name: also | skipped for name, also in LightningCLI.subcommands().items()}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--seed_everything",
            type=int,
            default=0,
            help="Of weights, split and order: decides the whole run.",
        )
        parser.add_argument("--name", type=str, default="lenet", help="A run's folder is <default_root_dir>/<name>/N.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("seed_everything", "data.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
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
            help="The folder of a run, runs/NAME/N, that goes on from its last.ckpt with the settings that it had.",
        )
        self._parser("fit").add_argument(
            "--monitor",
            type=bool,
            default=True,
            help="Show in TensorBoard what the norms do, and at the end what the network gets wrong.",
        )
        predict = self._parser("predict")
        predict.add_argument(
            "--data.images",
            nargs="+",
            type=str,
            default=None,
            help="Pictures of yours: files, folders, patterns. By default the images of the test set.",
        )
        predict.add_argument(
            "--data.invert",
            type=bool | None,
            default=None,
            help="Whether dark and bright change places in them; null does so where the border is bright.",
        )
        predict.add_argument("--format", type=Literal[predictions.FORMATS], default="table", help="What is printed.")
        predict.add_argument("--grid", type=str | None, default=None, help="A file for a picture of the answers.")
        super().parse_arguments(parser, args)
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        if not 0 <= config.seed_everything < 2**32:  # Lightning would take another one
            raise UserError(f"--seed_everything is {config.seed_everything}; it must be from 0 to {2**32 - 1}.")
        if config.ckpt_path is None and subcommand != "fit":
            raise UserError(
                f"{subcommand} needs a checkpoint: --ckpt_path runs/lenet/0/checkpoints/last.ckpt\n"
                "A run prints where its checkpoints lie when it ends."
            )
        is_first = getattr(rank_zero_only, "rank", 0) == 0
        runs = Path(config.trainer.default_root_dir, config.name)
        if subcommand == "fit" and config.resume is not None:
            if config.ckpt_path is not None:
                raise UserError("--resume and --ckpt_path are both given; a run goes on from one checkpoint.")
            last = folder.last_of(Path(config.resume), is_first)
            checkpoints.refuse_other_versions(*last)
            self._goes_on_in(Path(config.resume), *last)
            # What the run had until now is weaker than what is typed.
            self._parser("fit").default_config_files = list(map(str, folder.settings_files(Path(config.resume))))
            super().parse_arguments(parser, args)
            trainer = self.config.fit.trainer
            if trainer.fast_dev_run or trainer.enable_checkpointing is False:
                raise UserError(
                    "--resume goes on with a run for good, and what is trained is to be kept: leave out "
                    "--trainer.fast_dev_run and --trainer.enable_checkpointing.\n"
                    f"To try something with its weights: --ckpt_path {self.ckpt_path} --name trial"
                )
            return
        if config.ckpt_path == "last":
            found = folder.find_last(runs, is_first)
            if found is None:
                if subcommand != "fit":
                    raise UserError(f"There is no checkpoint of a run in {str(runs)!r}. Another place: --name NAME")
                if is_first:  # the same command is to begin a run and to go on with it
                    print(f"There is no checkpoint in {str(runs)!r} yet: a new run begins.", flush=True)
                return
        elif config.ckpt_path is not None:
            found = checkpoints.load(config.ckpt_path)
        else:
            return
        self.ckpt_path, checkpoint = found
        within = Path(self.ckpt_path).absolute().parent.parent
        is_last = config.ckpt_path == "last" or Path(self.ckpt_path).name == "last.ckpt"
        is_kept = not config.trainer.fast_dev_run and config.trainer.enable_checkpointing is not False
        if subcommand == "fit" and is_kept and is_last and folder.is_run(within) and within.parent == runs.absolute():
            self._goes_on_in(runs / within.name, *found)
        # The first parse found the checkpoint; the second has what it remembers as defaults.
        typed = config.model
        try:
            self._parser(subcommand).set_defaults(checkpoints.settings(checkpoint))
        except KeyError as error:
            raise UserError(
                f"{self.ckpt_path!r} was not written by this project: it has a setting unknown here: {error}"
            ) from error
        super().parse_arguments(parser, args)
        if subcommand == "fit":
            checkpoints.refuse_other_versions(*found)
        for name in ("norm", "optimizer", "scheduler"):
            used = self.config[subcommand].model[name]
            if used and "." in used and used != typed[name]:
                raise checkpoints.not_trusted(self.ckpt_path, name, used, f"--model.{name}")

    def before_instantiate_classes(self) -> None:
        if self.config.subcommand == "predict":  # of the pictures that are given the data module knows nothing
            data = self.config.predict.data
            self.pictures = data.pop("images"), data.pop("invert")

    def _goes_on_in(self, run: Path, ckpt_path: str, checkpoint: dict[str, Any]) -> None:
        self.goes_on, self.folder, self.ckpt_path = True, run, ckpt_path
        self._goes_on_at = checkpoint["global_step"]

    def _parse_ckpt_path(self) -> None:
        # Lightning would put what the checkpoint remembers over what was typed; `parse_arguments` has done it rightly.
        pass
