"""The memory of programs on CPU: huge pages, and kept.

XLA on CPU takes the memory of every call anew from the system and gives it back, as glibc does with all
large pieces. The system clears what it hands out, and a virtual machine whose host takes back what lay
free for a second or two has it fetched again, too (`docs/performance.md`, "Memory that is kept").
"""

import ctypes
import os
import sys

# Pages of 2 MB: clearing 4 kB at a time was a sixth of an update. One arena: those of further threads hold
# no piece above 64 MB, whatever `keep` asks for.
_TUNABLES = {"glibc.malloc.hugetlb": "1", "glibc.malloc.arena_max": "1"}

_STARTED = "JAXAGENTRL_STARTED_AGAIN"

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def use_huge_ones() -> None:
    """Starts the running command again with glibc's transparent huge pages and one arena.

    A setting that the command was given stays. glibc reads them when a process starts and never again.
    Where there are no such pages nothing changes.
    """
    if sys.platform != "linux":
        return
    given = os.environ.get("GLIBC_TUNABLES", "")
    missing = [f"{name}={value}" for name, value in _TUNABLES.items() if name not in given]
    if missing and _STARTED not in os.environ:  # once: some interpreters are not given the setting
        os.environ[_STARTED] = "1"
        os.environ["GLIBC_TUNABLES"] = ":".join([*filter(None, [given]), *missing])
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep() -> None:
    """From now on this process keeps the memory that its programs give back, for the next ones.

    It then holds more than it uses: what is taken for long in between may lie where the largest piece
    was, which must find another place. Of all memory after `use_huge_ones`, else of that of the first
    thread. Where there is no glibc nothing changes.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    libc.mallopt(_M_MMAP_MAX, 0)  # no piece is too large for the heap
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # and the heap never shrinks
