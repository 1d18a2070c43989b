"""The commands of this project, and of projects that use it. `--help` does not import torch."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from bn_lightning import __version__, terminal
from bn_lightning.errors import UserError

EXPERIMENT = "bn_lightning.experiment:EXPERIMENT"

# The module of each command, whose `main(arguments, experiment)` runs it, and its help
# text. To remove a command, delete its row and its module.
COMMANDS = {
    "fit": ("bn_lightning.runs.run", "train, then test the selected checkpoint"),
    "validate": (
        "bn_lightning.runs.run",
        "print metrics of a checkpoint on the validation samples",
    ),
    "test": ("bn_lightning.runs.run", "print metrics of a checkpoint on the test samples"),
    "predict": (
        "bn_lightning.deploy.predict",
        "predict the classes of the test samples or of your own files",
    ),
    "export": (
        "bn_lightning.deploy.export",
        "convert a checkpoint to .onnx or .pt2",
    ),
    "inspect": (
        "bn_lightning.deploy.inspection",
        "show the network, norms, settings and metrics of a checkpoint",
    ),
    "compare": (
        "bn_lightning.studies.compare",
        "compare norms or settings over several seeds: a table and a plot",
    ),
    "sweep": (
        "bn_lightning.studies.sweep",
        "search for the settings with the best validation metric",
    ),
    "check": (
        "bn_lightning.norms.check.command",
        "test a normalization layer, by name or import path",
    ),
    "new": (
        "bn_lightning.projects.new",
        "create a project that uses this library, or update one",
    ),
}

# Packages of the extra `study`.
STUDY_PACKAGES = ("optuna", "scipy", "matplotlib", "psycopg")

USAGE = """\
usage: {program} COMMAND [--help | settings]

{description}

{commands}

    {program} fit                            train with the defaults
    {program} fit --config configs/X.yaml    train with the settings in a file
    {program} fit --help                     show the settings
    {program} test --ckpt_path runs/NAME/0/checkpoints/best.ckpt
    {program} --print_completion bash        print a script for completion with Tab
"""


def main(experiment: str = EXPERIMENT) -> None:
    """Run the command in sys.argv.

    Args:
        experiment: import path of the project's experiment, `package.module:NAME`. It
            is imported only by commands that need it.

    Exits with 2 and a message after an invalid setting or file, and with 1 after a
    failed run.
    """
    arguments = sys.argv[1:]
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print(usage(experiment), end="")
    elif command == "--version":
        print(f"bn_lightning {__version__}")
    elif command in COMMANDS:
        _search_current_folder_last(experiment)
        _limit_spinning()
        module, _ = COMMANDS[command]
        _run(command, lambda: importlib.import_module(module).main(arguments, experiment))
    elif command == "--print_completion":
        _search_current_folder_last(experiment)
        _run(command, lambda: _print_completion(arguments[1:], experiment))
    else:
        commands = ", ".join(COMMANDS)
        _fail(f"Unknown command {command!r}. Commands: {commands}.\nFor help: --help")


def _search_current_folder_last(experiment: str) -> None:
    """Let import paths name modules in the current folder, which cannot replace installed ones.

    `python -m` puts the folder first in sys.path, and a console script leaves it out. It
    stays first if it contains the package of the experiment, which may be installed too.
    """
    folder = Path.cwd()
    if not (folder / experiment.partition(".")[0]).is_dir():
        sys.path[:] = [entry for entry in sys.path if entry not in ("", str(folder))]
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _limit_spinning() -> None:
    """Let the threads of GNU OpenMP sleep soon if they have no work.

    By default, they occupy their cores for milliseconds, and two runs on the same cores
    are many times slower. A shorter time than this one slows down a single run. OpenMP
    reads the variable when PyTorch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


def usage(experiment: str = EXPERIMENT) -> str:
    """Return the text of --help. Its description is the first line of the package's docstring."""
    package = importlib.import_module(experiment.partition(":")[0].partition(".")[0])
    description = (package.__doc__ or package.__name__).strip().partition("\n")[0]
    commands = "\n".join(f"  {name:10}{text}" for name, (_, text) in COMMANDS.items())
    return USAGE.format(program=terminal.program(), description=description, commands=commands)


def _print_completion(arguments: list[str], experiment: str) -> None:
    try:
        completion = importlib.import_module("bn_lightning.runs.completion")
    except ModuleNotFoundError as error:
        if error.name != "shtab":
            raise
        raise UserError(
            "--print_completion needs shtab, which is not installed: pip install shtab"
        ) from error
    texts = {name: text for name, (_, text) in COMMANDS.items()}
    print(completion.script(arguments, experiment, texts))


def _run(command: str, function: Callable[[], None]) -> None:
    try:
        function()
    except UserError as error:
        _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if error.name not in STUDY_PACKAGES:
            raise
        install = 'pip install "bn_lightning[study]"'
        _fail(f"{command} needs {error.name}, which is not installed: {install}")
    except BrokenPipeError:  # for example `| head`
        # The buffered rest of the output must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit as exit:
        # After an interrupt, Lightning exits with 1.
        if isinstance(exit.__context__, KeyboardInterrupt):
            sys.exit(130)
        raise


def _fail(message: str, code: int = 2) -> None:
    print(f"error: {terminal.printable_lines(message)}", file=sys.stderr)
    sys.exit(code)
