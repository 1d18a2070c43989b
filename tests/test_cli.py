import subprocess
import sys

import pytest

from bn_lightning import __version__, cli
from tests.conftest import command


def without_torch(*arguments):
    """What the command line prints, in a process that fails when it has imported torch."""
    code = f"import sys; sys.argv[1:] = {list(arguments)}; from bn_lightning.cli import main; main()"
    code += "; assert 'torch' not in sys.modules"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_each_command_and_needs_no_torch(arguments):
    printed = without_torch(*arguments)
    assert printed == cli.usage()
    assert all(f"\n  {name} " in printed for name in cli.COMMANDS)


def test_version():
    assert without_torch("--version") == f"bn_lightning {__version__}\n"


def test_unknown_command(main):
    code, out, err = main("fti")
    assert (code, out) == (2, "")
    assert err.startswith("error: There is no command 'fti'. There are fit, ")


@pytest.mark.parametrize("name", ["fit", "test"])
def test_help_of_a_command(tmp_path, name):
    printed = command(name, "--help", cwd=tmp_path).stdout
    for setting in ("--model.norm", "--model.lr", "--data.source", "--data.val_images", "--trainer.max_epochs",
                    "--seed_everything", "--ckpt_path", "--name"):  # fmt: skip
        assert setting in printed
    assert "`custom` (from scratch)" in printed or "custom" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["optuna", "matplotlib"])
def test_a_command_without_its_extra_says_what_to_install(package):
    code = f"import sys; sys.modules['{package}'] = None; sys.argv[1:] = ['sweep']; "
    code += "from bn_lightning.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f'error: sweep needs {package}, which is not installed: pip install -e ".[study]"\n'


def test_console_script(tmp_path):
    from pathlib import Path

    script = Path(sys.executable).with_name("bn_lightning")
    if not script.exists():
        pytest.skip("the package is not installed in this environment")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == f"bn_lightning {__version__}\n"
