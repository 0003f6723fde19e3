"""tools/play.py: a run's game by hand, by its walkthrough, by chance; what is wrong is one sentence."""

import json

import pytest
from test_settings import changed


@pytest.fixture
def run(tmp_path, smoke_games) -> str:
    """As much of a workdir as there is once a run has begun."""
    config = changed("textworld_smoke.py", **{"env.cache_dir": str(smoke_games)})
    (tmp_path / "config.json").write_text(json.dumps({"config": config}))
    return str(tmp_path)


def test_a_walkthrough_wins(play, run, capsys):
    play([run, "--agent", "walkthrough"])
    name, *told, end = capsys.readouterr().out.strip().splitlines()
    assert name.startswith("custom-w2-o3-q4-basic-s1: ") and end == "won (the game ended), score 1 of 1"
    assert [line[:3] for line in told if line[1:3] == "> "] == ["1> ", "2> ", "3> ", "4> "]


def test_by_hand(play, run, capsys, monkeypatch):
    typed = iter(["?", "dance", ""])
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(prompt) or next(typed))
    play([run, "--game", "1"])
    told = capsys.readouterr().out.splitlines()
    assert asked == ["1> ", "1> ", "2> "]
    assert "look" in told and told[-2].endswith("(refused)")
    assert told[-1] == "not won (no further command), score 0 of 1"


def test_the_end_of_the_input_is_the_end(play, run, capsys, monkeypatch):
    def ended(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", ended)
    play([run])
    assert "no further command" in capsys.readouterr().out


def test_chance_has_as_many_turns_as_the_run(play, run, capsys):
    play([run, "--agent", "random", "--game", "2", "--seed", "3"])
    told = capsys.readouterr().out.splitlines()
    assert "8> " in told[-3] and told[-1] == "not won (the limit of 8 turns), score 0 of 1"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--split", "exam"], "--split exam: the run's splits are demo, test, train."),
        (["--game", "8"], "--game 8: splits.test has the games 0 to 7."),
        (["--agent", "model"], "holds no model: a run writes it at its end"),
    ],
)
def test_what_is_wrong_is_one_sentence(play, run, arguments, words):
    with pytest.raises(SystemExit, match=words):
        play([run, *arguments])


def test_a_folder_that_is_no_run(play, tmp_path):
    with pytest.raises(SystemExit, match="holds no config.json: name the workdir of a run"):
        play([str(tmp_path / "nowhere")])
