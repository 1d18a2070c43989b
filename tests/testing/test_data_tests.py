"""`DataTests` on data modules of this repository, which have all properties."""

import numpy as np
import pytest
from PIL import Image

from bn_lightning.testing import DataTests
from tests.conftest import needs_all_images


@pytest.fixture(scope="class")
def pictures(tmp_path_factory):
    """A folder of small pictures of different sizes, as the current folder."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("folder")
    for name in ("ant", "bee", "cat"):
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(24):
            pixels = random.integers(0, 256, (*random.integers(34, 50, 2), 3), np.uint8)
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield


class TestFashionMNIST(DataTests):
    experiment = "bn_lightning.experiment:EXPERIMENT"
    settings = (
        *("--data.source", "sample", "--data.shift", "2", "--data.flip", "true"),
        *("--data.augment", '[{"name": "RandomErasing", "args": {"p": 0.5}}]'),
    )
    processes = (1, 3)


@pytest.mark.slow
@needs_all_images
@pytest.mark.timeout(900)
class TestAllOfFashionMNIST(DataTests):
    experiment = "bn_lightning.experiment:EXPERIMENT"
    settings = ("--data.source", "system", "--data.shift", "2")


@pytest.mark.slow
@pytest.mark.usefixtures("pictures")
class TestFolder(DataTests):
    experiment = "bn_lightning.experiment:EXPERIMENT"
    settings = (
        *("--data.dataset", "folder", "--data.dataset_args.path", "pictures"),
        *("--data.resize", "32", "--data.batch_size", "16", "--data.flip", "true"),
    )


@pytest.mark.slow
class TestTable(DataTests):
    experiment = "friedman.experiment:EXPERIMENT"
    settings = ("--data.rows", "200")


# The data modules that the mutants change.


class TestInMemory(DataTests):
    experiment = "tests.testing.data_modules:MEMORY"
    processes = (1,)


@pytest.mark.slow
class TestInFiles(DataTests):
    experiment = "tests.testing.data_modules:FILES"


@pytest.mark.slow
class TestInPlainLoaders(DataTests):
    experiment = "tests.testing.data_modules:PLAIN"
