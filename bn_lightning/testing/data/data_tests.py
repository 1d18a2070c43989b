"""Tests of the data of a project, to be inherited."""

from bn_lightning.testing.data.completeness_tests import CompletenessTests
from bn_lightning.testing.data.declaration_tests import DeclarationTests
from bn_lightning.testing.data.evaluation_tests import EvaluationTests
from bn_lightning.testing.data.order_tests import OrderTests
from bn_lightning.testing.data.preprocessing_tests import PreprocessingTests
from bn_lightning.testing.data.split_tests import SplitTests


class DataTests(
    DeclarationTests,
    PreprocessingTests,
    CompletenessTests,
    OrderTests,
    EvaluationTests,
    SplitTests,
):
    """Tests of a data module: what it declares, what its loaders return, and its split.

        class TestData(DataTests):
            experiment = "shoe_shop.experiment:EXPERIMENT"

    Nothing is trained. Lightning's Trainer passes the batches of the project's loaders to a
    module that records them, in 1, 2 and 3 processes. Samples are recognized by their content:
    samples with the same input and the same target are identical. With a large data set this
    takes long; `settings` can name a smaller one:

        class TestData(DataTests):
            experiment = "shoe_shop.experiment:EXPERIMENT"
            settings = ("--data.dataset_args.path", "some_pictures")
            processes = (1,)

    A test that does not apply to the data is skipped, and gives the reason. Samples of the
    validation or test set that are identical with training samples are shown as a warning.
    The test fails if they are more than 1% of the set.

    Leaked samples that were changed, for example resized in another way, are not found. A
    random augmentation in the Dataset of a plain DataLoader fails a test, and hides other
    mistakes.

    Attributes:
        experiment: the string in `__main__.py`, `package.module:NAME`.
        settings: flags of `fit` that all tests use.
        processes: the numbers of processes, of 1, 2 and 3, with which the project trains.
    """
