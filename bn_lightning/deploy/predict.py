"""The command `predict`: the class of each image of the test set, or of each file of the user."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from bn_lightning.deploy import predictions
from bn_lightning.errors import RunFailed, UserError
from bn_lightning.runs import process
from bn_lightning.runs.run import CLI, command_line


class PredictCLI(CLI):
    """The command line of `predict`.

    Attributes:
        files: the user's files, None for the test set, and whether to invert them.
    """

    commands = ("predict",)
    files: tuple[list[str] | None, bool | None] = (None, None)

    def add_command_arguments(self) -> None:
        parser = self._parser("predict")
        parser.add_argument(
            "--data.images",
            nargs="+",
            type=str,
            default=None,
            help="Pictures of yours: files, folders, patterns. By default the test set's images.",
        )
        parser.add_argument(
            "--data.invert",
            type=bool | None,
            default=None,
            help="Whether dark and bright change places in them; null does so where the border is "
            "bright.",
        )
        parser.add_argument(
            "--format",
            type=Literal[predictions.FORMATS],
            default="table",
            help="What is printed.",
        )
        parser.add_argument(
            "--grid", type=str | None, default=None, help="A file for a picture of the answers."
        )

    def before_instantiate_classes(self) -> None:
        data = self.config.predict.data  # the data module has no such settings
        self.files = data.pop("images"), data.pop("invert")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.config_init.predict.trainer.devices == "auto":
            kwargs["devices"] = 1  # the answers come in the order of the images
        return super().instantiate_trainer(**kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Print the class and the runner-up of each image, with their probabilities."""
        settings, classes = self.config.predict, self.datamodule.classes
        if classes is None:
            raise UserError("predict does not apply: this task has no classes")
        if self.trainer.world_size > 1:
            raise UserError(
                "predict gives the images in their order, in one process: --trainer.devices 1"
            )
        grid = None if settings.grid is None else Path(settings.grid)
        if grid is not None:
            predictions.refuse_place(grid)
        kwargs, unread = self._from_checkpoint(kwargs), 0
        files, invert = self.files
        answers: Any
        if files is None:
            answers = self.trainer.predict(**kwargs)
            inputs, about = self._test_set(classes)
        else:
            inputs, about, unread = self.datamodule.read_files(files, invert)
            no_targets = torch.zeros(len(inputs), dtype=torch.long)
            del kwargs["datamodule"]
            loader = self.datamodule.batches(inputs, no_targets)
            answers = self.trainer.predict(**kwargs, dataloaders=loader)
        if not answers:
            raise UserError(
                "There is no image to predict: leave out --trainer.limit_predict_batches 0"
            )
        probabilities = torch.cat(answers)
        asked = len(probabilities)  # fewer than there are with --trainer.limit_predict_batches
        found = predictions.Predictions(about[:asked], probabilities, classes)
        drawn = None if grid is None else self._pictures(inputs[:asked])
        found.print(settings.format)
        if grid is not None and drawn is not None:
            found.draw(grid, drawn)
        if unread:
            raise RunFailed(
                f"{unread} of {unread + len(inputs)} pictures could not be read; they are named "
                "above."
            )

    def _test_set(self, classes: Sequence[str]) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the raw samples of the test set, and the index and the class of each."""
        inputs, targets = self.datamodule.test_samples()
        truth = [classes[label] for label in targets.tolist()]
        return inputs, [{"image": index, "truth": name} for index, name in enumerate(truth)]

    def _pictures(self, inputs: Tensor) -> Tensor:
        """Return pictures of as many raw samples as --grid draws."""
        shown = self.datamodule.preprocessing(inputs[: predictions.MOST_DRAWN])
        pictures = self.datamodule.draw(shown)
        if pictures is None:
            raise UserError("--grid does not apply: these data have no pictures")
        return pictures


def main(arguments: list[str], reference: str) -> None:
    """Run predict; `arguments` begins with the command."""
    process.set_up()
    command_line(arguments, reference, PredictCLI)
