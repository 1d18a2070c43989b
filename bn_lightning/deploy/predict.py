"""The command `predict`: classify the test set or a user's own images."""

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
        files: the user's image files, or None for the test set; and whether to invert
            them.
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
            help="Your own images: files, folders or patterns. Default: the test set.",
        )
        parser.add_argument(
            "--data.invert",
            type=bool | None,
            default=None,
            help="Whether to invert the brightness of your images. null lets the data set decide.",
        )
        parser.add_argument(
            "--format",
            type=Literal[predictions.FORMATS],
            default="table",
            help="Output format.",
        )
        parser.add_argument(
            "--grid",
            type=str | None,
            default=None,
            help="Image file to write, for example grid.png. It shows the images with their "
            "predictions.",
        )

    def _paths_in(self, settings: Any) -> dict[str, Any]:
        paths, data = super()._paths_in(settings), settings.data
        names = self.experiment.data.found_in_data
        if data.get("images") is None or not names or None in map(data.get, names):
            return paths
        # For the user's own files, the data are not read, so their code is not imported.
        return {name: value for name, value in paths.items() if not name.startswith("data.")}

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        # These two are options of `predict`, not arguments of the data module.
        data = self.config.predict.data
        self.files = data.pop("images"), data.pop("invert")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if self.config_init.predict.trainer.devices == "auto":
            # A single process keeps the order of the images.
            kwargs["devices"] = 1
        return super().instantiate_trainer(**kwargs)

    def predict(self, **kwargs: Any) -> None:
        """Print the two most probable classes of each image."""
        settings, classes = self.config.predict, self.datamodule.classes
        if classes is None:
            raise UserError("predict cannot be used: this task has no classes.")
        if self.trainer.world_size > 1:
            raise UserError(
                "predict runs in a single process, to keep the order of the images. Use "
                "--trainer.devices 1."
            )
        sheet = None if settings.grid is None else Path(settings.grid)
        if sheet is not None:
            predictions.refuse_invalid_sheet_path(sheet)
        kwargs, unread = self._from_checkpoint(kwargs), 0
        files, invert = self.files
        outputs: Any
        if files is None:
            outputs = self.trainer.predict(**kwargs)
            inputs, about = self._test_set(classes)
        else:
            inputs, about, unread = self.datamodule.read_files(files, invert)
            no_targets = torch.zeros(len(inputs), dtype=torch.long)
            del kwargs["datamodule"]
            loader = self.datamodule.batches(inputs, no_targets)
            outputs = self.trainer.predict(**kwargs, dataloaders=loader)
        if not outputs:
            raise UserError(
                "There are no images to predict. Remove --trainer.limit_predict_batches 0."
            )
        probabilities = torch.cat(outputs)
        # --trainer.limit_predict_batches may select fewer images than there are.
        count = len(probabilities)
        found = predictions.Predictions(about[:count], probabilities, classes)
        images = None if sheet is None else self._drawn_images(inputs[:count])
        found.print(settings.format)
        if sheet is not None and images is not None:
            found.draw(sheet, images)
        if unread:
            total = unread + len(inputs)
            raise RunFailed(f"{unread} of {total} images could not be read. They are listed above.")

    def _test_set(self, classes: Sequence[str]) -> tuple[Tensor, list[dict[str, Any]]]:
        """Return the raw samples of the test set, and the name and class of each."""
        inputs, targets = self.datamodule.test_samples()
        names = zip(self.datamodule.test_names(), targets.tolist(), strict=True)
        return inputs, [{"image": name, "truth": classes[label]} for name, label in names]

    def _drawn_images(self, inputs: Tensor) -> Tensor:
        """Draw the first raw samples as images for --grid."""
        shown = self.datamodule.preprocessing(inputs[: predictions.MAX_DRAWN])
        images = self.datamodule.draw(shown)
        if images is None:
            raise UserError("--grid cannot be used: this data set has no images. Remove --grid.")
        return images


def main(arguments: list[str], reference: str) -> None:
    """Run `predict`. The first argument is the name of the command."""
    process.set_up()
    command_line(arguments, reference, PredictCLI)
