"""Settings of the whole process, not of one run: memory, and what is printed."""

import ctypes
import logging
import sys
import threading
import warnings


def set_up() -> None:
    """Prepare this process for any number of runs."""
    keep_freed_memory()
    # Lightning prints tips and advertisements; a newcomer should see the lines of the run.
    for quiet in (
        "pytorch.utilities.rank_zero",
        "fabric.utilities.rank_zero",
        "fabric.utilities.seed",
        "fabric.utilities.distributed",
    ):
        logging.getLogger(f"lightning.{quiet}").setLevel(logging.WARNING)
    for message in (
        # Arguments are given as they are in sys.argv, or by a study, which has its own there.
        "LightningCLI's args parameter",
        # The callbacks of the training are not wanted when a checkpoint is only tested.
        "Be aware that when using `ckpt_path`, callbacks used to create",
        # A run that resumes in its folder, and one that starts with another's checkpoint.
        "Checkpoint directory .* exists and is not empty",
        "The dirpath has changed from None",
        # lightning 2.6.6 with torch 2.15
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
    threading.excepthook = _ignore_os_errors


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step.

    By default it returns the activations of every step to the system and takes them anew, zeroed
    page by page: on 2 cores 1.8 million page faults in two epochs instead of 0.2 million, and up to
    a third of the speed.
    """
    if sys.platform == "linux":
        # musl has no mallopt.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: its largest value
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def _ignore_os_errors(args: threading.ExceptHookArgs) -> None:
    """Leave an OSError to the main thread: TensorBoard's writer thread raises it there again."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)
