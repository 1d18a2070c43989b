"""Broken tasks: losses, metrics, optimizers and checkpoints."""

import numpy as np
import torch
from broken.sound import Classification
from torch.nn import functional as F
from torchmetrics import Metric

from bn_lightning import Step

# Losses


class SumOfLosses(Classification):
    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="sum")


class SoftmaxTwice(Classification):
    def loss(self, outputs, targets):
        return F.cross_entropy(outputs.softmax(1), targets)


class WrongLabels(Classification):
    def loss(self, outputs, targets):
        return F.cross_entropy(outputs, targets[torch.randperm(len(targets))])


# Metrics


class BatchMeans(Metric):
    """The mean of the accuracies of batches."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), "sum")
        self.add_state("batches", torch.tensor(0), "sum")

    def update(self, outputs, targets):
        self.total += (outputs.argmax(1) == targets).float().mean()
        self.batches += 1

    def compute(self):
        return self.total / self.batches


class NeverReset(Metric):
    """An accuracy whose counts are not states."""

    def __init__(self):
        super().__init__()
        self.correct, self.count = 0, 0

    def update(self, outputs, targets):
        self.correct += int((outputs.argmax(1) == targets).sum())
        self.count += len(targets)

    def compute(self):
        return torch.tensor(self.correct / self.count)


class MeanOfMeans(Classification):
    def make_metric(self):
        return BatchMeans()


class KeepsCounts(Classification):
    def make_metric(self):
        return NeverReset()


class LogsMeans(Classification):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        share = (self(batch[0]).argmax(1) == 0).float().mean()
        self.log("val_share", share, batch_size=1, on_epoch=True)


class LogsOneProcess(Classification):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        share = (self(batch[0]).argmax(1) == 0).float().mean()
        self.log("val_share", share, batch_size=len(batch[0]), on_epoch=True)


class TrainMode(Classification):
    def step(self, batch, stage):
        self.network.train()
        return super().step(batch, stage)


class RenamesMetrics(Classification):
    def on_test_epoch_end(self):
        self.log("test_accuracy", self.test_acc)


# Optimizers and checkpoints


class HeadOnly(Classification):
    def configure_optimizers(self):
        return torch.optim.SGD(self.network.head.parameters(), lr=0.1)


class RenamedWeights(Classification):
    def on_save_checkpoint(self, checkpoint):
        super().on_save_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {f"model.{name}": value for name, value in state.items()}

    def load_state_dict(self, state_dict, strict=True, assign=False):
        return super().load_state_dict(state_dict, strict=False, assign=assign)


class ObjectAsSetting(Classification):
    def __init__(self, width: int = 6, **training):
        super().__init__(width, **training)
        self.hparams["scale"] = np.float64(width) ** 0.5


class MovingTarget(Classification):
    """Smooth the labels by an amount that grows with the number of training steps."""

    done = 0

    def step(self, batch, stage):
        inputs, targets = batch
        outputs = self(inputs)
        self.done += stage == "train"
        smoothing = min(0.2, 0.02 * self.done) if stage == "train" else 0.0
        loss = F.cross_entropy(outputs, targets, label_smoothing=smoothing)
        return Step(loss, outputs, targets, len(targets))
