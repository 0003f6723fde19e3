"""Instances in SWE-Gym's form, on a clone made here: what is read, what is left out, and that repairs win."""

import json
import pathlib
import sys

import pytest

from envs_host import collect, swe, swe_data, swe_problem, swe_tests
from tests import repositories
from tests.test_swe import BROKEN, FAIL_TO_PASS, OTHERS

HIDDEN = '''\
import pytest

from shelf import ordering


@pytest.mark.parametrize("number", range(5))
def test_always(number):
    pass



def test_none_is_skipped():
    assert ordering.first_after([None, 3], 1) == 3
'''
# What the reference repair makes of the file: another function goes, one comes.
REPAIRED = repositories.ORDERING.replace("item > bound and item is not None", "item is not None and item > bound").replace(
    '"""The value, or the bound that it is beyond."""\n    ', ""
) + "\n\ndef last(items):\n    return items[-1]\n"
ID = "tests/test_hidden.py::test_none_is_skipped"


@pytest.fixture
def instance(tmp_path):
    """An instance, whose clone is in tmp_path/clones; `first_after` cannot take None."""
    clone = repositories.make(tmp_path / "clones" / "corner__shelf")
    base = repositories.commit(clone)
    repositories.make(clone, {"shelf/ordering.py": REPAIRED, "shelf/fresh.py": "FRESH = True\n"})
    (clone / "README.md").unlink()
    repositories.commit(clone)
    patch = repositories.git(clone, "diff", base, "HEAD")
    repositories.make(clone, {"tests/test_hidden.py": HIDDEN})
    repositories.commit(clone)
    test_patch = repositories.git(clone, "diff", "HEAD~", "HEAD")
    return {
        "instance_id": "corner__shelf-1",
        "repo": "corner/shelf",
        "base_commit": base,
        "problem_statement": "first_after cannot take None\n",
        "patch": patch + "\n",
        "test_patch": test_patch,  # some sets lack the last line's end
        "FAIL_TO_PASS": [ID],
        "PASS_TO_PASS": [],
        "hints_text": "not read",
    }


def _read(tmp_path, *instances, **options):
    path = tmp_path / "instances.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in instances))
    folders = dict(repositories=str(tmp_path / "clones"), cache_dir=str(tmp_path / "cache"))
    return swe_data.read(instances=str(path), **folders | options)


def test_the_reference_repair_wins(tmp_path, instance):
    found = _read(tmp_path, instance)
    assert found.left_out == {}
    (task,) = found.tasks
    assert (task.name, task.objective) == ("corner__shelf-1", "first_after cannot take None")
    assert task.params == {"family": "swe-data", "split": "corner/shelf", "task_type": "patch_1_8"}
    assert swe_problem.load(task.file).tests == ("tests/test_hidden.py",)
    env = swe.SweEnv(sandbox="none", intermediate_reward=True)
    answers = [env.reset(task), *(env.step(command) for command in task.walkthrough)]
    assert all(answer.info.valid_command for answer in answers)
    assert answers[-1].info.won
    edits = [a.info.intermediate_reward for c, a in zip(task.walkthrough, answers[1:]) if c.startswith(("edit", "insert", "create", "delete"))]
    assert sorted(edits) == [1.0, 1.0, 1.0, 1.0, 4.0]  # four lines are put in by one
    # The commit lies in the clone; what came after it, the hidden test with it, does not show.
    env.reset(task)
    assert env.step("find hidden").observation.startswith("There is no file")
    assert env.step("submit").info.lost
    env.close()


def test_reference_repairs_that_do_not_win_are_left_out(tmp_path, instance, monkeypatch):
    lost = instance | {"instance_id": "lost", "PASS_TO_PASS": ["tests/test_hidden.py::test_none"]}
    slow = instance | {"instance_id": "slow", "test_patch": instance["test_patch"].replace("    pass", "    import time; time.sleep(9)")}
    found = _read(tmp_path, instance, lost, slow, test_limit_s=3.0)
    assert [task.name for task in found.tasks] == ["corner__shelf-1"]
    assert "1 of 1 failing tests pass now, 1 others fail." in found.left_out["lost"]
    assert "The tests took longer than 3 s." in found.left_out["slow"]
    # Nobody plays them again, until the record is deleted.
    monkeypatch.setattr(swe_tests, "run", None)
    assert _read(tmp_path, instance, lost, slow) == found
    path = found.left_out["lost"].rpartition("delete ")[2].removesuffix(")")
    monkeypatch.undo()
    pathlib.Path(path).write_text('""')
    assert [task.name for task in _read(tmp_path, instance, lost).tasks] == ["corner__shelf-1", "lost"]


def test_lists_may_be_texts_of_json(tmp_path, instance):
    as_lists = _read(tmp_path, instance).tasks
    as_texts = _read(tmp_path, instance | {"FAIL_TO_PASS": json.dumps([ID]), "PASS_TO_PASS": "[]"}).tasks
    assert as_texts == as_lists


def test_tests_that_are_changed_and_those_that_pass(tmp_path, instance):
    """A test_patch that changes a file there is; its other tests must go on passing."""
    clone = tmp_path / "clones" / "corner__shelf"
    repositories.make(clone, {"tests/test_shelf.py": repositories.TESTS + HIDDEN.partition("\n\n")[2]})
    test_patch = repositories.git(clone, "diff", instance["base_commit"], "--", "tests/test_shelf.py")
    others = [*OTHERS, *FAIL_TO_PASS]
    changed = {"test_patch": test_patch, "FAIL_TO_PASS": [ID.replace("hidden", "shelf")], "PASS_TO_PASS": others}
    (task,) = _read(tmp_path, instance | changed).tasks
    env = swe.SweEnv(sandbox="none")
    env.reset(task)
    assert [env.step(command) for command in task.walkthrough][-1].info.won
    env.reset(task)
    assert env.step("open shelf/ordering.py").info.valid_command
    assert env.step(f"edit 1:18\n{BROKEN.replace('item is not None', 'True')}").info.valid_command
    last = env.step("submit")
    assert last.observation == "0 of 1 failing tests pass now, 1 others fail."
    env.close()


def test_patches_of_all_kinds(tmp_path, instance):
    """Empty new files, renames, modes, lines that look like headers; and what `git archive` would leave out."""
    clone = tmp_path / "clones" / "corner__shelf"
    repositories.git(clone, "checkout", "--quiet", instance["base_commit"])
    repositories.make(clone, {".gitattributes": "tests export-ignore\n", "query.sql": "-- a/foo.py\nselect 1;\n", "old name.txt": "x\n" * 9})
    base = repositories.commit(clone)
    (clone / "old name.txt").rename(clone / "new name.txt")
    (clone / "shelf" / "text.py").chmod(0o755)
    repositories.make(clone, {"shelf/ordering.py": REPAIRED, "shelf/sub/__init__.py": "", "query.sql": "select 1;\n"})
    repositories.commit(clone)
    patch = repositories.git(clone, "diff", "-M", base, "HEAD") + "\n"
    (task,) = _read(tmp_path, instance | {"base_commit": base, "patch": patch}).tasks
    assert set(swe_problem.load(task.file).solution) == {
        "new name.txt", "old name.txt", "query.sql", "shelf/ordering.py", "shelf/sub/__init__.py", "shelf/text.py",
    }  # fmt: skip
    assert "create shelf/sub/__init__.py" in "\n".join(task.walkthrough) and "delete old name.txt" in task.walkthrough


def test_a_patch_may_make_a_file_of_a_folder(tmp_path, instance):
    """And the other way round, in the tests and in the repair."""
    clone = tmp_path / "clones" / "corner__shelf"
    repositories.git(clone, "checkout", "--quiet", instance["base_commit"])
    repositories.make(clone, {"tests/data/x.txt": "1\n", "tests/one": "1\n", "conf/y.txt": "1\n", "two": "2\n"})
    base = repositories.commit(clone)
    repositories.git(clone, "rm", "--quiet", "-r", "conf", "two")
    repositories.make(clone, {"shelf/ordering.py": REPAIRED, "conf": "now a file\n", "two/z.txt": "3\n"})
    middle = repositories.commit(clone)
    repositories.git(clone, "rm", "--quiet", "-r", "tests/data", "tests/one")
    repositories.make(clone, {"tests/test_hidden.py": HIDDEN, "tests/data": "now a file\n", "tests/one/x.txt": "1\n"})
    repositories.commit(clone)
    patches = {"patch": repositories.git(clone, "diff", base, middle) + "\n", "test_patch": repositories.git(clone, "diff", middle, "HEAD")}
    found = _read(tmp_path, instance | {"base_commit": base} | patches)
    assert found.left_out == {} and len(found.tasks) == 1


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"repo": "no/where"}, "there is no clone at"),
        ({"base_commit": "0" * 40}, "git ls-tree does not work"),
        ({"patch": "--- a/shelf/text.py\n+++ b/shelf/text.py\n@@ -1,1 +1,1 @@\n-def f():\n+def g():\n"}, "its patch does not apply"),
        ({"FAIL_TO_PASS": []}, "no test fails before the repair"),
        ({"FAIL_TO_PASS": ["test_it (shelf.Case)"]}, "its tests are not pytest's"),
        ({"test_patch": ""}, "its reference repair does not win here: The tests could not be run"),
    ],
)
def test_instances_that_cannot_be_played_are_left_out(tmp_path, instance, changes, reason):
    found = _read(tmp_path, instance | changes | {"instance_id": "other"}, instance)
    assert [task.name for task in found.tasks] == ["corner__shelf-1"]
    assert reason in found.left_out["other"]


def test_interpreters_by_name(tmp_path, instance):
    own = tmp_path / "corner__shelf-3.1" / "python"
    own.parent.mkdir()
    own.symlink_to(sys.executable)
    by_name = str(tmp_path / "{repo}-{version}" / "python")
    found = _read(tmp_path, instance | {"version": "3.1"}, instance | {"instance_id": "other", "version": "4"}, python=by_name)
    assert swe_problem.load(found.tasks[0].file).python == str(own)
    assert found.left_out == {"other": f"there is no interpreter at {tmp_path}/corner__shelf-4/python"}


@pytest.mark.parametrize(
    "content, expected",
    [
        ("{", "line 1: expected a JSON object"),
        ("3", "line 1: expected a JSON object"),
        (json.dumps(dict.fromkeys(swe_data._FIELDS, "[") | {"PASS_TO_PASS": []}), "line 1: FAIL_TO_PASS is not a list in JSON"),
        (json.dumps(dict.fromkeys(swe_data._FIELDS, "[]") | {"patch": None}), "line 1: patch must be a text, got None"),
        (json.dumps(dict.fromkeys(swe_data._FIELDS, '"t::a"')), "FAIL_TO_PASS must be a list of texts, got 't::a'"),
        ('{"repo": "a/b"}', "an instance needs instance_id, base_commit"),
    ],
)
def test_files_that_are_not_of_this_form(tmp_path, content, expected):
    path = tmp_path / "instances.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=expected):
        swe_data.read(instances=str(path), repositories=str(tmp_path), cache_dir=str(tmp_path))
    path.write_bytes('{"repo": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="instances.jsonl must be UTF-8, and are not"):
        swe_data.read(instances=str(path), repositories=str(tmp_path), cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match="cannot be read"):
        swe_data.read(instances=str(tmp_path / "none"), repositories=str(tmp_path), cache_dir=str(tmp_path))


def test_instances_twice(tmp_path, instance):
    with pytest.raises(ValueError, match="holds instances twice: corner__shelf-1"):
        _read(tmp_path, instance, instance)


def test_as_a_split(tmp_path, instance):
    others = [instance | {"instance_id": f"other-{number}", "problem_statement": f"{number}"} for number in range(3)]
    lost = instance | {"instance_id": "lost", "repo": "no/where"}
    _read(tmp_path, instance, *others, lost)
    params = dict(family="swe-data", instances=str(tmp_path / "instances.jsonl"), repositories=str(tmp_path / "clones"))
    arguments = dict(first=1, cache_dir=str(tmp_path / "cache"), num_workers=1)
    one, two = (collect.tasks(params, seeds, **arguments) for seeds in (range(1, 3), range(3, 5)))
    assert {task.name for task in one.tasks + two.tasks} == {"corner__shelf-1", "other-0", "other-1", "other-2"}
    assert "1 instances left out, e.g. lost: there is no clone" in one.notices[0]
    with pytest.raises(ValueError, match="there are 4 tasks, counted from 1, but a split asks for 1 to 5"):
        collect.tasks(params, range(1, 6), **arguments)
    with pytest.raises(ValueError, match="swe-data needs the parameters instances, repositories"):
        collect.tasks({"family": "swe-data"}, range(1), **arguments)
    assert collect.environment(params) == "swe"
    only = collect.tasks(params | {"repos": ("no/where",)}, range(1, 1), **arguments)
    assert only.tasks == []
