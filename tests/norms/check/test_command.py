"""The command `check`: the order of the table, exit codes, and the report."""

import json

import pytest

from bn_lightning import UserError, terminal
from bn_lightning.norms.check import command, identity, measurements, processes, properties
from bn_lightning.norms.check.findings import SECTIONS, Finding
from tests.conftest import command as run_command

EXPERIMENT = "nowhere:EXPERIMENT"  # `check` does not import it.
BIASED = "tests.support.faulty_norms.RunningVarianceIsBiased"


def test_the_table_has_each_check_once_and_section_by_section():
    checks = command.all_checks()
    sections = [check.section for check in checks]
    assert list(dict.fromkeys(sections)) == list(SECTIONS)
    assert sections == sorted(sections, key=list(SECTIONS).index)
    assert len({check.question for check in checks}) == len(checks) == 25
    assert checks[0] is properties.keeps_shape_and_dtype
    assert checks[16] is processes.two_processes_equal_one
    assert checks[17] is identity.same_output_in_training
    assert checks[-1] is measurements.memory_kept_for_the_backward_pass


def three_checks():
    return [
        properties.follows_module_training,
        identity.same_running_stats,
        measurements.memory_kept_for_the_backward_pass,
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
def test_exit_codes(monkeypatch, capsys, arguments, code):
    monkeypatch.setattr(command, "all_checks", three_checks)
    with pytest.raises(SystemExit) as exit:
        command.main(["check", *arguments], EXPERIMENT)
    assert exit.value.code == code
    printed = capsys.readouterr().out
    for title in SECTIONS.values():
        assert f"\n{title}\n" in printed
    assert printed.splitlines()[-1].startswith(f"{arguments[0]}: 1 ")


def test_norm_args_and_json(monkeypatch, capsys):
    monkeypatch.setattr(command, "all_checks", three_checks)
    with pytest.raises(SystemExit) as exit:
        command.main(["check", "group", "--norm_args.num_groups", "1", "--json"], EXPERIMENT)
    assert exit.value.code == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["norm"], report["passed"]) == ("group", True)
    assert [set(finding) for finding in report["findings"]] == [
        {"section", "question", "verdict", "difference", "note"}
    ] * 3


def test_help_has_the_name_of_the_program(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "program", lambda: "python -m shoes")
    with pytest.raises(SystemExit) as exit:
        command.main(["check", "--help"], EXPERIMENT)
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m shoes check ")


def test_a_line_has_its_note_below():
    finding = Finding("property", "a question", "FAIL", 0.123, "a cause")
    first, second = command.line(finding).splitlines()
    assert first == f"  {'a question':66}     FAIL      0.12"
    assert second == "      a cause"


@pytest.mark.parametrize(
    ("name", "norm_args", "said"),
    [
        ("custm", {}, "There is no norm 'custm'"),
        ("custom", {"epsilon": 1}, "does not take norm_args"),
    ],
)
def test_a_mistake_of_the_user_is_no_finding(name, norm_args, said):
    with pytest.raises(UserError, match=said):
        next(command.examine(name, norm_args))


def test_the_command_refuses_what_is_no_norm(main):
    code, _, error = main("check", "custm")
    assert code == 2
    assert "There is no norm 'custm'" in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("custom", "--identical"), 0),
        (("builtin", "--identical"), 0),
        (("article",), 1),
        (("group", "--norm_args.num_groups", "1"), 0),
    ],
)
def test_the_whole_command(arguments, code, tmp_path):
    done = run_command("check", *arguments, "--json", cwd=tmp_path, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] == (code == 0)
    assert len(report["findings"]) == len(command.all_checks())
    if arguments[0] in ("custom", "builtin"):
        assert {f["verdict"] for f in report["findings"]} == {"pass", "same", "measured"}
