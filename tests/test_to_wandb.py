"""tools/to_wandb.py with a stand-in for W&B, whose own package is not installed for tests."""

import importlib
import json
import pathlib
import sys
import types

import pytest

LINES = [
    {"phase": "baseline", "step": 0, "eval/success_rate": 0.0},
    {"phase": "sft", "step": 10, "loss/action": 1.5},
    {"phase": "rl", "step": 1, "loss/policy": -0.25},
]


class Run:
    """A run of W&B; `step` is where an earlier process has left it."""

    def __init__(self, step: int):
        self.step, self.logged, self.axes, self.finished = step, [], {}, 0

    def define_metric(self, name, step_metric=None, hidden=False):
        self.axes[name] = step_metric

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def to_wandb(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "tools")
    return importlib.import_module("to_wandb")


@pytest.fixture
def wandb(monkeypatch):
    """The module, whose runs begin where `started` says; `given` is what `init` was called with."""
    module = types.SimpleNamespace(started=0, runs=[], given=[])

    def init(**options):
        module.given.append(options)
        module.runs.append(Run(module.started))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "quick"
    root.mkdir()
    record = {"config": {"seed": 3, "rl": {"group_size": 8}}, "versions": {"jax": "0.10"}, "facts": {}}
    (root / "config.json").write_text(json.dumps(record))
    write(root / "metrics.jsonl", LINES)
    return root


def test_every_line_is_a_step_and_every_phase_has_its_own_axis(to_wandb, wandb, folder, capsys):
    assert to_wandb.main([str(folder), "--project", "p"]) == 0
    (run,), (given,) = wandb.runs, wandb.given
    assert run.logged == [
        (0, {"baseline/step": 0, "baseline/eval/success_rate": 0.0}),
        (1, {"sft/step": 10, "sft/loss/action": 1.5}),
        (2, {"rl/step": 1, "rl/loss/policy": -0.25}),
    ]
    assert run.axes["rl/*"] == "rl/step" and run.axes["sft/*"] == "sft/step" and run.finished == 1
    assert given["config"] == {"seed": 3, "rl": {"group_size": 8}, "versions": {"jax": "0.10"}, "facts": {}}
    assert (given["project"], given["name"], given["resume"]) == ("p", "quick", "allow")
    assert f"3 lines of metrics are in W&B's run {given['id']}" in capsys.readouterr().out


def test_what_was_sent_is_not_sent_again(to_wandb, wandb, folder):
    wandb.started = 2
    to_wandb.main([str(folder), "--project", "p"])
    to_wandb.main([str(folder), "--project", "p"])
    assert [step for step, _ in wandb.runs[0].logged] == [2]
    assert wandb.given[0]["id"] == wandb.given[1]["id"] != to_wandb.run_id(folder.parent / "other" / "quick")


def test_what_comes_is_sent_until_ctrl_c_and_a_run_that_goes_back_is_waited_for(to_wandb, wandb, folder, monkeypatch):
    """Killed after its third line, it goes on from a checkpoint after the first; a fourth line is half written."""
    path = folder / "metrics.jsonl"
    further = {"phase": "rl", "step": 2, "loss/policy": -0.5}
    contents = [LINES[:1], LINES, [*LINES, further]]

    def sleep(seconds):
        if not contents:
            raise KeyboardInterrupt
        write(path, contents.pop(0))
        with path.open("a") as file:
            file.write('{"phase": "rl", "st')

    monkeypatch.setattr(to_wandb, "time", types.SimpleNamespace(sleep=sleep))
    assert to_wandb.main([str(folder), "--project", "p", "--follow"]) == 0
    (run,) = wandb.runs
    assert [step for step, _ in run.logged] == [0, 1, 2, 3] and run.logged[3][1]["rl/loss/policy"] == -0.5
    assert run.finished == 1


def test_what_is_missing_gets_a_sentence(to_wandb, wandb, folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        to_wandb.main([str(folder.parent), "--project", "p"])
    assert "holds no config.json: name the workdir of a run" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        to_wandb.main([str(folder), "--project", "p"])
    assert "pip install wandb" in capsys.readouterr().err
