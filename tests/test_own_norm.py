"""The guide "Your own norm": its layer, its tests, and what `check` prints about them."""

import re
import shlex
import sys

import pytest
import torch

from bn_lightning import UserError, replace_norms
from bn_lightning.norms import names, registry
from bn_lightning.norms.check import examination
from bn_lightning.testing import norm_checks
from tests.conftest import REPOSITORY
from tests.test_readme import CHINESE, README, blocks, example

pytest_plugins = ["pytester"]
# pytester forgets modules that are imported while it runs tests, but their package keeps them.
examination.properties()

GUIDE = REPOSITORY / ".github/guides/own-norm.md"
PROGRAM = "python -m bn_lightning "
LAYER, TESTS = blocks("python", [GUIDE])
[*REPAIRS, MISTAKE, NAME, NAMES] = blocks("diff", [GUIDE])
# Fewer cases of the same properties.
SHORT = TESTS.replace("identical=True", "identical=True, num_dims=[2]")
FEW = ("accepts_input", "normalization", "empty_batch", "large_mean")


def changed(text, *diffs):
    """Apply diffs of the guide to a text."""
    for diff in diffs:
        lines = diff.splitlines(keepends=True)
        before, after = (
            "".join(line[1:] for line in lines if line[0] in (sign, " ")) for sign in "-+"
        )
        assert before in text
        text = text.replace(before, after)
    return text


REPAIRED = changed(LAYER, *REPAIRS)


def printed(mark, page=GUIDE):
    """Return the output that follows a mark in a page."""
    text = page.read_text(encoding="utf-8")
    return re.search(rf"^<!-- {mark} -->\n```\n(.*?)^```$", text, flags=re.S | re.M)[1]


def normalized(text):
    """Return the lines of a report without differences, which depend on the machine."""
    lines = [re.sub(r"^(  \w+ +[a-zA-Z/]+) .*", r"\1", line.rstrip()) for line in text.splitlines()]
    return [line for line in lines if line]


def assert_printed(expected, found):
    """Check that the parts between lines of `...` are in an output, in this order."""
    found, start = normalized(found), 0
    for part in "\n".join(normalized(expected)).split("\n...\n"):
        lines = [line for line in part.splitlines() if line.strip() != "..."]
        starts = range(start, len(found) - len(lines) + 1)
        at = [i for i in starts if found[i : i + len(lines)] == lines]
        assert at, "\n".join([*lines, "is not in", *found[start:]])
        start = at[0] + len(lines)


def forget():
    """Remove the modules of the guide, which each test writes anew."""
    for name in ("my_norms", "test_my_norms"):
        sys.modules.pop(name, None)


@pytest.fixture
def check(main, tmp_path, monkeypatch):
    """Return a function that runs a command on a layer, and returns exit code and output."""
    monkeypatch.syspath_prepend(tmp_path)

    def run(layer, *arguments):
        (tmp_path / "my_norms.py").write_text(layer)
        forget()
        code, out, err = main(*arguments)
        assert "Traceback" not in err
        return code, out

    return run


def commands(start):
    """Return the arguments of the commands of the guide that start with these words."""
    lines = "".join(blocks("sh", [GUIDE])).splitlines()
    return [shlex.split(x.removeprefix(PROGRAM)) for x in lines if x.startswith(PROGRAM + start)]


def test_the_mistake_is_reported_as_printed(check):
    mistaken = changed(LAYER, REPAIRS[0], MISTAKE, REPAIRS[1])
    _, report, reproduce = commands("check")
    code, out = check(mistaken, *report)
    assert code == 1
    assert_printed(printed("mistake"), out)

    code, script = check(mistaken, *reproduce)
    assert (code, script) == (1, printed("reproduce"))
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        exec(script, {})
    code, out = check(REPAIRED, *reproduce)
    assert code == 0 and "normalization: pass" in out
    exec(script, {})
    code, out = check(REPAIRED, *report)
    assert code == 0 and out.endswith("\nmy_norms.OnePass: 3 pass\n")


def test_a_wrong_command_has_exit_code_2(check):
    arguments = (*commands("check")[0], "--num_dims", "2")
    assert check(LAYER, *arguments, "--property", "mod")[0] == 2
    assert check("class OnePass:\n    def __init__(self, x): pass", *arguments)[0] == 2


@pytest.fixture
def run_tests(pytester):
    """Return a function that runs the tests of the guide on a layer."""

    def run(layer, *arguments, tests=SHORT):
        pytester.makepyfile(my_norms=layer, test_my_norms=tests)
        forget()
        return pytester.inline_run("-p", "no:cacheprovider", *arguments)

    return run


def outcomes(result):
    """Return the number of passed, of skipped or expectedly failed, and of failed cases."""
    return tuple(map(len, result.listoutcomes()))


def test_a_known_failure_is_expected(run_tests):
    result = run_tests(REPAIRED, "-k", " or ".join(FEW))
    passed, skipped, failed = result.listoutcomes()
    ids = [{re.search(r"\[(\w+)\]", r.nodeid)[1] for r in part} for part in (passed, skipped)]
    assert ids == [{"accepts_input", "normalization"}, {"empty_batch", "large_mean"}]
    [known] = [r for r in skipped if "large_mean" in r.nodeid]
    assert known.wasxfail.startswith("E[x²]") and not failed


def test_a_mistake_and_a_known_failure_that_passes_are_failures(run_tests):
    accurate = changed(LAYER, REPAIRS[0], MISTAKE, REPAIRS[1])
    result = run_tests(accurate, "-k", "normalization or accepts_input")
    assert outcomes(result) == (1, 0, 1)
    tests = SHORT.replace('{"large_mean"', '{"mode"')
    result = run_tests(REPAIRED, "-k", "test_one_pass and mode and not modes", tests=tests)
    _, _, failed = result.listoutcomes()
    assert [r.nodeid.partition("::")[2] for r in failed] == ["test_one_pass[mode]"]
    assert "XPASS(strict)" in str(failed[0].longrepr)


def test_an_unknown_known_failure_is_an_error():
    with pytest.raises(UserError, match="Unknown property 'large_men'"):
        norm_checks(torch.nn.Identity, known_failures={"large_men": "a typing error"})


def test_the_name_and_the_names_of_values_are_those_of_the_registry(monkeypatch):
    for name, diff in (("registry", NAME), ("names", NAMES)):
        changed((REPOSITORY / f"bn_lightning/norms/{name}.py").read_text(encoding="utf-8"), diff)
    scope = {}
    exec(REPAIRED, scope)
    entry = re.search(r"(Names\(.*\)),$", NAMES.splitlines()[1])[1]
    monkeypatch.setitem(registry.NORMS, "one_pass", scope["OnePass"])
    monkeypatch.setitem(names.NAMES, scope["OnePass"], eval(entry, {"Names": names.Names}))
    old = torch.nn.BatchNorm2d(6)
    torch.nn.init.normal_(old.weight)
    torch.nn.init.normal_(old.bias)
    x = 3 * torch.randn(8, 6, 5, 4) + 1
    old(x)
    expected = old.eval()(x)
    network = torch.nn.Sequential(old)
    replace_norms(network, "one_pass")
    assert type(network[0]) is scope["OnePass"]
    torch.testing.assert_close(network(x), expected)


@pytest.mark.slow
def test_the_report_is_as_printed(check):
    code, out = check(LAYER, *commands("check")[0])
    assert code == 1
    assert_printed(printed("check"), out)


@pytest.mark.slow
def test_the_report_of_the_readme_is_as_printed(check):
    code, out = check(example(), "check", "my_norms.RMSNorm")
    assert code == 0
    assert_printed(printed("check", README), out)
    assert_printed(printed("check", CHINESE), out)


@pytest.mark.slow
def test_all_tests_of_the_guide_pass(run_tests):
    passed, skipped, failed = outcomes(run_tests(REPAIRED, tests=TESTS))
    assert passed > 40 and skipped < 10 and not failed


@pytest.mark.slow
def test_the_norm_is_trained_and_compared(check):
    short = ("--data.source", "sample", "--trainer.max_epochs", "1")
    short += ("--trainer.limit_train_batches", "4")
    for arguments in (*commands("fit"), *commands("compare")):
        arguments = [{"5": "2"}.get(argument, argument) for argument in arguments]
        code, out = check(REPAIRED, *arguments, *short)
        assert code == 0
    assert "6 runs, 0 failed" in out and "my_norms.OnePass" in out
