"""Planted mistakes: what each is, where they are found, and that only their line changes."""

import pathlib

import pytest

from envs_host import swe_bugs

ROOT = pathlib.Path(__file__).resolve().parent.parent


def _changes(body: str) -> list[tuple[str, str]]:
    """Kind and changed line of every mistake in a function's one-line body."""
    found = swe_bugs.find(f"def f(a, b, c):\n    {body}\n")
    return [(bug.kind, bug.after.strip()) for bug in found]


@pytest.mark.parametrize(
    "body, expected",
    [
        ("return a < b", [("comparison", "return a <= b")]),
        ("return a is not b", [("comparison", "return a is b")]),
        ("return a not in b", [("comparison", "return a in b")]),
        ("return (a) == (b)", [("comparison", "return (a) != (b)")]),
        ("return a < b < c", [("comparison", "return a <= b < c"), ("comparison", "return a < b <= c")]),
        ("return a and b", [("boolean", "return a or b")]),
        ("return a or (b)", [("boolean", "return a and (b)")]),
        ("return a + b", [("arithmetic", "return a - b")]),
        ("return a // (b)", [("arithmetic", "return a / (b)")]),
        ("return '%s' % a", []),
        ("return 2", [("constant", "return 3"), ("constant", "return 1")]),
        ("return 0", [("constant", "return 1")]),
        ("return True", [("constant", "return False")]),
        ("return 'two'", []),
        ("return not a", [("negation", "return a")]),
        ("return a if b else c", [("condition", "return a if not b else c")]),
        ("return f(a, b)", [("arguments", "return f(b, a)")]),
        ("return f(*a, b)", []),
        ("return f(a , 'é')", [("arguments", "return f('é' , a)")]),
        ("return 'é' + a", [("arithmetic", "return 'é' - a")]),
    ],
)
def test_a_line_changes(body, expected):
    assert _changes(body) == expected


def test_conditions_and_loops():
    source = "def f(a):\n    while a:\n        if a > 1:\n            break\n        continue\n"
    found = [(bug.line, bug.kind, bug.after.strip()) for bug in swe_bugs.find(source)]
    assert found == [
        (2, "condition", "while not a:"),
        (3, "condition", "if not (a > 1):"),
        (3, "comparison", "if a >= 1:"),
        (3, "constant", "if a > 2:"),
        (3, "constant", "if a > 0:"),
        (4, "loop", "continue"),
        (5, "loop", "break"),
    ]


def test_only_functions_and_single_lines():
    source = "LIMIT = 1 + 2\n\n\nclass A:\n    size = 3\n\n    def f(self, a, b):\n        return (a +\n                b)\n"
    assert swe_bugs.find(source) == []


def test_the_place_is_named():
    source = "class A:\n    def f(self):\n        def g():\n            return 1 < 2\n        return g\n"
    bug = swe_bugs.find(source)[0]
    assert (bug.function, bug.body_line, bug.line) == ("A.f.g", 4, 4)


def test_a_functions_code_begins_below_what_documents_it():
    source = 'def f(a, b=1):\n    """What it does.\n\n    More of it.\n    """\n    c = a\n    return c < b\n'
    bugs = swe_bugs.find(source)
    assert {bug.body_line for bug in bugs} == {6}
    assert [bug.line for bug in bugs if bug.kind == "comparison"] == [7]
    assert swe_bugs.find('def f(a=1):\n    """Nothing else."""\n') == []


def test_what_is_no_other_program():
    same, wrong = (swe_bugs.Bug(1, "f(1, 1)", after, "arguments", "", 1) for after in ("f(1,  1)", "f(1 1)"))
    assert not swe_bugs.is_program("f(1, 1)", same)
    assert not swe_bugs.is_program("f(1, 1)", wrong)


def test_lines_are_counted_as_python_counts_them():
    # A form feed ends a line for str.splitlines, and not for Python.
    source = "def f(a):\n    '''\x0c page'''\n    return a < 1\r\n"
    bug = next(bug for bug in swe_bugs.find(source) if bug.kind == "comparison")
    assert bug.line == 3
    assert swe_bugs.plant(source, bug) == "def f(a):\n    '''\x0c page'''\n    return a <= 1\r\n"


def test_a_file_may_begin_with_a_byte_order_mark():
    source = "\ufeffdef f(a): return a < 1\n"
    bug = swe_bugs.find(source)[0]
    assert (bug.line, bug.before, bug.after) == (1, "def f(a): return a < 1", "def f(a): return a <= 1")
    assert swe_bugs.plant(source, bug) == "\ufeffdef f(a): return a <= 1\n" and swe_bugs.is_program(source, bug)


@pytest.mark.parametrize("name", ["games", "pool_server", "textworld_text", "alfworld_pddl"])
def test_real_code_stays_code_but_for_one_line(name):
    source = (ROOT / "envs_host" / f"{name}.py").read_text()
    bugs = swe_bugs.find(source)
    assert len(bugs) > 20
    programs = [bug for bug in bugs[::7] if swe_bugs.is_program(source, bug)]
    assert len(programs) > 0.9 * len(bugs[::7])
    for bug in programs:
        planted = swe_bugs.plant(source, bug)
        differing = [
            number
            for number, (one, two) in enumerate(zip(source.split("\n"), planted.split("\n"), strict=True), 1)
            if one != two
        ]
        assert differing == [bug.line]
        assert bug.kind in swe_bugs.KINDS
