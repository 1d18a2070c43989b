"""Settings of the process for all of its runs: memory, log levels and warnings."""

import ctypes
import logging
import sys
import threading
import warnings


def set_up() -> None:
    """Prepare this process for any number of runs."""
    keep_freed_memory()
    # Lightning prints tips and advertisements, which hide the lines of the run.
    for logger in (
        "pytorch.utilities.rank_zero",
        "fabric.utilities.rank_zero",
        "fabric.utilities.seed",
        "fabric.utilities.distributed",
    ):
        logging.getLogger(f"lightning.{logger}").setLevel(logging.WARNING)
    for message in (
        # A study passes arguments that are not those in sys.argv.
        "LightningCLI's args parameter",
        # A checkpoint is tested without the callbacks of its training.
        "Be aware that when using `ckpt_path`, callbacks used to create",
        # A run is resumed in its folder, or starts from another run's checkpoint.
        "Checkpoint directory .* exists and is not empty",
        "The dirpath has changed from None",
        # lightning 2.6.6 with torch 2.15
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
    ):
        warnings.filterwarnings("ignore", message)
    threading.excepthook = _ignore_os_errors


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next step.

    By default, glibc returns the memory of the activations to the system after every
    step, and the system zeroes each page before it is used again. On 2 cores this
    caused 1.8 instead of 0.2 million page faults in two epochs, and cost up to a third
    of the speed.
    """
    if sys.platform == "linux":
        # musl has no mallopt.
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: 0)
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, the largest value allowed
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD


def _ignore_os_errors(args: threading.ExceptHookArgs) -> None:
    """Hide the trace of an OSError. TensorBoard's writer raises it again in the main thread."""
    if not issubclass(args.exc_type, OSError):
        threading.__excepthook__(args)
