"""Which errors are wrong settings: a message and exit code 2 instead of a stack trace.

An error is a wrong setting if Lightning, PyTorch or jsonargparse raises it before the
first training step, and only these libraries and the framework called the code that
raised it. An error that passes through a network, a data set, a metric or a user's own
class is a bug, and keeps its stack trace. Lightning's MisconfigurationException is always
a wrong setting.
"""

import contextlib
import sys
import traceback
from collections.abc import Iterator

import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import AcceleratorRegistry

from bn_lightning.errors import UserError, describe_error

LIBRARIES = ("jsonargparse", "lightning", "lightning_utilities", "torch")
FRAMEWORK = ("bn_lightning.monitoring", "bn_lightning.runs", "bn_lightning.training")
# Failures of the machine.
NOT_SETTINGS = (OSError, MemoryError, torch.OutOfMemoryError)
# Types whose message is understood without their name.
PLAIN = (ImportError, MisconfigurationException, RuntimeError, TypeError, ValueError)


@contextlib.contextmanager
def of_settings() -> Iterator[None]:
    """Raise UserError for a wrong setting; nothing has been trained yet.

    Raises:
        UserError: an error is a wrong setting.
    """
    try:
        yield
    except Exception as error:
        wrong = find(error)
        if wrong is None or wrong is error:
            raise
        # With itself as a cause, an error would have an endless chain of causes.
        raise wrong from (error if wrong.__traceback__ is None else wrong.__cause__)


def find(error: Exception) -> UserError | None:
    """Return the message for an error before the first step, or None if it is a bug."""
    chain: list[BaseException] = [error]
    # jsonargparse wraps the errors of constructors several times.
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for cause in chain:
        if isinstance(cause, UserError):
            return cause
    cause = chain[-1]
    assert isinstance(cause, Exception)
    if isinstance(message := translated(cause), UserError):
        return message
    if "in DataLoader worker process" in str(cause):
        # A worker sends only the text of an error, which has passed through the data set.
        return None
    modules = [name for link in chain for name in _modules(link)]
    is_called_by_libraries = all(_is_in(name, (*LIBRARIES, *FRAMEWORK)) for name in modules)
    is_raised_by_library = bool(modules) and _is_in(modules[-1], LIBRARIES)
    if not is_called_by_libraries or not is_raised_by_library or isinstance(cause, NOT_SETTINGS):
        return None
    text = str(cause) if isinstance(cause, PLAIN) and str(cause) else describe_error(cause)
    library = modules[-1].partition(".")[0]
    return UserError(f"{text}\n{library} cannot start the run with these settings.")


def translated(error: Exception) -> Exception:
    """Return the message for an error at any time, or the error itself if it is a bug."""
    text = str(error)
    if isinstance(error, MisconfigurationException):
        return UserError(text)
    if "InvalidCxxCompiler" in text:
        return UserError(
            "--model.compile true needs a C++ compiler on a CPU, and none was found. Install "
            "g++, set CXX to your compiler, or use --model.compile false."
        )
    if text.startswith("Error(s) in loading state_dict"):
        return UserError(
            f"The checkpoint does not fit the network that the settings define: {error}\n"
            "Remove the --model settings, so that those in the checkpoint are used."
        )
    return error


def hardware_settings(settings: Namespace) -> str:
    """Return the settings that may not fit this machine, and its accelerators, for a message."""
    names = ("accelerator", "devices", "strategy", "precision")
    given = [
        f"--trainer.{name} {settings[name]}"
        for name in names
        if settings[name] not in (None, "auto")
    ]
    if not given:
        return ""
    available = [
        name for name, entry in AcceleratorRegistry.items() if entry["accelerator"].is_available()
    ]
    accelerators = ", ".join(available)
    return f"\nSettings: {' '.join(given)}\nAccelerators of this machine: {accelerators}"


def _modules(error: BaseException) -> list[str]:
    """Return the modules through which an error has passed, without the standard library."""
    frames = traceback.walk_tb(error.__traceback__)
    names = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
    return [n for n in names if n.partition(".")[0] not in sys.stdlib_module_names]


def _is_in(module: str, packages: tuple[str, ...]) -> bool:
    return f"{module}.".startswith(tuple(f"{package}." for package in packages))
