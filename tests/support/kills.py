"""Kill runs at random moments, go on with them, and hold what comes out against the run that was left alone.

    python -m tests.support.kills --folder FOLDER [--kills 50] [--processes 1] [--writing 0] [--seed 0]

Each trial begins a run of 2 epochs on the sample, with everything on that has a state (augmentation, dropout, gradient
accumulation, OneCycleLR, averaged weights, validation within the epoch, bfloat16), kills it with SIGKILL after a random
time, up to three times in a chain, lets it finish, and compares weights, optimizer, schedule, curves and result.json,
bit for bit.
With --writing N, N more trials are killed while a checkpoint is being written.
"""

import argparse
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
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of each purge

NORM = """\
from torch import nn
from bn_lightning import BatchNorm


class Noisy(nn.Sequential):
    def __init__(self, num_features, num_dims):
        super().__init__(BatchNorm(num_features, num_dims=num_dims), nn.Dropout(0.1))
"""
SETTINGS = (
    "--data.source", "sample", "--data.batch_size", "32", "--data.flip", "true", "--data.shift", "2",
    "--model.norm", "noisy.Noisy", "--model.optimizer", "AdamW", "--model.lr", "0.01",
    "--model.scheduler", "OneCycleLR",
    "--trainer.max_epochs", "2", "--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "0.4",
    "--trainer.precision", "bf16-mixed", "--trainer.log_every_n_steps", "1", "--trainer.accelerator", "cpu",
    "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging", "--trainer.callbacks.decay", "0.9",
    "--trainer.callbacks.use_buffers", "false", "--checkpoint.every_n_train_steps", "5",
)  # fmt: skip
MEASURED = ("images_per_second", "train_seconds", "resumed_at_steps", "commit")


def prepare(cwd: Path) -> Path:
    cwd.mkdir(parents=True, exist_ok=True)
    (cwd / "noisy.py").write_text(NORM)
    return cwd


def start(cwd, *settings, code=None):
    """A run in a process group of its own, so that all of its processes can be killed at once."""
    program = ["-c", code] if code else ["-m", "bn_lightning"]
    command = [sys.executable, *program, "fit", *map(str, settings), "--ckpt_path", "last"]
    with (cwd / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log, start_new_session=True)


def finish(cwd, *settings):
    code = start(cwd, *settings).wait(timeout=300)
    assert code == 0, (cwd / "log").read_text()


def kill(run):
    """True when it was still going."""
    was_going = run.poll() is None
    if was_going:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    return was_going


def wait_for(path: Path, run) -> None:
    while not path.exists() and run.poll() is None:
        time.sleep(0.002)


def curves(folder):
    """By tag: all (step, value) as a reader of the events sees them."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"]) - {"images_per_second", "result/images_per_second", "steps_per_second"}
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def differences(one, other, where=""):
    """Where two nested results differ, bit by bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in one.keys() | other.keys():
            if key not in one or key not in other:
                yield f"{where}/{key} is in one only"
            else:
                yield from differences(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{where}/{index}")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if not torch.equal(one, other):
            yield f"{where}: tensors differ"
    elif one != other:
        yield f"{where}: {str(one)[:60]} and {str(other)[:60]}"


def outcome(folder):
    """All that a run leaves but for what a clock measured and for where it lay."""
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    result = json.loads((folder / "result.json").read_text())
    for name in MEASURED:
        result.pop(name, None)
    kept = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")
    return {
        **{name: checkpoint[name] for name in kept if name in checkpoint},
        "best": best,
        "result": result,
        "curves": curves(folder),
    }


def last_folder(cwd):
    """Of the run; there are several where it was killed before it had anything to go on with."""
    return max((cwd / "runs/lenet").iterdir(), key=lambda path: int(path.name))


def compare(cwd, truth):
    """What differs between the undisturbed run and the one in `cwd`."""
    folder = last_folder(cwd)
    found = list(differences(truth, outcome(folder)))
    left = [path for path in (cwd / "runs/lenet").glob("*/checkpoints/last.ckpt") if path.parents[1] != folder]
    return found + [f"it went on in another folder than {path}" for path in left]


# Kills itself in the middle of the writing of the checkpoint with this number.
KILL_WHILE_WRITING = """\
import os, pathlib, signal
number, share = {number}, {share}
true_open = pathlib.Path.open
class Torn:
    def __init__(self, file): self.file = file
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def __getattr__(self, name): return getattr(self.file, name)
    def write(self, content):
        self.file.write(content[:int(len(content) * share)])
        self.file.flush()
        os.killpg(0, signal.SIGKILL)
def open_torn(self, *args, **kwargs):
    global number
    file = true_open(self, *args, **kwargs)
    if self.name.endswith(".ckpt.tmp"):
        number -= 1
        if number == 0:
            return Torn(file)
    return file
pathlib.Path.open = open_torn
from bn_lightning.cli import main
main()
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--writing", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    settings = (*SETTINGS, *(("--trainer.devices", args.processes) if args.processes > 1 else ()))
    chance = random.Random(args.seed)

    alone = prepare(args.folder / "alone")
    run = start(alone, *settings)
    wait_for(alone / "runs/lenet/0/config.yaml", run)
    begun = time.monotonic()
    assert run.wait() == 0, (alone / "log").read_text()
    duration = time.monotonic() - begun
    truth = outcome(alone / "runs/lenet/0")
    print(f"undisturbed: {duration:.1f} s from its folder to its end", flush=True)

    kills = equal = trials = unequal = 0
    while kills < args.kills:
        trials += 1
        cwd = prepare(args.folder / f"kill-{trials}")
        for _ in range(chance.choice((1, 1, 2, 3))):
            before = (cwd / "log").stat().st_size if (cwd / "log").exists() else 0
            run = start(cwd, *settings)
            while run.poll() is None and b"run folder" not in (cwd / "log").read_bytes()[before:]:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, duration))
            kills += kill(run)
        finish(cwd, *settings)
        found = compare(cwd, truth)
        equal += not found
        unequal += bool(found)
        resumed = json.loads((last_folder(cwd) / "result.json").read_text())["resumed_at_steps"]
        print(f"trial {trials}: went on at steps {resumed or 'none'}: {found or 'equal'}", flush=True)
    print(
        f"{kills} kills in {trials} runs of {args.processes} process(es): {equal} of {trials} equal bit for bit",
        flush=True,
    )

    equal = 0
    for number in range(1, args.writing + 1):
        cwd = prepare(args.folder / f"writing-{number}")
        share = chance.random()
        code = start(cwd, *settings, code=KILL_WHILE_WRITING.format(number=number, share=share)).wait()
        assert code == -signal.SIGKILL, code
        finish(cwd, *settings)
        found = compare(cwd, truth)
        equal += not found
        unequal += bool(found)
        print(f"killed {share:.0%} into checkpoint {number}: {found or 'equal'}", flush=True)
    if args.writing:
        print(f"{args.writing} kills within the writing of a checkpoint: {equal} of {args.writing} equal bit for bit")
    sys.exit(unequal > 0)


if __name__ == "__main__":
    main()
