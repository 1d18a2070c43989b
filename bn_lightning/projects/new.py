"""The command `new`: create a project from the template, or update one."""

import contextlib
import shlex
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

from bn_lightning import __version__, terminal
from bn_lightning.errors import RunFailed, UserError
from bn_lightning.projects import names, requirement
from bn_lightning.projects.answers import Answers
from bn_lightning.projects.rendering import render
from bn_lightning.projects.repository import MAIN, TEMPLATE, Repository, author

DESCRIPTION = """\
Create a project that uses bn_lightning as a library: a network, data, settings and tests of its
own, in a git repository. With --update, write the newest template to its branch `template`.
"""


def main(arguments: list[str], experiment: str) -> None:
    """Run `new PATH`.

    Args:
        arguments: the command line, starting with the command itself.
        experiment: not used. Every command receives it.
    """
    args = _parser().parse_args(arguments[1:])
    # The folder may be the current one.
    path = Path(args.path).resolve()
    try:
        if args.update:
            _update(path, args)
        else:
            _create(path, args)
    except OSError as error:
        is_mistake = isinstance(error, PermissionError | NotADirectoryError)
        kind = UserError if is_mistake else RunFailed
        raise kind(f"The project in {str(path)!r} cannot be written: {error}") from error


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog=f"{terminal.program()} new", description=DESCRIPTION)
    parser.add_argument("path", help="Folder of the project. It must be new or empty.")
    parser.add_argument(
        "--name", help="Name of the Python package. Default: the last part of the path."
    )
    parser.add_argument("--title", help="Title in the README and in --help.")
    parser.add_argument("--author", help="Name of the author. Default: the user.name of git.")
    parser.add_argument(
        "--requirement",
        help="How bn_lightning is installed: bn_lightning, with or without a version; an address, "
        "such as git+https://...; or the path of a clone or a wheel. Default: as it is now.",
    )
    parser.add_argument(
        "--update",
        action="store_true",
        help=f"Commit the newest template to the branch {TEMPLATE} of an existing project. The "
        "other flags change the answers that were given before.",
    )
    return parser


def _create(path: Path, args: Namespace) -> None:
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        kind = "is not empty" if path.is_dir() else "is a file"
        raise UserError(
            f"{str(path)!r} exists and {kind}. Use a new or an empty folder, or update the project "
            "in it with --update."
        )
    name = path.name if args.name is None else args.name
    names.refuse(name)
    answers = Answers(
        name=name,
        title=args.title or name.replace("_", " ").capitalize(),
        author=args.author or author(),
        requirement=_requirement(args, path) or requirement.installed(path),
    )
    with _staging(path) as folder:
        repository = Repository.create(folder)
        message = f"Start {name} from the template of bn_lightning {__version__}"
        repository.start(_commit(repository, answers, message))
        num_files = len(repository.files())
    shown = shlex.quote(args.path)
    print(f"created {args.path}: {num_files} files, branches {MAIN} and {TEMPLATE}")
    install = requirement.pip_arguments(answers.requirement)
    print(
        f"to install it and to train:\n  cd {shown}\n"
        f"  python3 -m venv .venv && .venv/bin/pip install {install}-e . && "
        f".venv/bin/python -m {name} fit"
    )
    if requirement.is_path(answers.requirement):
        print(
            f"CI cannot install bn_lightning from {answers.requirement}. Before you use CI, choose "
            "an address, for example that of your clone:\n"
            f"  {terminal.program()} new {shown} --update --requirement git+https://..."
        )


def _commit(
    repository: Repository, answers: Answers, message: str, parent: str | None = None
) -> str:
    """Commit the files as the template and the answers give them, and return the hash."""
    with tempfile.TemporaryDirectory() as rendering:
        render(answers, Path(rendering))
        return repository.commit(Path(rendering), message, parent)


def _requirement(args: Namespace, project: Path) -> str | None:
    """Return --requirement as it is written in a project."""
    return None if args.requirement is None else requirement.given(args.requirement, project)


@contextlib.contextmanager
def _staging(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` at the end. On a failure nothing is left."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as temporary:
            # The mode of the temporary folder is private. That of the project is the default.
            folder = Path(temporary, path.name)
            folder.mkdir()
            yield folder
            if missing:
                folder.rename(path)
            else:
                # The empty folder may be the current one, so it stays.
                for child in folder.iterdir():
                    child.rename(path / child.name)
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _update(path: Path, args: Namespace) -> None:
    repository = Repository.find(path)
    answers = Answers.read(path).changed(
        name=args.name,
        title=args.title,
        author=args.author,
        requirement=_requirement(args, path),
    )
    repository.refuse_changes()
    before = repository.template()
    message = f"Update the template to bn_lightning {__version__}"
    after = _commit(repository, answers, message, parent=before)
    changes = repository.changes(before, after)
    repository.move_template(after if changes else before)
    if changes:
        print(f"committed to the branch {TEMPLATE}:\n{changes}")
    else:
        print(f"The branch {TEMPLATE} has the newest files.")
    if repository.is_merged():
        print("There is nothing to merge.")
    else:
        print(f"To merge it into your branch:\n  git merge {TEMPLATE}")
