"""The exported file gives what the checkpoint's network gives, with nothing left of a norm that can be folded."""

import json
import sys
from collections import Counter

import pytest
import torch
from torch import nn

from bn_lightning.data import sources
from bn_lightning.data.fashion_mnist import CLASSES, MEAN, STD
from bn_lightning.deploy import export
from bn_lightning.networks.lenet import LeNet
from bn_lightning.norms import registry
from bn_lightning.training import checkpoints
from tests.conftest import QUICK

SOURCE = "system" if sources.SYSTEM.is_dir() else "sample"
ALL = "10,000 test images (system)" if SOURCE == "system" else "1,000 test images (sample)"
SUFFIXES = ("onnx", "pt2")
FOLDED = [f"norm{i} is folded into {layer}" for i, layer in enumerate(("conv1", "conv2", "fc1", "fc2"), 1)]
TEXTS = ("classes", "producer", "torch", "checkpoint", "norm", "data_source", "commit")  # the rest is JSON
# What is left of LeNet by its plan, the images' way into it before that.
OPERATORS = {
    "onnx": Counter({"Unsqueeze": 1, "Cast": 1, "Div": 1, "Conv": 2, "Reshape": 1, "Gemm": 3}),
    "pt2": Counter({"unsqueeze": 1, "div": 1, "conv2d": 2, "flatten": 1, "linear": 3}),
}
PHI_AND_POOL = {
    ("onnx", "sigmoid", "avg"): Counter({"Sigmoid": 4, "AveragePool": 2}),
    ("onnx", "relu", "max"): Counter({"Relu": 4, "MaxPool": 2}),
    ("pt2", "sigmoid", "avg"): Counter({"sigmoid": 4, "avg_pool2d": 2}),
    ("pt2", "relu", "max"): Counter({"relu": 4, "max_pool2d": 2}),
}


class RMSNorm(nn.Module):
    def __init__(self, num_features, num_dims):
        super().__init__()

    def forward(self, x):
        return x * (x.square().mean(1, keepdim=True) + 1e-5).rsqrt()


class InFloat32(nn.Module):
    """Affine in evaluation, by arithmetic of its own, and made of parts."""

    def __init__(self, num_features, num_dims):
        super().__init__()
        self.inner = registry.builtin(num_features, num_dims)
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


class OtherWhenExported(RMSNorm):
    def forward(self, x):
        return super().forward(x) + 0.1 * torch.compiler.is_exporting()


class OtherOn256(RMSNorm):
    def forward(self, x):
        return x + 0.1 * (len(x) == 256)


def checkpoint(path, normalize=False, dtype=torch.float32, **settings):
    """Write a checkpoint with random parameters and statistics in its norms; its optimizer cannot be imported."""
    torch.manual_seed(0)
    network = LeNet(**settings)
    for name, values in (*network.named_parameters(), *network.named_buffers()):
        if "norm" in name and values.is_floating_point():
            is_spread = any(word in name for word in ("var", "std", "weight", "gamma"))
            values.data.uniform_(0.5, 2.0) if is_spread else values.data.normal_()
    content = {
        "state_dict": {f"network.{name}": values.to(dtype) for name, values in network.state_dict().items()},
        "hyper_parameters": settings | {"optimizer": "no_such_package.Optimizer"},
        "datamodule_hyper_parameters": {"normalize": normalize, "seed": 3},
        "epoch": 1,
        "global_step": 44,
    }
    torch.save(content, path)
    return path


def logits_of(path, images, batch_size):
    if path.suffix == ".pt2":
        run = torch.export.load(path).module()
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])

        def run(batch):
            return torch.from_numpy(session.run(["logits"], {"images": batch.numpy()})[0])

    return torch.cat([run(batch) for batch in images.split(batch_size)])


@torch.no_grad()
def assert_gives_what_the_checkpoint_does(path, ckpt, source=SOURCE):
    _, content = checkpoints.load(str(ckpt))
    kept = content["hyper_parameters"]
    network = LeNet(**{name: kept[name] for name in ("norm", "norm_args", "activation", "pooling") if name in kept})
    network.load_state_dict({k.removeprefix("network."): v for k, v in content["state_dict"].items()})
    images = sources.load(source).test_images
    x = images.unsqueeze(1) / 255
    x = (x - MEAN) / STD if content["datamodule_hyper_parameters"]["normalize"] else x
    expected = network.eval()(x)
    allowed = 1e-5 * max(1, expected.abs().max())
    best, second = expected.topk(2).values.T
    for batch_size, first in ((256, len(images)), (7, 70), (1, 10)):
        logits = logits_of(path, images[:first], batch_size)
        assert logits.shape == (first, 10) and logits.dtype == torch.float32
        assert (logits - expected[:first]).abs().max() <= allowed
        is_clear = (best - second)[:first] >= allowed
        assert torch.equal(logits.argmax(1)[is_clear], expected[:first].argmax(1)[is_clear])


def operators(path):
    if path.suffix == ".onnx":
        return Counter(node.op_type for node in pytest.importorskip("onnx").load(path).graph.node)
    graph = torch.export.load(path).graph
    return Counter(node.target.overloadpacket.__name__ for node in graph.nodes if node.op == "call_function")


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine the threads of so small a network wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=SUFFIXES)
def suffix(request):
    if request.param == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    return request.param


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


@pytest.mark.parametrize(("norm", "activation", "pooling"), [("builtin", "sigmoid", "avg"), ("custom", "relu", "max")])
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
        standardized = Counter({"onnx": ["Sub", "Div"], "pt2": ["sub", "div"]}[suffix])
        assert operators(out) == OPERATORS[suffix] + standardized + PHI_AND_POOL[suffix, activation, pooling]


@pytest.mark.parametrize("norm", registry.NORMS)
def test_every_norm(tmp_path, norm, suffix):
    ckpt, out = checkpoint(tmp_path / "some.ckpt", norm=norm), tmp_path / f"model.{suffix}"
    done = export.export(str(ckpt), out, source="sample")
    assert_gives_what_the_checkpoint_does(out, ckpt, "sample")
    if norm == "group":
        assert done.notes == [
            f"norm{i}, a GroupNorm, has no affine form in evaluation: exported as it is" for i in range(1, 5)
        ]
    else:
        assert done.notes == FOLDED
        assert operators(out) == OPERATORS[suffix] + PHI_AND_POOL[suffix, "sigmoid", "avg"]


def test_a_norm_by_import_path(main, tmp_path, suffix):
    ckpt, out = checkpoint(tmp_path / "some.ckpt", norm=f"{__name__}.RMSNorm"), tmp_path / f"model.{suffix}"
    code, printed, _ = main("export", ckpt, out, "--source", "sample", "--norm", f"{__name__}.RMSNorm")
    assert code == 0
    assert "norm1, a RMSNorm, has no affine form in evaluation: exported as it is" in printed
    assert_gives_what_the_checkpoint_does(out, ckpt, "sample")


@pytest.mark.parametrize("named", [(), ("--norm", "custom"), ("--norm", "other.Norm")])
def test_nothing_is_imported_on_a_files_word(main, tmp_path, named):
    (tmp_path / "planted.py").write_text("raise SystemExit('it was run')")
    ckpt = checkpoint(tmp_path / "some.ckpt")
    content = torch.load(ckpt, weights_only=True)
    content["hyper_parameters"]["norm"] = "planted.Norm"
    torch.save(content, ckpt)
    code, _, error = main("export", ckpt, "model.pt2", *named)
    assert code == 2 and "planted" not in sys.modules
    assert "'planted.Norm'" in error and ("--norm planted.Norm" in error or "--norm is" in error)
    assert not (tmp_path / "model.pt2").exists()


def test_a_norm_is_probed_as_a_whole_and_in_the_precision_that_it_has(tmp_path):
    norm = f"{__name__}.InFloat32"
    ckpt, out = checkpoint(tmp_path / "some.ckpt", norm=norm), tmp_path / "model.pt2"
    done = export.export(str(ckpt), out, norm, source="sample")
    assert done.notes == FOLDED
    assert_gives_what_the_checkpoint_does(out, ckpt, "sample")
    assert operators(out) == OPERATORS["pt2"] + PHI_AND_POOL["pt2", "sigmoid", "avg"]


def test_a_network_that_cannot_be_traced_is_exported_unfolded(tmp_path):
    norm = f"{__name__}.Untraceable"
    ckpt, out = checkpoint(tmp_path / "some.ckpt", norm=norm), tmp_path / "model.pt2"
    (note,) = export.export(str(ckpt), out, norm, source="sample").notes
    assert note.startswith("nothing is folded, since torch.fx cannot trace the network: TraceError")
    assert_gives_what_the_checkpoint_does(out, ckpt, "sample")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_other_precisions_are_exported_in_float32(tmp_path, dtype):
    ckpt, out = checkpoint(tmp_path / "some.ckpt", dtype=dtype), tmp_path / "model.pt2"
    export.export(str(ckpt), out, source="sample")
    assert_gives_what_the_checkpoint_does(out, ckpt, "sample")


class Calls(nn.Sequential):
    """conv1, norm1 and conv1 again: a fold into conv1 would change its other call."""

    def forward(self, x):
        return self[0](self[1](self[0](x)))


class Residual(nn.Sequential):
    """What norm1 is given goes elsewhere too."""

    def forward(self, x):
        x = self[0](x)
        return x + self[1](x)


@pytest.mark.parametrize(
    ("network", "x", "notes"),
    [
        (nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Dropout(), nn.Identity(), nn.ReLU()),
         torch.randn(4, 2, 5, 5), ["1 is folded into 0", "2 is folded into 0", "3 is folded into 0"]),
        (nn.Sequential(nn.Conv1d(4, 4, 3, groups=2), nn.BatchNorm1d(4)), torch.randn(4, 4, 9), ["1 is folded into 0"]),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(3)), torch.randn(2, 3, 6), ["1, a BatchNorm1d, "]),
        (nn.Sequential(nn.Conv2d(2, 3, 3), nn.LayerNorm((3, 3, 3))), torch.randn(4, 2, 5, 5), ["1, a LayerNorm, "]),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), torch.randn(4, 3), ["1, a BatchNorm1d, "]),
        (nn.Sequential(nn.Linear(3, 3), nn.Hardtanh(-99, 99)), torch.randn(4, 3), []),  # affine on x
        (Residual(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.randn(4, 3), ["1, a BatchNorm1d, "]),
        (Calls(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.randn(4, 3), ["1, a BatchNorm1d, "]),
    ],
)  # fmt: skip
def test_fold(network, x, notes):
    for values in (*network.parameters(), *network.buffers()):
        if values.is_floating_point():
            values.data.uniform_(0.5, 2.0)
    before = {name: values.clone() for name, values in network.state_dict().items()}
    folded, found = export.fold(network.eval(), x)
    assert len(found) == len(notes) and all(map(str.startswith, found, notes)), found
    torch.testing.assert_close(folded(x), network(x))
    assert all(torch.equal(values, before[name]) for name, values in network.state_dict().items())


def test_what_the_file_says_of_itself(trained, tmp_path, suffix):
    run, out = trained[0], tmp_path / f"model.{suffix}"
    done = export.export(str(run / "checkpoints" / "best.ckpt"), out, source="sample")
    if suffix == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(out, providers=["CPUExecutionProvider"])
        about = session.get_modelmeta().custom_metadata_map
        assert session.get_modelmeta().producer_name == "bn_lightning"
        assert [d.name for d in session.get_inputs()] == ["images"] and session.get_inputs()[0].shape == ["N", 28, 28]
        about = {name: value if name in TEXTS else json.loads(value) for name, value in about.items()}
    else:
        files = {"metadata.json": ""}
        torch.export.load(out, extra_files=files)
        about = json.loads(files["metadata.json"])
    result = json.loads((run / "result.json").read_text())
    assert about["classes"].split("\n") == list(CLASSES)
    assert about["producer"].startswith("bn_lightning ") and about["torch"] == torch.__version__
    assert about["checkpoint"] == "lenet/0/checkpoints/best.ckpt"
    assert (about["norm"], about["seed"], about["data_source"]) == ("custom", 0, "sample")
    assert about["data_sha256"][sources.TEST_IMAGES] == sources.SAMPLED[2].sha256
    assert about["global_step"] in (22, 44)
    assert about["val_acc"] == result["val_acc"] and about.get("commit") == result.get("commit")
    assert (about["test_acc"], about["test_images"]) == (done.test_acc, len(done.images.test_labels))
    assert about["test_acc"] == pytest.approx(result["test_acc"])
    content = out.read_bytes()
    assert str(tmp_path).encode() not in content and b"bn_lightning/lenet.py" not in content


@pytest.mark.parametrize(
    ("norm", "what"), [("OtherOn256", "The folded network"), ("OtherWhenExported", "The file for")]
)
@pytest.mark.parametrize("older", [None, b"older"])
def test_a_file_that_does_not_do_the_same_is_not_written(main, tmp_path, older, norm, what, suffix):
    norm = f"{__name__}.{norm}"
    ckpt, out = checkpoint(tmp_path / "some.ckpt", norm=norm), tmp_path / "out" / f"model.{suffix}"
    out.parent.mkdir()
    if older:
        out.write_bytes(older)
    code, _, error = main("export", ckpt, out, "--norm", norm, "--source", "sample")
    assert code == 1
    assert what in error and "differs from the checkpoint's network: logits by up to" in error
    assert [path.read_bytes() for path in out.parent.iterdir()] == ([older] if older else [])


@pytest.mark.parametrize("given", ["/home/somebody/best.ckpt", "https://user:password@host/best.ckpt?Signature=x"])
def test_the_file_does_not_say_where_the_checkpoint_lay(given):
    assert export._about(given, "best.ckpt", {})["checkpoint"] == "best.ckpt"


def test_a_disk_that_is_full(main, tmp_path):
    resource = pytest.importorskip("resource")
    ckpt, out = checkpoint(tmp_path / "some.ckpt"), tmp_path / "out" / "model.pt2"
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
    ckpt = checkpoint(tmp_path / "some.ckpt")
    other = checkpoint(tmp_path / "other.ckpt", norm="none")
    content = torch.load(other, weights_only=True)
    content["hyper_parameters"]["norm"] = "custom"
    torch.save(content, other)
    content["state_dict"] = {name: values * float("nan") for name, values in content["state_dict"].items()}
    content["hyper_parameters"]["norm"] = "none"
    torch.save(content, tmp_path / "diverged.ckpt")
    by_batch = checkpoint(tmp_path / "by_batch.ckpt", norm="builtin", norm_args={"track_running_stats": False})
    for given, out, code, message in (
        (ckpt, "model.tflite", 2, "'model.tflite' is to be a file of another kind than .onnx (ONNX) and .pt2"),
        (ckpt, "model", 2, "'model' is to be"),
        (ckpt, "nowhere/model.pt2", 2, "There is no folder 'nowhere' to write model.pt2 into"),
        ("missing.ckpt", "model.pt2", 2, "There is no checkpoint 'missing.ckpt'"),
        (other, "model.pt2", 2, "does not fit this project's LeNet: Error(s) in loading state_dict"),
        (tmp_path / "diverged.ckpt", "model.pt2", 1, "gives logits that are no numbers"),
        (
            by_batch,
            "model.pt2",
            1,
            "The network cannot be run on batches of 1, 7 and 256 images: ValueError: Expected more",
        ),
    ):
        found, printed, error = main("export", given, out, "--source", "sample")
        assert (found, printed) == (code, "") and error.startswith("error: ") and message in error, error
    assert not list(tmp_path.glob("*model*"))


def test_without_the_extra(main, tmp_path, monkeypatch):
    ckpt = checkpoint(tmp_path / "some.ckpt")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    code, _, error = main("export", ckpt, "model.onnx")
    assert code == 2 and 'pip install -e ".[onnx]"' in error
    assert main("export", ckpt, "model.pt2", "--source", "sample")[0] == 0
