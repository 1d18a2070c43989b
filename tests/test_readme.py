"""What the README says is so: its commands run, its example works, its lists are whole."""

import re
import shlex
import shutil

import pytest
import torch

from bn_lightning import cli, norms

from .conftest import REPOSITORY, command

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
FIT = sorted(set(re.findall(r"^python -m bn_lightning (fit .*)$", README + cli.usage(), flags=re.M)))


@pytest.mark.parametrize("line", FIT)
def test_fit_commands_run(main, trained, tmp_path, line):
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    shutil.copytree(trained[0], tmp_path / "runs" / "lenet" / "0")
    (tmp_path / "my_norms.py").write_text(example())
    goes_on = "--resume" in line or "--ckpt_path" in line
    arguments = (
        *shlex.split(line),
        "--data.source",
        "sample",
        *(() if goes_on else ("--trainer.fast_dev_run", "true")),
    )
    if "ddp" in line:  # its second process is begun with this one's command
        assert "test acc" in command(*arguments, cwd=tmp_path).stdout
        return
    code, out, err = main(*arguments)
    assert code == 0, err
    assert "test acc" in out


def example():
    [code] = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    return code


def test_the_norm_of_the_example_is_what_it_says(tmp_path, monkeypatch):
    (tmp_path / "example_of_readme.py").write_text(example())
    monkeypatch.syspath_prepend(tmp_path)
    layer = norms.make("example_of_readme.RMSNorm", num_features=6, num_dims=4)
    y = layer(5 * torch.randn(4, 6, 3, 3))
    torch.testing.assert_close(y.square().mean(1), torch.ones(4, 3, 3), atol=1e-3, rtol=0)


def test_lists_are_whole():
    for path in (REPOSITORY / "bn_lightning").glob("[a-z]*.py"):
        assert f"    {path.name} " in README
    for path in (REPOSITORY / "configs").glob("*.yaml"):
        assert f"(configs/{path.name})" in README
        assert f"fit --config configs/{path.name}" in path.read_text()
    for name in cli.COMMANDS:
        assert f"| `python -m bn_lightning {name}" in README


def test_links_lead_somewhere():
    for page in (REPOSITORY / "README.md", REPOSITORY / ".github" / "README.zh-CN.md"):
        for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), link
