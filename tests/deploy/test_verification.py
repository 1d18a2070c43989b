"""A file is written only if its outputs match those of the checkpoint's network."""

import pytest
import torch
from torch import nn

from bn_lightning.deploy import folding
from bn_lightning.deploy.served import Served, ServedClassifier, restore
from bn_lightning.deploy.verification import Verification, compute_test_metrics
from bn_lightning.errors import RunFailed
from bn_lightning.networks.resnet import ResNet
from bn_lightning.norms import registry
from bn_lightning.norms.layer import BatchNorm
from tests.support.exports import FRIEDMAN, write_checkpoint, write_regression


class DiffersWhenExported(nn.Module):
    def __init__(self, num_features, num_dims):
        super().__init__()

    def forward(self, x):
        x = x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt()
        return x + 0.1 * torch.compiler.is_exporting()


class DiffersOn256(nn.Module):
    def __init__(self, num_features, num_dims):
        super().__init__()

    def forward(self, x):
        return x + 0.1 * (len(x) == 256)


@pytest.mark.parametrize(
    ("norm", "what"),
    [("DiffersOn256", "The folded network"), ("DiffersWhenExported", "The network exported for")],
)
@pytest.mark.parametrize("existing", [None, b"existing"])
def test_a_file_with_other_outputs_is_not_written(main, tmp_path, existing, norm, what, suffix):
    norm = f"{__name__}.{norm}"
    ckpt, out = (
        write_checkpoint(tmp_path / "some.ckpt", norm=norm),
        tmp_path / "out" / f"model.{suffix}",
    )
    out.parent.mkdir()
    if existing:
        out.write_bytes(existing)
    code, _, error = main("export", ckpt, out, "--model.norm", norm, "--source", "sample")
    assert code == 1
    assert what in error
    assert "does not match the checkpoint's network: logits differ by up to" in error
    assert [path.read_bytes() for path in out.parent.iterdir()] == ([existing] if existing else [])


def served(network, cls=Served):
    return cls(nn.Identity(), network)


class Shifted(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.shift = torch.as_tensor(shift)

    def forward(self, x):
        return x + self.shift


def test_the_tolerance_is_relative_to_the_largest_output():
    inputs = torch.linspace(-50, 100, 300).reshape(100, 3)
    verification = Verification(served(nn.Identity()), inputs)
    largest, allowed, changed = verification.verify("it", Shifted(0.0009))
    assert largest == pytest.approx(0.0009, rel=0.05) and changed is None
    assert allowed == pytest.approx(1e-5 * 100)
    message = r"it does not match .* outputs differ by up to 0.0011 \(allowed: .*\). No file"
    with pytest.raises(RunFailed, match=message):
        verification.verify("it", Shifted(0.0011))
    with pytest.raises(RunFailed, match="up to nan"):
        verification.verify("it", Shifted(float("nan")))


class Cancels(nn.Module):
    """Returns its input, with a rounding error of up to 2^-5 in float32."""

    def __init__(self, float32_only=False):
        super().__init__()
        self.float32_only = float32_only

    def forward(self, x):
        if self.float32_only and x.dtype != torch.float32:
            raise TypeError("float32 only")
        return (x + 2**19) - 2**19


def test_the_tolerance_is_ten_times_the_rounding_error_of_the_network():
    # float32 has a precision of 2^-4 at 2^19, so 31/32 is rounded to 1.
    inputs = torch.tensor([[31 / 32, 1.0]]).repeat(300, 1)
    verification = Verification(served(Cancels()), inputs)
    assert verification.allowed == 10 / 32
    assert verification.verify("it", lambda x: x).largest == 1 / 32
    with pytest.raises(RunFailed, match=r"by up to 0.38 \(allowed: 0.31\)"):
        verification.verify("it", Shifted(12 / 32))
    without_float64 = Verification(served(Cancels(float32_only=True)), inputs)
    assert without_float64.allowed == pytest.approx(1e-5)


@torch.no_grad()
def test_a_wrong_eps_in_one_of_twenty_layers_is_refused():
    network = ResNet(1, (28, 28), 10, registry.factory("custom"), depth=20, width=4).eval()
    generator = torch.Generator().manual_seed(0)
    for name, values in network.named_buffers():
        if values.is_floating_point():
            least, most = (-1, 1) if "mean" in name else (0.5, 2)
            values.uniform_(least, most, generator=generator)
    images = torch.rand(12, 1, 28, 28, generator=generator)
    verification = Verification(served(network, ServedClassifier), images)
    folded, _ = folding.fold(network, images)
    found = verification.verify("it", folded)
    assert found.largest < found.allowed / 3 and found.changed == 0
    layers = [module for module in network.modules() if isinstance(module, BatchNorm)]
    assert len(layers) == 19
    for layer in layers:
        layer.eps = 1e-3
        with pytest.raises(RunFailed, match="it does not match the checkpoint's network"):
            verification.verify("it", network)
        layer.eps = 1e-5
    assert verification.verify("it", network).largest == 0


def test_a_class_may_change_only_if_the_two_best_are_within_the_tolerance():
    inputs = torch.tensor([[0.0, 100.0], [5.0, 5.0004]]).repeat(10, 1)
    verification = Verification(served(nn.Identity(), ServedClassifier), inputs)
    assert verification.verify("it", Shifted([0.0008, 0.0])).changed == 10
    message = r"logits differ by up to 1e\+02 .*, and 20 of 20 predicted classes"
    with pytest.raises(RunFailed, match=message):
        verification.verify("it", lambda x: x.flip(1))


def test_in_place_operations_do_not_change_the_samples():
    inputs = torch.full((300, 2), 3.0)
    verification = Verification(served(nn.Threshold(5, 1.0, inplace=True)), inputs)
    assert (inputs == 3).all() and (verification.expected == 1).all()
    assert verification.is_finite
    assert not Verification(served(Shifted(float("inf"))), inputs).is_finite


def test_metrics_of_the_task_are_computed(tmp_path):
    restored = restore(str(write_regression(tmp_path / "some.ckpt")), FRIEDMAN)
    inputs, targets = restored.data.test_samples()
    found = compute_test_metrics(restored, inputs, targets)
    residuals = targets - restored.task(inputs)
    assert list(found) == ["test_rmse", "test_r2"]
    assert found["test_rmse"] == pytest.approx(float(residuals.square().mean().sqrt()))
    explained = 1 - residuals.square().sum() / (targets - targets.mean()).square().sum()
    assert found["test_r2"] == pytest.approx(float(explained), rel=1e-4)
    assert len(str(found["test_rmse"])) < 11  # digits of float32
