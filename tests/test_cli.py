"""The commands: help, exit codes and the name of the program."""

import contextlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest

import bn_lightning
import bn_lightning.studies
from bn_lightning import UserError, __version__, cli, terminal
from bn_lightning.errors import RunFailed
from bn_lightning.training.stopping import Stopped
from tests.conftest import PROJECTS, QUICK, on_cpu, run_here

FRIEDMAN = "friedman.experiment:EXPERIMENT"
HEAVY = ("torch", "lightning", "torchmetrics", "rich", "numpy", "jsonargparse")


def output_without_heavy_imports(module, *arguments):
    """Return the output of `python -m MODULE`. Fail if it has imported a heavy module."""
    code = (
        f"import runpy, sys; sys.argv = ['x', *{list(arguments)}]\n"
        f"try: runpy.run_module({module!r}, run_name='__main__', alter_sys=True)\n"
        f"finally: assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECTS)}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    ).stdout


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "3000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),
    ],
)
def test_openmp_threads_wait_passively_unless_the_user_decides(monkeypatch, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        # The second call makes the test restore what the command sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["x", "check", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


# Help


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_each_command_and_imports_no_torch(monkeypatch, arguments):
    printed = output_without_heavy_imports("bn_lightning", *arguments)
    monkeypatch.setattr(terminal, "_program", "python -m bn_lightning")
    assert printed == cli.usage()
    assert all(f"\n  {name} " in printed for name in cli.COMMANDS)
    assert printed.startswith("usage: python -m bn_lightning COMMAND")
    assert bn_lightning.__doc__.splitlines()[0] in printed


def test_help_of_another_project_has_its_name_and_its_docstring(monkeypatch):
    printed = output_without_heavy_imports("friedman", "--help")
    assert printed.startswith("usage: python -m friedman COMMAND")
    assert "\nFriedman's regression problem, learned by a multilayer perceptron.\n" in printed
    assert all(f"\n  {name} " in printed for name in cli.COMMANDS)
    assert "bn_lightning" not in printed
    monkeypatch.syspath_prepend(PROJECTS)
    monkeypatch.setattr(terminal, "_program", "python -m friedman")
    assert printed == cli.usage(FRIEDMAN)


def test_help_of_a_package_without_a_docstring_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "silent_project").mkdir()
    (tmp_path / "silent_project/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert "\nsilent_project\n" in cli.usage("silent_project.experiment:EXPERIMENT")


def test_version_is_that_of_bn_lightning():
    for module in ("bn_lightning", "friedman"):
        assert output_without_heavy_imports(module, "--version") == f"bn_lightning {__version__}\n"


@pytest.mark.parametrize("name", ["fit", "test"])
def test_help_of_a_command(main, tmp_path, name):
    code, printed, _ = main(name, "--help")
    assert code == 0
    for setting in (
        *("--model.norm", "--model.lr", "--model.optimizer", "--model.memory_format"),
        *("--data.source", "--data.val_images", "--data.batch_size", "--trainer.max_epochs"),
        *("--seed_everything", "--ckpt_path", "--name"),
    ):
        assert setting in printed
    assert "`custom` (from scratch)" in printed or "custom" in printed
    assert printed.startswith(f"usage: python -m bn_lightning {name} [settings]")
    assert ("--resume" in printed) == ("--monitor" in printed) == (name == "fit")
    assert list(tmp_path.iterdir()) == []


def test_help_has_own_settings_first_and_few_of_the_trainer(main, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, printed, _ = main("fit", "--help")
    flags = ("--resume", "--model.norm", "--data.source", "--trainer.max_epochs")
    places = [printed.index(f"  {flag} ") for flag in flags]
    assert code == 0 and places == sorted(places)
    assert "--trainer.barebones" not in printed and "data.seed" not in printed
    # Lines may be wrapped anywhere.
    assert "(default: sigmoid)" in " ".join(printed.split())
    assert len(printed.splitlines()) < 190
    assert "--help.trainer" in printed


def test_help_trainer_has_all_settings_of_the_trainer_and_no_others(main):
    code, printed, _ = main("fit", "--help.trainer")
    assert code == 0
    assert printed.startswith("usage: python -m bn_lightning fit [settings]")
    for name in inspect.signature(pl.Trainer.__init__).parameters:
        assert name == "self" or f"--trainer.{name}" in printed
    assert "--model.norm" not in printed and "--data.source" not in printed


def test_help_of_a_command_of_another_project(tmp_path):
    printed = run_here("fit", "--help", cwd=tmp_path, module="friedman").stdout
    assert printed.startswith("usage: python -m friedman fit [settings]")
    assert "--model.width" in printed and "--data.rows" in printed
    assert "--model.norm_args" not in printed and "--data.source" not in printed


# Commands


def test_the_error_of_an_unknown_command_names_all_commands(main):
    code, out, err = main("fti")
    assert (code, out) == (2, "")
    assert err.startswith("error: Unknown command 'fti'. Commands: fit, ")
    assert all(name in err for name in cli.COMMANDS)


def test_each_command_has_a_main_function():
    import importlib

    for name, (module, text) in cli.COMMANDS.items():
        assert callable(importlib.import_module(module).main), name
        assert text[0].islower() and not text.endswith(".")


@pytest.mark.parametrize("package", ["optuna", "matplotlib"])
def test_the_error_of_a_missing_package_says_what_to_install(main, monkeypatch, package):
    monkeypatch.setattr(bn_lightning, "studies", bn_lightning.studies)
    for name in list(sys.modules):
        if name.startswith(("bn_lightning.studies", f"{package}.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = main("sweep")
    assert (code, out) == (2, "")
    install = 'pip install "bn_lightning[study]"'
    assert err == f"error: sweep needs {package}, which is not installed: {install}\n"


@pytest.mark.parametrize("entry", ["", "current", None])
def test_files_in_the_current_folder_do_not_replace_installed_modules(tmp_path, monkeypatch, entry):
    """`python -m` puts the current folder first in sys.path, and a console script nowhere."""
    monkeypatch.chdir(tmp_path)
    first = [] if entry is None else [str(tmp_path) if entry == "current" else entry]
    monkeypatch.setattr(sys, "path", [*first, *filter(None, sys.path)])
    monkeypatch.setattr(sys, "argv", ["bn_lightning", "inspect", "no.ckpt"])
    with pytest.raises(SystemExit):
        cli.main()
    assert sys.path.index(str(tmp_path)) == len(sys.path) - 1
    assert "" not in sys.path


def test_a_project_in_the_current_folder_stays_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shoes").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "argv", ["shoes", "inspect", "no.ckpt"])
    with pytest.raises(SystemExit):
        cli.main("shoes.experiment:EXPERIMENT")
    assert sys.path[0] == str(tmp_path)


def test_the_console_script_uses_its_own_name(tmp_path):
    script = Path(sys.executable).with_name("bn_lightning")
    if not script.exists():
        pytest.skip("the package is not installed in this environment")

    def run(*arguments):
        return subprocess.run([script, *arguments], capture_output=True, text=True, cwd=tmp_path)

    assert run("--version").stdout == f"bn_lightning {__version__}\n"
    assert run("--help").stdout.startswith("usage: bn_lightning COMMAND")


# Exit codes


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Return a function that runs a command that raises an error, and returns the exit code."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "COMMANDS", {"fail": ("planted_command", "raises")})
    monkeypatch.setattr(sys, "argv", ["x", "fail", "--fast"])

    def run(error, before=None):
        module = type(sys)("planted_command")

        def main(arguments, experiment):
            assert (arguments, experiment) == (["fail", "--fast"], FRIEDMAN)
            if before is None:
                raise error
            try:
                raise before
            except BaseException:
                # Lightning does the same. The first error is the context of the second.
                raise error  # noqa: B904

        module.main = main
        monkeypatch.setitem(sys.modules, "planted_command", module)
        with pytest.raises(SystemExit) as exited:
            cli.main(FRIEDMAN)
        return exited.value.code

    return run


@pytest.mark.parametrize(
    ("error", "code", "printed"),
    [
        (UserError("no such norm"), 2, "error: no such norm\n"),
        (RunFailed("a full disk"), 1, "error: a full disk\n"),
        (ModuleNotFoundError("x", name="scipy"), 2, "error: fail needs scipy, which is not"),
        (KeyboardInterrupt(), 130, ""),
        (Stopped(143), 143, ""),
        (Stopped(0), 0, ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes(planted, capsys, error, code, printed):
    assert planted(error) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(printed) and "Traceback" not in err


def test_an_interrupt_that_lightning_turns_into_an_exit_is_130(planted):
    assert planted(SystemExit(1), before=KeyboardInterrupt()) == 130
    assert planted(SystemExit(1), before=ValueError()) == 1


def test_other_missing_modules_keep_their_traceback(planted):
    with pytest.raises(ModuleNotFoundError, match="typo"):
        planted(ModuleNotFoundError("typo", name="typo"))


@pytest.mark.parametrize("form", ["csv", "table"])
def test_predict_exits_quietly_if_its_reader_stops(trained, tmp_path, monkeypatch, capsys, form):
    monkeypatch.chdir(tmp_path)
    best = trained[0] / "checkpoints" / "best.ckpt"
    arguments = on_cpu(("predict", "--format", form, "--ckpt_path", best))
    monkeypatch.setattr(sys, "argv", ["bn_lightning", *arguments])
    reading, writing = os.pipe()
    os.close(reading)
    with (
        os.fdopen(writing, "w") as stdout,
        contextlib.redirect_stdout(stdout),
        pytest.raises(SystemExit) as exited,
    ):
        cli.main()
    assert exited.value.code == 141
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_fit_exits_quietly_if_its_reader_stops(tmp_path):
    given = [sys.executable, "-m", "bn_lightning", *on_cpu(("fit", *QUICK))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(given, **pipes, cwd=tmp_path) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        assert b"cannot continue" not in err and b"Traceback" not in err
        assert b"BrokenPipeError" not in err
    assert process.returncode == 141
