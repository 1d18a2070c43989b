"""An exported file returns the outputs of the network, and contains no norm that can be folded."""

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
    assert_matches_checkpoint,
    metadata_of,
    operators,
    outputs_of,
    write_checkpoint,
    write_export,
    write_regression,
)

# The classes of the norms of LeNet that are not affine maps in eval mode.
UNFOLDED = {
    "group": ["GroupNorm"] * 4,
    "layer": ["GroupNorm", "GroupNorm", "LayerNorm", "LayerNorm"],
    "rms": ["ChannelRMSNorm", "ChannelRMSNorm", "RMSNorm", "RMSNorm"],
}
SLOW = ("ghost", "frozen", "layer", "rms")
TEST_SETS = {"system": "10,000 test images (system)", "sample": "1,000 test images (sample)"}


class RMSNorm(nn.Module):
    def __init__(self, num_features, num_dims):
        super().__init__()

    def forward(self, x):
        return x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt()


class InFloat32(nn.Module):
    """Affine in evaluation, consists of several modules, and computes in float32."""

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


@pytest.mark.parametrize("source", ["sample", pytest.param(SOURCE, marks=pytest.mark.slow)])
def test_a_trained_network_is_exported_with_folded_norms(main, trained, tmp_path, suffix, source):
    ckpt, out = trained[0] / "checkpoints" / "best.ckpt", tmp_path / f"model.{suffix}"
    code, printed, error = main("export", ckpt, out, "--source", source)
    assert (code, error) == (0, "")
    assert printed.splitlines()[:4] == FOLDED
    assert "44,426 parameters (checkpoint: 44,878)" in printed
    assert f"{TEST_SETS[source]}: logits differ by at most" in printed
    assert ", 0 predicted classes differ" in printed
    assert f"{out.stat().st_size:,} bytes (checkpoint: {ckpt.stat().st_size:,})" in printed
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert_matches_checkpoint(out, ckpt, source)
    assert operators(out) == OPERATORS[suffix] + PHI_AND_POOL[suffix, "sigmoid", "avg"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "activation", "pooling"), [("builtin", "sigmoid", "avg"), ("custom", "relu", "max")]
)
def test_other_norms_activations_and_poolings_are_exported(
    main, tmp_path, norm, activation, pooling
):
    settings = ("--model.norm", norm, "--model.activation", activation, "--model.pooling", pooling)
    training = ("--data.normalize", "true", "--model.lr", "0.1", "--trainer.max_epochs", "1")
    limits = [f"--trainer.limit_{stage}_batches=4" for stage in ("train", "val", "test")]
    assert main("fit", *QUICK, *settings, *training, *limits)[0] == 0
    ckpt = tmp_path / "runs" / "lenet" / "0" / "checkpoints" / "best.ckpt"
    for suffix in SUFFIXES:
        if suffix == "onnx":
            pytest.importorskip("onnxscript")
        out = tmp_path / f"model.{suffix}"
        code, printed, error = main("export", ckpt, out, "--source", "sample")
        assert (code, error) == (0, "")
        assert printed.splitlines()[:4] == FOLDED
        assert_matches_checkpoint(out, ckpt, "sample")
        left = OPERATORS[suffix] + STANDARDIZED[suffix]
        assert operators(out) == left + PHI_AND_POOL[suffix, activation, pooling]


# The ONNX exporter takes most of the time. Other quick tests export folded and unfolded norms.
@pytest.mark.parametrize(
    "suffix", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)], indirect=True
)
@pytest.mark.parametrize(
    "norm",
    [
        pytest.param(norm, marks=pytest.mark.slow if norm in SLOW else [])
        for norm in registry.NORMS
        if norm != "instance"  # LeNet has norms behind linear layers.
    ],
)
def test_every_registered_norm_is_exported(tmp_path, norm, suffix):
    ckpt, out = write_checkpoint(tmp_path / "some.ckpt", norm=norm), tmp_path / f"model.{suffix}"
    exported = write_export(ckpt, out)
    assert_matches_checkpoint(out, ckpt, "sample")
    if norm in UNFOLDED:
        assert exported.notes == [
            f"norm{i} ({kind}) is not folded: in eval mode, it is not an affine map per channel"
            for i, kind in enumerate(UNFOLDED[norm], 1)
        ]
    else:
        assert exported.notes == ([] if norm == "none" else FOLDED)
        assert operators(out) == OPERATORS[suffix] + PHI_AND_POOL[suffix, "sigmoid", "avg"]


def test_a_norm_by_import_path_is_exported_if_a_flag_names_it(main, tmp_path, suffix):
    ckpt, out = (
        write_checkpoint(tmp_path / "some.ckpt", norm=f"{__name__}.RMSNorm"),
        tmp_path / f"model.{suffix}",
    )
    code, printed, _ = main(
        "export", ckpt, out, "--source", "sample", "--model.norm", f"{__name__}.RMSNorm"
    )
    assert code == 0
    assert "norm1 (RMSNorm) is not folded: in eval mode, it is not an affine map" in printed
    assert_matches_checkpoint(out, ckpt, "sample")


def test_a_norm_of_several_modules_that_computes_in_float32_is_folded(tmp_path):
    norm = f"{__name__}.InFloat32"
    ckpt, out = write_checkpoint(tmp_path / "some.ckpt", norm=norm), tmp_path / "model.pt2"
    exported = write_export(ckpt, out, norm)
    assert exported.notes == FOLDED
    assert_matches_checkpoint(out, ckpt, "sample")
    assert operators(out) == OPERATORS["pt2"] + PHI_AND_POOL["pt2", "sigmoid", "avg"]


def test_a_network_that_cannot_be_traced_is_exported_unfolded(tmp_path):
    norm = f"{__name__}.Untraceable"
    ckpt, out = write_checkpoint(tmp_path / "some.ckpt", norm=norm), tmp_path / "model.pt2"
    (note,) = write_export(ckpt, out, norm).notes
    assert note.startswith("nothing is folded: torch.fx cannot trace the network (TraceError")
    assert_matches_checkpoint(out, ckpt, "sample")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_other_dtypes_are_exported_in_float32(tmp_path, dtype):
    ckpt, out = write_checkpoint(tmp_path / "some.ckpt", dtype=dtype), tmp_path / "model.pt2"
    write_export(ckpt, out)
    assert_matches_checkpoint(out, ckpt, "sample")


def test_the_file_contains_metadata(trained, tmp_path, suffix):
    run, out = trained[0], tmp_path / f"model.{suffix}"
    exported = write_export(run / "checkpoints" / "best.ckpt", out)
    metadata = metadata_of(out)
    result = json.loads((run / "result.json").read_text())
    assert metadata["classes"].split("\n") == list(CLASSES)
    assert metadata["producer"].startswith("bn_lightning ")
    assert metadata["torch"] == torch.__version__
    assert metadata["checkpoint"] == "lenet/0/checkpoints/best.ckpt"
    assert (metadata["norm"], metadata["seed"], metadata["data_source"]) == ("custom", 0, "sample")
    assert metadata["data_sha256"][files.TEST_IMAGES] == files.SAMPLE[2].sha256
    assert metadata["global_step"] in (22, 44)
    assert metadata["val_acc"] == result["val_acc"]
    assert metadata.get("commit") == result.get("commit")
    assert metadata["test_acc"] == exported.metrics["test_acc"]
    assert metadata["test_images"] == len(exported.inputs)
    assert metadata["test_acc"] == pytest.approx(result["test_acc"])
    content = out.read_bytes()
    assert str(tmp_path).encode() not in content and b"lenet.py" not in content


@pytest.mark.parametrize(
    "given", ["/home/somebody/best.ckpt", "https://user:password@host/best.ckpt?Signature=x"]
)
def test_metadata_contain_no_home_directory_and_no_password(given):
    assert export._public_name(given) == "best.ckpt"


def test_a_regression_is_exported(tmp_path, capsys, suffix):
    ckpt, out = write_regression(tmp_path / "some.ckpt"), tmp_path / f"model.{suffix}"
    export.main(["export", str(ckpt), str(out)], FRIEDMAN)
    printed = capsys.readouterr().out
    assert printed.startswith("1 is folded into 0\n385 parameters (checkpoint: 449)\n")
    assert "100 test samples (formula): outputs differ by at most" in printed
    assert "class" not in printed
    *_, header, one, all_of_them = printed.splitlines()
    assert header.startswith("samples per call")
    assert (one.split()[0], all_of_them.split()[0]) == ("1", "100")
    restored = restore(str(ckpt), FRIEDMAN)
    inputs, targets = restored.data.test_samples()
    expected = restored.task.network(inputs)
    for batch_size in (1, 7, 100):
        outputs = outputs_of(out, inputs, batch_size)
        torch.testing.assert_close(outputs, expected)
    error = (expected - targets).square().mean().sqrt()
    metadata = metadata_of(out)
    assert metadata["test_rmse"] == pytest.approx(float(error)) and "test_r2" in metadata
    assert f"test rmse {error:.4f}, test r2 " in printed
    assert (metadata["test_samples"], metadata["seed"]) == (100, 3)
    assert metadata["data_source"] == "formula"
    assert not {"classes", "test_images", "test_loss", "val_rmse"} & metadata.keys()


def test_flags_exist_only_for_settings_of_the_data_module(tmp_path, capsys):
    ckpt = write_regression(tmp_path / "some.ckpt")
    for flag in ("--source", "--root"):
        with pytest.raises(SystemExit) as exit:
            export.main(["export", str(ckpt), "model.pt2", flag, "sample"], FRIEDMAN)
        assert exit.value.code == 2 and flag in capsys.readouterr().err


def test_a_full_disk_leaves_an_existing_file_unchanged(main, tmp_path):
    resource = pytest.importorskip("resource")
    ckpt, out = write_checkpoint(tmp_path / "some.ckpt"), tmp_path / "out" / "model.pt2"
    out.parent.mkdir()
    out.write_bytes(b"existing")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        code, _, error = main("export", ckpt, out, "--source", "sample")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert f"Cannot write {out}: File too large. An existing file is unchanged." in error
    assert [path.read_bytes() for path in out.parent.iterdir()] == [b"existing"]


def test_errors_state_why_a_checkpoint_cannot_be_exported(main, tmp_path):
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
    cannot_run = "The network must accept batches of 1, 7 and 256 images, but raises an error"
    by_batch = write_checkpoint(
        tmp_path / "by_batch.ckpt", norm="builtin", norm_args={"track_running_stats": False}
    )
    for path, out, code, message in (
        (ckpt, "model.tflite", 2, "Unsupported format '.tflite': use .onnx or .pt2."),
        (ckpt, "model", 2, "model has no suffix: use .onnx or .pt2."),
        (ckpt, "nowhere/model.pt2", 2, "There is no folder 'nowhere' for model.pt2. Create"),
        ("missing.ckpt", "model.pt2", 2, "There is no checkpoint 'missing.ckpt'"),
        (other, "model.pt2", 2, "does not match Classifier: Error(s) in loading state_dict"),
        (tmp_path / "diverged.ckpt", "model.pt2", 1, "returns logits that are NaN or infinite"),
        (by_batch, "model.pt2", 1, f"{cannot_run}: ValueError: Expected more"),
    ):
        found, printed, error = main("export", path, out, "--source", "sample")
        assert (
            (found, printed) == (code, "") and error.startswith("error: ") and message in error
        ), error
    assert not list(tmp_path.glob("*model*"))
