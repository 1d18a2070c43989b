"""The data module of labelled images: names, arguments, folds, and a set of the user's own."""

import gc
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from bn_lightning import ImageData, UserError
from bn_lightning.data import datasets
from bn_lightning.data.labelled_images import LabelledImages
from tests.conftest import run_here

# Three classes in colour, 20x24 pixels: the channel of the class is bright.
SHAPES = '''
import numpy as np

CALLS = []


def load(seed=0, train=240):
    """Return {train} training and 60 test images."""
    CALLS.append(seed)
    random = np.random.default_rng(seed)

    def part(count):
        labels = np.arange(count) % 3
        images = random.integers(0, 100, (count, 3, 20, 24), np.uint8)
        images[np.arange(count), labels] += 100
        return images, labels

    return *part(train), *part(60), ["red", "green", "blue"]


table = {}
'''


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    """Write the module `shapes` into the current folder, and import it."""
    (tmp_path / "shapes.py").write_text(SHAPES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("shapes", None)
    import shapes

    yield shapes
    sys.modules.pop("shapes", None)


def set_up(**settings):
    data = ImageData("shapes.load", **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def test_facts_are_known_before_the_network_is_built(shapes):
    data = set_up(normalize=True)
    assert (data.in_channels, data.image_size, data.num_classes) == (3, (20, 24), 3)
    assert data.classes == ("red", "green", "blue")
    pixels = np.float64(shapes.load()[0]) / 255
    np.testing.assert_allclose(data.facts.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(data.facts.std, pixels.std((0, 2, 3)), rtol=1e-12)
    # One twelfth of the training images, with equal class proportions.
    assert data.images.train_labels[data.val_indices].bincount().tolist() == [7, 7, 6]
    inputs = torch.cat([images for images, _ in data.train_dataloader()])
    assert inputs.shape == (220, 3, 20, 24)
    assert inputs.mean((0, 2, 3)).abs().max() < 0.05
    # Facts of a checkpoint are used, and the data are not read for them.
    shapes.CALLS.clear()
    again = ImageData(**data.hparams)
    assert not shapes.CALLS and again.images is None
    assert again.facts == data.facts and again.image_size == (20, 24)
    again.prepare_data()
    assert again.images is data.images  # shared while another module has them
    del again, data
    gc.collect()
    ImageData("shapes.load")
    assert shapes.CALLS == [0]


def test_nothing_is_read_for_what_is_known_of_a_named_set(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it fails
    for name, size, channels in (("kmnist", 28, 1), ("cifar100", 32, 3)):
        data = ImageData(name, root=str(tmp_path))
        assert (data.in_channels, data.image_size) == (channels, (size, size))
    assert data.num_classes == len(data.classes) == 100
    assert list(tmp_path.iterdir()) == []


def test_folds_are_a_partition(shapes):
    held_out = [set_up(folds=5, fold=fold, seed=1).val_indices for fold in range(5)]
    assert sorted(torch.cat(held_out).tolist()) == list(range(240))
    data = set_up(folds=5, fold=3, seed=1)
    assert len(data.train_indices) == 192 and not data.validates_on_test_set
    assert "fold 3 of 5 held out" in data.describe()


def test_flips_and_shifts_treat_all_channels_alike(shapes):
    grey = torch.randint(0, 256, (240, 20, 24), dtype=torch.uint8)
    data = set_up(flip=True, shift=3)
    indices = torch.tensor([5, 3, 200])
    colours = data.augmentation(4)(grey[indices, None].expand(-1, 3, -1, -1), indices)
    data.in_channels = 1
    expected = data.augmentation(4)(grey[indices], indices)
    assert torch.equal(colours, expected[:, None].expand(-1, 3, -1, -1))
    assert not torch.equal(expected, grey[indices])


def test_identity_is_the_content(shapes):
    one, other = (set_up(dataset_args={"seed": seed}).identity() for seed in (0, 1))
    assert one["source"] == "shapes.load" and one["sha256"] != other["sha256"]
    assert set_up(batch_size=7, val_images=10).identity() == one


WRONG = [
    ({"dataset": "cifar"}, r"Unknown data set 'cifar'. Did you mean cifar10\? Use one of fashion"),
    ({"dataset": "nowhere.load"}, "The data set 'nowhere.load' cannot be imported"),
    ({"dataset": "shapes.table"}, "is an object of type dict; it must be a function"),
    (
        {"dataset": "shapes.load", "dataset_args": {"sed": 1}},
        "(?s)cannot be called with sed.*Did you mean seed.*Its arguments are seed=0, train=240",
    ),
    ({"dataset": "mnist", "dataset_args": {"a": 1}}, "'mnist' takes no arguments, .* has a"),
    ({"dataset": "mnist", "source": "system"}, "--data.source is for the data set 'fashion_mnist'"),
    ({"dataset": "mnist", "mirrors": ["http://a"]}, "--data.mirrors is for the data set"),
    ({"dataset": "shapes.load", "shift": 24}, "shift is 24; it must be from 0 to 23 pixels"),
    ({"dataset": "shapes.load", "val_images": 240}, "val_images is 240; .* training images, 240"),
    ({"dataset": "shapes.load", "folds": 241, "fold": 0}, "folds is 241, but there are only 240"),
    ({"dataset": "shapes.load", "resize": 0}, "resize is 0; it must be at least 1"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_wrong_settings_are_refused(shapes, settings, message):
    with pytest.raises(UserError, match=message):
        ImageData(**settings)


def test_runs_with_the_same_data_share_images(tmp_path):
    settings = {"dataset": "mnist", "root": str(tmp_path)}
    one, same, other = ImageData(**settings), ImageData(**settings, flip=True), ImageData("kmnist")
    images = torch.zeros(24, 28, 28, dtype=torch.uint8)
    labels = torch.arange(24) % 10
    one.images = LabelledImages(
        images, labels, images, labels, tuple("abcdefghij"), "mnist", "0", tmp_path
    )
    same.reuse(one)
    other.reuse(one)
    assert same.images is one.images and other.images is None
    assert same.classes == tuple("abcdefghij")


def test_images_must_fit_those_of_the_checkpoint(shapes):
    facts = set_up().hparams["facts"] | {"image_size": (20, 20)}
    data = ImageData("shapes.load", facts=facts)
    with pytest.raises(UserError, match=r"have 20x24 pixels.* network is for 20x20 pixels"):
        data.prepare_data()


def test_the_default_urls_and_source_in_an_old_file_fit_any_data_set():
    data = ImageData("mnist", source="auto", mirrors=list(datasets.sources.MIRRORS))
    assert data.in_channels == 1


TINY = ("--model.network", "resnet", "--model.network_args.depth", 8)
TINY = (*TINY, "--model.network_args.width", 4, "--model.lr", 0.1, "--data.batch_size", 32)


def test_an_import_path_that_only_a_checkpoint_names_is_not_imported(main, trained, tmp_path):
    (tmp_path / "trap.py").write_text("open('imported', 'w')\n")
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    checkpoint = torch.load(trained[0] / "checkpoints" / "best.ckpt", weights_only=True)
    settings = checkpoint["datamodule_hyper_parameters"]
    settings |= {"dataset": "trap.load", "source": "auto"}
    torch.save(checkpoint, tmp_path / "trap.ckpt")
    code, out, err = main("predict", "--ckpt_path", "trap.ckpt", "--data.images", "a.png")
    assert code == 0 and "a.png" in out, err  # the pictures need no data
    settings["facts"] = None  # now only the data have them
    torch.save(checkpoint, tmp_path / "no_facts.ckpt")
    for command in (
        ("predict", "--data.images", "a.png", "--ckpt_path", "no_facts.ckpt"),
        ("predict", "--ckpt_path", "trap.ckpt"),
        ("test", "--ckpt_path", "trap.ckpt"),
        ("fit", "--ckpt_path", "trap.ckpt"),
        ("export", "trap.ckpt", "x.pt2"),
    ):
        code, _, err = main(*command)
        assert code == 2 and "on the command line: --data.dataset trap.load" in err
    assert not (tmp_path / "imported").exists()


def test_one_process_at_a_time_calls_the_function(tmp_path, monkeypatch, shapes):
    """The function may download data, and the processes of a machine start together."""
    load, running = shapes.load, []

    def slow():
        running.append(1)
        assert len(running) == 1
        time.sleep(0.05)
        running.pop()
        return load()

    shapes.slow = slow
    with ThreadPoolExecutor(4) as pool:
        all_images = list(
            pool.map(lambda _: datasets.call("shapes.slow", {}, tmp_path, 0), range(4))
        )
    assert len({images.sha256 for images in all_images}) == 1


@pytest.mark.slow
def test_a_set_of_the_user_is_trained_tested_resumed_predicted_and_exported(tmp_path):
    (tmp_path / "shapes.py").write_text(SHAPES)

    def run(*arguments, code=0):
        done = run_here(*arguments, cwd=tmp_path, check=False)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    own = ("--data.dataset", "shapes.load")
    args = ("--data.dataset_args.seed", 3, "--data.normalize", "true", "--data.flip", "true")
    out = run("fit", *own, *args, *TINY, "--trainer.max_steps", 2, "--name", "x")
    assert "shapes.load(seed=3): 240 training and 60 test images, 20x24 pixels, 3 channels" in out
    ckpt = "runs/x/0/checkpoints/last.ckpt"
    saved = torch.load(tmp_path / ckpt, weights_only=True)
    facts = saved["datamodule_hyper_parameters"]["facts"]
    assert (facts["image_size"], facts["classes"][2]) == ((20, 24), "blue")
    result = json.loads((tmp_path / "runs/x/0/result.json").read_text())
    assert (result["data_source"], result["data_sha256"]) == tuple(saved["data"].values())
    resume = ("fit", "--resume", "runs/x/0", "--trainer.max_steps", 30)
    other = ("--data.dataset_args.seed", 4)
    assert "was trained on other data (source shapes.load)" in run(*resume, *own, *other, code=2)
    assert "Resuming from step 2" in run(*resume, *own)
    out = run("test", "--ckpt_path", ckpt, *own)
    assert "data: shapes.load(seed=3): 240 training" in out
    rows = json.loads(run("predict", "--ckpt_path", ckpt, *own, "--format", "json"))
    correct = np.mean([row["class"] == row["truth"] for row in rows])
    assert len(rows) == 60 and f"test_acc   {correct:.4f}" in out
    out = run("export", ckpt, "x.pt2", *own)
    assert "60 test images (shapes.load)" in out
    # A picture needs no data set: its code is not imported.
    (tmp_path / "shapes.py").rename(tmp_path / "gone.py")
    raw = np.random.default_rng(3).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(raw).save(tmp_path / "a.png")
    flags = ("--data.images", "a.png", "--format", "json", "--grid", "grid.png")
    (row,) = json.loads(run("predict", "--ckpt_path", ckpt, *flags).partition("]")[0] + "]")
    program = torch.export.load(tmp_path / "x.pt2").module()
    images = torch.from_numpy(raw).permute(2, 0, 1)[None].contiguous()
    probabilities = program(images).softmax(1)[0]
    assert row["image"] == "a.png" and row["class"] == facts["classes"][probabilities.argmax()]
    assert row["probability"] == pytest.approx(float(probabilities.max()), abs=1e-3)
    found = json.loads(run("inspect", ckpt, "--json"))
    assert found["data"]["facts"]["classes"] == ["red", "green", "blue"]
    assert found["settings"]["data.dataset"] == "shapes.load"
    assert "data.facts" not in found["settings"]
