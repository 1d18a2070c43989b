"""Transforms of torchvision as augmentation."""

import json
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from torchvision.transforms import v2

from bn_lightning import FashionMNIST, UserError
from bn_lightning.data import transforms
from bn_lightning.data.augmentation import Augmentation
from bn_lightning.data.transforms import Transforms
from bn_lightning.training import seeds
from bn_lightning.training.batches import Epoch, TensorBatches
from tests.conftest import QUICK, assert_same_weights

CROP = {"name": "RandomCrop", "args": {"size": [20, 24], "padding": 2}}
JITTER = {"name": "ColorJitter", "args": {"brightness": 0.4, "saturation": 0.4}}
FLIP = {"name": "RandomHorizontalFlip"}
SHAPES = {"grey": (20, 24), "colour": (3, 20, 24)}

# Transforms with random numbers of each kind that torchvision draws.
RANDOM = [
    CROP,
    JITTER,
    FLIP,
    {"name": "AugMix"},
    {"name": "AutoAugment", "args": {"policy": "cifar10"}},
    {"name": "ElasticTransform", "args": {"sigma": 1.0}},
    {"name": "GaussianBlur", "args": {"kernel_size": 3}},
    {"name": "GaussianNoise"},
    {"name": "RandAugment"},
    {"name": "RandomApply", "args": {"transforms": [JITTER, FLIP], "p": 0.5}},
    {"name": "RandomChannelPermutation"},
    {"name": "RandomChoice", "args": {"transforms": [FLIP, CROP]}},
    {"name": "RandomErasing", "args": {"inplace": True}},
    {"name": "RandomOrder", "args": {"transforms": [JITTER, CROP]}},
    {"name": "RandomPerspective"},
    {"name": "RandomPhotometricDistort"},
    {"name": "RandomResizedCrop", "args": {"size": [20, 24], "interpolation": "nearest"}},
    {"name": "TrivialAugmentWide"},
]


def noise(shape, count=10):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)


def states():
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_image_is_that_of_torchvision_with_the_seed_of_the_sample(shape):
    images, indices = noise(shape), torch.arange(10)
    augment = Transforms([CROP, JITTER, FLIP], shape).of_epoch(10, seed=3, epoch=2)
    by_hand = v2.Compose(
        [
            v2.RandomCrop((20, 24), padding=2),
            v2.ColorJitter(brightness=0.4, saturation=0.4),
            v2.RandomHorizontalFlip(),
        ]
    )
    expected = []
    for image, seed in zip(images, seeds.of_samples(10, 3, 2).tolist(), strict=True):
        torch.manual_seed(seed)
        expected.append(by_hand(image.view(-1, 20, 24)).view(shape))
    assert torch.equal(augment(images, indices), torch.stack(expected))


@pytest.mark.parametrize("setting", RANDOM, ids=lambda setting: setting["name"])
def test_random_numbers_depend_on_seed_epoch_and_sample_only(setting):
    shape, indices = SHAPES["colour"], torch.arange(10)
    images, before = noise(shape), noise(shape)
    own = Transforms([setting], shape)
    whole = own.of_epoch(10, 3, 2)(images, indices)
    assert torch.equal(images, before) or setting["name"] == "RandomErasing"
    # Another state of the global generators, another order, and other samples in the batch.
    torch.manual_seed(9), random.seed(9), np.random.seed(9)
    some, at_first = torch.tensor([7, 2, 9, 0]), states()
    assert torch.equal(own.of_epoch(10, 3, 2)(before[some], some), whole[some])
    assert states() == at_first
    for other in ((4, 2), (3, 4), (2, 3)):
        assert not torch.equal(own.of_epoch(10, *other)(noise(shape), indices), whole)


def test_the_shards_of_two_processes_form_the_batch():
    images, indices = noise((3, 20, 24), 50), torch.arange(50)
    own = Transforms([CROP, JITTER, FLIP], (3, 20, 24))

    def batches(rank=0, world_size=1):
        epoch = Epoch(seeds.epoch_order(50, 0, 1), 0, own.of_epoch(50, 0, 1))
        return TensorBatches(images, indices, indices, 16, lambda: epoch, rank, world_size)

    shards = zip(batches(0, 2), batches(1, 2), strict=True)
    for (one, _), (other, _), (whole, _) in (
        (*pair, batch) for pair, batch in zip(shards, batches(), strict=True)
    ):
        assert torch.equal(torch.cat([one, other]), whole)


def test_flip_and_shift_are_applied_before_the_transforms():
    settings = {"flip": True, "shift": 3, "augment": [{**CROP, "args": {"size": 28, "padding": 2}}]}
    data = FashionMNIST("sample", seed=5, **settings)
    data.prepare_data()
    data.setup("fit")
    images, indices = data.images.train_images[:30], torch.arange(30)
    flipped = Augmentation(6_000, 5, 4, True, 3)(images, indices)
    expected = data.transforms.of_epoch(6_000, 5, 4)(flipped, indices)
    assert torch.equal(data.augmentation(4)(images, indices), expected)


def test_images_that_are_resized_afterwards_may_have_another_size():
    crop = [{"name": "RandomResizedCrop", "args": {"size": 16}}]
    data = FashionMNIST("sample", augment=crop, resize=32, batch_size=8)
    data.prepare_data()
    data.setup("fit")
    assert data.augmentation(0)(data.images.train_images[:8], torch.arange(8)).shape == (8, 16, 16)
    inputs, _ = next(iter(data.train_dataloader()))
    assert inputs.shape == (8, 1, 32, 32)
    for crop in (
        {"name": "RandomResize", "args": {"min_size": 20, "max_size": 30}},  # different sizes
        {"name": "RGB"},
    ):
        with pytest.raises(UserError, match="Images must keep their type and shape"):
            FashionMNIST("sample", augment=[crop], resize=32)


def test_only_training_images_are_transformed():
    inverted = [{"name": "RandomInvert", "args": {"p": 1}}]
    data = FashionMNIST("sample", augment=inverted, batch_size=100)
    data.prepare_data()
    data.setup("fit")
    images = data.images
    [inputs, _], *_ = data.train_dataloader()
    visited = data.train_order(0)[:100]
    assert torch.equal(inputs, (255 - images.train_images[visited]).unsqueeze(1) / 255)
    for loader, expected in (
        (data.val_dataloader(), images.train_images[data.val_indices]),
        (data.test_dataloader(), images.test_images),
        (data.predict_dataloader(), images.test_images),
    ):
        [inputs, _], *_ = loader
        assert torch.equal(inputs, expected[:100].unsqueeze(1) / 255)


def test_a_resumed_run_with_transforms_is_bit_identical(main, tmp_path):
    crop = {"name": "RandomCrop", "args": {"size": 28, "padding": 2}}
    limits = ("--trainer.limit_val_batches", 1, "--trainer.limit_test_batches", 1)
    batches = ("--data.batch_size", 20, "--trainer.limit_train_batches", 4)
    short = (*QUICK, *batches, *limits, "--monitor", "false")
    setting = ("--data.augment", json.dumps([crop, JITTER, FLIP]))
    assert main("fit", *short, *setting)[0] == 0

    # The same settings from a file, stopped in the second epoch.
    (tmp_path / "augment.yaml").write_text(
        yaml.safe_dump({"data": {"augment": [crop, JITTER, FLIP]}})
    )
    config = ("--config", "augment.yaml")
    assert main("fit", *short, *config, "--trainer.max_steps", 6)[0] == 0
    stopped = tmp_path / "runs/lenet/1"
    assert yaml.safe_load((stopped / "config.yaml").read_text())["data"]["augment"][0] == crop
    last = torch.load(stopped / "checkpoints/last.ckpt", weights_only=True)
    assert last["datamodule_hyper_parameters"]["augment"] == [crop, JITTER, FLIP]
    assert main("fit", "--resume", "runs/lenet/1", "--trainer.max_steps", -1)[0] == 0
    ends = [tmp_path / f"runs/lenet/{number}/checkpoints/last.ckpt" for number in (0, 1)]
    assert_same_weights(*ends)


# Errors


@pytest.mark.parametrize(
    ("augment", "messages"),
    [
        ("RandomCrop", ["augment is 'RandomCrop'; it must be a list"]),
        (FLIP, ["augment is {'name': 'RandomHorizontalFlip'}; it must be a list"]),
        (["RandomCrop"], ["augment contains 'RandomCrop'; each transform must have a `name`"]),
        ([{"args": {}}], ["contains {'args': {}}; each transform must have a `name`"]),
        ([{**FLIP, "arg": {}}], ["and has no other key"]),
        ([{**FLIP, "args": [1]}], ["which are its arguments by name"]),
        ([{"name": "randomcrop"}], ["unknown transform 'randomcrop'. Similar names: RandomCrop"]),
        ([{"name": 5}], ["unknown transform '5'"]),
        ([{"name": "Transform"}], ["unknown transform 'Transform'"]),
        ([{"name": "torch.nn.Flatten"}], ["unknown transform 'torch.nn.Flatten'"]),
        ([{"name": "functional"}], ["unknown transform 'functional'"]),
        (
            [{"name": "RandomCrop", "args": {"sizes": 28}}],
            ["unexpected keyword argument 'sizes'", "Did you mean size?", "size, padding=None"],
        ),
        ([{"name": "RandomCrop"}], ["missing 1 required positional argument: 'size'"]),
        (
            [{"name": "AutoAugment", "args": {"policy": "mnist"}}],
            ["'mnist' is not a valid AutoAugmentPolicy"],
        ),
        (
            [{"name": "RandomApply", "args": {"transforms": [{"name": "Flip"}]}}],
            ["unknown transform 'Flip'"],
        ),
        ([{"name": "MixUp"}], ["MixUp, which mixes several images and their labels"]),
        ([{"name": "CutMix"}], ["CutMix, which mixes several images and their labels"]),
        ([{"name": "RandomIoUCrop"}], ["(RandomIoUCrop) fail for an image", "bounding boxes"]),
        (
            [{"name": "Lambda", "args": {"lambd": {"class_path": "calendar.Calendar"}}}],
            ["(Lambda) fail for an image", "'dict' object is not callable"],
        ),
        (
            [FLIP, {"name": "RandomResizedCrop", "args": {"size": 24}}],
            [
                "(RandomHorizontalFlip, RandomResizedCrop) turn an image, torch.uint8 (1, 28, 28), "
                "into torch.uint8 (1, 24, 24)",
                "Set the size in the arguments to [28, 28]",
            ],
        ),
        ([{"name": "RGB"}], ["into torch.uint8 (3, 28, 28)"]),
        ([{"name": "ConvertImageDtype"}], ["into torch.float32 (1, 28, 28)"]),
        ([{"name": "ToPILImage"}], ["into an object of type Image"]),
        ([{"name": "FiveCrop", "args": {"size": 28}}], ["into an object of type tuple"]),
    ],
)
def test_wrong_settings_are_refused(augment, messages):
    with pytest.raises(UserError) as refused:
        FashionMNIST("sample", augment=augment)
    for message in messages:
        assert message in str(refused.value)
    assert str(refused.value).count("\n") <= 6


def test_the_example_in_messages_is_correct():
    [line] = [line for line in transforms.EXAMPLE.splitlines() if "--data.augment" in line]
    assert FashionMNIST(augment=json.loads(line.split("'")[1])).transforms is not None
    assert FashionMNIST(augment=[]).transforms is None


@pytest.mark.parametrize(
    "draw", [random.random, np.random.random, None], ids=["random", "numpy", "state"]
)
def test_a_transform_with_other_random_numbers_or_a_state_is_refused(monkeypatch, draw):
    class Planted(v2.Transform):
        calls = 0

        def transform(self, image, params):
            self.calls += 1
            return image // 2 if (draw() < 0.5 if draw else self.calls % 5 == 0) else image

    monkeypatch.setitem(transforms.KNOWN, "Planted", Planted)
    with pytest.raises(UserError, match="different results with the same random numbers"):
        Transforms([FLIP, {"name": "Planted"}], (28, 28))


@pytest.mark.parametrize(
    "value",
    ["RandomCrop", "5", '{"name": "RandomCrop"}', '[{"name": "Random', '[{"name": "Crop"}]'],
)
def test_the_command_line_refuses_wrong_settings_with_an_example(main, value):
    code, out, err = main("fit", *QUICK, "--data.augment", value)
    assert (code, out) == (2, "")
    assert err.startswith("error: augment ") and transforms.EXAMPLE in err
    assert err.count("\n") <= 5


def test_the_parser_imports_nothing_that_a_setting_names(main, tmp_path):
    (tmp_path / "planted_module.py").write_text("raise SystemExit('imported')")
    named = {"class_path": "planted_module.Class"}
    for setting in ([named], [{"name": "Lambda", "args": {"lambd": named}}]):
        code, _, err = main("fit", *QUICK, "--data.augment", json.dumps(setting))
        assert code == 2 and "imported" not in err


@pytest.mark.slow
def test_without_transforms_those_of_torchvision_are_not_imported():
    code = (
        "import sys; from bn_lightning import FashionMNIST; FashionMNIST(flip=True, shift=1)\n"
        "assert 'torchvision.transforms.v2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
