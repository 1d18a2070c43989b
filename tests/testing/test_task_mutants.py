"""Broken networks and tasks: `TaskTests` finds each of them, and says where to look."""

import pytest

from bn_lightning.testing import TaskTests
from tests.support.inherited_tests import Inherited

OVERFITTED = "one_batch_can_be_overfitted"
GRADIENT = "every_parameter_gets_a_gradient"
OPTIMIZER = "the_optimizer_has_every_parameter"
METRICS = "metrics_equal_those_of_all_samples_at_once"
ANEW = "metrics_start_anew_in_each_evaluation"
UNCHANGED = "an_evaluation_leaves_the_network_unchanged"
ALONE = "the_output_of_a_sample_does_not_depend_on_its_batch"
INPUT = "the_network_leaves_its_input_unchanged"
PLAIN = "settings_in_a_checkpoint_are_plain_data"
RESTORED = "a_checkpoint_restores_the_network"
BFLOAT16 = "a_step_in_bfloat16_is_near_that_in_float32"
LEAVES = "a_run_leaves_its_results_and_checkpoints"
RESUMED = "a_killed_run_is_resumed_bit_identically"
REPRODUCED = "the_settings_of_a_run_reproduce_it"
PROCESSES = "two_processes_train_as_one"
EXPORTED = "an_exported_file_agrees_with_the_network"

# The test that finds it, words of its message, and the other tests that fail.
HERE = {
    "PlainTensors": (RESTORED, "network.norm.mean is or contains a plain tensor", ()),
    "LayersInList": (RESTORED, "network.more has a Linear in a Python container", ()),
    "CountsCalls": (RESTORED, "network.calls is 8 in the trained object and 0 in the", ()),
    "RenamedWeights": (RESTORED, "methods that rename or skip weights", ()),
    "ObjectAsSetting": (PLAIN, "scale is a numpy.float64", (RESTORED, BFLOAT16)),
    "Detached": (GRADIENT, "network.convolution.weight", ()),
    "Unused": (GRADIENT, "network.skip.weight", ()),
    "HeadOnly": (OPTIMIZER, "network.norm.weight", ()),
    "SoftmaxTwice": (OVERFITTED, "softmax before a cross-entropy", ()),
    "WrongLabels": (OVERFITTED, "the labels", (METRICS, ANEW)),
    "Half": (OVERFITTED, "The loss of 32 samples is nan in the first step", (BFLOAT16,)),
    "SumOfLosses": (METRICS, "a loss that is a sum instead of a mean", ()),
    "MeanOfMeans": (METRICS, "val_acc is 0.425 in one and 0.30", ()),
    "LogsMeans": (METRICS, "self.log() needs batch_size", ()),
    "KeepsCounts": (ANEW, "reset() of these metrics", (METRICS,)),
    "TrainMode": (UNCHANGED, "norm.running_mean differs", (METRICS, ALONE)),
    "UpdatesInEvaluation": (UNCHANGED, "norm.running_mean differs", (ANEW, ALONE)),
    # Random outputs differ in every comparison.
    "AlwaysDropout": (ALONE, "F.dropout needs training", (METRICS, ANEW, RESTORED)),
    "OverBatch": (ALONE, "operations over dimension 0", (METRICS,)),
    # No evaluation is possible.
    "FixedBatchSize": (ALONE, "fails for a batch of 1 sample(s)", (METRICS, ANEW, UNCHANGED)),
    "Squeezed": (ALONE, "float32 (1, 5) in one and float32 (5,)", (METRICS, UNCHANGED)),
    "ChangesInput": (INPUT, "operations in place at the start of the network", ()),
    "FixedBuffer": (BFLOAT16, "tensors with a fixed dtype", ()),
}
IN_PROCESSES = {
    "RenamesMetrics": (LEAVES, "on_test_epoch_end(), is overridden and does not call super()"),
    "MovingTarget": (RESUMED, "attributes that change from step to step"),
    "OwnGenerator": (RESUMED, "network.generator is a generator of its own (torch"),
    "UnseededNumpy": (REPRODUCED, "numpy.random.default_rng()"),
    "FixedDtype": (PROCESSES, "tensors with a fixed dtype or device"),
    "SumOfLosses": (PROCESSES, "a loss in step() that is not the mean over the samples"),
    "LogsOneProcess": (PROCESSES, "val_share"),
}


@pytest.fixture
def inherited(tmp_path, monkeypatch):
    """Return a function that returns the tests of an experiment by its name."""

    def tests_of(name):
        experiment = f"broken.experiment:{name}"
        monkeypatch.setenv("BROKEN_EXPERIMENT", experiment)
        return Inherited(experiment, tmp_path)

    return tests_of


def test_a_sound_task_passes(inherited):
    assert inherited("SOUND").quick_failures() == {}


# They are trained with each of the settings, because their losses do not fall.
SLOW = ("SoftmaxTwice", "WrongLabels")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in HERE],
)
def test_a_broken_task_is_found(inherited, name):
    test, words, others = HERE[name]
    failures = inherited(name).quick_failures()
    assert words in failures[f"test_{test}"]
    assert failures.keys() == {f"test_{other}" for other in (test, *others)}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("BranchesOnValue", "branches on values"),
        ("FixedBatchSize", "raises an error: RuntimeError: shape '[32, -1]' is invalid"),
    ],
)
def test_a_network_that_cannot_be_exported_is_found(inherited, name, words):
    message = inherited(name).failure(f"test_{EXPORTED}", suffix=".pt2")
    assert words in message


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PROCESSES)
def test_a_task_whose_runs_are_broken_is_found(inherited, name):
    test, words = IN_PROCESSES[name]
    assert words in inherited(name).failure(f"test_{test}")


def test_a_broken_task_is_planted_for_every_test():
    found = {test for test, *_ in (*HERE.values(), *IN_PROCESSES.values())} | {EXPORTED}
    names = {name.removeprefix("test_") for name in dir(TaskTests) if name.startswith("test_")}
    assert names == found
