"""The command starts itself again once, with everything it was given."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, sys
from jaxagentrl import pages
pages.use_huge_ones()
print(os.getpid(), os.environ["GLIBC_TUNABLES"], sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
@pytest.mark.parametrize(
    "given, wanted",
    [
        ("", "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=0", "glibc.malloc.check=0:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0"),
    ],
)
def test_the_same_process_goes_on_with_the_setting(given, wanted):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "--config=a b", "x"],
        env=os.environ | {"GLIBC_TUNABLES": given},
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = process.communicate(timeout=60)
    assert output.split(maxsplit=2) == [str(process.pid), wanted, "['--config=a b', 'x']\n"]
