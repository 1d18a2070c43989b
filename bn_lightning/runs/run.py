"""One run: the sub-commands fit, validate and test, and the life of the run's folder."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback

from bn_lightning import terminal
from bn_lightning.errors import RunFailed, UserError
from bn_lightning.runs import console, process, result, trainer
from bn_lightning.runs.folder import RunFolder, new_folder
from bn_lightning.runs.settings import TRAINER_DEFAULTS, SettingsCLI
from bn_lightning.runs.tensorboard import TensorBoard
from bn_lightning.training import checkpoints
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.stopping import Stopped
from bn_lightning.training.task import Task


class CLI(SettingsCLI):
    """Lightning's command line for an experiment: a run, and what it leaves behind."""

    model: Task
    datamodule: DataModule
    equipment: trainer.Equipment
    _held: RunFolder | None = None  # `folder`, once it is open

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        extra = self.trainer_defaults["callbacks"]
        self.equipment = trainer.equip(
            str(self.subcommand), config, self.model, self.datamodule, extra
        )
        if self.equipment.resume is not None:
            self.equipment.resume.resuming = self.resuming
        self.trainer_defaults["callbacks"] = self.equipment.callbacks
        try:
            return super().instantiate_trainer(**kwargs | self.equipment.arguments)
        except (MisconfigurationException, ValueError, ImportError) as error:
            names = ("accelerator", "devices", "strategy", "precision")
            given = " ".join(f"--trainer.{name} {config.trainer[name]}" for name in names)
            here = [
                name
                for name, entry in AcceleratorRegistry.items()
                if entry["accelerator"].is_available()
            ]
            raise UserError(
                f"{error}\nGiven: {given}\nAccelerators of this machine: {', '.join(here)}"
            ) from error

    # fit

    def before_fit(self) -> None:
        """Prepare data and folder. Everything that can be refused has been refused before."""
        run = self.folder or Path("elsewhere")
        if self.trainer.is_global_zero:
            self.datamodule.prepare_data()
            run = self._open_folder()
        else:
            self.folder = None  # Lightning tells the other ranks what rank 0 says
        if self.equipment.wants_tensorboard:
            purge_step = self.resumes_at if self.resuming else None
            self.trainer.logger = TensorBoard(
                run.parent.parent, run.parent.name, run.name, purge_step=purge_step
            )
        dirpath = str((run / "checkpoints").absolute())
        if self.equipment.resume is not None:
            self.equipment.resume.dirpath = dirpath if self.folder else None
        if self.equipment.best is not None:
            self.equipment.best.dirpath = dirpath
        if self.trainer.is_global_zero:
            self._print_header()

    def _open_folder(self) -> Path:
        """Return the folder of the run, new or resumed, with its settings in it."""
        settings = self.config["fit"]
        parent = Path(settings.trainer.default_root_dir, settings.name)
        try:
            self._held = RunFolder(self.folder or new_folder(parent), self.resuming)
            self.folder = self._held.path
            if self.resuming:
                self._held.note_changes(*map(self.as_plain_data, (settings, self.defaults())))
            else:
                config = self.folder / "config.yaml"
                self._parser("fit").save(settings, config, skip_unset=False)
        except OSError as error:
            self._remove_empty_run()
            raise UserError(
                f"No folder for the run can be made in {str(parent)!r}: {error.strerror}.\n"
                "Another place: --trainer.default_root_dir FOLDER, another name: --name NAME"
            ) from error
        return self.folder

    def as_plain_data(self, settings: Any) -> dict[str, Any]:
        """Return the settings of `fit` as config.yaml has them."""
        return dict(yaml.safe_load(self._parser("fit").dump(settings, skip_unset=False)))

    def defaults(self) -> Any:
        """Return the settings of `fit` where nothing is set."""
        return self._parser("fit").get_defaults()

    def _remove_empty_run(self) -> None:
        """Remove what a run that has trained nothing has put on the disk."""
        if self._held is not None and not self._has_trained():
            if self.resuming and isinstance(self.trainer.logger, TensorBoard):
                self.trainer.logger.experiment.close()
            self._held.leave_nothing()

    def _has_trained(self) -> bool:
        resume = self.equipment.resume
        return resume.has_trained if resume is not None else self.trainer.global_step > 0

    def _print_header(self) -> None:
        data = self.datamodule
        lines = console.header(self.trainer, self.model, data, self.folder)
        self._print(lines + self._where_to_look("watch"))
        if self._held is not None and self.resuming:
            self._print(f"Resuming from step {self.resumes_at:,} ({self.ckpt_path})")
            for setting, (before, now) in self._held.changed.items():
                self._print(f"changed: --{setting} {now}, which was {before}")
        is_synchronized = self.config.fit.trainer.sync_batchnorm
        for line in console.notes(self.trainer, self.model, data, is_synchronized):
            self._print(line)

    def _where_to_look(self, how: str) -> str:
        root = self.config.fit.trainer.default_root_dir
        shown = self.equipment.wants_tensorboard
        return f"; {how} it with: tensorboard --logdir {root}" if shown else ""

    def fit(self, **kwargs: Any) -> None:
        try:
            self.trainer.fit(**self._from_checkpoint(kwargs))
        except Stopped:
            assert self.equipment.resume is not None
            # A run that is out of time goes on to its test.
            if not self.equipment.resume.stop_requests.is_out_of_time:
                self._end_stopped_run()
                raise
        except BaseException as error:
            self._remove_empty_run()
            self._explain(error)
            raise
        finally:
            if self._held is not None:
                self._held.release()
        found = self._result(self._load_tested_weights())
        test = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        for metrics in test:
            found |= {name: metrics[name] for name in self.model.names("test")}
        if self.folder is not None:
            self._finish(self.folder, found)

    def _end_stopped_run(self) -> None:
        """Say how to resume, and what was reached until now."""
        self._print(f"resume with: {terminal.program()} fit --resume {self.folder}")
        if self.folder is not None:
            found = self._result("nothing yet", finished=False)
            result.write_json(self.folder / "result.json", found)

    def _explain(self, error: BaseException) -> None:
        """Raise RunFailed for a full disk, or for another process that has died."""
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            reason = f"The run in {self.folder} cannot continue: {error}."
            when = "When the cause is removed"
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            # gloo's errors have no class of their own, and begin with a place in its source.
            said = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0])
            reason, when = f"Another process of this run has died: {said}", "From the last save"
        else:
            return
        if not self._has_trained() and not self.resuming:
            raise RunFailed(f"{reason}\nNothing was trained yet, and nothing is left.") from error
        # Only rank 0 has the folder, but all ranks know where the checkpoint is.
        resume = self.equipment.resume
        run = self.folder or (resume.path.parent.parent if resume else "FOLDER")
        raise RunFailed(f"{reason}\n{when}: fit --resume {run}") from error

    def _load_tested_weights(self) -> str:
        """Load the checkpoint that is tested, and return its name."""
        best, resume = self.equipment.best, self.equipment.resume
        path = best.best_model_path if best is not None else ""
        if not path and resume is not None and resume.path.exists():
            path = str(resume.path)
        if not path:
            return "the weights in memory"
        # The trainer would restore the callbacks too, and some exchange the weights.
        self.model.load_state_dict(checkpoints.load(path)[1]["state_dict"])
        # With nothing left to train, the best checkpoint may be another run's.
        is_own = resume is not None and Path(path).parent == resume.path.parent
        return Path(path).name if is_own else path

    def _result(self, tested: str, finished: bool = True) -> dict[str, Any]:
        resume = self.equipment.resume
        resumed_at = ", ".join(map(str, resume.resumed_at)) if resume else ""
        found = result.assemble(
            self.trainer, self.model, self.datamodule, self.equipment.records, tested
        )
        return found | {"finished": finished, "resumed_at_steps": resumed_at}

    def _finish(self, folder: Path, found: dict[str, Any]) -> None:
        result.write_json(folder / "result.json", found)
        if isinstance(self.trainer.logger, TensorBoard):
            self.trainer.logger.log_result(self.trainer, self.model, self.datamodule, found)
        self._print(console.closing(found, self.model, folder))
        self._print(self.model.test_report())
        self._print(f"\nall of it is in {folder}" + self._where_to_look("look at"))

    # validate and test

    def validate(self, **kwargs: Any) -> None:
        kwargs = self._from_checkpoint(kwargs)
        self._print(console.metrics(self.trainer.validate(**kwargs, verbose=False)))

    def test(self, **kwargs: Any) -> None:
        kwargs = self._from_checkpoint(kwargs)
        self._print(console.metrics(self.trainer.test(**kwargs, verbose=False)))
        self._print(self.model.test_report())

    def _from_checkpoint(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        # The file that was loaded for its settings: an address could give another one now.
        return kwargs | {"ckpt_path": self.ckpt_path, "weights_only": True}

    def _print(self, text: str) -> None:
        if self.trainer.is_global_zero:
            print(text, flush=True)


class Rehearsal(CLI):
    """A command line that builds everything, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def command_line(
    arguments: list[str], reference: str, cls: type[CLI] = CLI, callbacks: Sequence[Callback] = ()
) -> CLI:
    """Run a sub-command with its settings, and return what has run it.

    Args:
        arguments: the sub-command, and its settings.
        reference: of the experiment, `package.module:NAME`.

    Raises:
        UserError: a mistake in the settings, or a run that cannot continue.
        Stopped: a run that was asked to stop, and can be resumed.
    """
    try:
        defaults = TRAINER_DEFAULTS | {"callbacks": list(callbacks)}
        return cls(reference, arguments, trainer_defaults=defaults)
    except MisconfigurationException as error:  # settings that exclude each other
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if "InvalidCxxCompiler" in str(error):
            raise UserError(
                "--model.compile true needs a C++ compiler on a CPU: none was found (g++, or the "
                "one that CXX names)."
            ) from error
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise UserError(
            f"The checkpoint does not fit the network that the settings ask for: {error}\n"
            "Leave out the --model settings: the checkpoint has its own."
        ) from error
    finally:
        # Otherwise its threads end in any order when the process ends.
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def main(arguments: list[str], reference: str) -> None:
    """Run fit, validate or test; `arguments` begins with the command."""
    process.set_up()
    command_line(arguments, reference, CLI)
