"""What is installed beside a repository under the repository's own names.

A mistake that is planted in a package is none in the copy of the package that another library has brought
along, and what a pull request repairs is repaired in the release after it: such copies are answers to be
read. The repository's own modules are found before them, so that nothing misses them.
"""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

# Where modules are found that do not belong to Python, and what is loaded before those of the repository are found.
_PROBE = """\
import json, os, site, sys, sysconfig
sys.path.pop(0)
standard = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib")]
standard += [os.path.join(folder, "lib-dynload") for folder in standard]
folders = [folder for folder in sys.path if folder not in standard]
if hasattr(site, "getsitepackages"):
    folders += site.getsitepackages([sys.prefix, sys.base_prefix]) + [site.getusersitepackages()]
import pytest
print(json.dumps([folders, sorted({name.partition(".")[0] for name in sys.modules})]))
"""
_CODE = (".py", ".pyc", ".so", ".pyd")


class _Installed(NamedTuple):
    """What an interpreter has: folders that modules are installed in, names of those that pytest needs."""

    folders: frozenset[str]
    needed: frozenset[str]


def copies(repository: str, python: str | None) -> list[str]:
    """Files and folders that are installed for an interpreter, or for this one, and that a repository in a folder
    hides from imports. What pytest itself is made of is not among them."""
    here = _installed(sys.executable)
    folders, needed = here if python is None else _installed(python)
    folders |= here.folders
    found = set()
    for own in (repository, os.path.join(repository, "src")):
        for folder in folders:
            found |= {os.path.realpath(path) for path in _shadowed(own, folder, needed)}
    return sorted(found)


def _shadowed(own: str, installed: str, needed: frozenset[str]) -> Iterator[str]:
    """What is installed in a folder under the names of modules and packages of another."""
    if not os.path.isdir(own) or not os.path.isdir(installed):
        return
    there: dict[str, list[str]] = {}
    for folder in (installed, os.path.join(installed, "__pycache__")):
        for entry in os.listdir(folder) if os.path.isdir(folder) else ():
            there.setdefault(entry.partition(".")[0], []).append(os.path.join(folder, entry))
    for entry in os.listdir(own):
        name, path = entry.removesuffix(".py"), os.path.join(own, entry)
        if name not in there or name in needed:
            continue
        if os.path.isdir(path) and not os.path.exists(os.path.join(path, "__init__.py")):
            # Without it a folder is a part of a package that may have others elsewhere, or gives way to one that has it.
            if not os.path.exists(os.path.join(installed, name, "__init__.py")):
                yield from _shadowed(path, os.path.join(installed, name), frozenset())
        elif os.path.isdir(path) or entry.endswith(".py"):
            yield from (copy for copy in there[name] if copy.endswith(_CODE) or os.path.basename(copy) == name)


@functools.cache
def _installed(interpreter: str) -> _Installed:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command = [interpreter, "-c", _PROBE]
    try:
        ended = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):  # without pytest, say: no test runs, and is told why
        return _Installed(frozenset(), frozenset())
    folders, needed = json.loads(ended.stdout.splitlines()[-1])
    return _Installed(frozenset(folders), frozenset(needed))
