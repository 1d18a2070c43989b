"""A run on several processes or machines is equal to the run on one process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.benchmarks.photographs import write_photographs
from tests.conftest import QUICK, command, run_here, weights
from tests.support.logs import events_in
from tests.support.runs import begin, result_of

EXACT = (
    *QUICK[:2],
    "--trainer.precision",
    "64-true",
    "--trainer.sync_batchnorm",
    "true",
    "--data.flip",
    "true",
)
CLOSE = 1e-9


def run(cwd, name, *settings):
    """Train in float64, and return the run folder."""
    command("fit", *EXACT, "--name", name, *settings, cwd=cwd)
    return cwd / "runs" / name / "0"


def assert_the_same(one, other):
    """Compare all parameters and buffers, and the accuracies exactly."""
    a, b = (weights(folder / "checkpoints/last.ckpt") for folder in (one, other))
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(
            b[name], value, rtol=0, atol=CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )
    results = [result_of(folder) for folder in (one, other)]
    for name in ("steps", "epochs", "test_acc", "val_acc", "val_acc_final", "train_acc"):
        assert results[0][name] == results[1][name], name
    # The loss is summed in float32.
    assert results[0]["train_loss"] == pytest.approx(results[1]["train_loss"], rel=1e-6)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of 50 steps in one process. The last batch of an epoch has 124 images, others 256."""
    return run(tmp_path_factory.mktemp("alone"), "one", "--trainer.max_steps", 50)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_train_as_one_process(alone, tmp_path, count):
    several = run(tmp_path, "several", "--trainer.max_steps", 50, "--trainer.devices", count)
    assert_the_same(alone, several)
    # The confusion matrix, the most confident mistakes and the filters, over all ranks.
    assert len(images(alone)) == 3
    assert images(several) == images(alone)


@pytest.mark.slow
def test_a_residual_network_is_trained_as_in_one_process(tmp_path):
    settings = (
        *("--model.network", "resnet", "--model.network_args.depth", 8),
        *("--model.lr", 0.05, "--data.batch_size", 64),
    )
    one, two = (
        run(tmp_path, str(n), *settings, "--trainer.max_steps", 40, "--trainer.devices", n)
        for n in (1, 2)
    )
    assert_the_same(one, two)


@pytest.mark.slow
def test_pictures_of_a_folder_are_those_of_one_process(tmp_path):
    """Read by 2 workers in one process, and by 1 in each of two."""
    write_photographs(tmp_path / "pictures", 300, width=60, height=45)
    crop = {"name": "RandomCrop", "args": {"size": 32, "padding": 4}}
    jitter = {"name": "ColorJitter", "args": {"brightness": 0.3, "contrast": 0.3}}
    settings = (
        *("--data.source", "auto", "--data.dataset", "folder", "--data.resize", 32),
        *("--data.dataset_args.path", "pictures", "--data.batch_size", 50),
        *("--data.augment", json.dumps([crop, jitter])),
        *("--model.network", "resnet", "--model.network_args.depth", 8),
        *("--model.network_args.width", 4, "--model.lr", 0.05, "--trainer.max_steps", 15),
        *("--trainer.strategy", "ddp"),
    )
    one, two = (
        run(tmp_path, str(n), *settings, "--trainer.devices", n, "--data.workers", 3 - n)
        for n in (1, 2)
    )
    assert_the_same(one, two)


def images(folder):
    events = events_in(folder)
    return {tag: events.Images(tag)[-1].encoded_image_string for tag in events.Tags()["images"]}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (2, 3)])
def test_a_run_resumes_with_another_number_of_processes(alone, tmp_path, first, then):
    folder = run(tmp_path, "changes", "--trainer.max_steps", 29, "--trainer.devices", first)
    settings = ("--trainer.max_steps", 50, "--trainer.devices", then)
    done = command("fit", "--resume", folder, *settings, cwd=tmp_path)
    assert f"processes {then} (was {first})" in done.stdout
    assert_the_same(alone, folder)


@pytest.mark.slow
def test_shards_of_unequal_size_give_the_gradient_of_the_batch(tmp_path):
    """The shards have 34, 33 and 33 images, and gradients are accumulated over two batches.

    Without a norm, the ranks exchange only gradients.
    """
    settings = (
        "--model.norm",
        "none",
        "--data.batch_size",
        100,
        "--trainer.accumulate_grad_batches",
        2,
    )
    one, three = (
        run(tmp_path, str(n), *settings, "--trainer.max_epochs", 1, "--trainer.devices", n)
        for n in (1, 3)
    )
    assert_the_same(one, three)


@pytest.mark.slow
def test_torchrun_can_start_the_processes(alone, tmp_path):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
    ]
    settings = (*EXACT, "--trainer.accelerator", "cpu", "--trainer.max_steps", "50")
    done = subprocess.run(
        [*torchrun, "bn_lightning", "fit", *settings], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch  1") == 1
    assert [path.name for path in (tmp_path / "runs/lenet").iterdir()] == ["0"]
    assert_the_same(alone, tmp_path / "runs/lenet/0")


@pytest.mark.slow
def test_a_killed_process_ends_the_run_with_a_message(tmp_path):
    process = begin(tmp_path, "--trainer.devices", "2")
    while not (tmp_path / "runs/lenet/0/checkpoints/best.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    [child] = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(child), signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1, out + err
    assert "Another process of this run has died" in err
    assert "fit --resume runs/lenet/0" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_two_processes_leave_one_run(tmp_path):
    done = command("fit", *QUICK, "--trainer.devices", "2", cwd=tmp_path)
    folder = tmp_path / "runs" / "lenet" / "0"
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.glob("**/0")] == ["runs/lenet/0"]
    # The second process writes no files.
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    found = result_of(folder)
    assert (found["processes"], found["steps"]) == (2, 44)
    # Each of the 1,000 test images is counted once.
    assert round(found["test_acc"] * 1_000, 3) == int(found["test_acc"] * 1_000 + 0.5)
    assert found["train_loss"] < 1.5
    assert done.stdout.count("epoch  ") == 2
    alone = run_here("test", "--ckpt_path", folder / "checkpoints" / "best.ckpt", cwd=tmp_path)
    assert f"{found['test_acc']:.4f}" in alone.stdout


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_evaluation_with_a_small_last_batch_is_that_of_one_process(trained, tmp_path, count):
    """The 1,000 test images are 9 batches of 111 and one image."""
    best = trained[0] / "checkpoints" / "best.ckpt"
    settings = ("--ckpt_path", best, "--data.batch_size", 111)
    alone = run_here("test", *settings, cwd=tmp_path).stdout
    assert command("test", *settings, "--trainer.devices", count, cwd=tmp_path).stdout == alone


# Several machines: network namespaces that are connected by a virtual cable

HOSTS = {"a": "10.187.21.1", "b": "10.187.21.2"}
SLOW = """\
import time
import lightning.pytorch as pl


class Slow(pl.Callback):
    def on_train_batch_end(self, *args):
        time.sleep(0.15)
"""


@pytest.fixture
def hosts():
    """Prefixes that run a command on one of two simulated machines."""

    def ip(*words):
        subprocess.run(["ip", *words], check=True, capture_output=True)

    names = {host: f"bn-{os.getpid()}-{host}" for host in HOSTS}
    try:
        try:
            for name in names.values():
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip(
                "link",
                "add",
                "bn0",
                "netns",
                names["a"],
                "type",
                "veth",
                "peer",
                "name",
                "bn0",
                "netns",
                names["b"],
            )
            for host, name in names.items():
                ip("-n", name, "addr", "add", f"{HOSTS[host]}/24", "dev", "bn0")
                ip("-n", name, "link", "set", "bn0", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs network namespaces (Linux, root, iproute2): {error}")
        yield {host: ["ip", "netns", "exec", name] for host, name in names.items()}
    finally:
        for name in names.values():
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def begin_on(host, prefix, cwd, *settings):
    """Start torchrun on one machine, as the README does. The rendezvous is on the first machine."""
    torchrun = (
        *("-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"),
        *("--max-restarts=5", "--rdzv-backend=c10d", "--rdzv-id=run"),
        f"--rdzv-endpoint={HOSTS['a']}:29400",
        f"--rdzv-conf=is_host={int(host == 'a')}",
        f"--local-addr={HOSTS[host]}",
        *("-m", "bn_lightning", "fit", *settings, "--ckpt_path", "last"),
    )
    environment = os.environ | {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": "bn0",
        "PYTHONPATH": str(cwd),
        "OMP_NUM_THREADS": "1",
    }
    with (cwd / f"log-{host}").open("ab") as log:
        return subprocess.Popen(
            [*prefix, sys.executable, *map(str, torchrun)],
            cwd=cwd,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )


def kill_all_on(prefix):
    found = subprocess.run(["ip", "netns", "pids", prefix[-1]], capture_output=True, text=True)
    for number in found.stdout.split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(number), signal.SIGKILL)


def wait_for_step(cwd, step, runs, timeout=90):
    """Wait until last.ckpt is from that step or a later one."""
    last, end = cwd / "runs/lenet/0/checkpoints/last.ckpt", time.monotonic() + timeout
    while True:
        with contextlib.suppress(FileNotFoundError):
            if torch.load(last, weights_only=True)["global_step"] >= step:
                return
        logs = "".join(path.read_text()[-3_000:] for path in cwd.glob("log-*"))
        assert time.monotonic() < end, logs
        assert any(run.poll() is None for run in runs), logs
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_continues_when_a_machine_dies_and_returns(hosts, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    settings = (*EXACT, "--trainer.accelerator", "cpu", "--trainer.max_steps", 110)
    truth = run(tmp_path, "uninterrupted", "--trainer.max_steps", 110)
    settings = (*settings, "--checkpoint.every_n_train_steps", 5, "--trainer.callbacks+=slow.Slow")
    a, b = (begin_on(host, hosts[host], tmp_path, *settings) for host in ("a", "b"))
    try:
        wait_for_step(tmp_path, 25, [a, b])
        kill_all_on(hosts["b"])  # torchrun and its training process
        wait_for_step(tmp_path, 45, [a])  # the other machine continues alone
        b = begin_on("b", hosts["b"], tmp_path, *settings)
        codes = [process.wait(timeout=300) for process in (a, b)]
    finally:
        for prefix in hosts.values():
            kill_all_on(prefix)
    logs = {host: (tmp_path / f"log-{host}").read_text() for host in HOSTS}
    assert codes == [0, 0], logs
    assert "processes 1 (was 2)" in logs["a"]
    assert "processes 2 (was 1)" in "".join(logs.values())
    assert [path.name for path in (tmp_path / "runs/lenet").iterdir()] == ["0"]
    assert_the_same(truth, tmp_path / "runs/lenet/0")
