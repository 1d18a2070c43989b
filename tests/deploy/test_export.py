"""The exported file gives what the network gives, with nothing left of norms that can be folded."""

import json

import pytest
import torch
from torch import nn

from bn_lightning.data import files
from bn_lightning.data.fashion_mnist import CLASSES
from bn_lightning.deploy import export
from bn_lightning.deploy.served import restore
from bn_lightning.norms import registry, torch_norms
from tests.conftest import QUICK
from tests.deploy.conftest import SUFFIXES
from tests.support.exports import (
    FOLDED,
    FRIEDMAN,
    OPERATORS,
    PHI_AND_POOL,
    SOURCE,
    STANDARDIZED,
    assert_gives_what_the_checkpoint_does,
    operators,
    outputs_of,
    said_by,
    write_checkpoint,
    write_export,
    write_regression,
)

ALL = "10,000 test images (system)" if SOURCE == "system" else "1,000 test images (sample)"


class RMSNorm(nn.Module):
    def __init__(self, num_features, num_dims):
        super().__init__()

    def forward(self, x):
        return x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt()


class InFloat32(nn.Module):
    """Affine in evaluation, by arithmetic of its own, and made of parts."""

    def __init__(self, num_features, num_dims):
        super().__init__()
        self.inner = torch_norms.builtin(num_features, num_dims)
        self.gain = nn.Parameter(torch.full((), 1.5))

    def forward(self, x):
        inner = self.inner.float()
        return (inner(x.float()) * self.gain.float() + 0.25).to(x.dtype)


class Untraceable(nn.Module):
    def __init__(self, num_features, num_dims):
        super().__init__()
        self.mix = nn.Linear(num_features, num_features)

    def forward(self, x):
        return x * self.mix(x.mean((2, 3)))[:, :, None, None] if x.dim() == 4 else x * self.mix(x)


def test_a_trained_network(main, trained, tmp_path, suffix):
    ckpt, out = trained[0] / "checkpoints" / "best.ckpt", tmp_path / f"model.{suffix}"
    code, printed, error = main("export", ckpt, out, "--source", SOURCE)
    assert (code, error) == (0, "")
    assert printed.splitlines()[:4] == FOLDED
    assert "44,426 parameters, of 44,878" in printed
    assert f"{ALL}: logits differ by at most" in printed and "the class of 0 images" in printed
    assert f"{out.stat().st_size:,} bytes, of a checkpoint of {ckpt.stat().st_size:,}" in printed
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert_gives_what_the_checkpoint_does(out, ckpt)
    assert operators(out) == OPERATORS[suffix] + PHI_AND_POOL[suffix, "sigmoid", "avg"]


@pytest.mark.parametrize(
    ("norm", "activation", "pooling"), [("builtin", "sigmoid", "avg"), ("custom", "relu", "max")]
)
def test_other_trained_networks(main, tmp_path, norm, activation, pooling):
    settings = ("--model.norm", norm, "--model.activation", activation, "--model.pooling", pooling)
    assert main("fit", *QUICK, *settings, "--data.normalize", "true", "--model.lr", "0.1")[0] == 0
    ckpt = tmp_path / "runs" / "lenet" / "0" / "checkpoints" / "best.ckpt"
    for suffix in SUFFIXES:
        if suffix == "onnx":
            pytest.importorskip("onnxscript")
        out = tmp_path / f"model.{suffix}"
        code, printed, error = main("export", ckpt, out, "--source", SOURCE)
        assert (code, error) == (0, "")
        assert printed.splitlines()[:4] == FOLDED
        assert_gives_what_the_checkpoint_does(out, ckpt)
        left = OPERATORS[suffix] + STANDARDIZED[suffix]
        assert operators(out) == left + PHI_AND_POOL[suffix, activation, pooling]


@pytest.mark.parametrize("norm", registry.NORMS)
def test_every_norm(tmp_path, norm, suffix):
    ckpt, out = write_checkpoint(tmp_path / "some.ckpt", norm=norm), tmp_path / f"model.{suffix}"
    done = write_export(ckpt, out)
    assert_gives_what_the_checkpoint_does(out, ckpt, "sample")
    if norm == "group":
        assert done.notes == [
            f"norm{i}, a GroupNorm, has no affine form in evaluation: exported as it is"
            for i in range(1, 5)
        ]
    else:
        assert done.notes == FOLDED
        assert operators(out) == OPERATORS[suffix] + PHI_AND_POOL[suffix, "sigmoid", "avg"]


def test_a_norm_by_import_path(main, tmp_path, suffix):
    ckpt, out = (
        write_checkpoint(tmp_path / "some.ckpt", norm=f"{__name__}.RMSNorm"),
        tmp_path / f"model.{suffix}",
    )
    code, printed, _ = main(
        "export", ckpt, out, "--source", "sample", "--norm", f"{__name__}.RMSNorm"
    )
    assert code == 0
    assert "norm1, a RMSNorm, has no affine form in evaluation: exported as it is" in printed
    assert_gives_what_the_checkpoint_does(out, ckpt, "sample")


def test_a_norm_is_probed_as_a_whole_and_in_the_precision_that_it_has(tmp_path):
    norm = f"{__name__}.InFloat32"
    ckpt, out = write_checkpoint(tmp_path / "some.ckpt", norm=norm), tmp_path / "model.pt2"
    done = write_export(ckpt, out, norm)
    assert done.notes == FOLDED
    assert_gives_what_the_checkpoint_does(out, ckpt, "sample")
    assert operators(out) == OPERATORS["pt2"] + PHI_AND_POOL["pt2", "sigmoid", "avg"]


def test_a_network_that_cannot_be_traced_is_exported_unfolded(tmp_path):
    norm = f"{__name__}.Untraceable"
    ckpt, out = write_checkpoint(tmp_path / "some.ckpt", norm=norm), tmp_path / "model.pt2"
    (note,) = write_export(ckpt, out, norm).notes
    assert note.startswith("nothing is folded, since torch.fx cannot trace the network: TraceError")
    assert_gives_what_the_checkpoint_does(out, ckpt, "sample")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_other_precisions_are_exported_in_float32(tmp_path, dtype):
    ckpt, out = write_checkpoint(tmp_path / "some.ckpt", dtype=dtype), tmp_path / "model.pt2"
    write_export(ckpt, out)
    assert_gives_what_the_checkpoint_does(out, ckpt, "sample")


def test_what_the_file_says_of_itself(trained, tmp_path, suffix):
    run, out = trained[0], tmp_path / f"model.{suffix}"
    done = write_export(run / "checkpoints" / "best.ckpt", out)
    about = said_by(out)
    result = json.loads((run / "result.json").read_text())
    assert about["classes"].split("\n") == list(CLASSES)
    assert about["producer"].startswith("bn_lightning ") and about["torch"] == torch.__version__
    assert about["checkpoint"] == "lenet/0/checkpoints/best.ckpt"
    assert (about["norm"], about["seed"], about["data_source"]) == ("custom", 0, "sample")
    assert about["data_sha256"][files.TEST_IMAGES] == files.SAMPLED[2].sha256
    assert about["global_step"] in (22, 44)
    assert about["val_acc"] == result["val_acc"] and about.get("commit") == result.get("commit")
    assert (about["test_acc"], about["test_images"]) == (done.metrics["test_acc"], len(done.inputs))
    assert about["test_acc"] == pytest.approx(result["test_acc"])
    content = out.read_bytes()
    assert str(tmp_path).encode() not in content and b"lenet.py" not in content


@pytest.mark.parametrize(
    "given", ["/home/somebody/best.ckpt", "https://user:password@host/best.ckpt?Signature=x"]
)
def test_the_file_does_not_say_where_the_checkpoint_lay(given):
    assert export._name_of(given) == "best.ckpt"


def test_an_experiment_without_classes_and_pictures(tmp_path, capsys, suffix):
    ckpt, out = write_regression(tmp_path / "some.ckpt"), tmp_path / f"model.{suffix}"
    export.main(["export", str(ckpt), str(out)], FRIEDMAN)
    printed = capsys.readouterr().out
    assert printed.startswith("1 is folded into 0\n385 parameters, of 449\n")
    assert "100 test samples (formula): outputs differ by at most" in printed
    assert "class" not in printed
    *_, header, one, all_of_them = printed.splitlines()
    assert header.startswith("samples at once")
    assert (one.split()[0], all_of_them.split()[0]) == ("1", "100")
    restored = restore(str(ckpt), FRIEDMAN)
    inputs, targets = restored.data.test_samples()
    expected = restored.task.network(inputs)
    for batch_size in (1, 7, 100):
        outputs = outputs_of(out, inputs, batch_size)
        torch.testing.assert_close(outputs, expected)
    error = (expected - targets).square().mean().sqrt()
    about = said_by(out)
    assert about["test_rmse"] == pytest.approx(float(error)) and "test_r2" in about
    assert f"test rmse {error:.4f}, test r2 " in printed
    assert (about["test_samples"], about["seed"], about["data_source"]) == (100, 3, "formula")
    assert not {"classes", "test_images", "test_loss", "val_rmse"} & about.keys()


def test_settings_that_the_data_module_does_not_have_are_no_flags(tmp_path, capsys):
    ckpt = write_regression(tmp_path / "some.ckpt")
    for flag in ("--source", "--root"):
        with pytest.raises(SystemExit) as exit:
            export.main(["export", str(ckpt), "model.pt2", flag, "sample"], FRIEDMAN)
        assert exit.value.code == 2 and flag in capsys.readouterr().err


def test_a_disk_that_is_full(main, tmp_path):
    resource = pytest.importorskip("resource")
    ckpt, out = write_checkpoint(tmp_path / "some.ckpt"), tmp_path / "out" / "model.pt2"
    out.parent.mkdir()
    out.write_bytes(b"older")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code, _, error = main("export", ckpt, out, "--source", "sample")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and f"{out} cannot be written: File too large" in error
    assert [path.read_bytes() for path in out.parent.iterdir()] == [b"older"]


def test_what_cannot_be_exported(main, tmp_path):
    ckpt = write_checkpoint(tmp_path / "some.ckpt")
    other = write_checkpoint(tmp_path / "other.ckpt", norm="none")
    content = torch.load(other, weights_only=True)
    content["hyper_parameters"]["norm"] = "custom"
    torch.save(content, other)
    content["state_dict"] = {
        name: values * float("nan") for name, values in content["state_dict"].items()
    }
    content["hyper_parameters"]["norm"] = "none"
    torch.save(content, tmp_path / "diverged.ckpt")
    cannot_run = "The network cannot be run on batches of 1, 7 and 256 images"
    by_batch = write_checkpoint(
        tmp_path / "by_batch.ckpt", norm="builtin", norm_args={"track_running_stats": False}
    )
    for given, out, code, message in (
        (
            ckpt,
            "model.tflite",
            2,
            "'model.tflite' is to be a file of another kind than .onnx (ONNX) and .pt2",
        ),
        (ckpt, "model", 2, "'model' is to be"),
        (ckpt, "nowhere/model.pt2", 2, "There is no folder 'nowhere' to write model.pt2 into"),
        ("missing.ckpt", "model.pt2", 2, "There is no checkpoint 'missing.ckpt'"),
        (other, "model.pt2", 2, "does not fit Classifier: Error(s) in loading state_dict"),
        (tmp_path / "diverged.ckpt", "model.pt2", 1, "gives logits that are no numbers"),
        (by_batch, "model.pt2", 1, f"{cannot_run}: ValueError: Expected more"),
    ):
        found, printed, error = main("export", given, out, "--source", "sample")
        assert (
            (found, printed) == (code, "") and error.startswith("error: ") and message in error
        ), error
    assert not list(tmp_path.glob("*model*"))
