"""The git repository of a project, and its branch `template` with the files as `new` wrote them."""

import getpass
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from bn_lightning.errors import RunFailed, UserError

MAIN, TEMPLATE = "main", "template"
# A hook of git or a script may have set these for another repository.
OF_OTHERS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR")


class Repository:
    """The repository of a project.

    Args:
        folder: the top folder of its working tree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path) -> Self:
        """Create a repository without commits in an empty folder."""
        git(folder, "init", "--quiet")
        git(folder, "symbolic-ref", "HEAD", f"refs/heads/{MAIN}")
        return cls(folder)

    @classmethod
    def find(cls, folder: Path) -> Self:
        """Return the repository of a project.

        Raises:
            UserError: the folder is not the top folder of a repository.
        """
        if not folder.is_dir():
            raise UserError(f"There is no folder {str(folder)!r}. Use the folder of a project.")
        if not (folder / ".git").exists():
            raise UserError(
                f"{str(folder)!r} is not the top folder of a git repository. Use the folder of a "
                "project that `new` has created."
            )
        return cls(folder)

    def commit(self, files: Path, message: str, parent: str | None) -> str:
        """Commit the files in a folder, without those that its .gitignore excludes.

        No branch, index or file of the working tree changes.

        Args:
            parent: the commit before this one, or None.

        Returns:
            The hash of the commit.
        """
        with tempfile.TemporaryDirectory() as temporary:
            own = {
                "GIT_DIR": git(self.folder, "rev-parse", "--absolute-git-dir"),
                "GIT_WORK_TREE": str(files),
                "GIT_INDEX_FILE": str(Path(temporary, "index")),
            }
            # Files that the user's global settings ignore belong to the project too.
            add = ("-c", "core.excludesFile=/dev/null", "add", "--all", ".")
            git(files, *add, environment=own)
            tree = git(files, "write-tree", environment=own)
        parents = () if parent is None else ("-p", parent)
        arguments = ("commit-tree", tree, *parents, "-m", message)
        return git(self.folder, *arguments, environment=self._identity())

    def start(self, commit: str) -> None:
        """Let both branches begin with a commit, and write its files."""
        for branch in (TEMPLATE, MAIN):
            git(self.folder, "update-ref", f"refs/heads/{branch}", commit)
        git(self.folder, "reset", "--quiet", "--hard")

    def files(self) -> list[str]:
        """Return the names of the tracked files."""
        return git(self.folder, "ls-files").splitlines()

    def refuse_changes(self) -> None:
        """Refuse to go on if tracked files have uncommitted changes.

        Raises:
            UserError: there are changes.
        """
        changes = git(self.folder, "status", "--porcelain", "--untracked-files=no")
        if changes:
            raise UserError(
                f"{str(self.folder)!r} has uncommitted changes:\n{changes}\n"
                "Commit them first, or put them aside with git stash."
            )

    def template(self) -> str:
        """Return the newest commit of the branch `template`, here or in a remote repository.

        Raises:
            UserError: there is no such branch.
        """
        pattern = f"refs/remotes/*/{TEMPLATE}"
        remote = git(self.folder, "for-each-ref", "--format=%(refname)", pattern).splitlines()
        commits = [
            git(self.folder, "rev-parse", "--verify", "--quiet", name, may_fail=True)
            for name in (f"refs/heads/{TEMPLATE}", *remote)
        ]
        if any(commits):
            # Commits that another one contains are left out.
            heads = git(self.folder, "merge-base", "--independent", *filter(None, commits))
            return next(commit for commit in commits if commit in heads.splitlines())
        raise UserError(
            f"{str(self.folder)!r} has no branch {TEMPLATE}. Fetch it:\n"
            f"  git fetch origin {TEMPLATE}:{TEMPLATE}\n"
            "If it is nowhere, start it at the first commit of the project:\n"
            f"  git branch {TEMPLATE} COMMIT"
        )

    def move_template(self, commit: str) -> None:
        """Let the branch `template` end with a commit.

        Raises:
            UserError: it is checked out, and its files would not be those of the commit.
        """
        branch = f"refs/heads/{TEMPLATE}"
        used = git(self.folder, "for-each-ref", "--format=%(worktreepath)", branch)
        if used:
            raise UserError(
                f"The branch {TEMPLATE} is checked out in {used!r}. Switch to your own branch, for "
                f"example with git switch {MAIN}."
            )
        git(self.folder, "update-ref", branch, commit)

    def changes(self, before: str, after: str) -> str:
        """Return a table of the changed files between two commits."""
        return git(self.folder, "diff", "--stat=100", before, after)

    def is_merged(self) -> bool:
        """Return whether the current branch contains the branch `template`."""
        return not git(self.folder, "rev-list", "--max-count=1", TEMPLATE, "^HEAD")

    def _identity(self) -> dict[str, str]:
        """Return the author and committer of a commit, if git does not know the user."""
        identity: dict[str, str] = {}
        for role in ("AUTHOR", "COMMITTER"):
            if not git(self.folder, "var", f"GIT_{role}_IDENT", may_fail=True):
                identity |= {f"GIT_{role}_NAME": author(), f"GIT_{role}_EMAIL": "none@localhost"}
        return identity


def author() -> str:
    """Return the name of the user, as git knows it, or else the name of the account."""
    name = git(Path.cwd(), "config", "user.name", may_fail=True)
    if name:
        return name
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # an account without a name, as in a container
        return "unknown"


def git(
    folder: Path,
    *arguments: str,
    may_fail: bool = False,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run git in a folder and return what it prints.

    Args:
        may_fail: whether to return an empty text if git fails.
        environment: additional variables of the environment.

    Raises:
        UserError: git is not installed.
        RunFailed: git fails.
    """
    own = {name: value for name, value in os.environ.items() if name not in OF_OTHERS}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env={**own, **(environment or {})},
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except FileNotFoundError as error:
        raise UserError("git is not installed. Install it: https://git-scm.com") from error
    if done.returncode == 0:
        return done.stdout.rstrip("\n")
    if may_fail:
        return ""
    raise RunFailed(f"git {arguments[0]} failed in {str(folder)!r}:\n{done.stderr.strip()}")
