"""The environment doctor names the argument that is wrong, and suggests limits that a run takes."""

import importlib
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def doctor(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("env_doctor")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--env=textworld", '--params={"family":"alfworld"}'], "--params: games of 'alfworld' are played by --env=alf"),
        (["--env=textworld", f"--tasks={ROOT / 'README.md'}"], "README.md, line 1: expected a JSON object"),
        (["--env=textworld", f"--tasks={ROOT / 'docs' / 'rollout.png'}"], "rollout.png cannot be read"),
        (["--env=textworld", "--tasks=/nope"], "the file of tasks /nope cannot be read.*No such file"),
        (["--env=textworld", f"--cache_dir={ROOT / 'README.md' / 'x'}"], "--cache_dir=.*README.md/x cannot be made"),
        (["--env=nomod:X"], "--env=nomod:X .* the module 'nomod' cannot be imported"),
        (["--env=collections:OrderedDict"], "--env=collections:OrderedDict .* the class has no close, reset, step"),
        (["--env=textworld", '--options={"remember":1}'], "--env=textworld .*remember must be True or False"),
    ],
)
def test_a_wrong_argument_is_named(doctor, monkeypatch, arguments, words):
    monkeypatch.setattr("sys.argv", ["env_doctor.py", *arguments])
    with pytest.raises(SystemExit, match=words):
        doctor.main()


def test_no_seconds_are_refused_before_anything_is_measured(doctor, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["env_doctor.py", "--env=textworld", "--turn_s=0"])
    with pytest.raises(SystemExit):
        doctor.main()
    assert "--turn_s: expected seconds, more than 0, got '0'" in capsys.readouterr().err


def test_a_step_may_be_a_run_of_tests(doctor):
    assert doctor._longest_step("swe", {}) == 70.0
    assert doctor._longest_step("swe", {"test_limit_s": 5.0}) == 15.0
    assert doctor._longest_step("textworld", {}) == 0.0


def test_why_games_were_set_aside_is_told(doctor, monkeypatch, capsys):
    pytest.importorskip("gymnasium")
    expert = "gymnasium_worlds:no_way"
    params = {"family": "gymnasium", "id": "gymnasium_worlds:Walk-v0", "actions": ["left", "right"], "expert": expert}
    command = ["env_doctor.py", "--env=gymnasium", f"--params={json.dumps(params)}", "--num_tasks=2"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="no task is usable"):
        doctor.main()
    assert "2 of 2 games set aside, e.g.: the expert finds no way" in capsys.readouterr().err
