"""Commands that once went wrong for users: a handful of tests/data/cases, and the script that runs all of them."""

import json

import pytest

from benchmarks import cases
from benchmarks.processes import MARK, end, marked, start

CHEAP = ["clash_silent", "clash_envs_package", "syntax_error"]


@pytest.mark.parametrize("name", CHEAP)
def test_a_case_has_its_outcome(name):
    assert cases.run_case(cases.CASES / name) == ""


def test_every_case_is_whole():
    folders = [path for path in cases.CASES.iterdir() if path.is_dir()]
    assert len(folders) > 80
    known = {"exit", "stderr", "stdout", "said", "not", "files", "absent", "text"}
    for folder in folders:
        about, *outcomes = map(json.loads, (folder / "want").read_text().splitlines())
        assert about["situation"] and about.keys() <= {"situation", "timeout", "needs"}, folder
        assert outcomes and all(outcome and outcome.keys() <= known for outcome in outcomes), folder
        for outcome in outcomes:  # every pattern is one
            cases.differences(outcome, 0, "", "", folder)
        assert "python" in (folder / "command.txt").read_text(), folder


@pytest.fixture
def case(tmp_path):
    """Return a function that makes a case from a command and its outcomes."""

    def make(command, *outcomes, **about):
        folder = tmp_path / "case"
        folder.mkdir(exist_ok=True)
        (folder / "command.txt").write_text(command)
        lines = [{"situation": "a test", **about}, *outcomes]
        (folder / "want").write_text("\n".join(map(json.dumps, lines)) + "\n")
        return folder

    return make


def test_any_of_the_outcomes_is_right(case):
    command = "echo hello; echo well >&2; touch made; exit 3"
    assert cases.run_case(case(command, {"exit": 0}, {"exit": [2, 3], "stdout": "^hello", "files": ["ma*"]})) == ""
    for outcome, said in {
        "exit 3 where [0]": {"exit": 0},
        "stderr lacks hello": {"stderr": "hello"},
        "printed 'well'": {"not": "w.*"},
        "no other": {"files": ["other"]},
        "made is there": {"absent": ["made"]},
        "made lacks x": {"text": {"made": "x"}},
    }.items():
        assert outcome in cases.run_case(case(command, said))
    assert "Traceback" in cases.run_case(case("echo 'Traceback (most recent call last)'", {"exit": 0}))


def test_a_case_whose_package_is_missing_is_left_out(case, tmp_path, capsys):
    case("exit 1", {"exit": 0}, needs="no_such_package")
    assert cases.main([str(tmp_path)]) == 0 and "0 of 0 passed, 1 left out" in capsys.readouterr().out
    case("exit 1", {"exit": 0})
    assert cases.main([str(tmp_path)]) == 1 and "0 of 1 passed" in capsys.readouterr().out


def test_a_command_that_hangs_is_ended_with_all_that_it_started(case):
    orphan = "(setsid sleep 100 &) ; sleep 100"
    assert "exit hang" in cases.run_case(case(orphan, {"exit": 0}, timeout=0.5))


def test_processes_left_behind_are_found_and_ended(tmp_path):
    process, mark = start(f"(setsid sleep 100 &); test -n ${MARK}", tmp_path)
    assert process.wait(20) == 0
    assert len(end(process, mark)) == 1 and marked(mark) == []
