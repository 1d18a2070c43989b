"""Each mistake in data is found by the test that is for it, and no unrelated test fails."""

import inspect
from typing import NamedTuple

import pytest

from bn_lightning.testing import DataTests
from bn_lightning.testing.data import split_tests
from tests.testing import data_mutants, loader_mutants

DECLARED = "batches_have_the_declared_shape_and_type"
LABELS = "labels_are_those_of_the_named_classes"
FINITE = "values_are_finite"
NETWORK = "the_network_accepts_a_batch"
ONE_PREPROCESSING = "preprocessing_is_the_same_in_the_loaders_export_and_predict"
SAME_DATA = "two_data_modules_declare_the_same_data"
ONCE = "each_sample_is_read_exactly_once_in_an_epoch"
WORKERS = "training_samples_do_not_depend_on_the_number_of_workers"
AGAIN = "training_samples_depend_only_on_seed_and_epoch"
NEW_ORDER = "each_epoch_has_a_new_order_of_training_samples"
POSITION = "the_augmentation_of_a_sample_does_not_depend_on_its_position_or_process"
EVALUATION = "evaluation_reads_the_same_samples_in_each_pass"
TARGETS = "each_input_keeps_its_target"
HELD_OUT = "held_out_samples_are_never_trained_on"
SPLIT = "the_split_is_always_the_same"
LEAK = "few_samples_of_the_evaluation_are_identical_with_training_samples"


class Mutant(NamedTuple):
    """A broken data module: the class, the test that must fail, and words of its message.

    The tests in `also` necessarily fail too.
    """

    name: str
    test: str
    words: tuple[str, ...]
    also: tuple[str, ...] = ()
    processes: tuple[int, ...] = (1,)


MUTANTS = [
    Mutant("WrongImageSize", DECLARED, ("image_size is declared as (8, 10)",), (NETWORK,)),
    Mutant("LabelsFromOne", LABELS, ("label 3 does not exist", "start at 1"), (NETWORK,)),
    Mutant("FloatLabels", LABELS, ("float32; labels must be int64",), (NETWORK,)),
    Mutant("NoClassNames", LABELS, ("3 classes, but `classes`", "None")),
    Mutant("BlankTestImage", FINITE, ("1 of 60 test samples", ": 17.", "standard deviation")),
    Mutant("CountsOfAll", SAME_DATA, ("class_counts() is", "training samples only")),
    Mutant("IdentityWithTime", SAME_DATA, ("identity() differs", "no run could be resumed")),
    Mutant("PreprocessedTwice", ONE_PREPROCESSING, ("applies the preprocessing twice",)),
    Mutant("PreprocessingOfTraining", ONE_PREPROCESSING, ("must not need training data",)),
    Mutant("DropsLastOfTest", ONCE, ("12 are not read", "drop_last=True")),
    Mutant("DrawsWithRepeats", ONCE, ("read too often", "Too often: training samples")),
    Mutant("FillsLastBatch", ONCE, ("1 are read too often", "DistributedSampler"), (), (1, 2)),
    Mutant("PartOfPart", ONCE, ("96 are not read", "part of its own part"), (), (1, 2)),
    Mutant("AllRanksReadAll", ONCE, ("36 are read too often", "trainer=self.trainer"), (), (1, 2)),
    Mutant("GeneratorInTransform", WORKERS, ("_OwnGenerator.rng`, a numpy",), (AGAIN, POSITION)),
    Mutant("GeneratorAtImport", WORKERS, ("`RANDOM` of tests",), (AGAIN, POSITION)),
    Mutant("WorkerSeeds", WORKERS, ("differ with 2 workers", "depend on the worker")),
    Mutant("PlainShuffle", WORKERS, ("in another order with 2 workers", "sampler in")),
    Mutant("DrawsInTurn", POSITION, ("of 192", "in reverse order", "seeds.for_samples")),
    Mutant(
        "DrawsFromClock",
        AGAIN,
        ("a new data module reads the second epoch again", "time"),
        (POSITION,),
    ),
    Mutant("SameOrder", NEW_ORDER, ("the same order in each epoch", "self.train_batches")),
    Mutant("ShuffledValidation", EVALUATION, ("validation samples are shuffled",)),
    Mutant(
        "AugmentedValidation",
        EVALUATION,
        ("differ when they are read a second", "random tr"),
    ),
    Mutant("TargetsShuffled", TARGETS, ("another target in another pass",)),
    Mutant("LeakedIndices", HELD_OUT, ("36 validation samples are training samples",)),
    Mutant("LeakedCopies", LEAK, ("same input as a training sample", "(training)", "oversampling")),
    Mutant("LeakedTestAfterResize", LEAK, ("4 test samples of 60 (6.7%)", "sample 11 (test) =")),
    Mutant("BlackImages", LEAK, ("All 192 training samples have the same input",)),
    Mutant("SplitByTime", SPLIT, ("change places", "the time"), (AGAIN,)),
    Mutant("SplitByRank", SPLIT, ("with 2 processes", "depends on the process"), (ONCE,), (1, 2)),
    Mutant("UnseededSplit", SPLIT, ("change places", "generator"), (AGAIN,)),
]
# They need no worker processes.
QUICK = ("LabelsFromOne", "PreprocessedTwice", "DropsLastOfTest", "DrawsInTurn", "LeakedIndices")


def results(name, processes=(1,)):
    """Run all tests of an experiment. Return the messages of those that fail or are skipped."""
    module = data_mutants if hasattr(data_mutants, name) else loader_mutants
    members = {"experiment": f"{module.__name__}:OF_{name}", "processes": processes}
    tests = type("TestMutant", (DataTests,), members)()
    failed, skipped = {}, {}
    for method in dir(tests):
        if not method.startswith("test_"):
            continue
        function, property_name = getattr(tests, method), method.removeprefix("test_")
        takes_number = bool(inspect.signature(function).parameters)
        for arguments in [(n,) for n in processes] if takes_number else [()]:
            try:
                function(*arguments)
            except pytest.fail.Exception as failure:
                failed[property_name] = str(failure)
            except pytest.skip.Exception as skip:
                skipped[property_name] = str(skip)
    return failed, skipped


@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(m, id=m.name, marks=() if m.name in QUICK else pytest.mark.slow)
        for m in MUTANTS
    ],
)
def test_the_mistake_is_found_by_its_test_and_described(mutant):
    failed, _ = results(mutant.name, mutant.processes)
    assert failed.keys() == {mutant.test, *mutant.also}, "\n\n".join(failed.values())
    for words in mutant.words:
        assert words in failed[mutant.test], failed[mutant.test]


@pytest.mark.slow
def test_a_sampler_that_draws_with_replacement_is_not_asked_for_each_sample_once():
    failed, skipped = results("OversampledClasses")
    # Its order is drawn from the global generator.
    assert failed.keys() == {WORKERS}
    assert ONCE not in skipped


def test_a_few_identical_samples_are_shown_as_a_warning(monkeypatch):
    monkeypatch.setattr(split_tests, "MAX_IDENTICAL", 0.1)
    with pytest.warns(UserWarning, match=r"4 test samples of 60 \(6.7%\) have the same input"):
        failed, _ = results("LeakedTestAfterResize")
    assert not failed


def test_missing_data_fail_with_their_own_message():
    members = {
        "experiment": "bn_lightning.experiment:EXPERIMENT",
        "settings": ("--data.dataset", "folder", "--data.dataset_args.path", "nowhere"),
    }
    with pytest.raises(pytest.fail.Exception, match="There is no folder 'nowhere'") as raised:
        type("TestMissing", (DataTests,), members)().test_values_are_finite()
    assert raised.value.__suppress_context__
