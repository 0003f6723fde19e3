"""What README shows is there and runs."""

import pathlib
import re

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_library_example_runs(capsys):
    (source,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(source, "README.md", "exec"), {})
    assert "0." in capsys.readouterr().out


@pytest.mark.slow
def test_the_loop_by_hand_learns(capsys):
    (source,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL)
    exec(compile(source, "library.md", "exec"), {})
    lines = re.findall(r"reward (\S+) sampler gap (\S+)", capsys.readouterr().out)
    rewards, gaps = np.array(lines, float).T
    assert len(rewards) == 40 and rewards[0] < 0.2 and rewards[-1] > 0.9 and gaps.max() < 1e-5


def test_all_files_that_it_names_exist():
    named = re.findall(r"\b(?:docs|colab|configs|tools|tests)/[\w.]+\.\w+", README)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_tree_has_every_module():
    tree = README[README.index("## The tree") : README.index("## Words")]
    missing = [
        path.name
        for path in (ROOT / "jaxagentrl").glob("*.py")
        if not re.search(rf"\b{path.stem}\b", tree) and path.stem != "__init__"
    ]
    assert missing == []
