"""Folders that episodes work in, and what becomes of them when their process is killed.

A process has one folder for all of its own, and holds a lock in it for as long as it lives: whoever can
take the lock knows that the process is dead, whatever ended it, and clears up. A process does so with its first
folder and as it ends, and a worker that is killed is replaced by one that plays its episodes again: copies
of large repositories do not pile up.
"""

import atexit
import fcntl
import functools
import glob
import os
import shutil
import tempfile
import time

_PREFIX = "jaxagentrl-swe-"
_LOCK = "lock"
_YOUNG_S = 60.0  # Between its making and its lock a folder is nobody's.


def folder() -> tempfile.TemporaryDirectory:
    """A folder of its own, without links in its path; to be entered, or cleaned up."""
    return tempfile.TemporaryDirectory(dir=_root(), ignore_cleanup_errors=True)


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
    atexit.register(shutil.rmtree, root, ignore_errors=True)
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
        shutil.rmtree(root, ignore_errors=True)
    finally:
        os.close(descriptor)
