"""The command `check`: the order of the table, exit codes, and the JSON report."""

import json

import pytest

from bn_lightning import UserError, terminal
from bn_lightning.norms.check import command, identity, measurements, processes, properties
from bn_lightning.norms.check.findings import SECTIONS, Finding
from tests.conftest import command as start_command
from tests.conftest import run_here
from tests.support.processes import start as start_processes

# `check` does not import the experiment.
EXPERIMENT = "nowhere:EXPERIMENT"
BIASED = "tests.support.faulty_norms.RunningVarianceIsBiased"


def test_each_check_is_in_the_table_once_and_sections_are_contiguous():
    checks = command.all_checks()
    sections = [check.section for check in checks]
    assert list(dict.fromkeys(sections)) == list(SECTIONS)
    assert sections == sorted(sections, key=list(SECTIONS).index)
    assert len({check.question for check in checks}) == len(checks) == 25
    assert checks[0] is properties.keeps_shape_and_dtype
    assert checks[16] is processes.two_processes_equal_one
    assert checks[17] is identity.same_output_in_training
    assert checks[-1] is measurements.memory_saved_for_the_backward_pass


def three_checks():
    return [
        properties.follows_module_training,
        identity.same_running_stats,
        measurements.memory_saved_for_the_backward_pass,
    ]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("custom",), 0),
        (("custom", "--identical"), 0),
        (("article",), 1),
        ((BIASED,), 0),
        ((BIASED, "--identical"), 1),
    ],
)
def test_exit_code_is_1_if_a_property_fails_or_an_identity_differs(
    monkeypatch, capsys, arguments, code
):
    monkeypatch.setattr(command, "all_checks", three_checks)
    with pytest.raises(SystemExit) as exit:
        command.main(["check", *arguments], EXPERIMENT)
    assert exit.value.code == code
    printed = capsys.readouterr().out
    for title in SECTIONS.values():
        assert f"\n{title}\n" in printed
    assert printed.splitlines()[-1].startswith(f"{arguments[0]}: 1 ")


def test_json_report_has_the_findings_for_the_norm_with_its_arguments(monkeypatch, capsys):
    monkeypatch.setattr(command, "all_checks", three_checks)
    with pytest.raises(SystemExit) as exit:
        command.main(["check", "group", "--norm_args.num_groups", "1", "--json"], EXPERIMENT)
    assert exit.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["norm"], report["passed"]) == ("group", True)
    assert [set(finding) for finding in report["findings"]] == [
        {"section", "question", "verdict", "difference", "note"}
    ] * 3


def test_help_starts_with_the_name_of_the_program(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "program", lambda: "python -m shoes")
    with pytest.raises(SystemExit) as exit:
        command.main(["check", "--help"], EXPERIMENT)
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m shoes check ")


def test_a_note_is_printed_below_its_line():
    finding = Finding("property", "a question", "FAIL", 0.123, "a cause")
    first, second = command.line(finding).splitlines()
    assert first == f"  {'a question':66}     FAIL      0.12"
    assert second == "      a cause"


@pytest.mark.parametrize(
    ("name", "norm_args", "message"),
    [
        ("custm", {}, "Unknown norm 'custm'"),
        ("custom", {"epsilon": 1}, "does not accept norm_args"),
    ],
)
def test_a_wrong_name_or_argument_is_an_error_and_not_a_finding(name, norm_args, message):
    with pytest.raises(UserError, match=message):
        next(command.examine(name, norm_args))


def test_an_unknown_norm_exits_with_2(main):
    code, _, error = main("check", "custm")
    assert code == 2
    assert "Unknown norm 'custm'" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "arguments", "code"),
    [
        (start_command, ("custom", "--identical"), 0),
        (run_here, ("builtin", "--identical"), 0),
        (run_here, ("article",), 1),
        (run_here, ("group", "--norm_args.num_groups", "1"), 0),
    ],
)
def test_command_runs_all_checks(run, arguments, code, tmp_path, monkeypatch):
    # This speeds up the checks in this process. A new process spawns, as for a user.
    monkeypatch.setattr(processes, "spawn", start_processes)
    done = run("check", *arguments, "--json", cwd=tmp_path, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] == (code == 0)
    assert len(report["findings"]) == len(command.all_checks())
    if arguments[0] in ("custom", "builtin"):
        assert {f["verdict"] for f in report["findings"]} == {"pass", "same", "measured"}
