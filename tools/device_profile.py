"""Where a device's time goes: the costliest kernels of a `jax.profiler` trace, for the benchmarks."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable

import jax


def costs(run: Callable[[], object]) -> list[tuple[str, float, int]]:
    """(name, seconds, how often) of every kernel of one call of `run`, which must wait for its result;
    costliest first.

    Names that differ in a running number only are added up. Empty where the profiler knows no
    device, as on CPU.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    seconds: collections.Counter[str] = collections.Counter()
    runs: collections.Counter[str] = collections.Counter()
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = re.sub(r"[._]\d+\b", "", event.name)
                seconds[name] += event.duration_ns * 1e-9
                runs[name] += 1
    return [(name, value, runs[name]) for name, value in seconds.most_common()]


def report(run: Callable[[], object], *, count: int = 5) -> None:
    """Prints the `count` costliest kernels of one call of `run`, and what the rest takes."""
    found = costs(run)
    total = sum(seconds for _, seconds, _ in found)
    if not found:
        print("    no profile: the profiler saw no GPU")
        return
    times = sum(runs for _, _, runs in found)
    print(f"    kernels, {1e3 * total:.2f} ms in all, {times} runs:")
    for name, seconds, runs in found[:count]:
        print(f"    {1e3 * seconds:9.3f} ms {seconds / total:5.1%} {runs:6} x  {name[:110]}")
    rest = sum(seconds for _, seconds, _ in found[count:])
    print(f"    {1e3 * rest:9.3f} ms {rest / total:5.1%}  {max(len(found) - count, 0)} others", flush=True)
