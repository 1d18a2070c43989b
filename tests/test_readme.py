"""The README and the guides: commands run or parse, code runs, links and lists are complete."""

import ast
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bn_lightning import ImageData, cli
from bn_lightning.data import sources
from bn_lightning.deploy import export, inspection, predict
from bn_lightning.norms import registry
from bn_lightning.norms.check import command as check
from bn_lightning.projects import new
from bn_lightning.runs import experiment, run
from bn_lightning.studies import study, sweep, variants
from tests.conftest import REPOSITORY, command

README = REPOSITORY / "README.md"
CHINESE = REPOSITORY / ".github" / "README.zh-CN.md"
GUIDES = sorted((REPOSITORY / ".github" / "guides").glob("*.md"))
OTHERS = [REPOSITORY / ".github" / name for name in ("CONTRIBUTING.md", "SECURITY.md")]
PAGES = {path: path.read_text(encoding="utf-8") for path in (README, CHINESE, *OTHERS, *GUIDES)}

BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.S | re.M)
SAMPLE = ("--data.source", "sample")
STAGES = ("train", "val", "test")


def blocks(language, pages=PAGES):
    """Return the code blocks in this language."""
    found = [block for page in pages for block in BLOCK.findall(PAGES[page])]
    return [code for kind, code in found if kind == language]


def shell_lines():
    """Return each line of the shell blocks once, without comments."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return sorted({shlex.join(line) for line in words if line})


LINES = shell_lines()
PROGRAM = "python -m bn_lightning "
COMMANDS = [
    line.removeprefix(PROGRAM)
    for line in LINES
    if line.startswith(PROGRAM)
    and "--help" not in line
    and "stripes" not in line
    # tests/runs/test_schema.py and test_completion.py have these.
    and "--print_" not in line
]
# The guide with stripes is run as printed by a test of its own.
# Compilation takes long, and tests/training/test_task.py has it.
# The pictures of a guide are drawn by its test, which runs these commands.
OF_PICTURES = [line for line in COMMANDS if "pictures" in line or "runs/folder" in line]
FIT = [
    line
    for line in COMMANDS
    if line.startswith("fit") and "--model.compile" not in line and line not in OF_PICTURES
]
OTHER_PROGRAMS = (
    *("cd", "export", "pip", ".venv/bin/pip", "python3", "tensorboard", "lint-imports"),
    *("torchrun", "srun", "git", "pytest", "jupyter"),
    # tests/runs/test_schema.py and test_completion.py run these.
    *("alias", "bn_lightning", "check-jsonschema", "source"),
    *(".", "bash", "mypy", "ruff", "uv"),
)


# Commands


@pytest.fixture
def folder(main, trained, tmp_path, monkeypatch):
    """The current folder, with the files that the commands name."""
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    shutil.copytree(trained[0], tmp_path / "runs" / "lenet" / "0")
    (tmp_path / "my_norms.py").write_text(example() + example("class OnePass"))
    (tmp_path / "my_networks.py").write_text(example("class TwoLayers"))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=pytest.mark.slow if "ddp" in line else ()) for line in FIT]
)
def test_fit_commands_run(main, folder, line):
    resumes = "--resume" in line or "--ckpt_path" in line
    # The run that is resumed has 2 epochs.
    few = ("--trainer.max_epochs", "3", *(f"--trainer.limit_{s}_batches=2" for s in STAGES))
    short = few if resumes else ("--trainer.fast_dev_run", "true")
    arguments = (*shlex.split(line), *SAMPLE, *short)
    if "ddp" in line:  # rank 1 is started with the command of this process
        assert "test acc" in command(*arguments, cwd=folder).stdout
        return
    code, out, err = main(*arguments)
    assert code == 0, err
    assert "test acc" in out


class PredictRehearsal(run.Rehearsal, predict.PredictCLI):
    """Builds everything that `predict` needs, and runs nothing."""


def parse(line):
    """Parse the arguments of a command as the command does, and run nothing."""
    name, *flags = arguments = shlex.split(line)
    if name == "compare":
        _, compared, common = variants.parse(flags)
        # All values are parsed in one go. The last of each setting is used.
        varied = [text for variant in compared for text in variant.arguments([])]
        study.plan_runs(cli.EXPERIMENT, [*SAMPLE, *common, *varied])
    elif name == "sweep":
        _, _, common = sweep.parse(flags)
        study.plan_runs(cli.EXPERIMENT, [*common, *SAMPLE])
    elif name == "check":
        registry.find(check._parser().parse_args(flags).norm)
    elif name == "export":
        export._parser(experiment.load(cli.EXPERIMENT)).parse_args(flags)
    elif name == "new":
        new._parser().parse_args(flags)
    elif name == "inspect":
        inspection._parser().parse_args(flags)
    else:
        rehearsal = PredictRehearsal if name == "predict" else run.Rehearsal
        run.command_line(arguments, cli.EXPERIMENT, rehearsal)


def test_other_commands_parse(folder):
    launched = [line for line in LINES if line.startswith(("torchrun", "srun"))]
    lines = {*COMMANDS, *(line.partition(" -m bn_lightning ")[2] for line in launched)}
    for line in lines - {*FIT, *OF_PICTURES}:
        print(line)  # is shown if it fails
        parse(line)


def test_other_programs_have_these_files_flags_and_extras():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    for line in LINES:
        words = shlex.split(line)
        if words[:2] == ["python", "-m"]:
            script = f"{words[2].replace('.', '/')}.py"
        elif words[0] == "python":
            script = words[1]
        else:
            extras = re.findall(r"\.\[(\w+)\]", line)
            assert set(extras) <= set(project["project"]["optional-dependencies"])
            assert words[0] in OTHER_PROGRAMS, line
            continue
        if any(name in line for name in ("bn_lightning", "my_task", "shoe_shop")):
            continue
        source = (REPOSITORY / script).read_text(encoding="utf-8")
        for flag in re.findall(r" (--\w+)", line):
            assert f'"{flag}"' in source, line


# Code


def example(word="class RMSNorm"):
    """Return the one Python block with that word in it."""
    [code] = [code for code in blocks("python") if word in code]
    return code


@pytest.fixture
def run_script(tmp_path, monkeypatch, capsys):
    """Return a function that runs a script in this process, as its __main__, and its output."""
    monkeypatch.chdir(tmp_path)

    def run(code):
        (tmp_path / "script.py").write_text(code)
        runpy.run_path("script.py", run_name="__main__")
        return capsys.readouterr().out

    return run


def test_a_script_trains_with_monitoring(run_script, tmp_path):
    code = example("L.Trainer").replace("max_epochs=10", "max_epochs=1, accelerator='cpu'")
    code = code.replace("FashionMNIST()", "FashionMNIST('sample')")
    assert "test_acc" in run_script(code)
    tags = (
        EventAccumulator(str(tmp_path / "lightning_logs/version_0"), size_guidance={"images": 0})
        .Reload()
        .Tags()
    )
    assert tags["images"] and "activation_input/4/p50" in tags["scalars"]


def test_a_norm_of_a_notebook(run_script):
    code = example() + example("L.Trainer").replace('"custom"', '"__main__.RMSNorm"')
    code = code.replace("max_epochs=10", "fast_dev_run=True, accelerator='cpu'")
    code = code.replace("FashionMNIST()", "FashionMNIST('sample')")
    assert "test_acc" in run_script(code)


def test_an_exported_file_runs_with_numpy_and_onnxruntime_alone(main, trained, tmp_path):
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
    predicted = [row["class"] for row in json.loads(out)[:5]]
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert ast.literal_eval(done.stdout) == predicted


def test_the_norm_of_the_example_normalizes_by_the_root_mean_square(tmp_path, monkeypatch):
    (tmp_path / "example_of_readme.py").write_text(example())
    monkeypatch.syspath_prepend(tmp_path)
    layer = registry.make("example_of_readme.RMSNorm", num_features=6, num_dims=4)
    y = layer(5 * torch.randn(4, 6, 3, 3))
    torch.testing.assert_close(y.square().mean(1), torch.ones(4, 3, 3), atol=1e-3, rtol=0)


def test_the_layer_replaces_that_of_torch():
    exec(compile(example("theirs"), "layer.md", "exec"), {})


def test_norms_of_a_network_are_replaced(run_script):
    printed = run_script(example("replace_norms"))
    assert re.search(r"^layer1.0.bn1 +BatchNorm2d +BatchNorm$", printed, flags=re.M)


def test_the_statistics_of_a_network_are_estimated(run_script):
    assert "statistics of 20 layer(s)" in run_script(example("estimate_statistics"))


@pytest.mark.slow
def test_the_guide_own_data_runs_as_printed(main, tmp_path):
    guide = REPOSITORY / ".github/guides/own-data.md"
    (tmp_path / "my_data.py").write_text(example("def stripes"))
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    for line in "".join(blocks("sh", [guide])).replace("\\\n", " ").splitlines():
        returned, out, err = main(*shlex.split(line.removeprefix(PROGRAM)))
        assert returned == 0, err
        if line.startswith(f"{PROGRAM}test"):
            assert float(re.search(r"test_acc +(\S+)", out)[1]) > 0.9
    assert (tmp_path / "model.pt2").exists()


@pytest.mark.slow
def test_the_guide_own_pictures_runs_as_printed(main, run_script, tmp_path):
    guide = REPOSITORY / ".github/guides/own-pictures.md"
    # Fewer pictures than in the guide are enough.
    run_script(example("mgrid").replace("900", "360"))
    assert sum(1 for _ in (tmp_path / "pictures").rglob("*.jpg")) == 360
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    (tmp_path / "more").mkdir()
    for file in ("a.jpg", "more/b.png"):
        shutil.copy(tmp_path / "pictures/dots/2.jpg", tmp_path / file)
    # The same commands, with a smaller network for fewer epochs. Pretrained weights would be
    # downloaded.
    quick = {"fit --config": ("--model.network_args.depth", "8", "--trainer.max_epochs", "4")}
    for line in "".join(blocks("sh", [guide])).replace("\\\n", " ").splitlines():
        if "pretrained" in line:
            continue
        arguments = shlex.split(line.removeprefix(PROGRAM))
        returned, out, err = main(*arguments, *quick.get(" ".join(arguments[:2]), ()))
        assert returned == 0, err
        if arguments[0] == "test":
            assert float(re.search(r"test_acc +(\S+)", out)[1]) > 0.5
    assert (tmp_path / "model.onnx").exists() and (tmp_path / "answers.png").exists()


def test_images_in_files_are_those_of_the_guide_own_data(main, tmp_path, monkeypatch):
    for name, word in (("my_data", "def stripes"), ("my_photos", "class Photos")):
        (tmp_path / f"{name}.py").write_text(example(word))
    monkeypatch.syspath_prepend(tmp_path)
    stripes = runpy.run_path("my_data.py")["stripes"]
    images, labels, *test, classes = stripes(size=32)
    for part, pixels, numbers in (("train", images, labels), ("test", *test)):
        rows = []
        for index, image in enumerate(pixels[:40]):
            name = f"{part} {index}.png"
            Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / name)
            rows.append(f"{name},{classes[numbers[index]]}\n")
        (tmp_path / f"{part}.csv").write_text("".join(rows))
    settings = ("--data.dataset", "my_photos.load", "--data.dataset_args.folder", ".")
    settings += ("--data.workers", "1", "--data.batch_size", "16", "--model.network", "mlp")
    code, out, err = main("fit", *settings, "--trainer.max_epochs", "1")
    assert code == 0, err
    assert "40 training and 40 test images, 32x32 pixels, 3 channels, 2 classes" in out
    data = ImageData("my_photos.load", {"folder": "."}, workers=0)
    read, read_labels = data.test_samples()
    assert np.array_equal(read, test[0][:40]) and np.array_equal(read_labels, test[1][:40])


def test_each_python_block_is_tested():
    words = (
        *("class RMSNorm", "L.Trainer", "onnxruntime", "theirs"),
        *("class TwoLayers", "replace_norms", "estimate_statistics"),
        *("def stripes", "class Photos", "mgrid"),
        # tests/test_own_{project,network,task,norm}.py have these.
        *("class Block", "class TestTwoLayers", "class OnePass", "norm_checks"),
        *("np.savetxt", "my_task.experiment:EXPERIMENT", "class Regression"),
    )
    tested = [example(word) for word in words]
    assert sorted(blocks("python")) == sorted(tested)


# Pages


def test_the_readme_is_short():
    assert len(PAGES[README].splitlines()) <= 250


def test_lists_are_complete():
    text = PAGES[README]
    for path in (REPOSITORY / "bn_lightning").glob("[a-z]*"):
        if path.suffix == ".py" or path.is_dir():
            assert f"\n    {path.name}{'/' if path.is_dir() else ''} " in text
    for path in (REPOSITORY / "configs").glob("*.yaml"):
        assert f"(configs/{path.name})" in text
        assert (
            f"{'sweep' if path.stem == 'sweep' else 'fit'} --config configs/{path.name}"
            in path.read_text()
        )
    for name in cli.COMMANDS:
        assert f"| `python -m bn_lightning {name}" in text
    for guide in GUIDES:
        assert f"(.github/guides/{guide.name})" in text
        assert f"(guides/{guide.name})" in PAGES[CHINESE]


def test_the_two_commands_are_the_same_in_both_languages():
    commands = [
        re.search(rf"<!-- {mark} -->\n(```sh\n.*?```)", PAGES[README], flags=re.S)[1]
        for mark in ("train", "test")
    ]
    assert all(block in PAGES[CHINESE] for block in commands)


def test_each_guide_begins_with_a_title_a_sentence_and_a_command():
    for guide in GUIDES:
        beginning = PAGES[guide].partition("\n## ")[0]
        title, sentence, command, *_ = beginning.split("\n\n")
        assert title.startswith("# ") and "\n" not in title, guide.name
        assert sentence.endswith((".", ":")), guide.name
        assert command.startswith("```sh\n"), guide.name


def anchors(page):
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", PAGES[page]), flags=re.M)
    return [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_links_resolve():
    for page, text in PAGES.items():
        for link in re.findall(r"\]\((?!http)([^)]+)\)", BLOCK.sub("", text)):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), (page.name, link)
            if anchor:
                assert anchor in anchors(target), (page.name, link)
