"""The statistics that precise statistics are compared with."""

import torch

from bn_lightning import Classifier
from bn_lightning.training.seeds import statistics_order
from tests.support.pooled_statistics import pooled_statistics


def batches_of(data, count, seed=0):
    """Return the inputs of the batches that the documentation promises, without augmentation."""
    indices = data.train_indices
    chosen = indices[statistics_order(len(indices), seed)][: count * data.batch_size]
    loader = data.train_dataloader()
    return [loader.take(part)[0] for part in chosen.split(data.batch_size)]


def as_builtin(state):
    """Return the weights of a LeNet with any norm, for one with torch's batch norm."""
    network = Classifier("builtin").network
    weights = network.state_dict()
    for name, value in state.items():
        name = name.replace("gamma", "weight").replace("beta", "bias")
        if "moving" not in name and "running" not in name:
            weights[name] = value.view_as(weights[name])
    network.load_state_dict(weights)
    return network


def assert_statistics(state, reference, batches, rtol=1e-4, atol=1e-5):
    """Assert that the running statistics in a state dict are those of the batches.

    The reference is a network with the same weights.
    """
    expected = pooled_statistics(reference, batches)
    assert expected
    for name, (mean, var) in expected.items():
        found = {
            key.rpartition(".")[2]: value.double().flatten()
            for key, value in state.items()
            if key.startswith(f"{name}.")
        }
        if "running_std" in found:
            # sqrt(variance + eps)
            found["running_var"] = found["running_std"].square() - 1e-5
        for kind, truth in (("mean", mean), ("var", var)):
            value = found.get(f"running_{kind}", found.get(f"moving_{kind}"))
            torch.testing.assert_close(
                value,
                truth,
                rtol=rtol,
                atol=atol,
                msg=lambda text, where=f"{name} {kind}": f"{where}: {text}",
            )
