"""The commands fit, validate and test, and what `fit` writes to the run's folder."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from bn_lightning import terminal
from bn_lightning.errors import RunFailed, UserError, report_failure
from bn_lightning.runs import console, csv_log, plain_settings, process, refusals, result, trainer
from bn_lightning.runs.folder import RunFolder, new_folder
from bn_lightning.runs.settings import TRAINER_DEFAULTS, SettingsCLI
from bn_lightning.runs.tensorboard import CHARTS, TensorBoard
from bn_lightning.runs.threads import OtherProcesses
from bn_lightning.training import checkpoints
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.stopping import Stopped
from bn_lightning.training.task import Task
from bn_lightning.training.worker_processes import WorkerFailed


class CLI(SettingsCLI):
    """The command line of an experiment. It trains and tests a network."""

    model: Task
    datamodule: DataModule
    parts: trainer.TrainerParts
    _run_folder: RunFolder | None = None  # set on rank 0 when the folder is locked

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        self.other_processes = OtherProcesses()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        extra = self.trainer_defaults["callbacks"]
        self.parts = trainer.build_parts(
            str(self.subcommand),
            config,
            self.model,
            self.datamodule,
            extra,
            starts_anew=self.ckpt_path is None,
        )
        if self.parts.resume is not None:
            self.parts.resume.resuming = self.resuming
        self.trainer_defaults["callbacks"] = self.parts.callbacks
        try:
            with refusals.of_settings():
                return super().instantiate_trainer(**kwargs | self.parts.arguments)
        except UserError as error:
            raise UserError(f"{error}{refusals.hardware_settings(config.trainer)}") from error

    def instantiate_classes(self) -> None:
        with refusals.of_settings():
            super().instantiate_classes()

    # fit

    def before_fit(self) -> None:
        """Prepare the data and the run's folder. All settings are valid at this point."""
        run = self.folder or Path("unused")  # a placeholder on other ranks
        if self.trainer.is_global_zero:
            self.datamodule.prepare_data()
            run = self._open_folder()
        else:
            # Only rank 0 writes to the folder. Lightning broadcasts the paths of
            # checkpoints to the other ranks.
            self.folder = None
        if self.parts.wants_tensorboard:
            purge_step = self.resumes_at if self.resuming else None
            self.trainer.logger = TensorBoard(
                run.parent.parent, run.parent.name, run.name, purge_step=purge_step
            )
        if self.resuming and self.trainer.is_global_zero:
            csv_log.keep_rows(self.trainer.loggers, self.resumes_at + self.was_finished)
        dirpath = str((run / "checkpoints").absolute())
        if self.parts.resume is not None:
            self.parts.resume.dirpath = dirpath if self.folder else None
        if self.parts.best is not None:
            self.parts.best.dirpath = dirpath
        if self.parts.found_settings is not None:
            self.parts.found_settings.folder = self.folder
        if self.trainer.is_global_zero:
            self._print_header()

    def _open_folder(self) -> Path:
        """Lock the folder of a new or resumed run, write the settings to it, and return it."""
        settings = self.config["fit"]
        parent = Path(settings.trainer.default_root_dir, settings.name)
        try:
            self._run_folder = RunFolder(self.folder or new_folder(parent), self.resuming)
            self.folder = self._run_folder.path
            if self.resuming:
                now, defaults = map(self.as_plain_data, (settings, self.defaults()))
                self._run_folder.save_changes(now, defaults)
            else:
                written = yaml.safe_dump(self.as_plain_data(settings), sort_keys=False)
                (self.folder / "config.yaml").write_text(written, encoding="utf-8")
        except OSError as error:
            self._remove_empty_run()
            raise UserError(
                f"The run's folder cannot be created in {str(parent)!r}: {error.strerror}.\n"
                "Choose another folder with --trainer.default_root_dir FOLDER, or another name "
                "with --name NAME."
            ) from error
        return self.folder

    def as_plain_data(self, settings: Any) -> dict[str, Any]:
        """Return settings of `fit` as they are written to config.yaml."""
        return plain_settings.of(self._parser("fit"), settings)

    def _remove_empty_run(self) -> None:
        """Remove the new files of a run if it has not trained any batch."""
        if self._run_folder is not None and not self._has_trained():
            if self.resuming and isinstance(self.trainer.logger, TensorBoard):
                self.trainer.logger.experiment.close()
            self._run_folder.remove_new_files()

    def _has_trained(self) -> bool:
        resume = self.parts.resume
        return resume.has_trained if resume is not None else self.trainer.global_step > 0

    def _print_header(self) -> None:
        data = self.datamodule
        header = console.header(self.trainer, self.model, data, self.folder)
        self._print(header + self._tensorboard_hint("watch it"))
        if self._run_folder is not None and self.resuming:
            self._print(f"Resuming from step {self.resumes_at:,} ({self.ckpt_path})")
            for setting, (before, now) in self._run_folder.changed.items():
                self._print(f"changed: --{setting} {now} (was {before})")
        for name in self.parts.skipped:
            self._print(f"{name} is skipped: the checkpoint has the settings that it found")
        is_synchronized = self.config.fit.trainer.sync_batchnorm
        lines = console.notes(self.trainer, self.model, data, is_synchronized)
        is_on_cpu = self.trainer.strategy.root_device.type == "cpu"
        if is_on_cpu and self.trainer.world_size == 1:
            lines += self.other_processes.notes()
        for line in lines:
            self._print(line)

    def _tensorboard_hint(self, action: str) -> str:
        if not self.parts.wants_tensorboard:
            return ""
        root = self.config.fit.trainer.default_root_dir
        return f"; {action} with: tensorboard --logdir {root}\nthe charts are at {CHARTS}"

    def fit(self, **kwargs: Any) -> None:
        """Train the network, then test the selected checkpoint."""
        try:
            self.trainer.fit(**self._from_checkpoint(kwargs))
        except Stopped:
            resume = self.parts.resume
            # A run that has reached its time limit is still tested.
            if resume is None or not resume.stop_requests.is_out_of_time:
                self._end_stopped_run()
                raise
        except BaseException as error:
            self._remove_empty_run()
            self._raise_run_failed(error)
            if self._has_trained():
                raise
            with refusals.of_settings():
                raise
        finally:
            if self._run_folder is not None:
                self._run_folder.release()
        found = self._result(self._load_tested_weights())
        test = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        for metrics in test:
            found |= {name: metrics[name] for name in self.model.names("test")}
        if self.folder is not None:
            self._finish(self.folder, found)

    def _end_stopped_run(self) -> None:
        """Print the command that resumes the run, and write the results so far."""
        self._print(f"resume with: {self.resume_command()}")
        if self.folder is not None:
            found = self._result("nothing yet", finished=False)
            result.write_json(self.folder / "result.json", found)

    def _raise_run_failed(self, error: BaseException) -> None:
        """Raise RunFailed if a file operation failed or another process has died."""
        is_file_error = isinstance(error, OSError) and not isinstance(error, BrokenPipeError)
        if is_file_error or isinstance(error, WorkerFailed):
            reason = f"The run in {self.folder} cannot continue: {str(error).removesuffix('.')}."
            when = "Fix the cause, then resume"
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            # gloo raises RuntimeError. Its messages start with a position in its source
            # code, which is removed.
            cause = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0])
            reason = f"Another process of this run has died: {cause}"
            when = "Resume from the last checkpoint"
        else:
            return
        if not self._has_trained() and not self.resuming:
            raise RunFailed(
                f"{reason}\nNo step was completed, and the run's folder was removed."
            ) from error
        # Only rank 0 knows the folder, but all ranks know the path of last.ckpt.
        resume = self.parts.resume
        run = self.folder or (resume.path.parent.parent if resume else "FOLDER")
        raise RunFailed(f"{reason}\n{when}: fit --resume {run}") from error

    def _load_tested_weights(self) -> str:
        """Load the weights to test, and return the name or path of their checkpoint."""
        best, resume = self.parts.best, self.parts.resume
        path = best.best_model_path if best is not None else ""
        if not path and resume is not None and resume.path.exists():
            path = str(resume.path)
        if not path:
            return "the weights in memory"
        # The trainer does not load the checkpoint, because it would also restore the
        # callbacks. Some callbacks replace the weights.
        _, checkpoint = checkpoints.load(path)
        self.model.load_state_dict(checkpoints.weights_to_evaluate(checkpoint))
        # If no step was left to train, the best checkpoint may be in the folder of
        # another run.
        is_own = resume is not None and Path(path).parent == resume.path.parent
        return Path(path).name if is_own else path

    def _result(self, tested: str, finished: bool = True) -> dict[str, Any]:
        resume = self.parts.resume
        resumed_at = ", ".join(map(str, resume.resumed_at)) if resume else ""
        found = result.assemble(
            self.trainer, self.model, self.datamodule, self.parts.records, tested
        )
        return found | {"finished": finished, "resumed_at_steps": resumed_at}

    def _finish(self, folder: Path, found: dict[str, Any]) -> None:
        result.write_json(folder / "result.json", found)
        if isinstance(self.trainer.logger, TensorBoard):
            with report_failure("TensorBoard does not show the settings under HParams"):
                self.trainer.logger.log_result(self.trainer, self.model, self.datamodule, found)
        self._print(console.closing(found, self.model, folder))
        self._print_test_report()
        self._print(f"\nresults are in {folder}" + self._tensorboard_hint("view them"))

    # validate and test

    def validate(self, **kwargs: Any) -> None:
        """Print the metrics of a checkpoint on the validation samples."""
        kwargs = self._from_checkpoint(kwargs)
        with refusals.of_settings():
            found = self.trainer.validate(**kwargs, verbose=False)
        self._print(console.metrics(found))
        self._print(f"data: {self.datamodule.describe()}")

    def test(self, **kwargs: Any) -> None:
        """Print the metrics of a checkpoint on the test samples."""
        kwargs = self._from_checkpoint(kwargs)
        with refusals.of_settings():
            found = self.trainer.test(**kwargs, verbose=False)
        self._print(console.metrics(found))
        self._print(f"data: {self.datamodule.describe()}")
        self._print_test_report()

    def _from_checkpoint(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        # `ckpt_path` is the file from which the settings were read. If a URL was given,
        # a second download could return another file.
        return kwargs | {"ckpt_path": self.ckpt_path, "weights_only": True}

    def _print(self, text: str) -> None:
        # A checkpoint and the data contain names that are printed.
        if self.trainer.is_global_zero:
            print(terminal.printable_lines(text), flush=True)

    def _print_test_report(self) -> None:
        # The cells of its tables are printable already.
        if self.trainer.is_global_zero:
            print(self.model.test_report(), flush=True)


class Rehearsal(CLI):
    """A command line that builds all objects of a run, but does not train or test."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def command_line(
    arguments: list[str], reference: str, cls: type[CLI] = CLI, callbacks: Sequence[Callback] = ()
) -> CLI:
    """Run a command, and return its `CLI` object, which holds the objects of the run.

    Args:
        arguments: the command and its settings.
        reference: import path of the experiment, `package.module:NAME`.
        cls: class of the command line.
        callbacks: callbacks to add to those of the settings.

    Raises:
        UserError: the settings are invalid, or the run cannot continue.
        Stopped: the run was stopped and can be resumed.
    """
    try:
        defaults = TRAINER_DEFAULTS | {"callbacks": list(callbacks)}
        return cls(reference, arguments, trainer_defaults=defaults)
    except (MisconfigurationException, RuntimeError) as error:
        message = refusals.translated(error)
        if message is error:
            raise
        raise message from error
    finally:
        # Otherwise the threads of the process group end in an arbitrary order at exit.
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


def main(arguments: list[str], reference: str) -> None:
    """Run fit, validate or test. The first argument is the command."""
    process.set_up()
    command_line(arguments, reference, CLI)
