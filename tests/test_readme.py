"""What README shows is there and runs."""

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_library_example_runs(capsys):
    (source,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(source, "README.md", "exec"), {})
    assert "0." in capsys.readouterr().out


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
