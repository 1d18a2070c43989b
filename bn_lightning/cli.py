"""The table of commands, of this project and of any other. Light to import: --help needs no torch."""

import importlib
import os
import sys
from pathlib import Path

from bn_lightning import __version__, terminal
from bn_lightning.errors import UserError

EXPERIMENT = "bn_lightning.experiment:EXPERIMENT"

# Command: the module whose `main(arguments, experiment)` runs it, and what --help says. To remove a
# command, delete its row and its module.
COMMANDS = {
    "fit": ("bn_lightning.runs.run", "train, then test the checkpoint that was kept"),
    "validate": ("bn_lightning.runs.run", "metrics of a checkpoint on the validation samples"),
    "test": ("bn_lightning.runs.run", "metrics of a checkpoint on the test samples"),
    "predict": (
        "bn_lightning.deploy.predict",
        "what a checkpoint makes of the test samples, or of your own files",
    ),
    "export": (
        "bn_lightning.deploy.export",
        "write a checkpoint as a file for any runtime: .onnx or .pt2",
    ),
    "inspect": (
        "bn_lightning.deploy.inspection",
        "show what a checkpoint is: network, norms, settings, metrics",
    ),
    "compare": (
        "bn_lightning.studies.compare",
        "train norms or settings with several seeds: one table and a figure",
    ),
    "sweep": ("bn_lightning.studies.sweep", "search the settings with the best validation metric"),
    "check": (
        "bn_lightning.norms.check.command",
        "examine a normalization layer: a name, or an import path to yours",
    ),
}

# Packages of the extra `study`.
STUDY_PACKAGES = ("optuna", "scipy", "matplotlib", "psycopg")

USAGE = """\
usage: {program} COMMAND [--help | settings]

{description}

{commands}

    {program} fit                            train with the defaults
    {program} fit --config configs/X.yaml    a named experiment
    {program} fit --help                     all settings
    {program} test --ckpt_path runs/NAME/0/checkpoints/best.ckpt
"""


def main(experiment: str = EXPERIMENT) -> None:
    """Run the command in sys.argv.

    Args:
        experiment: where the project's experiment is, `package.module:NAME`. It is imported only by
            commands that need it.

    A user's mistake ends with its message and exit code 2, a run that fails with 1.
    """
    arguments = sys.argv[1:]
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(usage(experiment), end="")
    elif command == "--version":
        print(f"bn_lightning {__version__}")
    elif command in COMMANDS:
        # A user's own modules are in the current folder, where a console script does not look.
        sys.path.insert(0, str(Path.cwd()))
        _run(command, arguments, experiment)
    else:
        _fail(f"Unknown command {command!r}. Commands: {', '.join(COMMANDS)}.\nAll of them: --help")


def usage(experiment: str = EXPERIMENT) -> str:
    """Return what --help prints. The description is the first line of the package's docstring."""
    package = importlib.import_module(experiment.partition(":")[0].partition(".")[0])
    description = (package.__doc__ or package.__name__).strip().partition("\n")[0]
    commands = "\n".join(f"  {name:10}{text}" for name, (_, text) in COMMANDS.items())
    return USAGE.format(program=terminal.program(), description=description, commands=commands)


def _run(command: str, arguments: list[str], experiment: str) -> None:
    module, _ = COMMANDS[command]
    try:
        importlib.import_module(module).main(arguments, experiment)
    except UserError as error:
        _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if error.name not in STUDY_PACKAGES:
            raise
        _fail(f'{command} needs {error.name}, which is not installed: pip install -e ".[study]"')
    except BrokenPipeError:  # the reader has closed the pipe: `| head`
        # What is left to write goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as exit:
        if isinstance(exit.__context__, KeyboardInterrupt):  # for which Lightning exits with 1
            sys.exit(130)
        raise


def _fail(message: str, code: int = 2) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)
