"""The command starts itself again once, with everything it was given."""

import os
import subprocess
import sys

import pytest

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")

PROGRAM = """
import os, sys
from jaxagentrl import pages
pages.use_huge_ones()
print(os.getpid(), os.environ["GLIBC_TUNABLES"], sys.argv[1:])
"""


@LINUX
@pytest.mark.parametrize(
    "given, wanted",
    [
        ("", "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"),
        (
            "glibc.malloc.check=0",
            "glibc.malloc.check=0:glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1",
        ),
        ("glibc.malloc.hugetlb=0", "glibc.malloc.hugetlb=0:glibc.malloc.arena_max=1"),
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


# Page faults of a call of a program that needs some 50 MB for itself; the median, as now and then what is
# kept lies in the way of a piece, and the heap grows.
FAULTS = """
import resource, statistics, sys
import jax, jax.numpy as jnp
from jaxagentrl import pages
pages.use_huge_ones()
if sys.argv[1] == "kept":
    pages.keep()
program = jax.jit(lambda x: (jnp.outer(x, x) @ jnp.outer(x, x)).sum())
x, seen = jnp.ones(2048), []
for _ in range(12):
    jax.block_until_ready(program(x))
    seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(statistics.median(after - before for before, after in zip(seen, seen[1:])))
"""


@pytest.mark.slow
@LINUX
def test_memory_of_a_program_is_kept_for_the_next():
    def faults(word):
        command = [sys.executable, "-c", FAULTS, word]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") < faults("given back") / 10
