"""Folders that episodes work in, and what becomes of them when their process is killed.

A process has one folder for all of its own, and holds a lock in it for as long as it lives: whoever can
take the lock knows that the process is dead, whatever ended it, and clears up. A process does so with its first
folder and as it ends, and a worker that is killed is replaced by one that plays its episodes again: copies
of large repositories do not pile up.

What is in these folders an agent's tests have made, and it is removed whatever they have made of it.
"""

import atexit
import contextlib
import fcntl
import functools
import glob
import os
import secrets
import tempfile
import time
import weakref

_PREFIX = "jaxagentrl-swe-"
_LOCK = "lock"
_YOUNG_S = 60.0  # Between its making and its lock a folder is nobody's.


class Folder:
    """See `folder`."""

    def __init__(self, name: str):
        self.name = name
        self.cleanup = weakref.finalize(self, remove, name)  # however often it is called

    def __enter__(self) -> str:
        return self.name

    def __exit__(self, *_) -> None:
        self.cleanup()


def folder() -> Folder:
    """A folder of its own, without links in its path; to be entered, or cleaned up."""
    return Folder(tempfile.mkdtemp(dir=_root()))


def remove(folder: str) -> None:
    """Removes a folder with all that is in it, as far as it can be removed.

    Folders are moved up before they are looked into, and then have a short path: thousands of them, one in
    the other, are more than a path, a recursion (`shutil.rmtree`) or the descriptors of a process can hold.
    """
    waiting = [folder]
    while waiting:
        inner = waiting.pop()
        # What cannot be removed keeps nothing else from being removed.
        with contextlib.suppress(OSError):
            waiting += _emptied(inner, folder)
            os.rmdir(inner)
    with contextlib.suppress(OSError):
        os.rmdir(folder)


def _emptied(inner: str, top: str) -> list[str]:
    """Removes the files of a folder, and moves the folders in it to the top; returns where they are."""
    os.chmod(inner, 0o700)
    with os.scandir(inner) as listed:
        entries = list(listed)
    moved = []
    for entry in entries:
        with contextlib.suppress(OSError):
            if not entry.is_dir(follow_symlinks=False):
                os.remove(entry.path)
                continue
            os.chmod(entry.path, 0o700)  # one that may not be written to cannot be moved either
            target = os.path.join(top, secrets.token_hex(16))
            os.rename(entry.path, target)
            moved.append(target)
    return moved


@functools.cache
def _root() -> str:
    """This process's folder."""
    parent = os.path.realpath(tempfile.gettempdir())
    _clear_dead(parent)
    root = tempfile.mkdtemp(prefix=_PREFIX, dir=parent)
    # Held to the end of the process, and by no child: descriptors are not inherited.
    descriptor = os.open(os.path.join(root, _LOCK), os.O_CREAT | os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    # pytest looks for settings in all folders above, as far as it finds some: those of others are not ours.
    open(os.path.join(root, "pytest.ini"), "w").close()
    # The workers of a run are killed as it ends.
    atexit.register(_clear_dead, parent)
    atexit.register(remove, root)
    return root


def _clear_dead(parent: str) -> None:
    for root in glob.glob(os.path.join(glob.escape(parent), _PREFIX + "*")):
        _clear_if_dead(root)


def _clear_if_dead(root: str) -> None:
    lock = os.path.join(root, _LOCK)
    try:
        # The folder itself changes with every episode.
        made = os.stat(lock if os.path.exists(lock) else root).st_mtime
        if time.time() - made < _YOUNG_S:
            return
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR)
    except OSError:
        return  # Another process was faster, or it is somebody else's.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    else:
        remove(root)
    finally:
        os.close(descriptor)
