"""A small repository with tests, as tasks of `swe` are made from; and a git clone of it with an instance."""

import pathlib
import subprocess

ORDERING = '''\
"""Looking things up in order."""


def clamp(value, low, high):
    """The value, or the bound that it is beyond."""
    if value < low:
        return low
    if value > high:
        return high
    return value


def first_after(items, bound):
    """The first of the items that is above a bound, or None."""
    for item in items:
        if item > bound and item is not None:
            return item
    return None
'''

TEXT = '''\
def shorten(text, width):
    if len(text) <= width:
        return text
    return text[: width - 1] + "…"
'''

TESTS = '''\
import pytest

from shelf import ordering, text


@pytest.mark.parametrize("value, expected", [(0, 1), (1, 1), (2, 2), (3, 3), (9, 3)])
def test_clamp(value, expected):
    assert ordering.clamp(value, 1, 3) == expected


class TestFirstAfter:
    def test_found(self):
        assert ordering.first_after([1, 5, 9], 4) == 5

    def test_bound_is_not_after(self):
        assert ordering.first_after([4], 4) is None


def test_shorten():
    assert text.shorten("abc", 3) == "abc"
    assert text.shorten("abcd", 3) == "ab…"
'''

FILES = {
    "README.md": "# shelf\n",
    "shelf/__init__.py": "",
    "shelf/ordering.py": ORDERING,
    "shelf/text.py": TEXT,
    "tests/test_shelf.py": TESTS,
}


def make(folder: pathlib.Path, files: dict[str, str] = FILES) -> pathlib.Path:
    """Writes the repository; returns the folder."""
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content, encoding="utf-8")
    return folder


def git(folder: pathlib.Path, *arguments: str) -> str:
    named = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(["git", "-C", str(folder), *named, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(folder: pathlib.Path) -> str:
    """Commits all that is there; returns the commit."""
    if not (folder / ".git").exists():
        git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "as it is")
    return git(folder, "rev-parse", "HEAD")
