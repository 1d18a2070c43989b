"""A real TensorBoard on a run: what its server answers, and what a browser shows."""

import io
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from bn_lightning.data.fashion_mnist import CLASSES
from bn_lightning.runs.tensorboard import TensorBoard
from tests.conftest import REPOSITORY, command, needs_all_images
from tests.projects.friedman.experiment import Regression, Table
from tests.support.logs import events_in
from tests.support.runs import result_of

PAGES = {
    "scalars": ["activation_input", "gradient_norm", "train_loss", "steps_per_second"],
    "custom_scalars": [
        "Training",
        "Inputs of the activations",
        "How far the running statistics lag",
        "Gradient norms",
    ],
    "histograms": ["batch_mean/norm1", "gamma", "running_var"],
    "images": ["confusion_matrix", "most_confident_mistakes", "first_layer_filters"],
    "graphs": ["Main Graph"],
    "hparams": ["norm", "result/test_acc"],
}


@contextmanager
def server(folder):
    """The address of a TensorBoard on `folder`."""
    begun = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder),
        "--port",
        "0",
        "--load_fast=false",
    ]
    with subprocess.Popen(
        begun, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            for line in process.stderr:
                if found := re.search(r"http://\S+?:(\d+)", line):
                    yield f"http://127.0.0.1:{found[1]}"
                    break
            else:
                raise AssertionError("TensorBoard has ended")
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def ask(trained):
    """Ask a server on the trained run: `ask(path, **query)` returns its answer, or its bytes."""
    with server(trained[0].parent.parent) as address:

        def get(path, **query):
            where = f"{address}/data/{path}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(where, timeout=30) as answer:
                content = answer.read()
            return (
                json.loads(content)
                if answer.headers["Content-Type"].startswith("application/json")
                else content
            )

        deadline = time.monotonic() + 60
        while "lenet/0" not in get("runs") and time.monotonic() < deadline:
            time.sleep(0.2)
        yield get


def test_scalars(ask, trained):
    tags = ask("plugin/scalars/tags")["lenet/0"]
    assert {
        "train_loss",
        "val_acc",
        "gradient_norm/all",
        "saturated/4",
        "test_acc_of/Coat",
    } <= tags.keys()
    result = result_of(trained[0])
    [(_, step, value)] = ask("plugin/scalars/scalars", run="lenet/0", tag="test_acc")
    assert (step, value) == (44, pytest.approx(result["test_acc"]))


def test_custom_scalars(ask):
    [*_, layout] = (ask("plugin/custom_scalars/layout"),)
    charts = {category["title"]: category["chart"] for category in layout["category"]}
    titles = list(charts)
    assert titles[0] == "Training" and titles[1].startswith("Inputs of the activations")
    bands = charts[titles[1]]
    assert [band["title"] for band in bands] == [f"activation {n}" for n in (4, 3, 2, 1)]
    scalars = ask("plugin/scalars/tags")["lenet/0"]
    for band in bands:
        [series] = band["margin"]["series"]
        assert (
            series["value"].endswith("p50")
            and series["lower"].endswith("p15")
            and series["upper"].endswith("p85")
        )
        assert set(series.values()) <= scalars.keys()
    for title in titles[2:]:
        for chart in charts[title]:
            for pattern in chart["multiline"]["tag"]:
                assert any(re.match(pattern, tag) for tag in scalars), (title, pattern)
                answer = ask("plugin/custom_scalars/scalars", run="lenet/0", tag=pattern)
                assert answer["regex_valid"] and answer["tag_to_events"]


def test_histograms(ask):
    tags = ask("plugin/histograms/tags")["lenet/0"]
    for what in ("gamma", "beta", "batch_mean", "running_mean", "batch_var", "running_var"):
        assert {f"{what}/norm{n}" for n in (1, 2, 3, 4)} <= tags.keys()
    [(_, step, bins)] = ask("plugin/histograms/histograms", run="lenet/0", tag="running_var/norm4")
    assert (step, sum(count for *_, count in bins)) == (0, 84)  # channels


def test_images(ask):
    for tag in ("confusion_matrix", "most_confident_mistakes", "first_layer_filters"):
        [meta] = ask("plugin/images/images", run="lenet/0", tag=tag, sample=0)
        with Image.open(
            io.BytesIO(
                ask("plugin/images/individualImage", **dict(urllib.parse.parse_qsl(meta["query"])))
            )
        ) as picture:
            assert (
                picture.format == "PNG" and picture.width > 200 and np.asarray(picture).std() > 10
            )


def test_hparams(ask, trained):
    result = result_of(trained[0])
    body = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_RUNNING"],
        "colParams": [],
        "startIndex": 0,
        "sliceSize": 10,
    }
    answer = ask("plugin/hparams/session_groups", request=json.dumps(body))
    [group] = answer["sessionGroups"]
    assert (group["hparams"]["norm"], group["hparams"]["lr"]) == ("custom", 1.0)
    metrics = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    assert metrics["result/test_acc"] == pytest.approx(result["test_acc"])


def test_curves(trained):
    folder, _ = trained
    result = result_of(folder)
    events = events_in(folder)

    def curve(tag):
        return [(event.step, event.value) for event in events.Scalars(tag)]

    assert [step for step, _ in curve("train_loss")] == [9, 19, 29, 39]
    for tag in ("train_loss_epoch", "train_acc", "val_loss", "val_acc", "images_per_second"):
        assert [step for step, _ in curve(tag)] == [21, 43], tag
    assert curve("train_acc")[-1][1] == float(torch.tensor(result["train_acc"]))
    assert [value for _, value in curve("lr-SGD")] == [1.0] * 4
    assert len(curve("test_acc")) == 1
    assert {f"test_acc_of/{name}" for name in CLASSES} <= set(events.Tags()["scalars"])
    # The hyperparameters, and the figures that they led to.
    summaries = set(events.summary_metadata)
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= summaries
    assert curve("result/test_acc")[0][1] == float(torch.tensor(result["test_acc"]))


def test_results_are_shown_with_settings_but_for_those_of_the_machine(tmp_path):
    task, data = Regression(width=4), Table(rows=40, folder="elsewhere")
    logger = TensorBoard(tmp_path, "friedman", "0")
    trainer = pl.Trainer(accelerator="cpu", logger=logger, max_epochs=3)
    names = [name for stage in ("train", "val", "test") for name in task.names(stage)]
    result = dict.fromkeys(names, 0.5) | {"test_r2": None, "images_per_second": 3.0}
    logger.log_result(trainer, task, data, result)
    folder = tmp_path / "friedman/0"
    assert [path.name.split(".")[0] for path in folder.iterdir()] == ["events"]  # no hparams.yaml
    events = events_in(folder)
    shown = [tag for tag in events.Tags()["scalars"] if tag.startswith("result/")]
    assert set(shown) == {f"result/{n}" for n in result if n != "test_r2"}
    settings = events.summary_metadata["_hparams_/session_start_info"].SerializeToString()
    assert b"width" in settings and b"rows" in settings and b"max_epochs" in settings
    assert b"folder" not in settings and b"elsewhere" not in settings


def text_of(browser):
    """All text of the page, also of what it hides from document.body.innerText."""
    return browser.execute_script("""
        let text = "";
        const walk = (node) => {
            if (node.nodeType === Node.TEXT_NODE) text += node.textContent.trim() + " ";
            if (node.shadowRoot) node.shadowRoot.childNodes.forEach(walk);
            const isHidden = ["STYLE", "SCRIPT", "NOSCRIPT"].includes(node.tagName);
            if (!isHidden) node.childNodes.forEach(walk);
        };
        walk(document.body);
        return text.replace(/\\s+/g, " ");
    """)


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("needs chromium and chromedriver (packages chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--window-size=1500,1500",
    ):
        options.add_argument(flag)
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as opened:
        yield opened


@pytest.mark.slow
@needs_all_images
def test_each_page_in_a_browser(tmp_path, browser):
    """The article's recipe, with its norm and without; screenshots are in the test's folder."""
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    recipe = ("fit", "--config", "configs/article.yaml", "--trainer.max_epochs", "3")
    command(*recipe, cwd=tmp_path)
    command(*recipe, "--model.norm", "none", "--name", "none", cwd=tmp_path)
    with server(tmp_path / "runs") as address:
        for page, promised in PAGES.items():
            browser.get("about:blank")
            browser.get(f"{address}/#{page}")
            deadline = time.monotonic() + 60
            while (
                missing := [word for word in promised if word not in text_of(browser)]
            ) and time.monotonic() < deadline:
                time.sleep(0.5)
            assert not missing, (page, text_of(browser)[:2_000])
            time.sleep(3)  # charts are drawn after their titles
            picture = tmp_path / f"{page}.png"
            browser.save_screenshot(str(picture))
            assert not re.search(
                r"No \w+ data was found|is not running|Oh no|error occurred", text_of(browser)
            )
            with Image.open(picture) as shot:
                below = np.asarray(shot.convert("RGB"))[100:, 350:].reshape(-1, 3)
            assert len(np.unique(below, axis=0)) > 50, (
                page
            )  # lines, text and pictures, not one empty ground
