"""Repositories as an environment: what commands do, what is told, and that only a repair scores."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
import time

import psutil
import pytest

import envs_host
from envs_host import games, swe, swe_bugs, swe_installed, swe_maker, swe_problem, swe_scratch, swe_tests, swe_text, swe_workspace
from envs_host.pool import EnvPool
from envs_host.specs import SetAside, Spec
from envs_host.types import EnvFailure, GameFileError, ResetResult, Task
from tests import repositories

ROOT = pathlib.Path(__file__).resolve().parent.parent
BROKEN = repositories.ORDERING.replace("value < low", "value <= low").replace("item > bound", "item >= bound")
FAIL_TO_PASS = ("tests/test_shelf.py::TestFirstAfter::test_bound_is_not_after",)
OTHERS = (
    *(f"tests/test_shelf.py::test_clamp[{pair}]" for pair in ("0-1", "1-1", "2-2", "3-3", "9-3")),
    "tests/test_shelf.py::TestFirstAfter::test_found",
    "tests/test_shelf.py::test_shorten",
)
PASSED = "\n".join(f"PASSED {test}" for test in FAIL_TO_PASS + OTHERS)
SUMMARY = f"= short test summary info =\n{PASSED}"
REPAIR = ("open shelf/ordering.py", "edit 16:16\n        if item > bound and item is not None:")


def _task(folder: pathlib.Path, **changes) -> Task:
    """A task in a new repository below the folder; `changes` are of the problem."""
    repository = folder / "shelf"
    if not repository.exists():
        repositories.make(repository)
    problem = swe_problem.Problem(
        repository=str(repository),
        commit=None,
        tree=swe_workspace.tree(str(repository)),
        changed={"shelf/ordering.py": BROKEN},
        solution={"shelf/ordering.py": repositories.ORDERING},
        hidden={},
        tests=(),
        fail_to_pass=FAIL_TO_PASS,
        pass_to_pass=OTHERS,
        python=None,
    )
    path = folder / f"{len(list(folder.glob('*.swe.json')))}.swe.json"
    swe_problem.save(dataclasses.replace(problem, **changes), str(path))
    digest = swe_problem.digest(str(path))
    return Task("swe", path.name, {"family": "swe-bugs"}, 1, str(path), digest, "Repair it.", 1.0, (*REPAIR, "submit"))


@pytest.fixture(autouse=True)
def nothing_judged(monkeypatch):
    monkeypatch.setattr(swe, "_JUDGED", {})


@pytest.fixture
def env():
    made = swe.SweEnv(sandbox="none", window_lines=8, intermediate_reward=True)
    yield made
    made.close()


def _play(env, task, *commands):
    """The answers to the commands; the first is that of reset."""
    return [env.reset(task), *(env.step(command) for command in commands)]


def test_a_repair_wins(env, tmp_path):
    answers = _play(env, _task(tmp_path), *REPAIR, "test", "submit")
    assert answers[0].observation == "README.md\nshelf/\ntests/"
    assert answers[0].info.objective == "Repair it."
    assert answers[1].observation.splitlines()[:2] == ["[shelf/ordering.py, lines 1 to 8 of 18]", '1:"""Looking things up in order."""']
    assert "16:        if item > bound and item is not None:" in answers[2].observation
    assert answers[3].observation == "8 passed."
    last = answers[4]
    assert last.observation == "1 of 1 failing tests pass now, 0 others fail."
    assert (last.reward, last.terminated, last.truncated) == (1.0, True, False)
    assert (last.info.score, last.info.won, last.info.lost, last.info.command) == (1.0, True, False, "submit")
    with pytest.raises(RuntimeError, match="reset first"):
        env.step("ls")


def test_the_same_submission_is_judged_once(env, tmp_path, monkeypatch):
    task, other = _task(tmp_path), _task(tmp_path, pass_to_pass=OTHERS[1:])
    runs, run = [], swe_tests.run
    monkeypatch.setattr(swe_tests, "run", lambda *args, **kwargs: runs.append(kwargs) or run(*args, **kwargs))
    first = _play(env, task, *REPAIR, "submit")[-1]
    assert _play(env, task, "open README.md", *REPAIR, "submit")[-1] == first and len(runs) == 1
    assert not _play(env, task, "submit")[-1].info.won and len(runs) == 2  # other files
    assert _play(env, other, *REPAIR, "submit")[-1].info.won and len(runs) == 3  # another task
    own = _task(tmp_path, python=sys.executable)  # the same but for the interpreter, which is no part of the digest
    assert own.digest == task.digest and _play(env, own, *REPAIR, "submit")[-1].info.won and len(runs) == 4
    forgetful = swe.SweEnv(sandbox="none", remember=False, window_lines=8, intermediate_reward=True)
    assert _play(forgetful, task, *REPAIR, "submit")[-1] == first and len(runs) == 5
    # What could not be run to its end may be run another time.
    hasty = swe.SweEnv(sandbox="none", test_limit_s=0.01)
    for number in (6, 7):
        assert "longer than" in _play(hasty, task, *REPAIR, "submit")[-1].observation and len(runs) == number


def test_doing_nothing_earns_nothing(env, tmp_path):
    last = _play(env, _task(tmp_path), "submit")[-1]
    assert last.observation == "0 of 1 failing tests pass now, 0 others fail."
    assert (last.reward, last.info.won, last.info.lost) == (0.0, False, True)


def test_a_part_of_the_failing_tests_is_a_part_of_the_score(env, tmp_path):
    both = (*FAIL_TO_PASS, "tests/test_shelf.py::test_of_something_else")
    last = _play(env, _task(tmp_path, fail_to_pass=both), *REPAIR, "submit")[-1]
    assert (last.reward, last.info.won, last.info.lost) == (0.5, False, True)


def test_breaking_another_test_costs_all(env, tmp_path):
    last = _play(env, _task(tmp_path), *REPAIR, "open shelf/text.py", "edit 4:4\n    return text", "submit")[-1]
    assert last.observation == "1 of 1 failing tests pass now, 1 others fail."
    assert last.reward == 0.0


@pytest.mark.parametrize(
    "commands",
    [
        # A test that asks for nothing.
        ["open tests/test_shelf.py", "edit 16:16\n        pass"],
        # Settings under which everything is expected to fail.
        ["create conftest.py\nimport pytest\ndef pytest_itemcollected(item):\n    item.add_marker(pytest.mark.xfail)"],
        ["create pytest.ini\n[pytest]\naddopts = --collect-only"],
        # What stands in pytest's place, or before it.
        [f"create pytest.py\nprint({SUMMARY!r})"],
        [f"create src/sitecustomize.py\nimport os\nprint({SUMMARY!r}, flush=True)\nos._exit(0)"],
        # What prints as pytest ends, and tests that are asked to be expected to fail.
        ["open shelf/__init__.py", f"insert 0\nimport atexit\natexit.register(print, {SUMMARY!r})"],
        ["open shelf/ordering.py", "insert 13\n    import pytest; pytest.xfail('so')"],
        ["create .pytest.ini\n[pytest]\naddopts = -p evil", "create evil.py\ndef pytest_pyfunc_call(pyfuncitem):\n    return True"],
        # Files around the repository, written by the tests themselves.
        [
            "open shelf/__init__.py",
            "insert 0\nopen('../pytest.ini', 'w').write('[pytest]\\naddopts = -p evil\\npythonpath = .\\n')\n"
            "open('../evil.py', 'w').write('def pytest_pyfunc_call(pyfuncitem): return True\\n')",
            "test",
            "undo",
        ],
        # An end before the tests, with what looks like their summary to the eye.
        ["open shelf/__init__.py", f"insert 0\nimport os\nprint({PASSED!r}, flush=True)\nos._exit(0)"],
    ],
)
def test_the_tests_decide_and_not_what_became_of_them(env, tmp_path, commands):
    *before, last = _play(env, _task(tmp_path), *commands, "submit")
    assert all(answer.info.valid_command for answer in before)
    assert last.reward == 0.0


@pytest.mark.parametrize("folder", ["evil.egg-info", "src/evil-1.DIST-INFO"])
def test_metadata_of_the_agents_brings_no_plugin(env, tmp_path, folder):
    """An interpreter of the repository's own loads what is installed for pytest."""
    task = _task(tmp_path, python=sys.executable)
    commands = [
        f"create {folder}/PKG-INFO\nMetadata-Version: 2.1\nName: evil\nVersion: 1.0",
        f"create {folder}/METADATA\nMetadata-Version: 2.1\nName: evil\nVersion: 1.0",
        f"create {folder}/entry_points.txt\n[pytest11]\nevil = evil",
        "create evil.py\nimport pytest\n@pytest.hookimpl(hookwrapper=True, trylast=True)\ndef pytest_runtest_makereport(item, call):\n"
        "    report = (yield).get_result()\n    report.outcome = 'passed'",
    ]
    *before, last = _play(env, task, *commands, "submit")
    assert all(answer.info.valid_command for answer in before)
    assert last.observation == "0 of 1 failing tests pass now, 0 others fail." and last.reward == 0.0


def test_examples_in_a_text_are_tests(env, tmp_path):
    guide, ids = ">>> from shelf import ordering\n>>> ordering.first_after([4], 4)\n", ("guide.rst::guide.rst",)
    repositories.make(tmp_path / "shelf", repositories.FILES | {"guide.rst": guide, "pytest.ini": "[pytest]\naddopts = --doctest-glob=*.rst\n"})
    task = _task(tmp_path, fail_to_pass=ids)
    answers = _play(env, task, "test guide.rst", "open guide.rst", "edit 1:2\n>>> 1\n1", "test guide.rst", "submit")
    assert [answers[index].observation.splitlines()[0] for index in (1, 4)] == ["1 failed, 0 passed.", "1 passed."]
    assert answers[-1].reward == 0.0
    assert _play(env, task, *REPAIR, "submit")[-1].info.won


def test_files_of_tests():
    ids = ("tests/a.py::test_b[x::y.z]", "guide.rst::guide.rst", "code.py::code.function", "t.yaml::one.two", "test_it (shelf.Case)")
    assert swe_problem.test_files(ids) == {"tests/a.py", "guide.rst", "t.yaml"}


def test_what_is_marked_to_fail_may_go_on_failing(env, tmp_path):
    """As in SWE-bench, whose PASS_TO_PASS has such tests; to repair nothing is not made up for by them."""
    marked = {"tests/test_marked.py": "import pytest\n\n@pytest.mark.xfail\ndef test_later():\n    assert 0\n"}
    id_, tests = "tests/test_marked.py::test_later", ("tests/test_marked.py", "tests/test_shelf.py")
    task = _task(tmp_path, hidden=marked, tests=tests, pass_to_pass=(id_,))
    assert _play(env, task, *REPAIR, "submit")[-1].info.won
    task = _task(tmp_path, hidden=marked, tests=tests, fail_to_pass=(id_,))
    assert _play(env, task, *REPAIR, "submit")[-1].reward == 0.0


def test_hidden_tests_are_only_there_at_the_end(env, tmp_path):
    hidden = {"tests/test_hidden.py": "from shelf import ordering\n\ndef test_it():\n    assert ordering.first_after([4], 4) is None\n"}
    task = _task(tmp_path, hidden=hidden, tests=("tests/test_hidden.py",), pass_to_pass=(), fail_to_pass=("tests/test_hidden.py::test_it",))
    answers = _play(env, task, "find hidden", "create tests/test_hidden.py\ndef test_it():\n    pass", "submit")
    assert answers[1].observation == "There is no file with hidden in its path."
    assert answers[-1].reward == 0.0
    assert _play(env, task, *REPAIR, "submit")[-1].info.won


TEST_IT = "from shelf import ordering\n\ndef test_it():\n    assert ordering.first_after([4], 4) is None\n"


@pytest.mark.parametrize(
    "commands, hidden, score",
    [
        # Deleted tests are there again, and their folder is no place for a file; what has a place counts.
        (["delete tests/test_shelf.py", "create tests\nhello", *REPAIR], "tests/test_hidden.py", 1.0),
        (["delete checks/check_shelf.py", "create checks/check_shelf.py/x.txt\nhello", *REPAIR], "tests/test_hidden.py", 1.0),
        # A file of the agent's where hidden tests have a folder, and the other way round.
        (["create new\nhello", *REPAIR], "new/below/test_hidden.py", 1.0),
        (["create new/below\nhello"], "new/below/test_hidden.py", 0.0),
        (["create new/test_hidden.py/" + "d/" * 600 + "x.txt\nhello", *REPAIR], "new/test_hidden.py", 1.0),
        # A folder of the repository's that is a file now.
        (["delete shelf/text.py", "delete shelf/__init__.py", "delete shelf/ordering.py", "create shelf\nhello"], "tests/test_hidden.py", 0.0),
        (["create spare/a.txt", *REPAIR, "delete docs/a.txt", "create docs\nhello"], "tests/test_hidden.py", 1.0),
    ],
)
def test_files_and_folders_of_the_same_name_are_judged(env, tmp_path, commands, hidden, score):
    id_ = f"{hidden}::test_it"
    there = {"checks/check_shelf.py": "def test_fine(): pass\n", "docs/a.txt": "a"}
    repositories.make(tmp_path / "shelf", repositories.FILES | there)
    checks = ("checks/check_shelf.py::test_fine",)
    task = _task(tmp_path, hidden={hidden: TEST_IT}, tests=(hidden, "checks/check_shelf.py"), fail_to_pass=(id_,), pass_to_pass=checks)
    *before, last = _play(env, task, *commands, "submit")
    assert all(answer.info.valid_command for answer in before)
    assert last.reward == score


def test_what_a_submission_writes_over(tmp_path):
    files = repositories.make(tmp_path / "r", {"a/b": "1", "c": "2", "d/e/f": "3"})
    swe_workspace.write_what_fits(str(files), {"a": "x", "c/d": "x", "d": "x", "d/e/f": None, "g": "x"})
    assert swe_workspace.Workspace(str(files)).files() == ["a/b", "c", "d", "g"]
    swe_workspace.write_over(str(files), {"a": None, "c/d/e": "y", "d": "y", "g/h": None})
    assert swe_workspace.Workspace(str(files)).files() == ["c/d/e", "d"]


@pytest.mark.parametrize(
    "command, expected",
    [
        ("ls shelf", "__init__.py\nordering.py\ntext.py"),
        ("create bom.py\n\ufeffONE = 1", "[bom.py, lines 1 to 1 of 1]\n1:\ufeffONE = 1"),
        ("find test", "tests/test_shelf.py"),
        ("search return text", "shelf/text.py:3: return text\nshelf/text.py:4: return text[: width - 1] + \"…\""),
        ("find \ud800", "There is no file with ? in its path."),
        ("search nowhere at all", "There is no line with nowhere at all in it."),
        ("open shelf/text.py 4", "[shelf/text.py, lines 1 to 4 of 4]\n1:def shorten(text, width):\n2:    if len(text) <= width:\n"
         '3:        return text\n4:    return text[: width - 1] + "…"'),
        ("open shelf/__init__.py", "[shelf/__init__.py, empty]"),
        ("So:\n```bash\nls shelf\n```\nThat is it.", "__init__.py\nordering.py\ntext.py"),
        ("It said\n```\n3 failed\n```\nso\n```bash\nls shelf\n```", "__init__.py\nordering.py\ntext.py"),
        ("create shelf/new.py\n```python\nONE = 1\n```", "[shelf/new.py, lines 1 to 1 of 1]\n1:ONE = 1"),
        ('create a.md\nSay:\n```\nsubmit\n```\n', "[a.md, lines 1 to 4 of 4]\n1:Say:\n2:```\n3:submit\n4:```"),
        ("create c.md\n```\na\n```\nand\n```\nb\n```", "[c.md, lines 1 to 7 of 7]\n1:```\n2:a\n3:```\n4:and\n5:```\n6:b\n7:```"),
        ("create d.md\n```md\nSay:\n```sh\nls\n```\n```", "[d.md, lines 1 to 4 of 4]\n1:Say:\n2:```sh\n3:ls\n4:```"),
        ("create b.md\n\n\nx\n\n", "[b.md, lines 1 to 4 of 4]\n1:\n2:\n3:x\n4:"),
        ("create shelf/new.py\nONE = 1", "[shelf/new.py, lines 1 to 1 of 1]\n1:ONE = 1"),
        ("delete shelf/text.py", "shelf/text.py is deleted."),
        ("test tests/test_shelf.py::test_shorten", "1 passed."),
    ],
)  # fmt: skip
def test_what_commands_tell(env, tmp_path, command, expected):
    answer = _play(env, _task(tmp_path), command)[-1]
    assert answer.observation == expected
    assert answer.info.valid_command


@pytest.mark.parametrize(
    "command, expected",
    [
        ("", "No command was given."),
        ("rm -rf /", "There is no command 'rm'. Commands: ls, find,"),
        ("open", "open needs words behind it."),
        ("ls\nls", "ls takes no lines below it."),
        ("undo it", "undo takes no words behind it."),
        ("down", "No file is open."),
        ("search_file x", "No file is open."),
        ("edit 1:1\nx", "No file is open."),
        ("undo", "There is nothing to undo."),
        ("open nowhere.py", "There is no file nowhere.py."),
        ("open shelf", "There is no file shelf."),
        ("open shelf/text.py 9", "There is no line 9: shelf/text.py has 4."),
        ("ls nowhere", "There is no folder nowhere."),
        ("open ../0.swe.json", "../0.swe.json is not a path in the repository."),
        ("open /etc/passwd", "/etc/passwd is not a path in the repository."),
        ("open shelf/way/out", "shelf/way/out is not a path in the repository."),
        ("create shelf/text.py\nx", "There is a file shelf/text.py: open it."),
        ("create shelf/text.py/below.py\nx = 1", "shelf/text.py/below.py cannot be written (File exists)."),
        ("create " + "x" * 5000 + "\nx", "x" * 200 + " cannot be written (File name too long)."),
        ("open " + "x" * 5000, "There is no file xxx"),
        ("ls " + "x" * 5000, "There is no folder xxx"),
        ("open shelf/text.py " + "9" * 5000, "There is no file shelf/text.py 999"),
        ("create shelf/wrong.py\ndef f(:", "The edit was not made: it would be a syntax error in line 1"),
        ("delete shelf", "There is no file shelf."),
        ("create deep.py\n" + "-" * 100_000 + "1", "The edit was not made: Python cannot read it"),
        ("create null.py\nx = 1\0", "The edit was not made: "),
        ("test -p no:python", "test takes a file, a folder or the id of a test, and no options."),
        ("test nowhere.py::test_a", "There is no file nowhere.py."),
        ("test tests/test_shelf.py::a\0b", "test takes no null byte."),
        ("test ../x", "../x is not a path in the repository."),
        ("open a\0b", "a\0b is not a path in the repository."),
    ],
)
def test_what_is_refused(env, tmp_path, command, expected):
    task = _task(tmp_path)
    env.reset(task)
    os.symlink(tmp_path, os.path.join(env._work.folder, "shelf", "way"))
    answer = env.step(command)
    assert answer.observation.startswith(expected)
    assert not answer.info.valid_command
    assert not answer.terminated


def test_edits(env, tmp_path):
    answers = _play(
        env,
        _task(tmp_path),
        "open shelf/text.py",
        "edit 2:3",  # takes lines out
        "edit 9:9\nx",
        "edit 2:1\nx",
        "edit one\nx",
        "edit 2:2\n\treturn (",
        "insert 1\n    width += 1\n    width -= 1",
        "insert " + "9" * 5000 + "\nx",
        "undo",
        "undo",
        "undo",
    )
    told = [answer.observation for answer in answers]
    assert told[2].splitlines()[1:] == ["1:def shorten(text, width):", '2:    return text[: width - 1] + "…"']
    assert told[3] == "There are no lines 9 to 9: the file has 2."
    assert told[4] == "There are no lines 2 to 1: the file has 2."
    assert told[5] == "edit needs a range of lines, such as edit 12:14."
    assert told[6].startswith("The edit was not made: it would be a syntax error in line")
    assert told[7].splitlines()[2:4] == ["2:    width += 1", "3:    width -= 1"]
    assert told[8] == "insert needs the number of a line, 0 to 4."
    assert told[9] == told[2]
    assert told[10] == told[1]
    assert told[11] == "There is nothing to undo."


def test_line_ends_stay_what_they_are(env, tmp_path):
    files = {"a.txt": "one\r\ntwo\r\nthree", "b.txt": "one\ntwo"}
    _play(env, _task(tmp_path, changed=files), "open a.txt", "edit 2:2\n2\n2b", "insert 4\nfour", "open b.txt", "insert 2\nthree")
    assert env._work.read("a.txt") == "one\r\n2\r\n2b\r\nthree\r\nfour\r\n"
    assert env._work.read("b.txt") == "one\ntwo\nthree\n"


def test_undo_loses_nothing(env, tmp_path):
    commands = ("delete shelf/text.py", "create shelf/text.py/x\n1", "undo", "undo", "open shelf/text.py", "undo")
    answers = _play(env, _task(tmp_path), *commands)
    assert answers[3].observation == "shelf/text.py/x is deleted."
    assert answers[4].observation == answers[5].observation
    assert answers[6].observation == "There is nothing to undo."


def test_ids_of_tests_are_what_pytest_calls_them(env, tmp_path):
    """Odd ones; and tests that fail in a part, or as they end, do not pass."""
    odd = '''
import unittest, pytest

@pytest.mark.parametrize("name", ["a - b", "0xdeadbeef", " in 1.50s"])
def test_odd(name): pass

@pytest.fixture
def ends_badly():
    yield
    raise ValueError("at the end")

def test_end(ends_badly): pass

@pytest.mark.xfail
def test_expected(): assert 0

def test_asks_for_it(): pytest.xfail("so")

@pytest.mark.xfail
def test_passes_all_the_same(): pass

class Parts(unittest.TestCase):
    @unittest.expectedFailure
    def test_expected(self): assert 0

    def test_parts(self):
        with self.subTest(n=1):
            assert 0
'''
    task = _task(tmp_path, changed={"tests/test_odd.py": odd})
    env.reset(task)
    run = env._run(("tests/test_odd.py",), env._work.folder)
    assert run.passed == {f"tests/test_odd.py::test_odd[{name}]" for name in ("a - b", "0xdeadbeef", " in 1.50s")}
    assert run.expected == {"tests/test_odd.py::test_expected", "tests/test_odd.py::Parts::test_expected"}
    failed = {"tests/test_odd.py::test_end": "ValueError: at the end"}
    assert run.failed.items() >= failed.items() and "tests/test_odd.py::Parts::test_parts" in run.failed
    judged = env._run(("tests/test_odd.py",), env._work.folder, explained=False)
    assert judged.passed == run.passed and judged.failed.keys() == run.failed.keys()
    wrong = {"tests/test_wrong.py": "import nowhere\n"}
    env.reset(_task(tmp_path, changed=wrong))
    assert env.step("test tests/test_wrong.py").observation.splitlines()[:2] == [
        "1 failed, 0 passed.", "tests/test_wrong.py: ModuleNotFoundError: No module named 'nowhere'"
    ]  # fmt: skip


def test_long_messages_do_not_hide_what_passed(env, tmp_path):
    long = "def test_good(): pass\ndef test_bad(): raise ValueError('x' * 5_000_000)\n"
    env.reset(_task(tmp_path, changed={"tests/test_long.py": long}))
    run = env._run(("tests/test_long.py",), env._work.folder)
    assert run.passed == {"tests/test_long.py::test_good"} and not run.problem
    assert run.failed["tests/test_long.py::test_bad"].startswith("ValueError: xxx")
    assert len(run.failed["tests/test_long.py::test_bad"]) < 5000
    env.reset(_task(tmp_path, changed={"tests/conftest.py": "import os\nprint('x' * 5_000_000)\nos._exit(1)\n"}))
    answer = env.step("submit")
    assert "could not be run" in answer.observation and len(answer.observation) < 5000


def test_processes_that_tests_start_find_the_repository(env, tmp_path):
    elsewhere = """
import subprocess, sys
def test_it(tmp_path):
    subprocess.run([sys.executable, "-c", "import shelf, inner"], cwd=tmp_path, check=True)
"""
    answers = _play(env, _task(tmp_path, changed={"tests/test_it.py": elsewhere, "src/inner.py": ""}), "test tests/test_it.py")
    assert answers[1].observation == "1 passed."


def test_settings_of_others_are_not_the_repositorys(tmp_path):
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "--nothing-of-this-kind"\n')
    script = (
        "import sys; sys.path.insert(0, 'tests'); import pathlib; from envs_host import swe; from tests import test_swe\n"
        f"env = swe.SweEnv(sandbox='none'); task = test_swe._task(pathlib.Path({str(tmp_path)!r}))\n"
        "print([env.reset(task), *map(env.step, task.walkthrough)][-1].info.won); env.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"TMPDIR": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "True", done.stderr


def test_a_repair_may_be_in_what_looks_like_a_test(env, tmp_path):
    broken, whole = ({"shelf/test/tools.py": f"def answer():\n    return {number}\n"} for number in (41, 42))
    hidden = {"tests/test_hidden.py": "from shelf.test import tools\n\ndef test_it():\n    assert tools.answer() == 42\n"}
    changes = dict(hidden=hidden, tests=("tests/test_hidden.py",), pass_to_pass=(), fail_to_pass=("tests/test_hidden.py::test_it",))
    task = _task(tmp_path, changed=broken, solution=whole, **changes)
    answers = _play(env, task, "open shelf/test/tools.py", "edit 2:2\n    return 42", "submit")
    assert answers[2].info.intermediate_reward == 1.0
    assert answers[3].info.won


def test_files_come_and_go(env, tmp_path):
    commands = ("create shelf/new.py\nONE = 1", "undo", "delete shelf/text.py", "undo", "delete shelf/text.py", "create shelf/text.py", "submit")
    answers = _play(env, _task(tmp_path), *commands)
    assert [answer.observation for answer in answers[2:6]] == [
        "shelf/new.py is deleted.",
        "shelf/text.py is deleted.",
        '[shelf/text.py, lines 1 to 4 of 4]\n1:def shorten(text, width):\n2:    if len(text) <= width:\n'
        '3:        return text\n4:    return text[: width - 1] + "…"',
        "shelf/text.py is deleted.",
    ]
    assert answers[-1].observation == "0 of 1 failing tests pass now, 1 others fail."
    assert _play(env, _task(tmp_path), *REPAIR, "delete shelf/text.py", "submit")[-1].observation == (
        "0 of 1 failing tests pass now, 7 others fail."  # the tests cannot be imported
    )


def test_a_window_moves(env, tmp_path):
    answers = _play(env, _task(tmp_path), "open shelf/ordering.py", "down", "down", "down", "up", "open shelf/ordering.py 12")
    heads = [answer.observation.splitlines()[0] for answer in answers[1:]]
    assert heads == [f"[shelf/ordering.py, lines {first} to {first + 7} of 18]" for first in (1, 9, 11, 11, 3, 10)]


def test_differences():
    assert swe_workspace.differences(list("abcde"), list("abXde")) == [(2, 3, 2, 3)]
    assert swe_workspace.differences(list("aaa"), list("aa")) == [(2, 3, 2, 2)]
    assert swe_workspace.differences([], list("ab")) == [(0, 0, 0, 2)]
    assert swe_workspace.differences(list("abcabc"), list("XbcabY")) == [(0, 1, 0, 1), (5, 6, 5, 6)]
    assert swe_workspace.differences(list("ab"), list("ab")) == []


def test_long_lines_and_many_hits_are_cut(env, tmp_path):
    files = {"data/many.txt": "needle\n" * 30, "data/long.txt": "x" * 1000}
    answers = _play(env, _task(tmp_path, changed=files), "search needle", "open data/long.txt")
    assert answers[1].observation.splitlines()[-2:] == ["data/many.txt:20: needle", "and 10 more"]
    assert answers[2].observation.splitlines()[1] == "1:" + "x" * (swe_text.MAX_LINE - 1) + "…"


def test_failures_are_told_with_their_place(env, tmp_path):
    answers = _play(env, _task(tmp_path), "test", f"test {FAIL_TO_PASS[0]}")
    assert answers[1].observation == f"1 failed, 7 passed.\n{FAIL_TO_PASS[0]}: assert 4 is None"
    assert "tests/test_shelf.py:16: in test_bound_is_not_after" in answers[2].observation
    assert "= FAILURES" not in answers[2].observation


def test_progress_is_towards_the_repair(env, tmp_path):
    wrong = "edit 16:16\n        if item == bound:\n            pass"
    answers = _play(env, _task(tmp_path), REPAIR[0], REPAIR[1], wrong, "undo", "open tests/test_shelf.py", "edit 1:1", "edit 7:7\nx", "edit 9:9\n    value + 1")
    # BROKEN has two wrong lines; what becomes of tests is neither here nor there.
    assert [answer.info.intermediate_reward for answer in answers] == [0, 0, 1, -2, 2, 0, 0, 0, 0]
    quiet = swe.SweEnv(sandbox="none")
    assert _play(quiet, _task(tmp_path), *REPAIR)[-1].info.intermediate_reward == 0.0
    quiet.close()


def test_ways_back_to_the_same_files_earn_nothing(env, tmp_path):
    """A large step away and small steps back neither; and what is far away is not told from what is farther."""
    junk = ["create junk.txt\n" + "a\n" * 4, *["edit 1:1"] * 4]
    gained = [answer.info.intermediate_reward for answer in _play(env, _task(tmp_path), *junk)[1:]]
    assert gained == [-4, 1, 1, 1, 1]
    far = ["create junk.txt\n" + "a\n" * 900, "edit 1:899", "delete shelf/text.py", "undo", "delete junk.txt", *REPAIR]
    gained = [answer.info.intermediate_reward for answer in _play(env, _task(tmp_path), *far)[1:]]
    assert gained == [-5, 4, -4, 4, 1, 0, 1]


def test_admissible_commands_can_be_given(tmp_path):
    env = swe.SweEnv(sandbox="none", admissible_commands=True)
    answers = _play(env, _task(tmp_path), "open shelf/text.py")
    listed = answers[1].info.admissible_commands
    assert {"ls", "test", "submit", "down", "up", "open shelf/ordering.py"} <= set(listed)
    for command in listed:
        if command != "submit":
            assert env.step(command).info.valid_command
    assert env.step("submit").info.admissible_commands == ()


def test_tests_that_do_not_end_are_the_agents_failure(tmp_path):
    env = swe.SweEnv(sandbox="none", test_limit_s=3.0)
    # A process of its own that outlives pytest, unless all are killed.
    loop_marker = f"time.sleep(77)  # {tmp_path}"
    loop = f"import subprocess, sys, time\nchild = subprocess.Popen([sys.executable, '-c', {'import time; ' + loop_marker!r}])\ntime.sleep(77)"
    env.reset(_task(tmp_path))
    answers = [env.step(command) for command in ("open shelf/__init__.py", f"insert 0\n{loop}", "test", "submit")]
    assert answers[2].observation == "The tests took longer than 3 s."
    assert answers[3].terminated and answers[3].info.lost
    time.sleep(0.1)
    assert [process for process in psutil.process_iter(["cmdline"]) if loop_marker in " ".join(process.info["cmdline"] or ())] == []


def test_memory_of_tests_is_limited(tmp_path):
    env = swe.SweEnv(sandbox="none", test_memory_mb=512)
    answers = _play(env, _task(tmp_path), "open shelf/text.py", "insert 1\n    bytes(1 << 30)", "test tests/test_shelf.py::test_shorten")
    assert "MemoryError" in answers[-1].observation
    env.close()


@pytest.mark.skipif(swe_tests.safest_sandbox() == "none", reason="bubblewrap is not installed, or not allowed")
def test_a_sandbox_keeps_tests_in_their_folder(tmp_path):
    outside = pathlib.Path("/etc/jaxagentrl-was-here")
    env = swe.SweEnv(sandbox="bubblewrap")
    write = f"insert 1\n    open({str(outside)!r}, 'w')"
    call = "insert 1\n    import socket\n    socket.create_connection(('127.0.0.1', 9), timeout=1)"
    # What root could do, and where the reference repair lies.
    mount = "insert 1\n    import subprocess\n    subprocess.run(['mount', '-o', 'remount,rw,bind', '/'], check=True)"
    kernel = "insert 1\n    open('/proc/sys/kernel/core_pattern', 'a')"
    task = _task(tmp_path)
    read = f"insert 1\n    open({task.file!r})"
    inside = "insert 1\n    import tempfile\n    tempfile.TemporaryFile()"
    answers = _play(env, task, "open shelf/text.py", write, "test", "undo", call, "test", "undo", inside, "test")
    assert "Read-only file system" in answers[3].observation
    assert "Connection refused" in answers[6].observation  # by an own loopback: see the next
    assert "1 failed, 7 passed." in answers[9].observation  # what the task begins with, and nothing else
    assert not outside.exists()
    for harm, expected in ((mount, "CalledProcessError"), (kernel, "Read-only file system"), (read, "No such file")):
        assert expected in _play(env, task, "open shelf/text.py", harm, "test")[-1].observation
    away = "insert 1\n    assert open('/proc/net/dev').read().count(':') == 1"
    assert "1 failed, 7 passed." in _play(env, task, "open shelf/text.py", away, "test")[-1].observation  # loopback alone
    assert _play(env, _task(tmp_path), *REPAIR, "submit")[-1].info.won


@pytest.mark.skipif(swe_tests.safest_sandbox() == "none", reason="bubblewrap is not installed, or not allowed")
def test_a_sandbox_hides_what_is_installed_of_the_repository(tmp_path):
    """What chex brings along, and a module alone; they stay hidden when the agent deletes its own."""
    look = """
import os, pytest
installed = os.path.dirname(os.path.dirname(pytest.__file__))
def read(path):
    with open(os.path.join(installed, path)) as file:
        return file.read()
def test_package():
    assert os.listdir(os.path.join(installed, "toolz")) == []
def test_module():
    with pytest.raises(PermissionError):
        read("typing_extensions.py")
def test_others():
    assert read("pytest/__init__.py") and read("chex/__init__.py")
"""
    package = {"toolz/__init__.py": "", "typing_extensions.py": ""}
    task = _task(tmp_path, changed=package | {"tests/test_look.py": look})
    env = swe.SweEnv(sandbox="bubblewrap")
    answers = _play(env, task, "test tests/test_look.py", "delete toolz/__init__.py", "delete typing_extensions.py", "test tests/test_look.py")
    assert answers[1].observation == answers[4].observation == "3 passed."
    env.close()


def test_installed_copies(tmp_path, monkeypatch):
    """Of what the repository hides from imports, with what is compiled of it; nothing that is found or needed all the same."""
    site = tmp_path / "site"
    own = ("one/__init__.py", "src/two.py", "parts/mine/__init__.py", "docs/a.py", "needed.py", "setup.cfg", "notes/three/x.txt")
    copied = ("one/__init__.py", "one/code.py", "two.py", "__pycache__/two.cpython-311.pyc", "two.cpython-311.so", "parts/mine/a.py")
    left = ("one-1.0.dist-info/METADATA", "two.pth", "parts/other/a.py", "docs/__init__.py", "docs/a.py", "needed.py", "notes/three.py")
    repositories.make(tmp_path / "r", dict.fromkeys(own, ""))
    repositories.make(site, dict.fromkeys(copied + left, ""))
    known = swe_installed._Installed(frozenset([str(site), "/nowhere"]), frozenset(["needed"]))
    monkeypatch.setattr(swe_installed, "_installed", lambda interpreter: known)
    found = swe_installed.copies(str(tmp_path / "r"), None)
    assert [os.path.relpath(path, site) for path in found] == sorted(["one", *copied[2:5], "parts/mine"])
    assert swe_installed.copies(str(tmp_path / "r"), "/other/python") == found


def test_an_interpreter_is_asked_where_modules_are_installed():
    folders, needed = swe_installed._installed(sys.executable)
    assert os.path.dirname(os.path.dirname(pytest.__file__)) in folders and os.path.dirname(os.__file__) not in folders
    assert {"pytest", "pluggy"} <= needed and "toolz" not in needed
    assert swe_installed._installed("/nowhere/python") == (frozenset(), frozenset())


def test_a_sandbox_that_is_not_there(monkeypatch):
    monkeypatch.setenv("PATH", "")
    swe_tests._bubblewrap_fails.cache_clear()
    with pytest.raises(swe_tests.SandboxError, match="apt install"):
        envs_host.make("swe")
    with pytest.raises(swe_tests.SandboxError, match="apt install"):
        envs_host.check_here("swe", {"test_limit_s": 5.0})
    envs_host.check_here("swe", {"sandbox": "none"})
    envs_host.check_here("textworld", {})
    swe_tests._bubblewrap_fails.cache_clear()
    with pytest.raises(ValueError, match="sandbox must be one of bubblewrap, none, got 'docker'"):
        envs_host.make("swe", sandbox="docker")
    with pytest.raises(ValueError, match="window_lines must be more than 0"):
        envs_host.make("swe", sandbox="none", window_lines=0)


def test_an_episode_leaves_nothing_behind(env, tmp_path):
    task = _task(tmp_path)
    env.reset(task)
    folder = pathlib.Path(env._scratch.name)
    assert (folder / "repository" / "shelf" / "ordering.py").read_text() == BROKEN
    env.reset(task)
    assert not folder.exists()
    folder = pathlib.Path(env._scratch.name)
    env.close()
    env.close()
    assert not folder.exists()
    # The repository itself is never written to.
    assert (tmp_path / "shelf" / "shelf" / "ordering.py").read_text() == repositories.ORDERING


def test_what_a_killed_process_leaves_is_cleared_up(tmp_path):
    """By the next one, and by one that ends, if it had lived for a minute; what a live process has stays."""
    live = "import sys; from envs_host import swe_scratch; f = swe_scratch.folder(); print(f.name, flush=True); sys.stdin.read()"
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    start = functools.partial(subprocess.Popen, [sys.executable, "-c", live], env=environment, text=True, **pipes)

    def folder_of(process):
        folder = pathlib.Path(process.stdout.readline().strip())
        os.utime(folder.parent / "lock", (time.time() - 100,) * 2)  # the folder itself changes with every episode
        return folder

    with start() as killed, start() as alive:
        folders = [folder_of(process) for process in (killed, alive)]
        killed.kill()
        killed.wait()
        with start() as third:
            folders.append(folder_of(third))
            assert [folder.exists() for folder in folders] == [False, True, True]
            assert not folders[0].parent.exists()
            alive.kill()  # as the workers of a run are when it ends
            alive.wait()
            third.stdin.close()
            third.wait()
    assert not any(folder.parent.exists() for folder in folders)


# Folders in each other, more than a path or a recursion can go down; and one that may not be looked into.
LABYRINTH = "import os\nos.mkdir('shut')\nos.chmod('shut', 0)\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\ndef test_it(): pass"


def test_folders_without_end_hurt_neither_the_episode_nor_the_next(env, tmp_path):
    task = _task(tmp_path)
    answers = _play(env, task, f"create tests/test_deep.py\n{LABYRINTH}", "test tests/test_deep.py", "find ordering", "search def clamp", "ls")
    assert [answer.observation for answer in answers[3:]] == ["shelf/ordering.py", "shelf/ordering.py:4: def clamp(value, low, high):",
        "README.md\nd/\nshelf/\nshut/\ntests/"]  # fmt: skip
    folder = pathlib.Path(env._scratch.name)
    assert _play(env, task, *REPAIR, "submit")[-1].info.won
    assert not folder.exists()


def test_what_a_killed_process_leaves_is_cleared_up_however_deep(tmp_path, monkeypatch):
    root = tmp_path / "jaxagentrl-swe-dead"
    (root / "repository").mkdir(parents=True)
    subprocess.run([sys.executable, "-c", LABYRINTH], cwd=root / "repository", check=True)
    (root / "lock").touch()
    os.utime(root / "lock", (1, 1))
    swe_scratch._clear_dead(str(tmp_path))
    assert not root.exists()


def test_folders_without_access():
    """What tests have shut is refused to be read, and removed; for root nothing is shut."""
    script = """
import os, tempfile
from envs_host import swe_scratch, swe_workspace
if os.getuid() == 0:
    os.setuid(65534)
root = tempfile.mkdtemp()
for path in ("shut/below/a", "kept/a"):
    os.makedirs(os.path.dirname(os.path.join(root, path)))
    open(os.path.join(root, path), "w").close()
for path, mode in (("shut/below", 0o500), ("shut", 0), ("kept", 0o500), (".", 0o500)):
    os.chmod(os.path.join(root, path), mode)
work = swe_workspace.Workspace(root)
print(work.files())
calls = ((work.entries, "shut"), (work.delete, "kept/a"), (work.read, "shut/below/a"), (lambda path: work.write(path, ""), "kept/b"))
for call, path in calls:
    try:
        call(path)
    except swe_workspace.PathError as error:
        print(error)
swe_scratch.remove(root)
print(os.path.exists(root))
"""
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "['kept/a']",
        "shut cannot be read (Permission denied).",
        "kept/a cannot be deleted (Permission denied).",
        "There is no file shut/below/a.",
        "kept/b cannot be written (Permission denied).",
        "False",
    ], done.stderr


def test_a_repository_that_has_changed_is_noticed(env, tmp_path):
    task = _task(tmp_path)
    (tmp_path / "shelf" / "README.md").write_text("# other\n")
    with pytest.raises(GameFileError, match="its files have changed"):
        env.reset(task)
    with EnvPool("swe", {"sandbox": "none"}, num_workers=1, step_limit_s=20.0, reset_limit_s=20.0, worker_memory_mb=1000.0) as pool:
        pool.reset(0, task)
        [(_, answer)] = _answers(pool)
    assert isinstance(answer, EnvFailure) and answer.reason == "game file"


def test_the_same_commands_get_the_same_answers(tmp_path):
    """Here and in two workers, one of which is killed on the way."""
    # What a test says of an object, and of where it ran, differs from run to run.
    shown = BROKEN.replace("return value", "assert not object(), (object(), __file__, list({'a', 'b', 'c'}))\n    return value")
    task = _task(tmp_path, changed={"shelf/ordering.py": shown})
    commands = ("test", "test shelf", "test tests/test_shelf.py::test_clamp[2-2]", "open shelf/ordering.py 10", "edit 10:11\n    return value", "test", "submit")
    env = swe.SweEnv(sandbox="none")
    expected = _play(env, task, *commands)
    options = dict(num_workers=2, step_limit_s=20.0, reset_limit_s=20.0, worker_memory_mb=1000.0)
    with EnvPool("swe", {"sandbox": "none"}, **options) as pool:
        got = {0: [], 1: []}
        for episode in got:
            pool.reset(episode, task)
        while any(len(answers) < len(expected) for answers in got.values()):
            for episode, answer in _answers(pool):
                got[episode].append(answer)
                if len(got[episode]) == 4 and episode == 0:
                    workers = [child for child in psutil.Process().children() if "envs_host" in " ".join(child.cmdline())]
                    workers[0].kill()
                if len(got[episode]) < len(expected):
                    pool.step(episode, commands[len(got[episode]) - 1])
    assert got == {0: expected, 1: expected}


def _answers(pool):
    while not (answers := pool.poll()):
        time.sleep(0.01)
    return answers


def test_mistakes_are_planted_by_seed(tmp_path, capfd):
    repository = str(repositories.make(tmp_path / "shelf"))
    specs = [dict(family="swe-bugs", repository=repository, files="shelf/*.py", seed=seed) for seed in range(6)]
    for spec in specs[::2]:
        spec["expert"] = "direct"
    made = games.generate(specs, cache_dir=str(tmp_path / "cache"))
    assert "Generating games: 6/6" in capfd.readouterr().err
    assert made.generated == 6 and len(made.tasks) >= 4
    assert set(made.reasons.values()) <= {"no test notices the mistake"}
    assert len({task.digest for task in made.tasks}) == len(made.tasks)
    for task in made.tasks:
        problem = swe_problem.load(task.file)
        (path,) = problem.changed
        assert problem.changed[path] != problem.solution[path] == repositories.FILES[path]
        assert problem.fail_to_pass and not set(problem.fail_to_pass) & set(problem.pass_to_pass)
        assert problem.fail_to_pass[0] in task.objective
        assert task.walkthrough[-1] == "submit"
        assert task.walkthrough[0].startswith("open tests/" if task.params["expert"] == "reader" else "open shelf/")
        assert task.params["split"] == "shelf"
    again = games.generate(specs, cache_dir=str(tmp_path / "cache"), progress=False)
    assert (again.tasks, again.generated) == (made.tasks, 0)
    # In other processes, in another order, too.
    elsewhere = games.generate(specs[3::-1], cache_dir=str(tmp_path / "other"), num_workers=1, progress=False)
    assert {task.name: task.digest for task in elsewhere.tasks}.items() <= {task.name: task.digest for task in made.tasks}.items()
    # Another state of the repository is another game.
    (tmp_path / "shelf" / "shelf" / "text.py").write_text(repositories.TEXT + "\n")
    assert games.generate(specs[:1], cache_dir=str(tmp_path / "cache"), progress=False).generated == 1


@pytest.mark.parametrize("num_shown", [1, 5, 16, 40, 1000])
def test_the_looker_edits_a_line_when_it_sees_it(tmp_path, num_shown):
    source = (ROOT / "envs_host" / "games.py").read_text()
    repositories.make(tmp_path / "shelf", repositories.FILES | {"shelf/long.py": source})
    env = swe.SweEnv(sandbox="none", window_lines=num_shown)
    env.reset(_task(tmp_path))
    bugs, begun = swe_bugs.find(source), set()
    for bug in bugs:
        walked = swe_maker._looking("shelf/long.py", bug, num_shown, source.count("\n"))
        windows = [env.step(command).observation for command in walked]
        seen = [f"\n{bug.line}:{bug.before}" in window for window in windows]
        assert seen == [False] * (len(seen) - 1) + [True]
        begun.add(walked[0])
    # Where it begins is known from the function, and not from the mistake.
    assert begun == {f"open shelf/long.py {bug.body_line}" for bug in bugs}
    env.close()


def test_the_lookers_repair_is_a_game(tmp_path):
    repository = str(repositories.make(tmp_path / "shelf"))
    spec = dict(family="swe-bugs", repository=repository, files="shelf/ordering.py", expert="looker", window_lines=1, seed=0)
    made = games.generate([spec | {"seed": seed} for seed in range(4)], cache_dir=str(tmp_path / "cache"), progress=False)
    assert made.tasks and all(task.walkthrough[0] in ("open shelf/ordering.py 6", "open shelf/ordering.py 15") for task in made.tasks)
    assert any("down" in task.walkthrough for task in made.tasks)
    with pytest.raises(ValueError, match="window_lines is 1, but only the expert \"looker\""):
        Spec.parse(spec | {"expert": "direct"})


def test_mistakes_that_no_test_notices_are_set_aside(tmp_path):
    files = repositories.FILES | {"shelf/spare.py": "def spare(a):\n    return a < 1\n"}
    repository = str(repositories.make(tmp_path / "shelf", files))
    spec = dict(family="swe-bugs", repository=repository, files="*spare.py", seed=0)
    made = games.generate([spec], cache_dir=str(tmp_path / "cache"), progress=False)
    assert made.tasks == []
    assert "no test notices" in next(iter(made.reasons.values()))


def test_mistakes_without_end_are_not_waited_for(tmp_path, monkeypatch):
    """What the tests may take with a mistake goes by what they take without."""
    monkeypatch.setattr(swe_maker, "_LEAST_S", 0.1)
    monkeypatch.setattr(swe_maker, "_SLOWER", 4.0)
    counting = "def count(n):\n    total = 0\n    while total != n:\n        total += 1\n    return total\n"
    tests = "from shelf import counting\n\ndef test_count():\n    assert counting.count(3) == 3\n"
    repository = repositories.make(tmp_path / "shelf", {"shelf/counting.py": counting, "tests/test_counting.py": tests})
    bugs = swe_maker._bugs(str(repository), "*counting.py", frozenset())
    (endless,) = (seed for seed, (_, bug) in enumerate(bugs) if bug.after.strip() == "total += 2")
    spec = Spec.parse(dict(family="swe-bugs", repository=str(repository), files="*counting.py", seed=endless))
    began = time.monotonic()
    with pytest.raises(SetAside, match="The tests took longer than"):
        swe_maker.build(spec, str(tmp_path / "a.swe.json"), str(tmp_path / "a.json"))
    assert time.monotonic() - began < 50


def test_no_mistake_is_in_a_test_whatever_it_is_called(tmp_path):
    files = {path: text for path, text in repositories.FILES.items() if not path.startswith("tests/")}
    files |= {"checks/check_shelf.py": repositories.TESTS, "pytest.ini": "[pytest]\npython_files = check_*.py\n"}
    repository = str(repositories.make(tmp_path / "shelf", files))
    specs = [dict(family="swe-bugs", repository=repository, seed=seed) for seed in range(5)]
    made = games.generate(specs, cache_dir=str(tmp_path / "cache"), progress=False)
    changed = {path for task in made.tasks for path in swe_problem.load(task.file).changed}
    assert changed and changed <= {"shelf/ordering.py", "shelf/text.py"}
    env = swe.SweEnv(sandbox="none")
    answers = _play(env, made.tasks[0], "open checks/check_shelf.py", f"edit 1:{repositories.TESTS.count(chr(10))}\nx = 1", "submit")
    assert answers[2].info.valid_command and answers[3].reward == 0.0


@pytest.mark.parametrize(
    "changes, files, expected",
    [
        ({"repository": "/nowhere"}, {}, "there is no repository at /nowhere"),
        ({"repository": 3}, {}, "repository must be a text, got 3"),
        ({"files": "*.rs"}, {}, "there is no function to plant a mistake in, in files '\\*.rs'"),
        ({"tests": "tests/test_shelf.py tests/test_none.py"}, {}, "the tests of .* do not run as it stands"),
        ({}, {"tests/test_shelf.py": "def test_it():\n    assert 0\n"}, "of the tests of .* none passes"),
    ],
)
def test_repositories_that_cannot_be_used(tmp_path, changes, files, expected):
    repository = str(repositories.make(tmp_path / "shelf", repositories.FILES | files))
    spec = dict(family="swe-bugs", repository=repository, files="shelf/*.py", seed=0) | changes
    with pytest.raises(ValueError, match=expected):
        games.generate([spec], cache_dir=str(tmp_path / "cache"), progress=False)


def test_what_git_tracks_is_the_repository(tmp_path):
    repository = repositories.make(tmp_path / "shelf")
    head = repositories.commit(repository)
    tree = swe_workspace.tree(str(repository))
    repositories.make(repository, {"shelf/new.py": "x = 1\n", "build/a.py": "x = 1\n"})
    assert swe_workspace.tree(str(repository)) == tree
    assert swe_workspace.lay_out(str(repository), head, str(tmp_path / "laid")) == head
    assert swe_workspace.Workspace(str(tmp_path / "laid")).files() == sorted(repositories.FILES)
    with pytest.raises(GameFileError, match="git read-tree does not work"):
        swe_workspace.lay_out(str(repository), "0" * 40, str(tmp_path / "none"))


def test_damaged_task_files(env, tmp_path):
    task = _task(tmp_path)
    path = pathlib.Path(task.file)
    for content in ("{", "{}", "[]", '{"format": 0}'):
        path.write_text(content)
        with pytest.raises(GameFileError):
            env.reset(task)
    path.unlink()
    with pytest.raises(GameFileError, match="generate the games again"):
        env.reset(task)


def test_resets_answer_like_the_first(env, tmp_path):
    task = _task(tmp_path)
    first = env.reset(task)
    env.step(REPAIR[0])
    assert isinstance(first, ResetResult) and env.reset(task) == first
    assert env.step("down").observation == "No file is open."
