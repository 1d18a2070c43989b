"""Kill a sweep at random times, resume it, and verify its database at the end.

    python -m tests.support.sweep_kills --folder FOLDER [--kills 10] [--seed 0]

After a run has started, the sweep is killed with SIGKILL at a random time. Then the same
command is started again. At the end, each set of parameters must have exactly one
finished trial. Killed trials stay in the database with the state FAIL.
"""

import argparse
import collections
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna

CONFIG = """\
data: {source: sample}
trainer: {max_epochs: 4, accelerator: cpu}
sweep:
  trials: 8
  space:
    model.lr: {low: 0.05, high: 2.0, log: true}
    model.activation: [sigmoid, relu]
"""
FINISHED = ("COMPLETE", "PRUNED")


def start(cwd: Path, *settings):
    """Start a sweep in `cwd`. Its output is appended to the file `log`."""
    (cwd / "sweep.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "bn_lightning", "sweep", "--config", "sweep.yaml"]
    command += map(str, settings)
    with (cwd / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log)


def wait_for_trial(cwd: Path, process, after: float = 0.0) -> bool:
    """Wait until a run has started after the time `after`.

    Return True if one has started, and False if the command has exited before.
    """
    while process.poll() is None:
        logs = cwd.glob("runs/sweep/trial-*/log.txt")
        if any(file.stat().st_mtime > after for file in logs):
            return True
        time.sleep(0.02)
    return False


def trials(storage: str):
    """Return the parameters and the state of each trial."""
    study = optuna.load_study(study_name="sweep", storage=storage)
    return [(tuple(sorted(trial.params.items())), trial.state.name) for trial in study.get_trials()]


def assert_each_is_finished_once(storage: str, min_finished: int):
    """Verify that each set of parameters has one finished trial, and return all trials."""
    found = trials(storage)
    finished = collections.Counter(params for params, state in found if state in FINISHED)
    assert set(finished.values()) == {1}, finished
    assert set(finished) == {params for params, _ in found if params}, found
    assert {state for _, state in found} <= {*FINISHED, "FAIL"}, found
    assert len(finished) >= min_finished, finished
    return found


def kill_and_resume(cwd: Path, kills: int, rng: random.Random):
    """Kill a sweep several times, run it to its end, and return its trials."""
    for _ in range(kills):
        start_time = time.time()
        process = start(cwd)
        if wait_for_trial(cwd, process, start_time):
            time.sleep(rng.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert start(cwd).wait(timeout=280) == 0, (cwd / "log").read_text()
    return assert_each_is_finished_once(f"sqlite:///{cwd}/runs/sweep/study.db", 8)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="folder in which the sweep runs")
    parser.add_argument("--kills", type=int, default=10, help="number of kills (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times (default: 0)")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    found = kill_and_resume(args.folder, args.kills, random.Random(args.seed))
    states = collections.Counter(state for _, state in found)
    print(f"{args.kills} kills. Trials by state: {dict(states)}.")
    print("Each set of parameters has exactly one finished trial.")


if __name__ == "__main__":
    main()
