"""metrics.jsonl as an uninterrupted run would have written it, and intervals by hand."""

import json
import math
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxagentrl import metrics


def write_run(root, first, last, **options):
    """Steps first..last of a pretend run: imitation up to 10, RL from 11 on, counting anew."""
    with metrics.Writer(root, **options) as writer:
        for step in range(first, last + 1):
            phase, number = ("sft", step) if step <= 10 else ("rl", step - 10)
            writer.write(phase, number, {"loss/x": 1 / step, "time/work_s": 0.5})
        return writer.num_lines


def plain(root):
    return [metrics.without_time(line) for line in metrics.read(root / "metrics.jsonl")]


def test_lines(tmp_path):
    with metrics.Writer(tmp_path) as writer:
        returned = writer.write("rl", 3, {
            "a": np.float32(0.1), "b": jnp.float32(2.5), "c": jnp.int32(7), "d": np.bool_(True),
            "e": jnp.bfloat16(0.5), "f": 3})
    line = metrics.read(tmp_path / "metrics.jsonl")[0]
    assert line == returned
    assert metrics.without_time(line) == {
        "phase": "rl", "step": 3, "a": float(np.float32(0.1)), "b": 2.5, "c": 7, "d": 1, "e": 0.5,
        "f": 3}
    assert isinstance(line["c"], int)
    assert line["time/unix"] > 1.6e9 and 0 <= line["time/run_s"] < 60


@pytest.mark.parametrize("saved, killed", [(4, 7), (10, 13), (13, 13), (0, 5), (12, 19)])
def test_resumed_file_equals_an_uninterrupted_one(saved, killed, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    write_run(tmp_path / "one", 1, 20)
    write_run(tmp_path / "two", 1, killed)
    # Killed in the middle of a line, too.
    with open(tmp_path / "two" / "metrics.jsonl", "a") as file:
        file.write('{"phase": "rl", "ste')
    write_run(tmp_path / "two", saved + 1, 20, resume_lines=saved)
    assert plain(tmp_path / "one") == plain(tmp_path / "two")


def test_run_time_goes_on_after_a_resume(tmp_path):
    write_run(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    lines = metrics.read(path)
    lines[1]["time/run_s"], lines[2]["time/run_s"] = 100.0, 200.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_run(tmp_path, 3, 3, resume_lines=2)
    assert 100.0 <= metrics.read(path)[2]["time/run_s"] < 101.0


def test_file_shorter_than_the_checkpoint_says(tmp_path):
    write_run(tmp_path, 1, 3)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(metrics.MetricsError, match="has 3 lines but .* after 5"):
        metrics.Writer(tmp_path, resume_lines=5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_damaged_line_is_named(tmp_path):
    write_run(tmp_path, 1, 3)
    path = tmp_path / "metrics.jsonl"
    rows = path.read_text().split("\n")
    rows[1] = rows[1][:20]
    path.write_text("\n".join(rows))
    with pytest.raises(metrics.MetricsError, match="line 2 is damaged"):
        metrics.read(path)


def test_a_step_is_written_once(tmp_path):
    with metrics.Writer(tmp_path) as writer:
        writer.write("sft", 5, {"a": 1})
        writer.write("rl", 1, {"a": 1})
        with pytest.raises(ValueError, match="step 5 does not follow 5"):
            writer.write("sft", 5, {"b": 1})
    # A resumed writer remembers.
    with metrics.Writer(tmp_path, resume_lines=2) as writer:
        with pytest.raises(ValueError, match="step 1 does not follow 1"):
            writer.write("rl", 1, {"a": 1})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), jnp.float32(-jnp.inf)])
def test_non_finite_value_stops_with_key_and_step(bad, tmp_path):
    with metrics.Writer(tmp_path) as writer:
        writer.write("rl", 1, {"loss/policy": 1.0})
        with pytest.raises(metrics.NonFiniteError, match="phase 'rl' at step 2: loss/policy = "):
            writer.write("rl", 2, {"loss/policy": bad, "loss/value": 0.5})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text   # neither is JSON
    line = metrics.read(tmp_path / "metrics.jsonl")[1]
    assert not math.isfinite(float(line["loss/policy"])) and line["loss/value"] == 0.5


@pytest.mark.parametrize("bad", [np.zeros(2), "text", None, [1.0]])
def test_only_single_numbers_are_metrics(bad, tmp_path):
    with metrics.Writer(tmp_path) as writer, pytest.raises(TypeError, match="metric 'k' is"):
        writer.write("rl", 1, {"k": bad})


def test_tensorboard_events(tmp_path):
    """Events are there per phase, and a resumed phase purges from its next step on."""
    from tensorboardX.proto import event_pb2

    write_run(tmp_path, 1, 13)
    write_run(tmp_path, 12, 14, resume_lines=11)
    found = {}
    for phase in ("sft", "rl"):
        events = []
        for path in sorted((tmp_path / "tensorboard" / phase).iterdir()):   # named by time
            data, place = path.read_bytes(), 0
            while place < len(data):   # record: length, crc of length, data, crc of data
                length = int.from_bytes(data[place:place + 8], "little")
                events.append(event_pb2.Event.FromString(data[place + 12:place + 12 + length]))
                place += length + 16
        found[phase] = events
    values = {
        phase: [(event.step, round(event.summary.value[0].simple_value, 4)) for event in events
                if event.summary.value and event.summary.value[0].tag == "loss/x"]
        for phase, events in found.items()
    }
    assert values["sft"] == [(step, round(1 / step, 4)) for step in range(1, 11)]
    assert values["rl"] == [(step - 10, round(1 / step, 4)) for step in (11, 12, 13, 12, 13, 14)]
    starts = [event.step for event in found["rl"] if event.session_log.status == 1]
    assert starts == [1, 2]   # step 2 and 3 of the killed run are purged


@pytest.mark.parametrize("successes, n, low, high", [
    # By hand for 5 of 10, z² = 3.8415: center (0.5 + 0.19207) / 1.38415 = 0.5,
    # half 1.96 √(0.025 + 0.0096037) / 1.38415 = 0.26341.
    (5, 10, 0.23659, 0.76341),
    (0, 10, 0.0, 0.27753),      # z² / (n + z²)
    (10, 10, 0.72247, 1.0),
    # 81 of 263: the example of Newcombe 1998, Statistics in Medicine 17, 857, method 3.
    (81, 263, 0.2553, 0.3662),
    (1, 29, 0.0061, 0.1718),
    (0, 0, 0.0, 1.0),
])
def test_wilson_interval(successes, n, low, high):
    assert metrics.wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_covers():
    """Over a grid of true rates and exact binomial sums, coverage stays near 95 %."""
    n = 100
    intervals = [metrics.wilson_interval(k, n) for k in range(n + 1)]
    for rate in np.linspace(0.05, 0.95, 19):
        mass = [math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(n + 1)]
        inside = sum(m for m, (low, high) in zip(mass, intervals, strict=True)
                     if low <= rate <= high)
        assert 0.92 < inside < 0.98


@pytest.mark.parametrize("successes, n", [(3, 2), (-1, 2)])
def test_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="successes of"):
        metrics.wilson_interval(successes, n)


def test_success_metrics():
    values = metrics.success_metrics("eval", 5, 10)
    assert values["eval/success_rate"] == 0.5 and values["eval/episodes"] == 10
    assert "eval/success_rate" not in metrics.success_metrics("eval", 0, 0)   # no rate of nothing


def test_a_mean_over_steps():
    assert metrics.mean([{"a": np.float32(1), "b": 2.0}, {"a": 3, "b": 4.0}]) == {"a": 2.0, "b": 3.0}


def test_the_ledgers_of_two_processes_are_one():
    one = dict(seconds=4.0, decode_share=0.5, slot_occupancy=1.0, tokens_decoded=10, env_crashes=0)
    other = dict(seconds=5.0, decode_share=0.25, slot_occupancy=0.5, tokens_decoded=7, env_crashes=2)
    assert metrics.of_processes([one]) == one
    assert metrics.of_processes([one, other]) == dict(
        seconds=5.0, decode_share=0.375, slot_occupancy=0.75, tokens_decoded=17, env_crashes=2
    )


def test_events_need_no_torch(tmp_path):
    """tensorboardX imports it where it is there, which takes longer than all else that a run imports."""
    code = (
        "import sys; from jaxagentrl import metrics\n"
        f"with metrics.Writer({str(tmp_path)!r}) as writer: writer.write('rl', 1, {{'k': 1.0}})\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[1], check=True)
    assert list((tmp_path / "tensorboard" / "rl").iterdir())
