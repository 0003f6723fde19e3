"""`tools/compare_runs.py` on made-up runs whose numbers are known."""

import json
import pathlib
import runpy
import sys

import numpy as np
import pytest
from matplotlib import axes

from jaxagentrl import metrics

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "compare_runs.py"
FIRST = (1, 1, 1, 1, 1, 1, 0, 0, 0, 0)
SECOND = (1, 1, 1, 1, 1, 0, 1, 1, 1, 0)  # three that the first lost, and one lost that it won


@pytest.fixture(scope="module")
def tool():
    return runpy.run_path(str(TOOL))


def make_run(root, won, *, prefix="eval", stage="rl", **config):
    """A workdir in which the stage ended with these tasks won."""
    root.mkdir()
    with metrics.Writer(root) as writer:
        writer.write("baseline", 0, metrics.success_metrics("eval", 0, len(won)))
        writer.write("eval", 0, metrics.success_metrics("eval", 2, len(won)))
        if stage == "rl":
            for step in (1, 2):
                writer.write("rl", step, metrics.success_metrics("eval", sum(won), len(won)))
    (root / "config.json").write_text(json.dumps({"config": config}))
    (root / "trajectories").mkdir()
    # Two tasks may be the same game.
    tasks = [{"name": f"s{index}", "digest": f"{index // 2}"} for index in range(len(won))]
    lines = [json.dumps({"task": task, "won": bool(each)}) for task, each in zip(tasks, won, strict=True)]
    (root / "trajectories" / f"{prefix}_{stage}.jsonl").write_text("\n".join(lines) + "\n")
    return str(root)


def test_two_runs_are_compared_task_by_task(tool, tmp_path):
    roots = [
        make_run(tmp_path / "a", FIRST, seed=0, rl={"rate": 1}),
        make_run(tmp_path / "b", SECOND, seed=0, rl={"rate": 2}),
    ]
    first, second = tool["read"](roots)
    assert (first.success, second.success) == (0.6, 0.8)
    found = tool["compare"](first, second)
    assert (found.pairs, found.gained, found.lost) == (10, 3, 1)
    assert found.difference == pytest.approx(0.2)
    # Half a pair more in each cell: 3.5 and 1.5 of 12.
    half = 1.959964 * np.sqrt(5 - 2**2 / 12) / 12
    assert (found.low, found.high) == pytest.approx((2 / 12 - half, 2 / 12 + half))
    assert found.p == pytest.approx(2 * (4 + 1) / 2**4)  # 3 or 4 heads of 4, or as few
    back = tool["compare"](second, first)
    assert (back.gained, back.lost, back.p) == (1, 3, found.p) and back.high == pytest.approx(-found.low)
    same = tool["compare"](first, first)
    assert (same.difference, same.p) == (0, 1) and same.low < 0 < same.high


def test_seeds_of_a_config_are_one_row_and_paired_by_seed(tool, tmp_path):
    roots = [
        make_run(tmp_path / "a0", FIRST, seed=0), make_run(tmp_path / "b1", FIRST, seed=1, lr=2),
        make_run(tmp_path / "a1", SECOND, seed=1), make_run(tmp_path / "b5", FIRST, seed=5, lr=2),
    ]  # fmt: skip
    first, second = tool["read"](roots)
    assert (first.name, first.by_seed(), second.name, second.by_seed()) == ("a0", [0.6, 0.8], "b1", [0.6, 0.6])
    found = tool["compare"](first, second)  # seed 1 alone is of both
    assert (found.pairs, found.gained, found.lost) == (10, 1, 3)
    (third,) = tool["read"]([make_run(tmp_path / "c", FIRST, seed=7, lr=3)])
    assert tool["compare"](first, third) is None


def test_the_table_and_the_picture(tmp_path, monkeypatch, capsys):
    roots = [
        make_run(tmp_path / "a", FIRST, seed=0, rl={"rate": 1}), make_run(tmp_path / "a1", SECOND, seed=1, rl={"rate": 1}),
        make_run(tmp_path / "b", SECOND, stage="sft", seed=0, rl={"rate": 2}),
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *roots, "--image", str(tmp_path / "x.png")])
    runpy.run_path(str(TOOL), run_name="__main__")
    told = " ".join(capsys.readouterr().out.split())
    assert "a (2 seeds) rl 70.0 % [48.1, 85.5]: 60.0, 80.0" in told
    assert "b sft 80.0 % [49.0, 94.3] +20.0 [-18.6, +52.0] 3 1 0.62" in told
    assert "b, set otherwise than a: rl.rate: 1 → 2" in told
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_another_split(tool, tmp_path, monkeypatch):
    root = make_run(tmp_path / "a", FIRST, prefix="eval_fresh", seed=0)
    (setting,) = tool["read"]([root], "fresh")
    assert setting.success == 0.6
    # The picture is of that split, too, which this run's metrics have at no iteration.
    drawn = []
    monkeypatch.setattr(axes.Axes, "plot", lambda _, steps, values, **__: drawn.append(list(steps)))
    for split in (None, "fresh"):
        tool["draw"]([setting], str(tmp_path / "x.png"), split)
    assert drawn == [[0, 1, 2], []]
    with pytest.raises(ValueError, match="has no eval_<stage>.jsonl in trajectories/"):
        tool["read"]([root])


def test_what_cannot_be_compared_gets_a_sentence(tool, tmp_path, monkeypatch):
    roots = [make_run(tmp_path / name, FIRST, seed=0) for name in "ab"]
    with pytest.raises(ValueError, match=r"a have the same config and the same seed \(0\)"):
        tool["read"](roots)
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="none has no metrics.jsonl"):
        runpy.run_path(str(TOOL), run_name="__main__")
    for kept in (tmp_path / "a" / "trajectories").glob("eval_*.jsonl"):
        kept.write_text("")
    with pytest.raises(ValueError, match="jsonl has no episode: the environments of that evaluation all failed"):
        tool["read"](roots[:1])
    (tmp_path / "b" / "config.json").unlink()
    with pytest.raises(ValueError, match="b has no config.json of a run"):
        tool["read"](roots[1:])
