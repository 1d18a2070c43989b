"""TensorBoard on a run: the answers of its server, and its pages in a browser."""

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
from tests.conftest import QUICK, REPOSITORY, run_here
from tests.projects.friedman.experiment import Regression, Table
from tests.support.logs import events_in
from tests.support.runs import result_of

PAGES = {
    "scalars": ["activation_input", "gradient_norm", "train_loss", "steps_per_second"],
    "custom_scalars": [
        "Training",
        "Inputs of the activations",
        "Saturated activations",
        "Gradient norms",
        "gamma and beta, channel 0",
        "Lag of the running statistics",
        "Batch and running statistics, channel 0",
    ],
    "histograms": ["batch_mean/norm1", "gamma", "running_var"],
    "images": ["confusion_matrix", "most_confident_mistakes", "first_layer_filters"],
    "graphs": ["Main Graph"],
    "hparams": ["batch_size lr max_epochs network norm", "result/test_acc"],
}


@contextmanager
def server(folder):
    """Start a TensorBoard on `folder`, and yield its URL."""
    arguments = ["--logdir", str(folder), "--port", "0", "--load_fast=false"]
    with subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            for line in process.stderr:
                if found := re.search(r"http://\S+?:(\d+)", line):
                    yield f"http://127.0.0.1:{found[1]}"
                    break
            else:
                raise AssertionError("TensorBoard ended before it printed its URL")
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def ask(trained):
    """Return a function that sends a request to a server on the trained run.

    `ask(path, **query)` returns the parsed JSON of the answer, or its bytes.
    """
    with server(trained[0].parent.parent) as url:

        def get(path, **query):
            request = f"{url}/data/{path}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(request, timeout=30) as answer:
                content = answer.read()
                is_json = answer.headers["Content-Type"].startswith("application/json")
            return json.loads(content) if is_json else content

        deadline = time.monotonic() + 60
        while "lenet/0" not in get("runs") and time.monotonic() < deadline:
            time.sleep(0.2)
        yield get


def test_scalars_are_served(ask, trained):
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


def test_custom_scalars_are_served(ask):
    layout = ask("plugin/custom_scalars/layout")
    charts = {category["title"]: category["chart"] for category in layout["category"]}
    titles = list(charts)
    assert titles[0] == "Training" and titles[1].startswith("Inputs of the activations")
    bands = charts[titles[1]]
    assert [band["title"] for band in bands] == [f"activation {n}" for n in (4, 3, 2, 1)]
    scalars = ask("plugin/scalars/tags")["lenet/0"]
    for band in bands:
        [series] = band["margin"]["series"]
        assert series["value"].endswith("p50")
        assert series["lower"].endswith("p15")
        assert series["upper"].endswith("p85")
        assert set(series.values()) <= scalars.keys()
    for title in titles[2:]:
        for chart in charts[title]:
            for pattern in chart["multiline"]["tag"]:
                assert any(re.match(pattern, tag) for tag in scalars), (title, pattern)
                answer = ask("plugin/custom_scalars/scalars", run="lenet/0", tag=pattern)
                assert answer["regex_valid"] and answer["tag_to_events"]


def test_histograms_are_served(ask):
    tags = ask("plugin/histograms/tags")["lenet/0"]
    for quantity in ("gamma", "beta", "batch_mean", "running_mean", "batch_var", "running_var"):
        assert {f"{quantity}/norm{n}" for n in (1, 2, 3, 4)} <= tags.keys()
    [(_, step, bins)] = ask("plugin/histograms/histograms", run="lenet/0", tag="running_var/norm4")
    assert (step, sum(count for *_, count in bins)) == (0, 84)  # channels


def test_images_are_served(ask):
    for tag in ("confusion_matrix", "most_confident_mistakes", "first_layer_filters"):
        [meta] = ask("plugin/images/images", run="lenet/0", tag=tag, sample=0)
        query = dict(urllib.parse.parse_qsl(meta["query"]))
        content = ask("plugin/images/individualImage", **query)
        with Image.open(io.BytesIO(content)) as picture:
            assert picture.format == "PNG" and picture.width > 200
            assert np.asarray(picture).std() > 10


def test_hparams_are_served(ask, trained):
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


def test_the_hparams_table_opens_with_norm_and_lr(ask):
    request = json.dumps({"experimentName": "", "includeMetrics": True})
    experiment = ask("plugin/hparams/experiment", request=request)
    # TensorBoard opens with the first five hyperparameters and the first five metrics.
    shown = [info["name"] for info in experiment["hparamInfos"]][:5]
    assert shown == ["batch_size", "lr", "max_epochs", "network", "norm"]
    metrics = [info["name"]["tag"] for info in experiment["metricInfos"]][:2]
    assert metrics == ["result/test_acc", "result/test_loss"]


def test_curves_and_results_are_logged(trained):
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
    # Hyperparameters and results.
    summaries = set(events.summary_metadata)
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= summaries
    assert curve("result/test_acc")[0][1] == float(torch.tensor(result["test_acc"]))


def test_hparams_omit_the_settings_of_the_machine(tmp_path):
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
    """Return all text of the page, including shadow roots, which innerText omits."""
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
    flags = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage")
    for flag in (*flags, "--window-size=1500,1500"):
        options.add_argument(flag)
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as opened:
        yield opened


@pytest.mark.slow
def test_each_page_is_shown_in_a_browser(tmp_path, browser):
    """Two runs of the article's recipe, with and without a norm; keeps screenshots."""
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    # Step 100 is monitored, so each curve has at least two points.
    recipe = ("fit", "--config", "configs/article.yaml", *QUICK, "--trainer.max_epochs", "5")
    run_here(*recipe, cwd=tmp_path)
    run_here(*recipe, "--model.norm", "none", "--name", "none", cwd=tmp_path)
    with server(tmp_path / "runs") as url:
        for page, expected in PAGES.items():
            browser.get("about:blank")
            browser.get(f"{url}/#{page}")
            deadline = time.monotonic() + 60
            while missing := [text for text in expected if text not in text_of(browser)]:
                assert time.monotonic() < deadline, (page, missing, text_of(browser)[:2_000])
                time.sleep(0.5)
            time.sleep(3)  # charts are drawn after their titles
            screenshot = tmp_path / f"{page}.png"
            browser.save_screenshot(str(screenshot))
            failures = r"No \w+ data was found|is not running|Oh no|error occurred"
            assert not re.search(failures, text_of(browser))
            with Image.open(screenshot) as image:
                below = np.asarray(image.convert("RGB"))[100:, 350:].reshape(-1, 3)
            # Charts, text and images have many colours; an empty page has few.
            assert len(np.unique(below, axis=0)) > 50, page
