"""Image classification: cross-entropy, accuracy, and the confusion matrix."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from bn_lightning import terminal
from bn_lightning.errors import UserError
from bn_lightning.networks import registry
from bn_lightning.networks.lenet import Activation, Pooling
from bn_lightning.norms import recognition
from bn_lightning.norms.registry import note_on_momentum
from bn_lightning.training.confusion import describe_selection, reported_classes, short_name
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.task import Stage, Step, Task

# The number of values of a norm layer that are printed at the end of a run.
MAX_CHANNELS = 8

Batch = tuple[Tensor, Tensor]


class Classifier(Task):
    """A network trained with cross-entropy. Batches are images (B, C, H, W) and labels (B,).

    Args:
        network: `lenet`, `mlp`, `resnet` (for small images), `torchvision.NAME`, or an
            import path `package.module.Name`, called as `network(in_channels=...,
            image_size=(height, width), num_classes=..., norm=..., **network_args)`.
        network_args: other arguments of the network, for example
            `--model.network_args.depth 8`.
        norm: normalization layer: `custom` (from scratch), `builtin` (PyTorch's),
            `article` (the tutorial's), `renorm` (batch renormalization), `ghost` (batch
            norm of virtual batches), `frozen` (batch norm with fixed statistics),
            `group`, `layer`, `instance`, `rms` (group, layer, instance and RMS norm),
            `none`, or an import path `package.module.Name`, called as
            `norm(num_features=..., num_dims=2|3|4|5, **norm_args)`.
        norm_args: other arguments of the norm, for example `--model.norm_args.eps
            1e-3`. `momentum` is the weight of the newest batch in the running
            statistics, as in PyTorch; for `article`, it is the weight of the old value.
        activation: activation function after each norm, for `lenet` only.
        pooling: 2x2 pooling after each convolution, for `lenet` only.
        lr: learning rate; with OneCycleLR, the maximum.
        label_smoothing: fraction of each label that is spread over all classes, in
            training only (Szegedy et al. 2016, section 7).
        class_weights: `balanced` weights each class in the training loss inversely to its
            number of training samples; by default, all samples have the same weight.
        in_channels, image_size, num_classes: channels, height and width of the images,
            and the number of classes; stated by the data.
        training: settings of `Task`: optimizer, scheduler, compile, memory_format.

    Raises:
        UserError: a network, norm, optimizer or scheduler is unknown, or does not accept
            an argument; or the network does not work for the images. At the start of
            `fit`: the data module does not count the samples of each class.
    """

    selects = ("val_acc", "max")
    import_paths = ("network", "norm", *Task.import_paths)
    stated_by_data = ("in_channels", "image_size", "num_classes")
    registered = {"network": registry.TORCHVISION}
    start_only = (*Task.start_only, "network_args.weights")

    def __init__(
        self,
        norm: str = "custom",
        norm_args: dict[str, Any] | None = None,
        activation: Activation = "sigmoid",
        pooling: Pooling = "avg",
        lr: float = 1.0,
        label_smoothing: float = 0.0,
        network: str = "lenet",
        network_args: dict[str, Any] | None = None,
        in_channels: int = 1,
        image_size: tuple[int, int] = (28, 28),
        num_classes: int = 10,
        class_weights: Literal["balanced"] | None = None,
        **training: Any,
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise UserError(
                f"label_smoothing is {label_smoothing}; it must be at least 0 and less than 1, for "
                "example --model.label_smoothing 0.05."
            )
        if class_weights not in (None, "balanced"):
            raise UserError(
                f"class_weights is {class_weights!r}; it must be 'balanced' or null, for example "
                "--model.class_weights balanced."
            )
        # The data module validates the labels once. Validating each batch would be
        # slow.
        accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        height, width = image_size
        shape = registry.ImageShape(in_channels, (height, width), num_classes)
        arguments = dict(network_args or {})
        if network == "lenet":
            arguments = {"activation": activation, "pooling": pooling} | arguments
        super().__init__(
            registry.build(network, shape, norm, norm_args, arguments),
            {"acc": accuracy},
            lr=lr,
            **training,
        )
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        # They follow from the training samples, so a checkpoint does not contain them.
        self._weights: Tensor | None = None
        self.test_confusion = MulticlassConfusionMatrix(num_classes, validate_args=False)
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.long)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        # `on_fit_start` would be too late: LearningRateFinder trains before it.
        if stage == "fit" and self.class_weights is not None:
            self._weights = balanced_weights(self._class_counts())

    def _class_counts(self) -> Tensor:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        counts = data.class_counts() if isinstance(data, DataModule) else None
        if counts is None:
            raise UserError(
                f"--model.class_weights {self.class_weights} needs the number of training samples "
                f"of each class, but {type(data).__name__} has no class_counts() that returns it.\n"
                "Implement this method of the data module, or use --model.class_weights null."
            )
        return counts

    def step(self, batch: Batch, stage: Stage) -> Step:
        images, labels = batch
        logits = self(images)
        # The loss is computed at least in float32, even if the network computes in 16
        # bits.
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        smoothing = self.label_smoothing if stage == "train" else 0.0
        if stage == "train" and self._weights is not None:
            loss = self._weighted_loss(precise, labels)
        else:
            loss = F.cross_entropy(precise, labels, label_smoothing=smoothing)
        return Step(loss, logits, labels, len(labels))

    def _weighted_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        assert self._weights is not None
        self._weights = self._weights.to(logits.dtype).to(logits.device)
        total = F.cross_entropy(
            logits, labels, self._weights, reduction="sum", label_smoothing=self.label_smoothing
        )
        # PyTorch's mean divides by the sum of the weights, which differs between the
        # shards of a batch.
        return total / len(labels)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return logits (B, num_classes), for callbacks."""
        logits = super().test_step(batch, batch_idx)
        self.test_confusion.update(logits, batch[1])
        return logits

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        counts = self.test_confusion.compute()
        self.test_confusion.reset()
        self.confusion = counts.cpu()
        accuracies = counts.diag() / counts.sum(1)
        totals = self.confusion.sum(1).tolist()
        for name, accuracy, total in zip(self._class_names(), accuracies, totals, strict=True):
            # A class without test samples has no accuracy.
            if total:
                # The confusion matrix is already reduced over all ranks.
                self.log(f"test_acc_of/{name}", accuracy, sync_dist=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return probabilities (B, num_classes)."""
        return self(batch[0]).float().softmax(1)  # type: ignore[no-any-return]

    def _class_names(self) -> Sequence[str]:
        classes = getattr(self.trainer.datamodule, "classes", None)  # type: ignore[attr-defined]
        return classes or [str(label) for label in range(self.hparams["num_classes"])]

    # Reports of a run

    def describe(self) -> str:
        network = self.hparams["network"]
        is_named = network in registry.NETWORKS
        name = type(self.network).__name__ if is_named else network
        return f"{name}, norm {self.hparams['norm']}"

    def notes(self) -> list[str]:
        note = note_on_momentum(self.hparams["norm"], self.hparams["norm_args"])
        return super().notes() + ([] if note is None else [note])

    def facts(self) -> dict[str, Any]:
        return {"network": self.hparams["network"], "norm": self.hparams["norm"]}

    def summary(self) -> list[str]:
        """Return gamma and beta of the first norm layer, as the article prints them at its end."""
        first = next(iter(recognition.layers(self.network).values()), None)
        if first is None:
            return []
        article_names = {"weight": "gamma", "bias": "beta"}
        return [
            f"{article_names.get(name, name)} of the first norm layer: {_format(values)}"
            for name, values in first.named_parameters()
        ]

    def test_report(self) -> str:
        assert self.confusion is not None
        return class_table(self.confusion, self._class_names())


def balanced_weights(counts: Tensor) -> Tensor:
    """Return weights of the classes that are inversely proportional to their frequency.

    The weight of class c is M / (C * M_c) for M training samples, M_c of them in class
    c, and C classes that have samples (King and Zeng 2001; `balanced` in scikit-learn).
    Every class then has the same share in the loss of the training set. The weights
    average to 1 over the training samples, so the loss of a batch is
    sum(weight * loss) / samples, and several processes equal one.

    Args:
        counts: number of training samples of each class, int64 (C,).

    Returns:
        Weights, float64 (C,); 0 for a class without training samples.
    """
    has_samples = counts > 0
    weights = counts.sum().double() / (has_samples.sum() * counts)
    return weights.where(has_samples, 0.0)


def class_table(confusion: Tensor, names: Sequence[str]) -> str:
    """Return a table with the accuracy of each class and its most frequent misclassification.

    If there are many classes, the table has those with the lowest accuracy.

    Args:
        confusion: counts (C, C), a row per true class and a column per predicted class.
    """
    names = [short_name(name) for name in names]
    rows = []
    for truth in reported_classes(confusion):
        counts = confusion[truth]
        total = int(counts.sum())
        others = counts.clone()
        others[truth] = 0
        wrong = int(others.argmax())
        mistake = f"{names[wrong]} ({int(others[wrong]) / total:.1%})" if int(others[wrong]) else ""
        accuracy = f"{int(counts[truth]) / total:.3f}" if total else "none"
        rows.append([names[truth], accuracy, mistake])
    table = terminal.table(("class", "test acc", "most often misclassified as"), rows)
    note = describe_selection(confusion)
    return f"{note}:\n{table}" if note else table


def _format(values: Tensor) -> str:
    shown = [f"{value:.2f}" for value in values.detach().flatten()[:MAX_CHANNELS].tolist()]
    return "[" + ", ".join(shown) + (", ...]" if values.numel() > MAX_CHANNELS else "]")
