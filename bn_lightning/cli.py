"""Every command, in one table. Light to import: --help and --version need no torch."""

import importlib
import os
import sys
from pathlib import Path

from bn_lightning import __version__
from bn_lightning.errors import UserError

# Command: the module whose main() runs it, and what --help says. To take a command out, delete its row and its module.
COMMANDS = {
    "fit": ("bn_lightning.runs.run", "train LeNet, then test what was kept"),
    "validate": ("bn_lightning.runs.run", "accuracy of a checkpoint on the validation images"),
    "test": ("bn_lightning.runs.run", "accuracy of a checkpoint on the test images, in all and by class"),
    "predict": ("bn_lightning.runs.run", "the class that a checkpoint gives test images, or pictures of yours"),
    "export": ("bn_lightning.deploy.export", "make a file of a checkpoint that any runtime takes: .onnx or .pt2"),
    "inspect": ("bn_lightning.deploy.inspection", "what a checkpoint is: network, norms, settings, figures"),
    "compare": ("bn_lightning.studies.compare", "norms or settings, with seeds: one table and a figure"),
    "sweep": ("bn_lightning.studies.sweep", "search settings for the best validation accuracy"),
    "check": (
        "bn_lightning.norms.check.properties",
        "examine a normalization layer: a name, or an import path to yours",
    ),
}

OF_STUDY = ("optuna", "scipy", "matplotlib", "psycopg")  # the extra of compare and sweep

USAGE = """\
usage: python -m bn_lightning COMMAND [--help | settings]

LeNet on Fashion-MNIST with a batch normalization that can be swapped.

{commands}

    python -m bn_lightning fit                               the article's recipe, custom batch norm, 10 epochs
    python -m bn_lightning fit --model.norm builtin          the same with PyTorch's layer
    python -m bn_lightning fit --config configs/smoke.yaml   a named experiment
    python -m bn_lightning test --ckpt_path runs/lenet/0/checkpoints/best.ckpt
"""


def usage() -> str:
    """What --help prints."""
    return USAGE.format(commands="\n".join(f"  {name:10}{text}" for name, (_, text) in COMMANDS.items()))


def main() -> None:
    """Run the command in sys.argv. A user's mistake ends with its message and exit code 2, a run that fails with 1."""
    arguments = sys.argv[1:]
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(usage(), end="")
    elif command == "--version":
        print(f"bn_lightning {__version__}")
    elif command in COMMANDS:
        # A norm of the user's lies in the current folder; a console script does not look there by itself.
        sys.path.insert(0, str(Path.cwd()))
        module, _ = COMMANDS[command]
        try:
            importlib.import_module(module).main()
        except UserError as error:
            _fail(str(error), error.exit_code)
        except ModuleNotFoundError as error:
            if error.name not in OF_STUDY:
                raise
            _fail(f'{command} needs {error.name}, which is not installed: pip install -e ".[study]"')
        except BrokenPipeError:  # who reads has seen enough: `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to write goes nowhere
            sys.exit(141)
        except KeyboardInterrupt:
            sys.exit(130)
        except SystemExit as exit:
            if isinstance(exit.__context__, KeyboardInterrupt):  # for which Lightning exits with 1
                sys.exit(130)
            raise
    else:
        _fail(f"There is no command {command!r}. There are {', '.join(COMMANDS)}.\nAll of them: --help")


def _fail(message: str, code: int = 2) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
