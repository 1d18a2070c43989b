"""Kill runs at random times, resume them, and compare the outcome with an uninterrupted run.

    python -m tests.support.kills --folder FOLDER [--kills 50] [--processes 1] [--writing 0]
        [--seed 0] [--pictures] [settings of fit]

Each trial trains for 2 epochs on the sample and uses every feature that has a state: augmentation,
dropout, gradient accumulation, OneCycleLR, averaged weights, validation within the epoch, bfloat16.
The run is killed with SIGKILL after a random time, up to three times in a row, and then finishes.
Weights, optimizer, scheduler, curves and result.json are compared bit for bit. With --writing N, N
more runs are killed while they write a checkpoint.

With --pictures, a residual network is trained on a folder of colour JPEGs that 2 worker processes
read. The runs are resumed with 0, 2 and 4 of them in turn.
"""

import argparse
import itertools
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.benchmarks.photographs import write_photographs
from tests.support.logs import events_in
from tests.support.processes import start_command

# Otherwise TensorBoard reports each purge of events.
logging.getLogger("tensorboard").setLevel(logging.ERROR)

NORM = """\
from torch import nn
from bn_lightning import BatchNorm


class Noisy(nn.Sequential):
    def __init__(self, num_features, num_dims):
        super().__init__(BatchNorm(num_features, num_dims=num_dims), nn.Dropout(0.1))
"""
TRANSFORMS = [
    {"name": "RandomCrop", "args": {"size": 28, "padding": 2}},
    {"name": "ColorJitter", "args": {"brightness": 0.2, "contrast": 0.2}},
]
SETTINGS = (
    *("--data.source", "sample", "--data.batch_size", "32"),
    *("--data.flip", "true", "--data.shift", "2", "--data.augment", json.dumps(TRANSFORMS)),
    *("--model.norm", "noisy.Noisy", "--model.optimizer", "AdamW", "--model.lr", "0.01"),
    *("--model.scheduler", "OneCycleLR"),
    *("--trainer.max_epochs", "2", "--trainer.accumulate_grad_batches", "2"),
    *("--trainer.val_check_interval", "0.4", "--trainer.precision", "bf16-mixed"),
    *("--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu"),
    "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging",
    *("--trainer.callbacks.decay", "0.9", "--trainer.callbacks.use_buffers", "false"),
    *("--checkpoint.every_n_train_steps", "5"),
)
CROP = {"name": "RandomCrop", "args": {"size": 32, "padding": 4}}
# Added to SETTINGS, or in place of them.
SETTINGS_OF_PICTURES = (
    *("--data.source", "auto", "--data.dataset", "folder", "--data.resize", "32"),
    *("--data.augment", json.dumps([CROP, TRANSFORMS[1], {"name": "RandomVerticalFlip"}])),
    *("--data.normalize", "true", "--data.workers", "2"),
    *("--model.network", "resnet", "--model.network_args.depth", "8"),
    *("--model.network_args.width", "4"),
)
WORKERS_WHEN_RESUMED = (0, 2, 4)
MEASURED = ("images_per_second", "train_seconds", "resumed_at_steps", "commit")


def prepare(cwd: Path) -> Path:
    """Create a folder that contains the norm in SETTINGS."""
    cwd.mkdir(parents=True, exist_ok=True)
    (cwd / "noisy.py").write_text(NORM)
    return cwd


def start(cwd, *settings, code=None):
    """Start a run in a new process group, so that all of its processes can be killed together."""
    arguments = ["fit", *map(str, settings), "--ckpt_path", "last"]
    (cwd / "log").touch()
    if not code:
        return start_command("bn_lightning", arguments, cwd, os.environ, cwd / "log")
    command = [sys.executable, "-c", code, *arguments]
    with (cwd / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log, start_new_session=True)


def finish(cwd, *settings):
    """Run to the end."""
    code = start(cwd, *settings).wait(timeout=300)
    assert code == 0, (cwd / "log").read_text()


def kill(run):
    """Kill a run, and return whether it was still running."""
    was_running = run.poll() is None
    if was_running:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    return was_running


def wait_for(path: Path, run) -> None:
    while not path.exists() and run.poll() is None:
        time.sleep(0.002)


def curves(folder):
    """Return all (step, value) pairs of each tag, as TensorBoard reads them."""
    events = events_in(folder)
    timed = {"images_per_second", "result/images_per_second", "steps_per_second"}
    tags = set(events.Tags()["scalars"]) - timed
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def differences(one, other, where=""):
    """Yield the differences between two nested results, which are compared bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            if key not in one or key not in other:
                yield f"{where}/{key} is in one only"
            else:
                yield from differences(one[key], other[key], f"{where}/{key}")
    elif (
        isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other)
    ):
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{where}/{index}")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if not torch.equal(one, other):
            yield f"{where}: tensors differ"
    elif one != other:
        yield f"{where}: {str(one)[:60]} and {str(other)[:60]}"


def outcome(folder):
    """Return all results of a run except durations and positions."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    result = json.loads((folder / "result.json").read_text())
    for name in MEASURED:
        result.pop(name, None)
    compared = (
        *("state_dict", "current_model_state", "averaging_state"),
        *("optimizer_states", "lr_schedulers", "global_step", "precise_statistics"),
    )
    return {
        **{name: checkpoint[name] for name in compared if name in checkpoint},
        "best": best,
        "result": result,
        "curves": curves(folder),
    }


def last_folder(cwd):
    """Return the last run folder. Runs killed before their first checkpoint leave others."""
    return max((cwd / "runs/lenet").iterdir(), key=lambda path: int(path.name))


def compare(cwd, truth):
    """Return the differences between the uninterrupted run and the run in `cwd`."""
    folder = last_folder(cwd)
    found = list(differences(truth, outcome(folder)))
    checkpoints = (cwd / "runs/lenet").glob("*/checkpoints/last.ckpt")
    left = [path for path in checkpoints if path.parents[1] != folder]
    return found + [f"the run did not resume in the folder of {path}" for path in left]


# A run that kills itself while it writes the checkpoint of this number.
KILL_WHILE_WRITING = """\
import os, pathlib, signal
number, fraction = {number}, {fraction}
true_open = pathlib.Path.open
class PartialFile:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, content):
        self.file.write(content[:int(len(content) * fraction)])
        self.file.flush()
        os.killpg(0, signal.SIGKILL)
def open_partially(self, *args, **kwargs):
    global number
    file = true_open(self, *args, **kwargs)
    if self.name.endswith(".ckpt.tmp"):
        number -= 1
        if number == 0:
            return PartialFile(file)
    return file
pathlib.Path.open = open_partially
from bn_lightning.cli import main
main()
"""


def run_uninterrupted(cwd, settings):
    """Return the outcome of a run that is not killed, and its duration after setup in seconds."""
    run = start(prepare(cwd), *settings)
    wait_for(cwd / "runs/lenet/0/config.yaml", run)
    started = time.monotonic()
    assert run.wait() == 0, (cwd / "log").read_text()
    return outcome(cwd / "runs/lenet/0"), time.monotonic() - started


def kill_at_random(cwd, settings, rng, duration, when_resumed):
    """Kill a run up to three times, let it finish, and return the number of kills.

    Args:
        when_resumed: iterator of more settings, for each process but the first one.
    """
    prepare(cwd)
    kills, more = 0, ()
    for _ in range(rng.choice((1, 1, 2, 3))):
        before = (cwd / "log").stat().st_size if (cwd / "log").exists() else 0
        run = start(cwd, *settings, *more)
        while run.poll() is None and b"run folder" not in (cwd / "log").read_bytes()[before:]:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, duration))
        kills += kill(run)
        more = next(when_resumed)
    finish(cwd, *settings, *more)
    return kills


def kill_while_writing(cwd, settings, number, fraction):
    """Kill a run after it has written a fraction of the given checkpoint, and let it finish."""
    code = KILL_WHILE_WRITING.format(number=number, fraction=fraction)
    assert start(prepare(cwd), *settings, code=code).wait() == -signal.SIGKILL
    finish(cwd, *settings)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--writing", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", action="store_true")
    parser.add_argument("--folder", type=Path, required=True)
    args, given = parser.parse_known_args()
    several = ("--trainer.devices", args.processes) if args.processes > 1 else ()
    settings = (*SETTINGS, *several)
    when_resumed = itertools.repeat(())
    if args.pictures:
        path = args.folder.absolute() / "pictures"
        write_photographs(path, 800, width=60, height=45)
        # All runs share the result of the check.
        where = ("--data.dataset_args.path", path, "--data.root", path.with_name("data"))
        settings = (*settings, *SETTINGS_OF_PICTURES, *where)
        when_resumed = itertools.cycle([("--data.workers", n) for n in WORKERS_WHEN_RESUMED])
    settings = (*settings, *given)
    rng = random.Random(args.seed)
    truth, duration = run_uninterrupted(args.folder / "uninterrupted", settings)
    print(f"uninterrupted: {duration:.1f} s after setup", flush=True)

    kills, found = 0, []
    while kills < args.kills:
        cwd = args.folder / f"kill-{len(found) + 1}"
        kills += kill_at_random(cwd, settings, rng, duration, when_resumed)
        found.append(compare(cwd, truth))
        result = json.loads((last_folder(cwd) / "result.json").read_text())
        at = result["resumed_at_steps"] or "none"
        print(f"trial {len(found)}: resumed at steps {at}: {found[-1] or 'equal'}", flush=True)
    print(
        f"{kills} kills in {len(found)} runs of {args.processes} process(es): "
        f"{found.count([])} of {len(found)} equal bit for bit",
        flush=True,
    )

    partial = []
    for number in range(1, args.writing + 1):
        cwd, fraction = args.folder / f"writing-{number}", rng.random()
        kill_while_writing(cwd, settings, number, fraction)
        partial.append(compare(cwd, truth))
        print(
            f"killed after {fraction:.0%} of checkpoint {number}: {partial[-1] or 'equal'}",
            flush=True,
        )
    if args.writing:
        print(
            f"{args.writing} kills while a checkpoint was written: "
            f"{partial.count([])} of {args.writing} equal bit for bit"
        )
    sys.exit(any([*found, *partial]))


if __name__ == "__main__":
    main()
