"""Convolutions in channels-last order: the results are those of channels-last weights."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector

from bn_lightning import BatchNorm, Classifier, FashionMNIST
from bn_lightning.training.channels_last import use_channels_last

# Sizes of the input, and a network.
NETWORKS = {
    "one channel": (
        (4, 1, 9, 9),
        lambda: nn.Sequential(nn.Conv2d(1, 6, 3), BatchNorm(6), nn.ReLU(), nn.Conv2d(6, 5, 3)),
    ),
    "colors": ((4, 3, 9, 9), lambda: nn.Sequential(nn.Conv2d(3, 6, 3), BatchNorm(6), nn.ReLU())),
    "separable": (
        (4, 3, 9, 9),
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 8, 1), BatchNorm(8)),
    ),
    "transposed": ((4, 3, 5, 5), lambda: nn.Sequential(nn.ConvTranspose2d(3, 6, 3), BatchNorm(6))),
    "order lost": (
        (4, 6),
        lambda: nn.Sequential(nn.Linear(6, 75), nn.Unflatten(1, (3, 5, 5)), nn.Conv2d(3, 6, 3)),
    ),
}


def gradients(network, x):
    y = network(x)
    y.square().mean().backward()
    return y, [p.grad for p in network.parameters()]


@pytest.mark.parametrize(("size", "make"), NETWORKS.values(), ids=NETWORKS)
def test_results_are_those_of_channels_last_weights_but_weights_stay_contiguous(size, make):
    torch.manual_seed(0)
    network, x = make(), torch.randn(size)
    reference = copy.deepcopy(network).to(memory_format=torch.channels_last)
    use_channels_last(network)
    (y, own), (expected, theirs) = gradients(network, x), gradients(reference, x)
    assert torch.equal(y, expected)
    assert y.stride() == expected.stride()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(own, theirs, strict=True))
    assert all(p.is_contiguous() and p.grad.is_contiguous() for p in network.parameters())


def test_other_convolutions_are_unchanged():
    network = nn.Sequential(nn.Conv3d(3, 4, 3), BatchNorm(4), nn.Flatten(), nn.LazyLinear(2))
    expected = copy.deepcopy(network)
    x = torch.randn(2, 3, 4, 4, 4)
    use_channels_last(network)
    torch.manual_seed(0)
    y = network(x)
    torch.manual_seed(0)
    assert torch.equal(y, expected(x))
    # A single image, without a batch.
    conv = nn.Conv2d(3, 4, 3)
    use_channels_last(conv)
    assert conv(torch.randn(3, 5, 5)).shape == (4, 3, 3)


class FlatViews(pl.Callback):
    """Views each weight, gradient and state of the optimizer as a vector."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        parameters = list(pl_module.parameters())
        values = parameters_to_vector(parameters)
        assert values.shape == parameters_to_vector([p.grad for p in parameters]).shape

    def on_train_batch_end(self, trainer, pl_module, *_):
        for state in trainer.optimizers[0].state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.view(-1)


@pytest.mark.parametrize("norm", ["custom", "none"])
@pytest.mark.parametrize("optimizer", ["LBFGS", "Adam"])
def test_weights_gradients_and_optimizer_states_have_flat_views(tmp_path, norm, optimizer):
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        fast_dev_run=1,
        callbacks=[FlatViews()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(norm, optimizer=optimizer), datamodule=FashionMNIST("sample"))
