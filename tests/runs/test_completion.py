"""Shell completion: bash completes commands, settings and values with the printed script."""

import shutil
import subprocess
import sys

import pytest

from bn_lightning import cli
from bn_lightning.runs import completion
from tests.conftest import run_here

shtab = pytest.importorskip("shtab")


def bash_is_recent():
    """Return whether bash has version 4. macOS has 3.2, and Windows may have that of WSL."""
    if sys.platform == "win32" or shutil.which("bash") is None:
        return False
    major = subprocess.run(["bash", "-c", "echo $BASH_VERSINFO"], capture_output=True, text=True)
    return int(major.stdout) >= 4


# The function of the script reads these variables, which bash sets when Tab is pressed.
PRESS_TAB = """
source completion.bash
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
complete -p "$1" >/dev/null || exit 3
"_shtab_$1"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Return a function that completes the last of its words, as bash does."""
    if not bash_is_recent():
        pytest.skip("needs bash 4 or later")
    folder = tmp_path_factory.mktemp("completion")
    for name in ("own.yaml", "other.txt"):
        (folder / name).touch()
    (folder / "own_runs").mkdir()

    def run(*words, module="bn_lightning"):
        printed = run_here("--print_completion", "bash", cwd=folder, module=module).stdout
        (folder / "completion.bash").write_text(printed)
        done = subprocess.run(
            ["bash", "--norc", "-c", PRESS_TAB, "bash", *words],
            capture_output=True,
            text=True,
            cwd=folder,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return sorted(done.stdout.split())

    return run


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["c"], ["check", "compare"]),
        ([""], sorted(cli.COMMANDS)),
        (["fit", "--model.norm"], ["--model.norm", "--model.norm_args"]),
        (["fit", "--model.lr", "0.5", "--data.ba"], ["--data.batch_size"]),
        (["fit", "--s"], ["--seed_everything"]),
        (["fit", "--model.activation", "s"], ["sigmoid", "silu"]),
        (["compare", "--data.flip", ""], ["false", "true"]),
        (["sweep", "--trainer.precision", "bf16-"], ["bf16-mixed", "bf16-true"]),
        (["test", "--ckpt_path", "o"], ["other.txt", "own.yaml", "own_runs"]),
        (["fit", "--config", "own."], ["own.yaml"]),
        (["fit", "--resume", "o"], ["own_runs"]),
        (["fit", "--re"], ["--resume"]),
        (["validate", "--re"], []),
        (["inspect", "own."], ["own.yaml"]),
    ],
)
def test_bash_completes(complete, words, completed):
    assert complete("bn_lightning", *words) == completed


def test_bash_completes_the_settings_of_another_project(complete):
    found = complete("friedman", "fit", "--model.", module="friedman")
    assert "--model.width" in found and "--model.norm_args" not in found


@pytest.mark.parametrize("shell", shtab.SUPPORTED_SHELLS)
def test_scripts_of_all_shells_are_small(main, shell):
    code, printed, err = main("--print_completion", shell)
    assert (code, err) == (0, "")
    assert "bn_lightning" in printed and "fit" in printed
    assert 1_000 < len(printed) < 300_000
    if shell != "tcsh":
        assert all(name in printed for name in (*cli.COMMANDS, "model.activation", "silu"))


@pytest.mark.parametrize("arguments", [[], ["cmd"], ["bash", "zsh"]])
def test_an_unknown_shell_is_refused(main, arguments):
    code, out, err = main("--print_completion", *arguments)
    assert (code, out) == (2, "")
    assert "the name of a shell: bash, " in err


def test_shtab_is_needed_for_completion_only(main, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    monkeypatch.delitem(sys.modules, "bn_lightning.runs.completion", raising=False)
    code, _, err = main("--print_completion", "bash")
    assert code == 2
    assert "error: --print_completion needs shtab, which is not installed: pip install shtab" in err
    assert main("--version")[0] == 0


def test_the_commands_with_settings_exist():
    assert set(completion.WITH_SETTINGS) < set(cli.COMMANDS)
    parser = completion.parser_of(cli.EXPERIMENT)
    defaults = parser.get_defaults()
    assert all(name in defaults for name in (*completion.FILES, *completion.FOLDERS))
