"""What the README says is so: its commands run, its example works, its lists are whole."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bn_lightning import cli
from bn_lightning.data import sources
from bn_lightning.norms import registry
from tests.conftest import REPOSITORY, command

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
FIT = sorted(
    set(re.findall(r"^python -m bn_lightning (fit .*)$", README + cli.usage(), flags=re.M))
)


@pytest.mark.parametrize("line", FIT)
def test_fit_commands_run(main, trained, tmp_path, line):
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    shutil.copytree(trained[0], tmp_path / "runs" / "lenet" / "0")
    (tmp_path / "my_norms.py").write_text(example())
    goes_on = "--resume" in line or "--ckpt_path" in line
    arguments = (
        *shlex.split(line),
        "--data.source",
        "sample",
        *(() if goes_on else ("--trainer.fast_dev_run", "true")),
    )
    if "ddp" in line:  # its second process is begun with this one's command
        assert "test acc" in command(*arguments, cwd=tmp_path).stdout
        return
    code, out, err = main(*arguments)
    assert code == 0, err
    assert "test acc" in out


def example(word="class RMSNorm"):
    """The one Python block of the README with that word in it."""
    [code] = [
        code for code in re.findall(r"```python\n(.*?)```", README, flags=re.S) if word in code
    ]
    return code


def run(code, cwd):
    (cwd / "script.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=cwd, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_five_lines_of_python_do_it(tmp_path):
    code = example("L.Trainer").replace("max_epochs=10", "max_epochs=1, accelerator='cpu'")
    code = code.replace("FashionMNIST()", "FashionMNIST('sample')")
    assert "test_acc" in run(code, tmp_path)
    tags = (
        EventAccumulator(str(tmp_path / "lightning_logs/version_0"), size_guidance={"images": 0})
        .Reload()
        .Tags()
    )
    assert tags["images"] and "activation_input/4/p50" in tags["scalars"]


def test_a_norm_of_a_notebook(tmp_path):
    code = example() + example("L.Trainer").replace('"custom"', '"__main__.RMSNorm"')
    code = code.replace("max_epochs=10", "fast_dev_run=True, accelerator='cpu'")
    assert "test_acc" in run(code.replace("FashionMNIST()", "FashionMNIST('sample')"), tmp_path)


def test_an_exported_file_is_used_with_numpy_and_onnxruntime_alone(main, trained, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    code, _, err = main(
        "export", trained[0] / "checkpoints/best.ckpt", "model.onnx", "--source", "sample"
    )
    assert code == 0, err
    np.save(tmp_path / "mine.npy", sources.load("sample").test_images[:5].numpy())
    text = example("onnxruntime").replace("np.zeros((5, 28, 28), np.uint8)", "np.load('mine.npy')")
    assert "mine.npy" in text and len(text.splitlines()) <= 10
    assert re.findall(r"^import (\w+)", text, flags=re.M) == ["numpy", "onnxruntime"]
    code, out, _ = main(
        "predict", "--ckpt_path", trained[0] / "checkpoints/best.ckpt", "--format", "json"
    )
    assert ast.literal_eval(run(text, tmp_path)) == [row["class"] for row in json.loads(out)[:5]]


def test_the_norm_of_the_example_is_what_it_says(tmp_path, monkeypatch):
    (tmp_path / "example_of_readme.py").write_text(example())
    monkeypatch.syspath_prepend(tmp_path)
    layer = registry.make("example_of_readme.RMSNorm", num_features=6, num_dims=4)
    y = layer(5 * torch.randn(4, 6, 3, 3))
    torch.testing.assert_close(y.square().mean(1), torch.ones(4, 3, 3), atol=1e-3, rtol=0)


def test_lists_are_whole():
    for path in (REPOSITORY / "bn_lightning").glob("[a-z]*"):
        if path.suffix == ".py" or path.is_dir():
            assert f"\n    {path.name}{'/' if path.is_dir() else ''} " in README
    for path in (REPOSITORY / "configs").glob("*.yaml"):
        assert f"(configs/{path.name})" in README
        assert (
            f"{'sweep' if path.stem == 'sweep' else 'fit'} --config configs/{path.name}"
            in path.read_text()
        )
    for name in cli.COMMANDS:
        assert f"| `python -m bn_lightning {name}" in README


def test_links_lead_somewhere():
    guides = (REPOSITORY / ".github" / "guides").glob("*.md")
    for page in (REPOSITORY / "README.md", REPOSITORY / ".github" / "README.zh-CN.md", *guides):
        for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.M)
            slugs = [
                re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings
            ]
            assert (
                link.removeprefix("#") in slugs if link[0] == "#" else (page.parent / link).exists()
            ), link
