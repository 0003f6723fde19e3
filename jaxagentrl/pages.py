"""Huge pages for the memory of programs on CPU."""

import os
import sys

_TUNABLE = "glibc.malloc.hugetlb"


def use_huge_ones() -> None:
    """Starts the running command again with glibc's transparent huge pages, unless it has a setting.

    XLA on CPU takes the memory of every call anew from the system, which clears it page by page: 4 kB
    at a time that is a sixth of an update (`docs/performance.md`). glibc reads the setting when a
    process starts and never again. Where there are no such pages nothing changes.
    """
    given = os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and _TUNABLE not in given:
        os.environ["GLIBC_TUNABLES"] = f"{given}:{_TUNABLE}=1".lstrip(":")
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
