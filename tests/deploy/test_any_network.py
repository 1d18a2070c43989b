"""`export`, `predict` and `inspect` with networks other than LeNet."""

import csv
import io
import json
from importlib.metadata import version

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bn_lightning import Classifier
from bn_lightning.data import sources
from bn_lightning.deploy.served import restore
from tests.conftest import run_here
from tests.support.exports import load_exported, operators, write_export

REFERENCE = "bn_lightning.experiment:EXPERIMENT"
IMAGES = sources.load("sample").test_images


class Net(nn.Sequential):
    def __init__(self, in_channels, image_size, num_classes, norm, width=3):
        super().__init__(
            nn.Conv2d(in_channels, width, 3, stride=2),
            norm(width, 4),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(width * (image_size[0] // 2 - 1) ** 2, num_classes),
        )


class Gain(nn.Module):
    def __init__(self, num_features, num_dims):
        super().__init__()
        self.gain = nn.Parameter(torch.full((num_features, 1, 1), 1.5))

    def forward(self, x):
        return x * self.gain


def write(path, data=None, saved=None, **settings):
    """Write a checkpoint of a network without training it.

    Args:
        data: settings of the data.
        saved: settings of the model that differ in the file.
        settings: settings of the model.
    """
    torch.manual_seed(0)
    task = Classifier(**settings)
    for name, values in task.network.named_buffers():
        if values.is_floating_point():
            values.uniform_(-1, 1) if "mean" in name else values.uniform_(0.5, 2)
    content = {
        "state_dict": task.state_dict(),
        "hyper_parameters": dict(task.hparams) | (saved or {}),
        "datamodule_hyper_parameters": {"source": "sample", "seed": 3} | (data or {}),
        "epoch": 1,
        "global_step": 44,
        "pytorch-lightning_version": version("lightning"),
    }
    torch.save(content, path)
    return path


def test_import_paths_of_network_and_norm_are_named_by_flags(main, tmp_path):
    network, norm = f"{__name__}.Net", f"{__name__}.Gain"
    shape = {"image_size": (32, 32), "network_args": {"width": 4}}
    ckpt = write(tmp_path / "a.ckpt", {"resize": 32}, network=network, norm=norm, **shape)
    by_flags = ("--model.network", network, "--model.norm", norm)
    for command in (("export", ckpt, "a.pt2"), ("predict", "--ckpt_path", ckpt)):
        code, _, error = main(*command)
        assert code == 2 and f"set it on the command line: --model.network {network}\n" in error
        code, _, error = main(*command, *by_flags[:2])
        assert code == 2 and f"set it on the command line: --model.norm {norm}\n" in error
    assert not (tmp_path / "a.pt2").exists()

    # --norm is the flag of earlier versions.
    by_alias = ("--model.network", network, "--norm", norm)
    code, out, error = main("export", ckpt, "a.pt2", "--source", "sample", *by_alias)
    assert (code, error) == (0, "") and out.startswith("1 is folded into 0\n")
    trained = restore(str(ckpt), REFERENCE, {"model.network": network, "model.norm": norm})
    x = F.interpolate(IMAGES[:, None] / 255, (32, 32), mode="bilinear")
    expected = trained.task.network(x)
    # The file resizes: its input are the raw images.
    logits = load_exported(tmp_path / "a.pt2")(IMAGES)
    torch.testing.assert_close(logits, expected)

    flags = ("--trainer.accelerator", "cpu", "--format", "csv")
    code, out, error = main("predict", "--ckpt_path", ckpt, *by_flags, *flags)
    assert code == 0, error
    probabilities = [float(row["probability"]) for row in csv.DictReader(io.StringIO(out))]
    found = torch.tensor(probabilities)
    torch.testing.assert_close(found, expected.softmax(1).amax(1), atol=1e-4, rtol=0)

    # inspect imports nothing, so it needs no flags.
    code, out, _ = main("inspect", ckpt)
    shown = " ".join(out.split())
    assert code == 0 and f'--model.network "{network}"' in shown
    assert '--model.network_args {"width": 4}' in shown


@pytest.mark.slow
def test_instance_norm_is_exported_with_a_network_that_can_have_it(tmp_path, suffix):
    arguments = {"network": "resnet", "network_args": {"depth": 8, "width": 4}}
    ckpt = write(tmp_path / "a.ckpt", norm="instance", **arguments)
    out = tmp_path / f"a.{suffix}"
    exported = write_export(ckpt, out)
    (note,) = {note.partition(" (")[2] for note in exported.notes}
    assert (
        note == "InstanceNorm2d) is not folded: in eval mode, it is not an affine map per channel"
    )
    network = restore(str(ckpt), REFERENCE, {}).task.network
    with torch.no_grad():
        expected = network(IMAGES[:20, None] / 255)
    torch.testing.assert_close(load_exported(out)(IMAGES[:20]), expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_never_downloads_pretrained_weights(main, tmp_path, monkeypatch):
    from torchvision.models import _api

    def refuse(*arguments, **keywords):
        raise AssertionError("download")

    ckpt = write(
        tmp_path / "a.ckpt",
        {"source": "sample"},
        saved={"network_args": {"weights": "DEFAULT", "dropout": 0.3}},
        network="torchvision.mobilenet_v3_small",
        network_args={"dropout": 0.3},
    )
    monkeypatch.setattr(_api, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(AssertionError, match="download"):
        Classifier(network="torchvision.mobilenet_v3_small", network_args={"weights": "DEFAULT"})
    task = restore(str(ckpt), REFERENCE).task
    saved = torch.load(ckpt, weights_only=True)["state_dict"]
    assert all(torch.equal(values, saved[name]) for name, values in task.state_dict().items())
    assert task.network.classifier[2].p == 0.3
    one_batch = ("--trainer.limit_predict_batches", "1", "--data.batch_size", "8")
    code, _, error = main("predict", "--ckpt_path", ckpt, *one_batch)
    assert code == 0, error
    code, out, _ = main("inspect", ckpt, "--json")
    assert code == 0
    assert json.loads(out)["settings"]["model.network"] == "torchvision.mobilenet_v3_small"


def test_a_residual_network_is_exported(tmp_path):
    args = {"depth": 8, "width": 4}
    ckpt = write(tmp_path / "a.ckpt", network="resnet", network_args=args)
    exported = write_export(ckpt, tmp_path / "a.pt2")
    assert len(exported.notes) == 7 and all("is folded into" in note for note in exported.notes)
    largest, allowed, changed = exported.difference
    assert largest <= allowed < 1e-4 and changed == 0
    found = operators(tmp_path / "a.pt2")
    assert (found["conv2d"], found["relu"], found["linear"]) == (7, 7, 1)
    assert not [name for name in found if "norm" in name or "sqrt" in name]


@pytest.mark.slow
def test_a_network_of_torchvision_is_trained_and_exported(tmp_path):
    pytest.importorskip("onnxruntime")
    short = ("--trainer.max_steps", "2", "--data.batch_size", "32", "--model.lr", "0.05")
    network = ("--model.network", "torchvision.mobilenet_v3_small", "--data.resize", "32")
    limits = (
        *("--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"),
        *("--data.source", "sample", "--monitor", "false"),
    )
    run_here("fit", *short, *network, *limits, "--name", "m", cwd=tmp_path)
    ckpt = tmp_path / "runs/m/0/checkpoints/last.ckpt"
    done = run_here("export", ckpt, "m.onnx", "--source", "sample", cwd=tmp_path)
    assert done.stdout.startswith("34 norms are folded into the layers before them\n")
    assert ", 0 predicted classes differ" in done.stdout
    found = operators(tmp_path / "m.onnx")
    assert found["Conv"] == 52 and "BatchNormalization" not in found
