"""Numbers of a run: one JSON line per (phase, step), TensorBoard events, and their intervals.

    {"phase": "rl", "step": 12, "rollout/return_mean": 0.61, ..., "time/run_s": 402.1}

Keys are paths. Everything that depends on the clock lives under "time/", so two runs that did the
same have equal lines once those keys are left out (`without_time`). metrics.jsonl of a run that was
killed and resumed reads as that of an uninterrupted one: a checkpoint remembers how many lines
there were, and a writer opened from it drops the rest.
"""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxagentrl import workdir as workdir_lib

# What depends on the clock, and on which programs a restarted process compiles again.
CLOCK_PREFIXES = ("time/", "ledger/")
Line = dict[str, Any]

_Z95 = 1.959963984540054


class NonFiniteError(ArithmeticError):
    """A metric is NaN or infinite; the run must stop (its line has been written)."""


class MetricsError(ValueError):
    """metrics.jsonl does not fit the checkpoint; the message names the way out."""


class Writer:
    """Appends metrics of a run to metrics.jsonl and to TensorBoard.

    Args:
        workdir: the run's folder.
        resume_lines: `num_lines` as remembered by the checkpoint the run continues from; lines
            beyond it are dropped. 0 starts anew.

    Raises:
        MetricsError: the file has fewer lines than the checkpoint remembers.
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_lines: int = 0):
        root = pathlib.Path(workdir)
        self._path = root / "metrics.jsonl"
        self._tensorboard = root / "tensorboard"
        lines = read(self._path)
        if len(lines) < resume_lines:
            raise MetricsError(
                f"{self._path} has {len(lines)} lines but the checkpoint was saved after "
                f"{resume_lines}. Restore the file, or start in another workdir."
            )
        kept = lines[:resume_lines]
        text = _text(kept)
        if not self._path.exists() or self._path.read_text(encoding="utf-8") != text:
            workdir_lib.write_atomic(self._path, text)
        self.num_lines = len(kept)
        self._last_steps = {line["phase"]: line["step"] for line in kept}
        self._seconds_before = kept[-1]["time/run_s"] if kept else 0.0
        self._opened = time.monotonic()
        self._file = open(self._path, "a", encoding="utf-8")
        self._events: dict[str, Any] = {}  # a writer of tensorboardX for each phase

    def write(self, phase: str, step: int, values: Mapping[str, Any]) -> Line:
        """Appends one line and returns it.

        Args:
            phase: "sft", "rl", ...; steps count within it.
            step: larger than the phase's last one.
            values: numbers (Python, numpy or jax scalars) by key. A mean over nothing has no value:
                leave its key out.

        Raises:
            NonFiniteError: a value is NaN or infinite; raised after the line is on disk.
        """
        if phase in self._last_steps and step <= self._last_steps[phase]:
            raise ValueError(
                f"metrics of phase {phase!r}: step {step} does not follow "
                f"{self._last_steps[phase]}; merge what belongs to one step into one write"
            )
        numbers = {key: _number(key, value) for key, value in values.items()}
        numbers["time/run_s"] = round(self.run_seconds, 3)
        numbers["time/unix"] = round(time.time(), 3)
        line: Line = {"phase": phase, "step": int(step)}
        line.update({key: x if math.isfinite(x) else str(x) for key, x in numbers.items()})
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.num_lines += 1
        self._last_steps[phase] = int(step)
        self._write_events(phase, int(step), numbers)
        bad = [f"{key} = {x}" for key, x in numbers.items() if not math.isfinite(x)]
        if bad:
            raise NonFiniteError(
                f"non-finite metrics in phase {phase!r} at step {step}: {', '.join(bad)}. The run "
                "stops here; its last checkpoint is intact."
            )
        return line

    def of_phase(self, phase: str) -> list[Line]:
        """The lines of a phase so far."""
        return [line for line in read(self._path) if line["phase"] == phase]

    @property
    def run_seconds(self) -> float:
        """Time since preparation that this run has worked, restarts included, work that was lost by a kill not."""
        return self._seconds_before + time.monotonic() - self._opened

    def flush(self) -> None:
        """Puts all lines on the disk. Call before saving a checkpoint with `num_lines`."""
        os.fsync(self._file.fileno())
        for events in self._events.values():
            events.flush()

    def close(self) -> None:
        self._file.close()
        for events in self._events.values():
            events.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *unused) -> None:
        self.close()

    def _write_events(self, phase: str, step: int, numbers: Mapping[str, float]) -> None:
        if phase not in self._events:
            # One event folder per phase: TensorBoard purges by step alone, and the steps of one
            # phase must not purge those of another. The suffix, because tensorboardX names files
            # by the second and would overwrite those of a run restarted within it.
            self._events[phase] = _tensorboard_x().SummaryWriter(
                str(self._tensorboard / phase),
                purge_step=step,
                flush_secs=10,
                filename_suffix=f".{time.time_ns()}",
            )
        for key, value in numbers.items():
            if math.isfinite(value):   # tensorboardX only warns; `write` raises after this
                self._events[phase].add_scalar(key, value, step)


def catch_up(workdir: pathlib.Path, first: pathlib.Path, num_lines: int) -> None:
    """Gives a process that was not there when the checkpoint was saved, or not of late, the lines of the first
    process's folder: all write the same."""
    own = workdir / "metrics.jsonl"
    if len(read(own)) < num_lines:
        workdir_lib.write_atomic(own, _text(read(first / "metrics.jsonl")[:num_lines]))


def _text(lines: Sequence[Line]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _tensorboard_x() -> Any:
    """tensorboardX, kept from importing torch where there is one: it does so for an annotation, in seconds and with
    hundreds of megabytes."""
    hides = "torch" not in sys.modules
    if hides:
        sys.modules["torch"] = None  # as if it were not installed
    try:
        import tensorboardX
    finally:
        if hides:
            del sys.modules["torch"]
    return tensorboardX


def read(path: str | os.PathLike) -> list[Line]:
    """Lines of a metrics.jsonl; [] when there is no file.

    A last line torn by a kill is left out.

    Raises:
        MetricsError: a line before the last is no JSON object with phase and step.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    rows = path.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = []
    for number, row in enumerate(rows[:-1], start=1):   # what follows the last newline is torn
        try:
            line = json.loads(row)
            line["phase"], line["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise MetricsError(f"{path}, line {number} is damaged: {row[:80]!r}") from error
        lines.append(line)
    return lines


def without_time(line: Line) -> Line:
    """A line without what depends on the clock, for comparing runs."""
    return {key: value for key, value in line.items() if not key.startswith(CLOCK_PREFIXES)}


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a success rate by Wilson's score method.

    With p = successes/n and z = 1.96: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n). Unlike
    p ± 1.96 σ it is never empty at 0 or n successes. Wilson 1927, JASA 22, 209.

    Returns:
        (low, high) in [0, 1]; (0, 1) for n = 0.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}, expected 0 <= successes <= n")
    if n == 0:
        return 0.0, 1.0
    p, z2 = successes / n, _Z95**2
    center = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends the two terms cancel exactly in theory; rounding must not leave 1e-17 there.
    low = 0.0 if successes == 0 else max(0.0, center - half)
    high = 1.0 if successes == n else min(1.0, center + half)
    return low, high


def success_metrics(prefix: str, successes: int, n: int) -> dict[str, float]:
    """A success rate with its n and 95 % interval under the keys that the report looks for."""
    low, high = wilson_interval(successes, n)
    rate = {f"{prefix}/success_rate": successes / n} if n else {}
    return rate | {
        f"{prefix}/success_low": low,
        f"{prefix}/success_high": high,
        f"{prefix}/successes": successes,
        f"{prefix}/episodes": n,
    }


def of_processes(ledgers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One ledger of the sampling that several processes did at the same time: the seconds of the slowest,
    the mean of shares and occupancies, the sum of what was counted."""

    def joined(key: str, values: list[float]) -> float:
        if key == "seconds":
            return max(values)
        is_part = key.endswith(("_share", "_occupancy"))
        return sum(values) / len(values) if is_part else sum(values)

    return {key: joined(key, [ledger[key] for ledger in ledgers]) for key in ledgers[0]}


def of_rounds(ledgers: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One ledger of sampling that was done one after the other: shares and occupancies are weighed by the seconds,
    everything else is summed."""
    seconds = sum(ledger["seconds"] for ledger in ledgers)

    def joined(key: str) -> float:
        if key.endswith(("_share", "_occupancy")):
            return sum(ledger["seconds"] * ledger[key] for ledger in ledgers) / seconds
        return sum(ledger[key] for ledger in ledgers)

    return {key: joined(key) for key in ledgers[0]}


def mean(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of every value over steps that measured the same; at least one."""
    return {key: float(np.mean([step[key] for step in steps])) for key in steps[0]}


def _number(key: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.ndim != 0 or array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise TypeError(
            f"metric {key!r} is {array.dtype} of shape {array.shape}, expected one number")
    return int(array) if array.dtype.kind in "biu" else float(array)
