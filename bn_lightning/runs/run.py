"""One run: LightningCLI for fit, validate, test and predict, and what surrounds it."""

import ctypes
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import (
    Callback,
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from torch.nn.modules.batchnorm import _BatchNorm

from bn_lightning import terminal
from bn_lightning.data import pictures
from bn_lightning.data.fashion_mnist import CLASSES, FashionMNIST
from bn_lightning.deploy import predictions
from bn_lightning.errors import RunFailed, UserError
from bn_lightning.monitoring.norm_monitor import ClosingPictures, NormMonitor
from bn_lightning.norms import recognition
from bn_lightning.norms.sync import LayerSync
from bn_lightning.runs import folder, records
from bn_lightning.runs.folder import RunFolder
from bn_lightning.runs.settings import PROGRAM, Parser, SettingsCLI
from bn_lightning.tasks.classifier import Classifier
from bn_lightning.training import averaging, checkpoints
from bn_lightning.training.distributed import Processes
from bn_lightning.training.resume import ExactResume
from bn_lightning.training.stopping import Stopped

TRAINER_DEFAULTS = {
    "max_epochs": 10,
    "default_root_dir": "runs",
    "log_every_n_steps": 10,
}


def _as_list(setting: Any) -> list[Any]:
    """Several, none, or one that a config names without a list."""
    return setting if isinstance(setting, list) else [setting] if setting else []


class CLI(SettingsCLI):
    """Lightning's command line for `Classifier` and `FashionMNIST`: a run, and what it leaves."""

    records: records.Records
    resume: ExactResume | None = None
    best: ModelCheckpoint | None = None
    _held: RunFolder | None = None  # `folder`, once it is opened

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self._get(self.config_init, "trainer")
        self._refuse(settings)
        own_callbacks = _as_list(settings["callbacks"])
        self._refuse_averaging(own_callbacks)
        self.records = records.Records()
        callbacks: list[Any] = [self.records, *self.trainer_defaults["callbacks"]]
        dry = bool(settings["fast_dev_run"])
        if self.subcommand == "fit" and settings["enable_checkpointing"] is not False and not dry:
            every = self._get(self.config_init, "checkpoint.every_n_train_steps")
            seed = self._get(self.config_init, "seed_everything")
            self.resume = ExactResume(every, seed=seed, max_time=settings["max_time"])
            self.resume.goes_on = self.goes_on
            kwargs["max_time"] = None  # Lightning's timer ends an epoch where it is
            callbacks.append(self.resume)
            if settings["limit_val_batches"] != 0 and not self.datamodule.validates_on_test_set:
                self.best = ModelCheckpoint(
                    filename="best",
                    monitor="val_acc",
                    mode="max",
                    save_last=False,
                    save_on_train_epoch_end=False,
                    enable_version_counter=False,
                )
                callbacks.append(self.best)
        if self.subcommand == "fit":
            callbacks.append(Processes())
            if self._get(self.config_init, "monitor"):
                own = {type(callback) for callback in own_callbacks}
                callbacks += [monitor() for monitor in (NormMonitor, ClosingPictures) if monitor not in own]
        if settings["logger"] is not False and not dry:
            callbacks.append(LearningRateMonitor("step"))
        by_default = settings["logger"] in (None, True)
        self._wants_tensorboard = by_default and not dry
        if by_default:
            kwargs["logger"] = False  # until there is a folder for it, see `before_fit`
        shows_progress = settings["enable_progress_bar"]
        if shows_progress is None:
            shows_progress = sys.stdout.isatty()  # in a file each refresh would be a line
        kwargs["enable_progress_bar"] = shows_progress
        if shows_progress and not any(isinstance(own, ProgressBar) for own in own_callbacks):
            callbacks.append(terminal.ProgressBar())
        if settings["enable_model_summary"] is None:
            kwargs["enable_model_summary"] = False  # `fit` says the number of parameters
        if self.subcommand == "predict" and settings["devices"] == "auto":
            kwargs["devices"] = 1  # the answers come in the order of the images
        plugins = [*_as_list(settings["plugins"]), checkpoints.WholeCheckpointIO()]
        kwargs["plugins"] = [*plugins, LayerSync()] if settings["sync_batchnorm"] else plugins
        if dist.is_available() and dist.is_torchelastic_launched():  # torchrun says how many processes there are
            local = int(os.environ["LOCAL_WORLD_SIZE"])
            kwargs["num_nodes"] = int(os.environ["WORLD_SIZE"]) // local
            if settings["devices"] == "auto":
                kwargs["devices"] = local
        self.trainer_defaults["callbacks"] = callbacks
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, ImportError) as error:
            given = " ".join(
                f"--trainer.{n} {settings[n]}" for n in ("accelerator", "devices", "strategy", "precision")
            )
            here = [name for name, entry in AcceleratorRegistry.items() if entry["accelerator"].is_available()]
            raise UserError(f"{error}\nGiven: {given}\nAccelerators of this machine: {', '.join(here)}") from error

    @staticmethod
    def _refuse(settings: Any) -> None:
        """Trainer flags that take away what a run is to leave."""
        if settings["barebones"]:
            raise UserError(
                "--trainer.barebones true switches off the metrics, and with them all that a run leaves and prints.\n"
                "What is costly by itself can be left out: --trainer.logger false --trainer.enable_checkpointing false"
            )
        if str(settings["strategy"]).endswith(("_spawn", "_fork", "_notebook")):
            raise UserError(
                f"--trainer.strategy {settings['strategy']} trains in processes that take their records with them.\n"
                "--trainer.strategy ddp does the same with processes that stay to the end."
            )

    def _refuse_averaging(self, callbacks: list[Any]) -> None:
        """Lightning's callback where averaged weights would keep the running statistics of other weights."""
        if self.subcommand != "fit" or StochasticWeightAveraging not in map(type, callbacks):
            return
        unseen = [norm for norm in recognition.with_statistics(self.model).values() if not isinstance(norm, _BatchNorm)]
        # What bn_lightning's own cannot do either, it refuses by itself.
        if unseen and averaging.StochasticWeightAveraging.pl_module_contains_batch_norm(self.model):
            raise UserError(
                f"Lightning's StochasticWeightAveraging does not see the norm {self.model.hparams['norm']!r}: the "
                "averaged weights would keep the running statistics of other weights.\n"
                "With the same arguments, one that sees it: "
                "--trainer.callbacks+=bn_lightning.StochasticWeightAveraging"
            )

    def before_fit(self) -> None:
        """Everything that can be refused has been when the run's folder is made."""
        run = self.folder or Path("elsewhere")
        if self.trainer.is_global_zero:
            self.datamodule.prepare_data()
            run = self._open_folder()
        else:
            self.folder = None  # other processes are told by Lightning, which asks the first one
        if self._wants_tensorboard:
            purged = {"purge_step": self._goes_on_at} if self.goes_on else {}
            self.trainer.logger = records.TensorBoard(run.parent.parent, run.parent.name, run.name, **purged)
        if self.resume is not None:
            self.resume.dirpath = str((run / "checkpoints").absolute()) if self.folder else None
        if self.best is not None:
            self.best.dirpath = str((run / "checkpoints").absolute())
        if self.trainer.is_global_zero:
            self._say_what_runs()

    def _open_folder(self) -> Path:
        """The folder of the run, new or gone on with, with its settings in it."""
        settings = self.config["fit"]
        parent = Path(settings.trainer.default_root_dir, settings.name)
        try:
            self._held = RunFolder(self.folder or folder.new_folder(parent), self.goes_on)
            self.folder = self._held.path
            if self.goes_on:
                parser = self._parser("fit")
                both = (parser.dump(values, skip_unset=False) for values in (settings, parser.get_defaults()))
                self._held.note_changes(*map(yaml.safe_load, both))
            else:
                self._parser("fit").save(settings, self.folder / "config.yaml", skip_unset=False)
        except OSError as error:
            self._leave_nothing()
            raise UserError(
                f"No folder for the run can be made in {str(parent)!r}: {error.strerror}.\n"
                "Another place: --trainer.default_root_dir FOLDER, another name: --name NAME"
            ) from error
        return self.folder

    @property
    def _has_trained(self) -> bool:
        return self.resume.has_trained if self.resume is not None else self.trainer.global_step > 0

    def _leave_nothing(self) -> None:
        """Remove what a run that has done nothing has put on the disk."""
        if self._held is not None and not self._has_trained:
            if self.goes_on and isinstance(self.trainer.logger, records.TensorBoard):
                self.trainer.logger.experiment.close()
            self._held.leave_nothing()

    def _say_what_runs(self) -> None:
        images, data = self.datamodule.images, self.datamodule
        validation = "the test set" if data.validates_on_test_set else "held-out training images"
        parameters = sum(p.numel() for p in self.model.parameters())
        self._print(
            f"LeNet, norm {self.model.hparams['norm']}, {parameters:,} parameters, "
            f"on {self.trainer.strategy.root_device}, precision {self.trainer.precision}, seed {data.seed}\n"
            f"Fashion-MNIST from {images.place} ({images.source}), validated on {validation}\n"
            f"run folder {self.folder}" + self._where_to_look("watch")
        )
        if self._held is not None and self.goes_on:
            self._print(f"goes on after step {self._goes_on_at:,}, from {self.ckpt_path}")
            for setting, (before, now) in self._held.changed.items():
                self._print(f"changed: --{setting} {now}, which was {before}")
        processes = self.trainer.world_size
        if processes > 1 and recognition.with_statistics(self.model.network):
            self._print(
                f"{processes} processes, norm statistics over the batches of all"
                if self.config.fit.trainer.sync_batchnorm
                else f"{processes} processes: each normalizes its own share of a batch, and the running statistics of "
                "the first one are kept; over whole batches: --trainer.sync_batchnorm true"
            )
        if data.validates_on_test_set:
            self._print(
                "val_images is 0: what is logged as val_loss and val_acc is of the test set, and selects nothing"
            )

    def fit(self, **kwargs: Any) -> None:
        try:
            self.trainer.fit(**self._from_checkpoint(kwargs))
        except Stopped:
            assert self.resume is not None
            if not self.resume.reasons.is_out_of_time:
                self._print(f"go on with: {PROGRAM} fit --resume {self.folder}")
                if self.folder is not None:
                    records.write_json(self.folder / "result.json", self._result("nothing yet", finished=False))
                raise
        except BaseException as error:
            self._leave_nothing()
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):  # who reads has seen enough
                said = f"The run in {self.folder} cannot go on: {error}.\nWhen the cause is mended"
            elif isinstance(error, dist.DistError) or "gloo" in str(error):  # gloo's errors have no class of their own
                reason = re.sub(r"^\[.*?\] ", "", str(error).splitlines()[0])  # without the place in gloo's source
                said = f"Another process of this run has gone: {reason}\nFrom the last step saved"
            else:
                raise
            if not self._has_trained and not self.goes_on:
                raise RunFailed(f"{said.splitlines()[0]}\nNothing was trained yet, and nothing is left.") from error
            # Of the processes the first alone has the folder, but all know where the checkpoint lies.
            run = self.resume.path.parent.parent if self.resume is not None else "FOLDER"
            raise RunFailed(f"{said}: fit --resume {self.folder or run}") from error
        finally:
            if self._held is not None:
                self._held.release()
        kept = self._kept_checkpoint()
        name = "the weights in memory"
        if kept:  # resumed with nothing left to do, the one that was kept is another run's
            # Not by the trainer, which would restore the callbacks too; some put weights of theirs over these.
            self.model.load_state_dict(checkpoints.load(kept)[1]["state_dict"])
            is_own = self.resume is not None and Path(kept).parent == self.resume.path.parent
            name = Path(kept).name if is_own else kept
        result = self._result(name)
        for figures in self.trainer.test(self.model, datamodule=self.datamodule, verbose=False):
            result |= {name: figures[name] for name in ("test_loss", "test_acc")}
        if self.folder is not None:
            self._finish(result)

    def _where_to_look(self, how: str) -> str:
        root = self.config.fit.trainer.default_root_dir
        return f"; {how} it with: tensorboard --logdir {root}" if self._wants_tensorboard else ""

    def _kept_checkpoint(self) -> str | None:
        if self.best is not None and self.best.best_model_path:
            return self.best.best_model_path
        return str(self.resume.path) if self.resume is not None and self.resume.path.exists() else None

    def _result(self, kept: str, finished: bool = True) -> dict[str, Any]:
        result = self.records.result(self.trainer, self.datamodule, self.model.hparams["norm"], kept)
        resumed_at = self.resume.resumed_at if self.resume else []
        return result | {"finished": finished, "resumed_at_steps": ", ".join(map(str, resumed_at))}

    def _finish(self, result: dict[str, Any]) -> None:
        assert self.folder is not None
        records.write_json(self.folder / "result.json", result)
        logger = self.trainer.logger
        if isinstance(logger, records.TensorBoard):
            figures = ("test_acc", "test_loss", "val_acc", "val_loss", "train_acc", "train_loss", "images_per_second")
            metrics = {f"result/{name}": result[name] for name in figures if result[name] is not None}
            trained = {"max_epochs": self.trainer.max_epochs, "precision": self.trainer.precision}
            data = {name: value for name, value in self.datamodule.hparams.items() if name not in ("root", "mirrors")}
            hyperparameters = {**self.model.hparams, **data, **trained}
            logger.log_hyperparams(hyperparameters, metrics, self.trainer.global_step)
            logger.experiment.close()
        self._print(f"\ntested {result['tested']} of {self.folder}")
        self._print(records.closing_lines(result, self.model.network.norm1))
        self._print("")
        self._print_classes()
        self._print(f"\nall of it is in {self.folder}" + self._where_to_look("look at"))

    def validate(self, **kwargs: Any) -> None:
        self._print_figures(self.trainer.validate(**self._from_checkpoint(kwargs), verbose=False))

    def test(self, **kwargs: Any) -> None:
        self._print_figures(self.trainer.test(**self._from_checkpoint(kwargs), verbose=False))
        self._print_classes()

    def _print_classes(self) -> None:
        if self.trainer.is_global_zero:
            terminal.print_classes(self.model.confusion, CLASSES)

    def _print_figures(self, results: Sequence[Mapping[str, float]]) -> None:
        for figures in results:
            whole = {name: value for name, value in figures.items() if "/" not in name}
            self._print("\n".join(f"{name:10} {value:.4f}" for name, value in whole.items()))

    def predict(self, **kwargs: Any) -> None:
        """Print the class and the runner-up of each image, with their probabilities."""
        if self.trainer.world_size > 1:
            raise UserError("predict gives the images in their order, in one process: --trainer.devices 1")
        images, invert = self.pictures
        settings = self.config.predict
        if settings.grid is not None:
            predictions.refuse_place(Path(settings.grid))
        kwargs, unread = self._from_checkpoint(kwargs), 0
        answers: Any
        if images is None:
            answers = self.trainer.predict(**kwargs)
            pixels, truth = self.datamodule.images.test_images, self.datamodule.images.test_labels
            about = [{"image": index, "truth": CLASSES[label]} for index, label in enumerate(truth.tolist())]
        else:
            read, unread = pictures.read_all(pictures.find(images), invert)
            pixels = torch.stack([picture.pixels for picture in read])
            about = [{"image": str(p.path), "inverted": p.inverted} for p in read]
            del kwargs["datamodule"]
            answers = self.trainer.predict(**kwargs, dataloaders=self.datamodule.batches_of(pixels))
        if not answers:
            raise UserError("There is no image to predict: leave out --trainer.limit_predict_batches 0")
        probabilities = torch.cat(answers)
        asked = len(probabilities)  # fewer than there are with --trainer.limit_predict_batches
        answered = predictions.Predictions(about[:asked], pixels[:asked], probabilities, CLASSES)
        answered.print(settings.format)
        if settings.grid is not None:
            answered.draw(Path(settings.grid))
        if unread:
            raise RunFailed(f"{unread} of {unread + len(read)} pictures could not be read; they are named above.")

    def _from_checkpoint(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        # What was loaded for its settings, and not the address that was typed: that could give another file now.
        return kwargs | {"ckpt_path": self.ckpt_path, "weights_only": True}

    def _print(self, text: str) -> None:
        if self.trainer.is_global_zero:
            print(text, flush=True)


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next step.

    By default it gives the activations of every step back to the system and takes them anew, zeroed page by page: on
    2 cores 1.8 million page faults in two epochs instead of 0.2 million, and up to a third of the speed.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)  # musl has none
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: its largest value
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def set_up() -> None:
    """What concerns the whole process, and not one run."""
    _keep_freed_memory()
    # Lightning's tips and advertisements; what a newcomer should see are our lines.
    for quiet in (
        "pytorch.utilities.rank_zero",
        "fabric.utilities.rank_zero",
        "fabric.utilities.seed",
        "fabric.utilities.distributed",
    ):
        logging.getLogger(f"lightning.{quiet}").setLevel(logging.WARNING)
    # Which are given as they stand in sys.argv, or by a study, whose own stand there.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter")
    # Ours counts each image once on any number of processes.
    warnings.filterwarnings("ignore", "Using `DistributedSampler` with the dataloaders")
    # Of a checkpoint that is only tested the callbacks of its training are not wanted.
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks used to create")
    # A run that goes on in its folder, and one that begins with another's checkpoint.
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", "The dirpath has changed from None")
    # lightning 2.6.6 with torch 2.15
    warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated")
    # TensorBoard writes in a thread of its own, and raises what goes wrong there once more in the main one.
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else threading.__excepthook__(args)


def command_line(arguments: list[str], cls: type[CLI] = CLI, callbacks: Sequence[Callback] = ()) -> CLI:
    """Run `arguments`, a sub-command and its settings, and give what has run it.

    Raises:
        UserError: a mistake in them, or a run that cannot go on.
        Stopped: a run that was asked to stop, and can go on.
    """
    try:
        return cls(
            Classifier,
            FashionMNIST,
            args=arguments,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS | {"callbacks": list(callbacks)},
            parser_class=Parser,
            parser_kwargs={"prog": PROGRAM}
            | {name: {"usage": f"{PROGRAM} {name} [settings]"} for name in LightningCLI.subcommands()},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    except MisconfigurationException as error:  # Lightning's word for settings that do not go together
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if "InvalidCxxCompiler" in str(error):
            raise UserError(
                "--model.compile true needs a C++ compiler on a CPU: none was found (g++, or the one that CXX names)."
            ) from error
        if not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise UserError(
            f"The checkpoint does not fit the network that the settings ask for: {error}\n"
            "Leave out the --model settings: the checkpoint remembers its own."
        ) from error
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # else its threads are torn down in any order when the process ends


class Rehearsal(CLI):
    """A command line that builds what it is asked for, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def main() -> None:
    """Run the sub-command that stands in sys.argv."""
    set_up()
    command_line(sys.argv[1:])
