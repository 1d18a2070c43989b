"""A file is written only if it does what the checkpoint's network does."""

import pytest
import torch
from torch import nn

from bn_lightning.deploy.served import Served, ServedClassifier, restore
from bn_lightning.deploy.verification import Verification, metrics_of_test
from bn_lightning.errors import RunFailed
from tests.support.exports import FRIEDMAN, write_checkpoint, write_regression


class OtherWhenExported(nn.Module):
    def __init__(self, num_features, num_dims):
        super().__init__()

    def forward(self, x):
        x = x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt()
        return x + 0.1 * torch.compiler.is_exporting()


class OtherOn256(nn.Module):
    def __init__(self, num_features, num_dims):
        super().__init__()

    def forward(self, x):
        return x + 0.1 * (len(x) == 256)


@pytest.mark.parametrize(
    ("norm", "what"), [("OtherOn256", "The folded network"), ("OtherWhenExported", "The file for")]
)
@pytest.mark.parametrize("older", [None, b"older"])
def test_a_file_that_does_not_do_the_same_is_not_written(main, tmp_path, older, norm, what, suffix):
    norm = f"{__name__}.{norm}"
    ckpt, out = (
        write_checkpoint(tmp_path / "some.ckpt", norm=norm),
        tmp_path / "out" / f"model.{suffix}",
    )
    out.parent.mkdir()
    if older:
        out.write_bytes(older)
    code, _, error = main("export", ckpt, out, "--norm", norm, "--source", "sample")
    assert code == 1
    assert what in error and "differs from the checkpoint's network: logits by up to" in error
    assert [path.read_bytes() for path in out.parent.iterdir()] == ([older] if older else [])


def served(network, cls=Served):
    return cls(nn.Identity(), network)


class Shifted(nn.Module):
    def __init__(self, shift):
        super().__init__()
        self.shift = torch.as_tensor(shift)

    def forward(self, x):
        return x + self.shift


def test_outputs_may_differ_by_the_tolerance_of_the_largest():
    inputs = torch.linspace(-50, 100, 300).reshape(100, 3)
    verification = Verification(served(nn.Identity()), inputs)
    largest, changed = verification.refuse_difference("it", Shifted(0.0009))
    assert largest == pytest.approx(0.0009, rel=0.05) and changed is None
    with pytest.raises(RunFailed, match=r"it differs .* outputs by up to 0.0011, .* allowed. Not"):
        verification.refuse_difference("it", Shifted(0.0011))
    with pytest.raises(RunFailed, match="up to nan"):
        verification.refuse_difference("it", Shifted(float("nan")))


def test_a_class_may_change_only_where_two_are_as_good():
    inputs = torch.tensor([[0.0, 100.0], [5.0, 5.0004]]).repeat(10, 1)
    verification = Verification(served(nn.Identity(), ServedClassifier), inputs)
    assert verification.refuse_difference("it", Shifted([0.0008, 0.0])).changed == 10
    with pytest.raises(RunFailed, match=r"logits by up to 1e\+02, .*, and 20 of 20 classes"):
        verification.refuse_difference("it", lambda x: x.flip(1))


def test_a_network_that_works_in_place_does_not_change_the_samples():
    inputs = torch.full((300, 2), 3.0)
    verification = Verification(served(nn.Threshold(5, 1.0, inplace=True)), inputs)
    assert (inputs == 3).all() and (verification.expected == 1).all()
    assert verification.is_finite
    assert not Verification(served(Shifted(float("inf"))), inputs).is_finite


def test_metrics_are_those_of_the_task(tmp_path):
    restored = restore(str(write_regression(tmp_path / "some.ckpt")), FRIEDMAN)
    inputs, targets = restored.data.test_samples()
    found = metrics_of_test(restored, inputs, targets)
    residuals = targets - restored.task(inputs)
    assert list(found) == ["test_rmse", "test_r2"]
    assert found["test_rmse"] == pytest.approx(float(residuals.square().mean().sqrt()))
    explained = 1 - residuals.square().sum() / (targets - targets.mean()).square().sum()
    assert found["test_r2"] == pytest.approx(float(explained), rel=1e-4)
    assert len(str(found["test_rmse"])) < 11  # the decimals of float32
