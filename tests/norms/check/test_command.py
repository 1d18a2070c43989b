"""The command `check`: its output, exit codes, and the JSON report."""

import json
import re

import pytest

from bn_lightning import terminal
from bn_lightning.norms import registry
from bn_lightning.norms.check import command, examination, processes
from bn_lightning.norms.check.findings import SECTIONS, Finding
from tests.conftest import command as start_command
from tests.conftest import run_here
from tests.support.processes import start as start_processes

# `check` does not import the experiment.
EXPERIMENT = "nowhere:EXPERIMENT"
BIASED = "tests.support.planted_state.BiasedRunningVar"
SOME = ("--property", "mode", "same_running_statistics", "memory", "--num_dims", "4")


def check(*arguments):
    """Run the command in this process, and return its exit code."""
    try:
        command.main(["check", *arguments], EXPERIMENT)
    except SystemExit as exit:
        return exit.code
    return 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("custom",), 0),
        (("custom", "--identical"), 0),
        (("article",), 1),
        ((BIASED,), 0),
        ((BIASED, "--identical"), 1),
        (("group", "--identical"), 1),
    ],
)
def test_exit_code_is_1_if_a_property_fails_or_the_norm_should_be_identical(
    capsys, arguments, code
):
    assert check(*arguments, *SOME) == code
    printed = capsys.readouterr().out
    for section in ("modes", "identity", "measured"):
        assert f"\n{SECTIONS[section]}\n" in printed
    assert f"\n{arguments[0]}: " in printed


def test_the_kind_is_printed_for_each_number_of_dimensions(capsys):
    assert check("instance", "--property", "counter") == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("2 dimensions: not accepted (UserError: The norm 'instance' cannot")
    text = " ".join(" ".join(others).split())
    assert "4 dimensions: statistics over height, width for each sample and channel;" in text


def test_identity_is_examined_for_batch_norms_only():
    for name, expected in (("builtin", True), ("layer", False)):
        norm = examination.prepare(registry.find(name), name, num_dims=[4])
        chosen = examination.Examination(norm).properties()
        assert any(p.section == "identity" for p in chosen) == expected


def test_json_report(capsys):
    arguments = ("--norm_args.num_groups", "3", "--num_dims", "2", "4", "--json")
    assert check("group", *arguments, "--property", "eps", "momentum", "second_derivative") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["norm"], report["passed"]) == ("group", True)
    assert list(report["kinds"]) == ["2", "4"]
    assert "3 groups of channels" in report["kinds"]["4"]
    assert [(f["name"], f["verdict"]) for f in report["findings"]] == [
        ("momentum", "n/a"),
        ("eps", "pass"),
        ("second_derivative", "pass"),
    ]


def test_list_prints_each_property_without_a_norm(capsys):
    assert check("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [p.name for p in examination.properties()]


def test_help_starts_with_the_name_of_the_program(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "program", lambda: "python -m shoes")
    assert check("--help") == 0
    assert capsys.readouterr().out.startswith("usage: python -m shoes check ")


def test_a_note_and_the_input_are_printed_below_the_line():
    finding = Finding("results", "mode", "FAIL", 0.123, "a cause\na second line")
    assert command.line(finding).splitlines() == [
        f"  {'mode':32}     FAIL      0.12",
        "      a cause",
        "      a second line",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("custm",), "Unknown norm 'custm'"),
        ((), "The norm to check is missing"),
        (("custom", "--norm_args.epsilon", "1"), "does not accept norm_args"),
        (("custom", "--num_dims", "1"), "num_dims is 1; it must be one of 2, 3, 4 and 5."),
        (("custom", "--property", "mod"), "Unknown property 'mod'. Did you mean mode?"),
        (("custom", "--reproduce", "mod"), "Unknown property 'mod'. Did you mean mode?"),
        (("torchvision.models.resnet18",), "'torchvision.models.resnet18' cannot be built: "),
        (("torch.nn.functional.relu",), "cannot be called as norm(num_features=..."),
        (("tests.norms.check.test_command.halves",), "is not a normalization layer: for input"),
        (("tests.norms.check.test_command.raises",), "line 3: raise KeyError"),
    ],
)
def test_what_is_no_norm_exits_with_2_on_one_screen(main, arguments, message):
    code, output, error = main("check", *arguments)
    assert (code, output) == (2, "")
    assert re.sub(r"line \d+", "line 3", message) in re.sub(r"line \d+", "line 3", error)
    assert "Traceback" not in error
    assert len(error.splitlines()) < 20


def halves(num_features, num_dims):
    from torch import nn

    return nn.AvgPool2d(2) if num_dims == 4 else nn.AvgPool1d(2)


def raises(num_features, num_dims):
    raise KeyError(num_features)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "arguments", "code"),
    [
        (start_command, ("custom", "--identical"), 0),
        (run_here, ("builtin", "--identical"), 0),
        (run_here, ("article",), 1),
        (run_here, ("renorm", "--norm_args.warmup", "0"), 0),
        (run_here, ("ghost", "--norm_args.virtual_batch_size", "4"), 0),
        (run_here, ("instance",), 0),
    ],
)
def test_command_examines_all_properties(run, arguments, code, tmp_path, monkeypatch):
    # This speeds up the checks in this process. A new process spawns, as for a user.
    monkeypatch.setattr(processes, "spawn", start_processes)
    done = run("check", *arguments, "--json", cwd=tmp_path, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] == (code == 0)
    verdicts = {f["name"]: f["verdict"] for f in report["findings"]}
    if arguments[0] in ("custom", "builtin"):
        assert len(verdicts) == len(examination.properties())
        # The time is not measured while other programs run.
        verdicts.pop("time_per_step")
        assert verdicts.pop("training_by_running_statistics") == "n/a"
        assert set(verdicts.values()) == {"pass", "same", "measured"}
    if arguments[0] == "article":
        failed = [name for name, verdict in verdicts.items() if verdict == "FAIL"]
        differs = [name for name, verdict in verdicts.items() if verdict == "DIFFERS"]
        assert failed == ["mode"]
        assert "same_running_statistics" in differs
