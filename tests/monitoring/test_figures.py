"""Figures at the end of a test, for tasks with and without classes."""

import json

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bn_lightning import Classifier, ClosingPictures, DataModule, FashionMNIST
from bn_lightning.data.fashion_mnist import CLASSES
from bn_lightning.monitoring import drawing
from tests.projects.friedman.experiment import Regression, Table
from tests.support.logs import QUIET, events_in

TAGS = ["confusion_matrix", "most_confident_mistakes", "first_layer_filters"]


def tags_after_test(folder, model, data, pictures=None):
    """Run a test with the callback, and return TensorBoard's tags."""
    logger = TensorBoardLogger(folder)
    trainer = pl.Trainer(logger=logger, callbacks=[pictures or ClosingPictures()], **QUIET)
    trainer.test(model, data, verbose=False)
    logger.experiment.flush()
    return events_in(logger.log_dir).Tags()


def test_a_run_writes_all_figures(trained):
    folder, printed = trained
    assert events_in(folder).Tags()["images"] == TAGS
    assert "no confusion matrix" not in printed and "no misclassified" not in printed


def test_the_confusion_matrix_counts_the_test_images(trained):
    folder, _ = trained
    model = Classifier.load_from_checkpoint(
        folder / "checkpoints/best.ckpt", weights_only=True, map_location="cpu"
    )
    data = FashionMNIST("sample")
    pl.Trainer(logger=False, **QUIET).test(model, data, verbose=False)
    with torch.no_grad():
        model.eval()
        predicted = model(data.images.test_images.unsqueeze(1) / 255).argmax(1)
    labels = data.images.test_labels
    counts = np.zeros((10, 10), dtype=int)
    np.add.at(counts, (labels.numpy(), predicted.numpy()), 1)
    assert (model.confusion.numpy() == counts).all()
    result = json.loads((folder / "result.json").read_text())
    assert counts.trace() / counts.sum() == pytest.approx(result["test_acc"])


def test_the_most_confident_mistakes_are_drawn(tmp_path, monkeypatch):
    drawn = []

    def grid(images, captions, *rest, **named):
        drawn.append((images, captions))

    monkeypatch.setattr(drawing, "grid", grid)
    monkeypatch.setattr(drawing, "filters", lambda weight: None)
    torch.manual_seed(0)
    model, data = Classifier(), FashionMNIST("sample", batch_size=300, normalize=True)
    tags_after_test(tmp_path, model, data, ClosingPictures(mistakes=7))
    [(images, captions)] = drawn
    with torch.no_grad():
        x = (data.images.test_images.unsqueeze(1) / 255 - 0.2860) / 0.3530
        probability, predicted = F.softmax(model.eval()(x), 1).max(1)
    labels = data.images.test_labels
    order = (probability * (predicted != labels)).argsort(descending=True)[:7]
    assert captions == [
        f"{CLASSES[predicted[i]]} {probability[i]:.1%}\ntrue: {CLASSES[labels[i]]}" for i in order
    ]
    assert torch.equal(images, data.images.test_images[order])


def test_a_perfect_classifier_has_no_figure_of_mistakes(tmp_path, capsys):
    class Perfect(Classifier):
        def test_step(self, batch, batch_idx):
            super().test_step(batch, batch_idx)
            return F.one_hot(batch[1], 10)

    assert tags_after_test(tmp_path, Perfect(), FashionMNIST("sample"))["images"] == [
        TAGS[0],
        TAGS[2],
    ]
    assert "no misclassified" not in capsys.readouterr().out


def test_a_task_without_classes_has_no_figures_of_classes(tmp_path, capsys):
    tags = tags_after_test(tmp_path, Regression(), Table())
    assert tags["images"] == [] and tags["graph"]
    message = (
        "TensorBoard shows no confusion matrix and no misclassified samples: "
        "this task has no classes"
    )
    assert capsys.readouterr().out.splitlines().count(message) == 1


def test_nothing_is_printed_without_tensorboard(capsys):
    trainer = pl.Trainer(logger=False, callbacks=[ClosingPictures()], **QUIET)
    trainer.test(Regression(), Table(), verbose=False)
    assert "misclassified" not in capsys.readouterr().out


def loader(samples=50, size=28):
    images = torch.rand(samples, 1, size, size, generator=torch.manual_seed(0))
    return DataLoader(TensorDataset(images, torch.arange(samples) % 10), batch_size=20)


def test_data_that_cannot_be_drawn_have_no_figure_of_mistakes(tmp_path, capsys):
    tags = tags_after_test(tmp_path, Classifier(), loader())
    assert tags["images"] == [TAGS[0], TAGS[2]] and tags["graph"]
    message = (
        "TensorBoard shows no misclassified samples: the data module does not implement draw()"
    )
    assert capsys.readouterr().out.splitlines().count(message) == 1


def test_a_figure_that_fails_causes_a_warning(tmp_path):
    class Undrawable(FashionMNIST):
        def draw(self, inputs):
            raise OSError("no ink")

    expected = "TensorBoard does not show the figure most_confident_mistakes: OSError: no ink"
    with pytest.warns(UserWarning, match=expected):
        tags = tags_after_test(tmp_path, Classifier(), Undrawable("sample"))
    assert tags["images"] == [TAGS[0], TAGS[2]] and tags["graph"]


def test_samples_of_different_sizes_cause_one_warning(tmp_path):
    class AnySize(Classifier):
        def forward(self, images):
            return super().forward(F.interpolate(images, (28, 28)))

        def test_step(self, batch, batch_idx, dataloader_idx=0):
            return super().test_step(batch, batch_idx)

    loaders = [loader(), loader(size=30)]
    with pytest.warns(UserWarning) as warned:
        tags = tags_after_test(tmp_path, AnySize(), loaders)
    messages = [str(w.message) for w in warned if "TensorBoard does not" in str(w.message)]
    assert len(messages) == 1
    assert "the figure of misclassified samples: RuntimeError" in messages[0]
    assert tags["images"] == [TAGS[0], TAGS[2]] and tags["graph"]


@pytest.mark.parametrize("returns", ["nothing", "pairs"])
def test_a_module_that_returns_no_logits_has_no_figure_of_mistakes(tmp_path, returns):
    class Own(Classifier):
        def test_step(self, batch, batch_idx):
            logits = super().test_step(batch, batch_idx)
            return None if returns == "nothing" else {"logits": logits}

    tags = tags_after_test(tmp_path, Own(), FashionMNIST("sample"))
    assert tags["images"] == [TAGS[0], TAGS[2]] and tags["graph"]


@pytest.mark.filterwarnings("ignore:TensorBoard does not show the network's graph")
@pytest.mark.parametrize(
    ("dataset", "has_graph"),
    [([0, 1], False), ([{"a": torch.ones(2)}], False), ([torch.ones(2)], True)],
    ids=("numbers", "mappings", "tensors"),
)
def test_batches_of_any_type_are_accepted(tmp_path, dataset, has_graph):
    class Odd(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = torch.nn.Linear(2, 2)

        def test_step(self, batch, batch_idx):
            return torch.zeros(())

    tags = tags_after_test(tmp_path, Odd(), DataLoader(dataset))
    assert tags["images"] == [] and tags["graph"] is has_graph


def test_a_module_without_a_network_has_no_graph(tmp_path, recwarn):
    class Plain(pl.LightningModule):
        def test_step(self, batch, batch_idx):
            return batch

    assert not tags_after_test(tmp_path, Plain(), loader())["graph"]
    assert not [w for w in recwarn if "TensorBoard" in str(w.message)]


class Colors(DataModule):
    """Noise in color, 20x24 pixels, standardized per channel. Class 1 has no test samples."""

    classes = ("猫", "a class that no test sample belongs to", "café")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25)))

    def __init__(self):
        super().__init__(batch_size=16)
        shape, generator = (30, 3, 20, 24), torch.manual_seed(0)
        self.images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        self.labels = torch.arange(30) % 2 * 2

    def test_dataloader(self):
        return self.batches((self.images / 255 - self.mean) / self.std, self.labels)

    def draw(self, inputs):
        pixels = (inputs * self.std + self.mean) * 255
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 1)


@pytest.mark.parametrize("network", ["mlp", "resnet"])
def test_mistakes_and_filters_are_in_color(tmp_path, monkeypatch, network):
    drawn, grid = [], drawing.grid

    def recorded_grid(images, captions, *rest, **named):
        drawn.append((images, captions))
        return grid(images, captions, *rest, **named)

    monkeypatch.setattr(drawing, "grid", recorded_grid)
    size = {"widths": [5]} if network == "mlp" else {"depth": 8, "width": 4}
    shape = {"in_channels": 3, "image_size": (20, 24), "num_classes": 3}
    torch.manual_seed(0)
    model, data = Classifier(network=network, network_args=size, **shape), Colors()
    assert tags_after_test(tmp_path, model, data)["images"] == TAGS
    (mistakes, captions), (filters, _) = drawn

    images = data.images.permute(0, 2, 3, 1)
    positions = [(images == mistake).flatten(1).all(1).nonzero().item() for mistake in mistakes]
    truths = ["class 0" if data.labels[i] == 0 else "cafe" for i in positions]
    assert [caption.split("true: ")[1] for caption in captions] == truths
    num_wrong = (model.confusion.sum() - model.confusion.trace()).item()
    assert 0 < len(mistakes) == min(num_wrong, 25)

    weight = next(p for p in model.network.parameters() if p.dim() > 1).detach()
    if network == "mlp":
        weight = torch.stack([row.reshape(3, 20, 24) for row in weight])
    expected = 127.5 * (1 + weight.permute(0, 2, 3, 1) / weight.abs().max())
    assert (filters.float() - expected).abs().max() <= 0.5 + 1e-3
    rows = [line.split() for line in model.test_report().splitlines()]
    assert rows[1][0] == "猫" and rows[2][-1] == "none"


class FirstNorm(torch.nn.Module):
    """A network that starts with a norm whose parameters have the shape (1, C, 1, 1)."""

    def __init__(self, in_channels, image_size, num_classes, norm):
        super().__init__()
        self.norm = norm(in_channels, 4)
        self.conv = torch.nn.Conv2d(in_channels, 2, 7)
        self.fc = torch.nn.Linear(2, num_classes)

    def forward(self, images):
        return self.fc(self.conv(self.norm(images)).mean((2, 3)))


def test_the_filters_are_those_of_the_first_convolution(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(drawing, "filters", lambda weight: drawn.append(weight))
    model = Classifier("article", network=f"{__name__}.FirstNorm")
    tags_after_test(tmp_path, model, loader())
    assert drawn[0] is model.network.conv.weight and len(drawn) == 1
