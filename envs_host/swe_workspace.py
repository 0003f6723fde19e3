"""The files of a repository: where they come from, and the copy of them that an episode works in.

A repository is a folder, of which the files count that git tracks (all but caches and builds, where
there is no git), or a commit of a git clone. Its `tree` is a digest of names and contents, or the
commit: a task is recorded with it, so that a repository that has changed since is noticed.
"""

import difflib
import fnmatch
import hashlib
import io
import os
import subprocess
import tempfile
from collections.abc import Mapping

from envs_host import swe_scratch
from envs_host.types import GameFileError

# Never part of a repository that git does not keep.
_LEFT_OUT = ("__pycache__", "*.pyc", ".*", "*.egg-info", "build", "dist", "node_modules", "venv")
_OF_TESTS = ("__pycache__", ".pytest_cache")  # folders that running them leaves
_TESTS = ("test_*.py", "*_test.py", "test.py", "tests.py", "conftest.py")
_TEST_FOLDERS = ("test", "tests", "testing")
_METADATA = (".egg-info", ".dist-info")  # Of what is installed: where pytest finds plugins.
_TEST_SETTINGS = (
    "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml", "tox.ini", "setup.cfg", "pyproject.toml",
)  # fmt: skip
_MAX_DEPTH = 50  # Folders in each other that files are looked for in: tests can make thousands.
# What git tells the programs that it calls, and what would have it read another repository.
_GIT_STATE = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR")


class PathError(ValueError):
    """A path of an episode leads nowhere, or out of its repository; the message is the answer to give."""


def paths(repository: str) -> list[str]:
    """The files of a repository in a folder, relative to it, in order.

    Raises:
        GameFileError: the folder is not there.
    """
    root = os.path.expanduser(repository)
    if not os.path.isdir(root):
        raise GameFileError(f"there is no repository at {repository}: the folder does not exist.")
    if os.path.exists(os.path.join(root, ".git")):
        listed = _git(root, "ls-files", "-z").decode(errors="surrogateescape").split("\0")
        # A file that is tracked may have been deleted, and a submodule is a folder.
        return sorted(path for path in listed if path and os.path.isfile(os.path.join(root, path)))
    found = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if not _is_left_out(name)]
        found += (os.path.relpath(os.path.join(folder, file), root) for file in files if not _is_left_out(file))
    return sorted(path for path in found if os.path.isfile(os.path.join(root, path)))  # no pipes, which block


def tree(repository: str) -> str:
    """Digest of a repository in a folder: SHA-256, in hexadecimal."""
    root, digest = os.path.expanduser(repository), hashlib.sha256()
    for path in paths(repository):
        with open(os.path.join(root, path), "rb") as file:
            _add(digest, path, file.read())
    return digest.hexdigest()


def lay_out(repository: str, commit: str | None, folder: str) -> str:
    """Copies a repository into a folder that is made; returns its `tree` (the commit, if there is one).

    Raises:
        GameFileError: the repository or the commit is not there.
    """
    os.makedirs(folder)
    root = os.path.expanduser(repository)
    if commit is not None:
        if not os.path.isdir(root):
            raise GameFileError(f"there is no clone at {repository}: the folder does not exist.")
        # Not `git archive`, which leaves out and rewrites what .gitattributes says.
        with tempfile.TemporaryDirectory() as scratch:
            index = os.path.join(scratch, "index")
            _git(root, "read-tree", commit, index=index)
            _git(root, "checkout-index", "--all", f"--prefix={folder}{os.sep}", index=index)
        return commit
    digest = hashlib.sha256()
    for path in paths(repository):
        target = os.path.join(folder, path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(os.path.join(root, path), "rb") as file:
            content = file.read()
        with open(target, "wb") as file:
            file.write(content)
        os.chmod(target, os.stat(os.path.join(root, path)).st_mode & 0o777 | 0o600)
        _add(digest, path, content)
    return digest.hexdigest()


def names(repository: str, commit: str) -> frozenset[str]:
    """The files of a commit of a clone.

    Raises:
        GameFileError: there is no such commit.
    """
    listed = _git(os.path.expanduser(repository), "ls-tree", "-r", "-z", "--name-only", commit)
    return frozenset(listed.decode(errors="surrogateescape").split("\0")[:-1])


def show(repository: str, commit: str, path: str) -> str:
    """The text of a file of a commit.

    Raises:
        GameFileError: there is none.
        UnicodeDecodeError: it is no text.
    """
    return _git(os.path.expanduser(repository), "show", f"{commit}:{path}").decode()


def write(folder: str, changes: Mapping[str, str | None]) -> None:
    """Writes files (path -> text) into a laid out repository; those at None are deleted first, with folders that
    they were the last in.

    Raises:
        FileExistsError, NotADirectoryError, IsADirectoryError: where a file is to be there is a folder, or the
            other way round. What was written before stays.
    """
    for path in (path for path, text in changes.items() if text is None):
        target = os.path.join(folder, path)
        if os.path.exists(target):
            os.remove(target)
            _remove_empty(os.path.dirname(target), folder)
    for path, text in changes.items():
        if text is not None:
            target = os.path.join(folder, path)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "w", encoding="utf-8", newline="") as file:
                file.write(text)


def write_what_fits(folder: str, changes: Mapping[str, str | None]) -> None:
    """As `write`, but for files whose place is a folder's, or in a file: those are left out."""
    for path in sorted(changes, key=lambda path: changes[path] is not None):
        try:
            write(folder, {path: changes[path]})
        except (FileExistsError, NotADirectoryError, IsADirectoryError):
            continue


def write_over(folder: str, changes: Mapping[str, str | None]) -> None:
    """As `write`, with files and folders removed that are in the way."""
    for path in changes:
        parts = path.split("/")
        for above in ("/".join(parts[:count]) for count in range(1, len(parts))):
            if os.path.isfile(target := os.path.join(folder, above)):
                os.remove(target)
        if os.path.isdir(target := os.path.join(folder, path)):
            swe_scratch.remove(target)
    write(folder, changes)


def split_lines(text: str) -> list[str]:
    """The lines of a text with their ends, as Python and editors count them: not at form feeds."""
    return io.StringIO(text, newline="").readlines()


def differences(old: list[str], new: list[str]) -> list[tuple[int, int, int, int]]:
    """Where two lists of lines differ: (i, k, j, m) for old[i:k] in whose place new[j:m] stands."""
    # What they begin and end with alike is most of a file, and blank lines in it would be compared in pairs.
    begin = len(os.path.commonprefix([old, new]))
    end = len(os.path.commonprefix([old[begin:][::-1], new[begin:][::-1]]))
    middle = difflib.SequenceMatcher(None, old[begin : len(old) - end], new[begin : len(new) - end], autojunk=False)
    return [tuple(begin + place for place in places) for tag, *places in middle.get_opcodes() if tag != "equal"]


def is_test(path: str) -> bool:
    """Whether a file has a say in what the tests find: a test, or what pytest is set up by."""
    *folders, name = path.split("/")
    in_tests = any(folder in _TEST_FOLDERS or folder.lower().endswith(_METADATA) for folder in folders)
    return in_tests or name in _TEST_SETTINGS or any(fnmatch.fnmatch(name, form) for form in _TESTS)


class Workspace:
    """A laid out repository as an episode reads and changes it. Paths are relative to it, with `/`."""

    def __init__(self, folder: str):
        self.folder = os.path.realpath(folder)
        self._before: dict[str, str | None] = {}  # What was in the files that were changed.

    def files(self) -> list[str]:
        """All files, in order; none that running tests has left, nor those in folders without end."""
        found = []
        for folder, names, files in os.walk(self.folder):
            depth = folder.count(os.sep) - self.folder.count(os.sep)
            names[:] = [name for name in names if depth < _MAX_DEPTH and name not in _OF_TESTS]
            found += (os.path.relpath(os.path.join(folder, file), self.folder) for file in files)
        return sorted(found)

    def entries(self, path: str) -> list[str]:
        """Names in a folder, folders with a `/` behind.

        Raises:
            PathError: there is no such folder, or it may not be read.
        """
        folder = self._real(path)
        if not os.path.isdir(folder):
            raise PathError(f"There is no folder {path}.")
        try:
            shown = [name for name in os.listdir(folder) if not fnmatch.fnmatch(name, "*.pyc") and name not in _OF_TESTS]
        except OSError as error:
            raise PathError(f"{path} cannot be read ({error.strerror}).") from None
        return sorted(name + "/" * os.path.isdir(os.path.join(folder, name)) for name in shown)

    def read(self, path: str) -> str:
        """The text of a file.

        Raises:
            PathError: there is no such file, or it is no text.
        """
        file = self._real(path)
        if not os.path.isfile(file):
            raise PathError(f"There is no file {path}.")
        try:
            with open(file, encoding="utf-8", newline="") as opened:
                return opened.read()
        except UnicodeDecodeError:
            raise PathError(f"{path} is not a text file.") from None
        except OSError as error:
            raise PathError(f"{path} cannot be read ({error.strerror}).") from None

    def write(self, path: str, text: str) -> None:
        """Writes a file, a new one if need be.

        Raises:
            PathError: the path leads out of the repository, or is a folder's.
        """
        target = self._real(path)
        if os.path.isdir(target):
            raise PathError(f"{path} is a folder.")
        name = self.name(path)
        before = self.read(name) if os.path.exists(target) else None  # refuses what is no text
        try:
            write(self.folder, {name: text})
        except OSError as error:  # a part of its path is a file, or too long
            raise PathError(f"{path[:200]} cannot be written ({error.strerror}).") from None
        except RecursionError:
            raise PathError(f"{path[:200]} cannot be written (too many folders).") from None
        self._before.setdefault(name, before)

    def name(self, path: str) -> str:
        """How a file is called here, however it was named.

        Raises:
            PathError: the path leads out of the repository.
        """
        return os.path.relpath(self._real(path), self.folder)

    def delete(self, path: str) -> None:
        """Deletes a file, and folders that it was the last in.

        Raises:
            PathError: there is no such file, it is no text, or it may not be deleted.
        """
        text, target = self.read(path), self._real(path)
        try:
            os.remove(target)
        except OSError as error:
            raise PathError(f"{path} cannot be deleted ({error.strerror}).") from None
        self._before.setdefault(self.name(path), text)
        _remove_empty(os.path.dirname(target), self.folder)

    def text(self, path: str) -> str | None:
        """The text of a file; None if there is no such file, or it is no text."""
        try:
            return self.read(path)
        except PathError:
            return None

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(self._real(path))

    def before(self, path: str) -> str | None:
        """The text of a file as the episode began, None if there was none."""
        return self._before[path] if path in self._before else self.text(path)

    def changed(self) -> dict[str, str | None]:
        """The files that the episode wrote and that differ from what they were: path -> text now."""
        now = {path: self.text(path) for path in self._before}
        return {path: text for path, text in now.items() if text != self._before[path]}

    def _real(self, path: str) -> str:
        if "\0" not in path and not os.path.isabs(path):
            real = os.path.realpath(os.path.join(self.folder, path))
            if os.path.commonpath([real, self.folder]) == self.folder:
                return real
        raise PathError(f"{path} is not a path in the repository.")


def _remove_empty(folder: str, top: str) -> None:
    """Removes a folder that is empty, and those around it that are empty then, below the top."""
    while folder != top:
        try:
            os.rmdir(folder)
        except OSError:
            return  # There is something in it, or it may not be removed.
        folder = os.path.dirname(folder)


def _is_left_out(name: str) -> bool:
    return any(fnmatch.fnmatch(name, form) for form in _LEFT_OUT)


def _add(digest, path: str, content: bytes) -> None:
    # Lengths first: no two trees give the same bytes.
    name = path.encode(errors="surrogateescape")
    digest.update(b"%d %d " % (len(name), len(content)) + name + content)


def git_environment(index: str | None = None) -> dict[str, str]:
    """The environment for calls of git that are about the folder that they name."""
    environment = {name: value for name, value in os.environ.items() if name not in _GIT_STATE}
    return environment if index is None else environment | {"GIT_INDEX_FILE": index}


def _git(root: str, *arguments: str, index: str | None = None) -> bytes:
    try:
        ended = subprocess.run(
            ["git", "-C", root, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=git_environment(index),
        )
    except FileNotFoundError:
        raise GameFileError("git is not installed, and repositories are read with it.") from None
    if ended.returncode != 0:
        said = ended.stderr.decode(errors="replace").strip()
        raise GameFileError(f"git {arguments[0]} does not work in {root}: {said}")
    return ended.stdout
