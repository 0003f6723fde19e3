"""The worker pool with environments that really crash, hang and grow, and with real games."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time

import fakes
import psutil
import pytest

import envs_host
from envs_host import textworld
from envs_host.pool import EnvPool, PoolError
from envs_host.types import EnvFailure, ResetResult, StepResult

QUIET = dict.fromkeys(
    ("crashes", "time_limits", "abandoned", "replays", "recycles", "failures"), 0
)


def make_pool(num_workers=1, **overrides):
    options = {"step_limit_s": 30.0, "reset_limit_s": 30.0, "worker_memory_mb": 1000.0} | overrides
    env_kwargs = options.pop("env_kwargs", {})
    return EnvPool("fakes:ScriptedEnv", env_kwargs, num_workers=num_workers, **options)


def collect(pool, count):
    """Polls until `count` answers are there, as a dict by handle."""
    answers = {}
    while len(answers) < count:
        polled = pool.poll(60.0)
        assert polled, f"only {len(answers)} of {count} answers came"
        answers |= dict(polled)
    return answers


def start(pool, handles, **params):
    for handle in handles:
        pool.reset(handle, fakes.task(str(handle), **params))
    return collect(pool, len(handles))


def say(pool, commands):
    for handle, text in commands.items():
        pool.step(handle, text)
    return collect(pool, len(commands))


def processes(pool, handles):
    """The process ids that episodes report."""
    return {answer.observation for answer in say(pool, dict.fromkeys(handles, "pid")).values()}


def test_answers_of_many_episodes():
    with make_pool(num_workers=2) as pool:
        opened = start(pool, range(20))
        assert {handle: answer.observation for handle, answer in opened.items()} == {
            handle: str(handle) for handle in range(20)
        }
        assert all(isinstance(answer, ResetResult) for answer in opened.values())
        for turn in range(3):
            stepped = say(pool, {handle: f"go {handle}" for handle in range(20)})
            for handle, answer in stepped.items():
                assert isinstance(answer, StepResult)
                history = [str(handle)] + [f"go {handle}"] * (turn + 1)
                assert answer.observation == " | ".join(history)
        assert pool.counters == QUIET


def test_handles_may_be_anything_hashable():
    with make_pool() as pool:
        assert set(start(pool, [("group", 1), "x", 3])) == {("group", 1), "x", 3}


def test_episodes_of_one_task_share_a_process_and_tasks_spread():
    with make_pool(num_workers=2) as pool:
        for member in range(8):
            pool.reset(member, fakes.task("same"))
        collect(pool, 8)
        assert len(processes(pool, range(8))) == 1
    with make_pool(num_workers=2) as pool:
        start(pool, range(30))
        assert len(processes(pool, range(30))) == 2


@pytest.mark.parametrize(
    ("fatal", "quoted"),
    [
        ("crash", "SIGSEGV"),
        ("raise", "made to fail"),
        ("unpicklable", "cannot pickle 'dict_keys' object"),
        ("no_text", "ScriptedEnv.step must return a StepResult whose observation is a text, got StepResult(observation=("),
    ],
)
def test_a_crash_fails_one_episode_and_spares_the_others(fatal, quoted):
    with make_pool() as pool:
        start(pool, "abc")
        say(pool, {"a": "one", "b": "one", "c": "one"})
        answers = say(pool, {"a": "two", "b": fatal, "c": "two"})
        assert answers["a"].observation == "a | one | two"
        assert answers["c"].observation == "c | one | two"
        failure = answers["b"]
        assert isinstance(failure, EnvFailure) and failure.reason == "crash"
        assert quoted in failure.message and "2 times" in failure.message
        assert say(pool, {"a": "three"})["a"].observation == "a | one | two | three"
        counters = pool.counters
        assert (counters["crashes"], counters["failures"]) == (2, 1)
        with pytest.raises(ValueError, match="not live"):
            pool.step("b", "anything")
        assert start(pool, "b")["b"].observation == "b"


def test_an_answer_that_cannot_be_read_fails_one_episode_and_spares_the_others():
    with make_pool() as pool:
        start(pool, "ab")
        answers = say(pool, {"a": "one", "b": "unreadable"})
        assert answers["a"].observation == "a | one"
        assert answers["b"].reason == "crash" and "cannot be unpickled: ValueError: invalid literal" in answers["b"].message


def test_why_a_pool_cannot_go_on_is_told(monkeypatch):
    with make_pool() as pool:
        start(pool, "a")

        def no_memory():
            raise OSError(12, "Cannot allocate memory")

        monkeypatch.setattr(pool._server, "_make_worker", no_memory)
        pool.step("a", "crash")
        with pytest.raises(PoolError, match="cannot go on.*Cannot allocate memory"):
            pool.poll(60.0)


def test_a_crash_that_does_not_come_again_is_healed_by_replay(tmp_path):
    with make_pool() as pool:
        start(pool, "ab")
        say(pool, {"a": "one", "b": "one"})
        command = f"crash_once {tmp_path / 'marker'}"
        answers = say(pool, {"a": command, "b": "two"})
        assert answers["a"].observation == f"a | one | {command}"
        assert answers["b"].observation == "b | one | two"
        assert pool.counters == QUIET | {"crashes": 1, "replays": 2}


def test_without_replays_the_first_crash_is_final(tmp_path):
    with make_pool(max_replays=0) as pool:
        start(pool, "a")
        assert isinstance(say(pool, {"a": f"crash_once {tmp_path / 'm'}"})["a"], EnvFailure)
        assert pool.counters == QUIET | {"crashes": 1, "failures": 1}


def test_a_crash_while_replaying_is_the_crash_of_that_episode(tmp_path):
    # "crash_once" has its marker when first carried out, and loses it before the replay.
    marker = tmp_path / "marker"
    marker.touch()
    with make_pool() as pool:
        start(pool, "ab")
        say(pool, {"a": f"crash_once {marker}", "b": "one"})
        marker.unlink()
        os.kill(pool.worker_pids[0], signal.SIGKILL)
        answers = say(pool, {"a": "two", "b": "two"})
        assert answers["a"].observation == f"a | crash_once {marker} | two"
        assert answers["b"].observation == "b | one | two"
        assert pool.counters["crashes"] == 2 and pool.counters["failures"] == 0


@pytest.mark.parametrize("hang", ["hang", "hang_in_c"])
def test_a_hang_is_ended_and_spares_the_others(hang):
    with make_pool(step_limit_s=1.0) as pool:
        start(pool, "abc")
        began = time.monotonic()
        answers = say(pool, {"a": "one", "b": hang, "c": "one"})
        assert time.monotonic() - began < 20
        assert answers["b"].reason == "step time limit"
        assert answers["a"].observation == "a | one" and answers["c"].observation == "c | one"
        assert pool.counters["time_limits"] == 2 and pool.counters["failures"] == 1


@pytest.mark.parametrize(
    ("command", "reason"),
    [("crash", "crash"), ("hang", "reset time limit"), ("no_game_file", "game file")],
)
def test_failing_resets(command, reason):
    with make_pool(reset_limit_s=1.0) as pool:
        pool.reset("good", fakes.task("good"))
        pool.reset("bad", fakes.task("bad", reset=command))
        answers = collect(pool, 2)
        assert answers["good"].observation == "good"
        assert isinstance(answers["bad"], EnvFailure) and answers["bad"].reason == reason
        assert pool.counters["failures"] == 1
        assert say(pool, {"good": "one"})["good"].observation == "good | one"


def test_a_slow_step_within_the_limit_is_no_failure():
    with make_pool(step_limit_s=2.0) as pool:
        start(pool, "abcd")
        # Together longer than the limit of one.
        answers = say(pool, dict.fromkeys("abcd", "sleep 0.6"))
        assert all(isinstance(answer, StepResult) for answer in answers.values())
        assert pool.counters == QUIET


def test_a_process_that_grows_is_replaced_and_nothing_is_noticed():
    with make_pool(worker_memory_mb=250.0) as pool:
        start(pool, "ab")
        first_pids = pool.worker_pids
        history = ["a"]
        for turn in range(4):
            history.append(f"turn {turn}")
            answers = say(pool, {"a": history[-1], "b": "grow 90"})
            assert answers["a"].observation == " | ".join(history)
            time.sleep(0.25)  # Memory is looked at five times a second at most.
        assert pool.counters["recycles"] >= 1 and pool.counters["crashes"] == 0
        assert pool.worker_pids != first_pids


def test_a_killed_idle_process_is_replaced():
    with make_pool(num_workers=2) as pool:
        start(pool, range(8))
        say(pool, dict.fromkeys(range(8), "one"))
        for pid in pool.worker_pids:
            os.kill(pid, signal.SIGKILL)
        answers = say(pool, dict.fromkeys(range(8), "two"))
        assert {a.observation for a in answers.values()} == {f"{n} | one | two" for n in range(8)}
        assert pool.counters == QUIET | {"crashes": 2, "replays": 8}


def test_a_process_killed_in_mid_step_is_replaced_and_nothing_is_noticed():
    with make_pool() as pool:
        start(pool, "ab")
        pool.step("a", "sleep 1")
        pool.step("b", "one")
        time.sleep(0.5)
        os.kill(pool.worker_pids[0], signal.SIGKILL)
        answers = collect(pool, 2)
        assert answers["a"].observation == "a | sleep 1"
        assert answers["b"].observation == "b | one"
        assert pool.counters["crashes"] == 1 and pool.counters["failures"] == 0


def test_a_process_that_dies_while_it_starts_is_replaced_if_another_has_worked(tmp_path):
    """A machine short of memory kills workers at any moment."""
    marker = tmp_path / "marker"
    marker.touch()
    with make_pool(env_kwargs={"make": f"crash_once {marker}"}) as pool:
        start(pool, "ab")
        marker.unlink()
        os.kill(pool.worker_pids[0], signal.SIGKILL)
        answers = say(pool, dict.fromkeys("ab", "one"))
        assert {answer.observation for answer in answers.values()} == {"a | one", "b | one"}
        assert pool.counters["crashes"] == 2 and pool.counters["failures"] == 0


def test_processes_that_keep_dying_while_they_start_are_an_error(tmp_path):
    needed = tmp_path / "needed"
    needed.touch()
    with make_pool(env_kwargs={"make": f"need {needed}"}) as pool:
        start(pool, "ab")
        needed.unlink()
        os.kill(pool.worker_pids[0], signal.SIGKILL)
        with pytest.raises(PoolError, match="(?s)cannot be started.*needed"):
            say(pool, dict.fromkeys("ab", "one"))
        assert pool.counters["crashes"] == 3


def test_a_process_that_keeps_dying_between_requests_is_an_error():
    with make_pool() as pool:
        start(pool, "ab")
        with pytest.raises(PoolError, match="(?s)3 times in a row between requests.*Bad file desc"):
            say(pool, {"a": "close_files", "b": "one"})
        assert pool.counters["crashes"] == 2


def test_deaths_between_requests_with_answers_between_them_are_healed():
    with make_pool() as pool:
        start(pool, "a")
        for turn in range(4):
            os.kill(pool.worker_pids[0], signal.SIGKILL)
            assert isinstance(say(pool, {"a": f"turn {turn}"})["a"], StepResult)
        assert pool.counters == QUIET | {"crashes": 4, "replays": 4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"env_kwargs": {"mkae": "x"}}, "mkae"),
        ({"env_kwargs": {"make": "raise"}}, "cannot be started"),
        ({"worker_memory_mb": 1.0}, r"pool\.worker_memory_mb=1\.0"),
    ],
)
def test_an_environment_that_cannot_start_is_an_error(options, message):
    with make_pool(**options) as pool:
        pool.reset("a", fakes.task())
        with pytest.raises(PoolError, match=message):
            pool.poll(60.0)
        with pytest.raises(PoolError):
            pool.poll(60.0)


@pytest.mark.parametrize(
    "bad",
    [{"num_workers": 0}, {"step_limit_s": 0.0}, {"worker_memory_mb": -1.0}, {"max_replays": -1}],
)
def test_numbers_out_of_range(bad):
    [(name, value)] = bad.items()
    with pytest.raises(ValueError, match=rf"^pool\.{name} must be .*, got {value}"):
        make_pool(**bad)


def test_unknown_environment():
    with pytest.raises(ValueError, match="chess.*textworld"):
        envs_host.make("chess")


@pytest.mark.parametrize("name", ["Scripted", ""])
def test_unknown_class(name):
    with pytest.raises(ValueError, match=rf"'fakes'.* no class '{name}'.*'ScriptedEnv'"):
        envs_host.make(f"fakes:{name}")


def test_wrong_calls():
    with make_pool() as pool:
        with pytest.raises(ValueError, match="not live"):
            pool.step("a", "x")
        start(pool, "a")
        pool.step("a", "x")
        with pytest.raises(ValueError, match="owes an answer"):
            pool.step("a", "y")
        collect(pool, 1)
        assert say(pool, {"a": "win"})["a"].terminated
        with pytest.raises(ValueError, match="has ended"):
            pool.step("a", "x")
    with pytest.raises(PoolError, match="closed"):
        pool.reset("a", fakes.task())
    pool.close()


def test_poll_with_nothing_to_come_and_with_a_limit():
    with make_pool() as pool:
        assert pool.poll() == []
        start(pool, "a")
        pool.step("a", "sleep 1")
        assert pool.poll(0) == []
        began = time.monotonic()
        assert pool.poll(0.1) == [] and time.monotonic() - began < 0.9
        assert len(pool.poll()) == 1


def test_a_poll_ends_for_what_another_thread_has_to_tell():
    with make_pool() as pool:
        start(pool, "a")
        pool.step("a", "sleep 1")
        told = threading.Event()

        def tell():
            pool.wake()  # for nothing: the poll goes on
            time.sleep(0.1)
            told.set()
            pool.wake()

        thread = threading.Thread(target=tell)
        began = time.monotonic()
        thread.start()
        assert pool.poll(until=told.is_set) == [] and told.is_set()
        assert 0.1 <= time.monotonic() - began < 0.9
        assert pool.poll(until=told.is_set) == []  # at once
        thread.join()
        pool.wake()
        assert len(pool.poll()) == 1  # old news end no wait


def test_released_and_reset_handles_get_no_stale_answers():
    with make_pool() as pool:
        start(pool, "ab")
        pool.step("a", "sleep 0.3")
        pool.release("a")
        pool.step("b", "old")
        pool.reset("b", fakes.task("new"))
        assert collect(pool, 1) == {"b": ResetResult("new", fakes.ScriptedEnv()._info(""))}
        pool.release("never there")


def test_a_released_episode_that_hangs_does_not_hold_up_the_others():
    with make_pool(step_limit_s=60.0) as pool:
        start(pool, "abc")
        say(pool, {"b": "one", "c": "one"})
        began = time.monotonic()
        pool.step("a", "sleep 30")
        assert pool.poll(0.3) == []
        pool.step("b", "two")  # Waits already when "a" is given up; "c" comes later.
        pool.release("a")
        pool.step("c", "two")
        answers = collect(pool, 2)
        assert time.monotonic() - began < 15
        assert {answers[h].observation for h in "bc"} == {"b | one | two", "c | one | two"}
        assert pool.counters == QUIET | {"abandoned": 1, "replays": 2}


def test_a_released_episode_runs_on_while_nobody_waits():
    with make_pool() as pool:
        start(pool, "ab")
        pool.step("a", "sleep 1")
        assert pool.poll(0.3) == []
        pool.release("a")
        time.sleep(2)
        assert say(pool, {"b": "one"})["b"].observation == "b | one"
        assert pool.counters == QUIET


def test_a_released_episode_runs_on_while_replays_would_take_longer():
    with make_pool() as pool:
        start(pool, "ab")
        say(pool, {"b": "sleep 2"})
        pool.step("a", "sleep 1")
        assert pool.poll(0.3) == []
        pool.release("a")
        assert say(pool, {"b": "one"})["b"].observation == "b | sleep 2 | one"
        assert pool.counters == QUIET


def test_environments_step_while_the_caller_computes():
    with make_pool() as pool:
        start(pool, "abc")
        for handle in "abc":
            pool.step(handle, "sleep 0.2")
        time.sleep(1.5)  # The caller does not poll, and yet:
        assert len(pool.poll(0.05)) == 3


def test_workers_import_no_jax_and_print_nothing(capfd):
    assert "jax" in sys.modules  # By conftest: spawn would import a main module like that again.
    with make_pool() as pool:
        start(pool, "a")
        say(pool, {"a": "print"})
        modules = say(pool, {"a": "modules"})["a"].observation.split()
    assert "fakes" in modules and "envs_host.pool_worker" in modules
    assert not {"jax", "numpy", "textworld", "transformers", "rich", "psutil"} & set(modules)
    assert capfd.readouterr().out == ""


SCRIPT = """
import signal, sys, fakes
# A shell's background job ignores it, and what it starts inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)
from envs_host.pool import EnvPool
with EnvPool("fakes:ScriptedEnv", {}, num_workers=2, step_limit_s=600, reset_limit_s=600,
             worker_memory_mb=1000) as pool:
    for handle in range(8):
        pool.reset(handle, fakes.task(str(handle)))
    answers = []
    while len(answers) < 8:
        answers += pool.poll()
    pool.step(7, "start")
    ((_, started),) = pool.poll()
    for handle in range(4):
        pool.step(handle, "hang_in_c" if handle else "hang")
    print(*pool.worker_pids, started.observation, flush=True)
    pool.poll()
"""


def assert_gone(*pids):
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_workers_die_with_their_parent(ending):
    here = os.path.dirname(__file__)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 3 and all(psutil.pid_exists(pid) for pid in pids)
    if ending == signal.SIGINT:
        os.killpg(process.pid, ending)  # As the terminal does: to parent and workers alike.
    else:
        os.kill(process.pid, ending)
    _, errors = process.communicate(timeout=20)
    assert_gone(*pids)
    if ending == signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1, errors


READER = """
import time
from envs_host.processes import Child
child = Child("fakes:start_and_read")
print(child.pid, child.connection.recv(), flush=True)
time.sleep(600)
"""


def test_a_worker_that_sees_its_parent_die_goes_with_all_that_it_has_started():
    """Its own thread may be the first to see it, and end before the one that kills the group."""
    here = os.path.dirname(__file__)
    process = subprocess.Popen(
        [sys.executable, "-c", READER],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([here, os.path.dirname(here)])},
        stdout=subprocess.PIPE,
        text=True,
    )
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
    process.kill()
    process.wait()
    process.stdout.close()
    assert_gone(*pids)


def test_what_a_worker_has_started_goes_with_it():
    """A shell, say, or a compiler: whether its worker crashes, is killed or closed."""
    with make_pool(step_limit_s=2.0, max_replays=0) as pool:
        for ending in ("crash", "hang", "close"):
            start(pool, ["a"])
            (answer,) = say(pool, {"a": "start"}).values()
            started = int(answer.observation)
            assert psutil.pid_exists(started)
            if ending != "close":
                (answer,) = say(pool, {"a": ending}).values()
                assert isinstance(answer, EnvFailure)
                assert_gone(started)
                pool.release("a")
    assert_gone(started)


def test_everything_imports_without_jax():
    code = "import sys; sys.modules['jax'] = None; import envs_host.pool, envs_host.textworld"
    root = os.path.dirname(envs_host.__path__[0])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


# Real games.


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    specs = [
        {"family": "custom", "world_size": 2, "nb_objects": 3, "quest_length": 4, "seed": seed,
         "theme": "basic"}
        for seed in (50001, 50003, 50005)
    ]
    cache_dir = tmp_path_factory.getbasetemp() / "textworld-games"  # Shared with test_textworld.py.
    return textworld.generate(specs, cache_dir=cache_dir, progress=False).tasks


def play(pool, tasks, before_turn=lambda turn: None):
    """Plays the walkthrough of each task twice; returns all answers by handle."""
    record = {}
    for handle in range(2 * len(tasks)):
        pool.reset(handle, tasks[handle // 2])
    for turn in range(1 + max(len(task.walkthrough) for task in tasks)):
        owed = len(tasks) * 2 if turn == 0 else 0
        before_turn(turn)
        for handle in range(2 * len(tasks)):
            walkthrough = tasks[handle // 2].walkthrough
            if 0 < turn <= len(walkthrough):
                pool.step(handle, walkthrough[turn - 1])
                owed += 1
        for handle, answer in collect(pool, owed).items():
            record.setdefault(handle, []).append(answer)
    return record


def textworld_pool(num_workers=2):
    return EnvPool(
        "textworld",
        {},
        num_workers=num_workers,
        step_limit_s=20.0,
        reset_limit_s=40.0,
        worker_memory_mb=1000.0,
    )


def test_real_games_are_won_through_the_pool_and_survive_killed_workers(tasks):
    def kill(turn):
        if turn == 2:
            for pid in pool.worker_pids:
                os.kill(pid, signal.SIGKILL)

    with textworld_pool() as pool:
        calm = play(pool, tasks)
        assert pool.counters == QUIET
        stormy = play(pool, tasks, before_turn=kill)
        assert pool.counters["crashes"] == 2 and pool.counters["replays"] == 2 * len(tasks)
        assert pool.counters["failures"] == 0
    assert stormy == calm
    for answers in calm.values():
        assert answers[-1].terminated and answers[-1].info.won
        assert answers[-1].info.score == answers[-1].info.max_score


def test_a_corrupt_game_file_fails_its_episode_only(tasks, tmp_path):
    broken = tmp_path / "broken.z8"
    broken.write_bytes(b"no game at all" * 100)
    with textworld_pool(num_workers=1) as pool:
        pool.reset("bad", dataclasses.replace(tasks[0], file=str(broken)))
        pool.reset("gone", dataclasses.replace(tasks[0], file=str(tmp_path / "none.z8")))
        pool.reset("good", tasks[1])
        answers = collect(pool, 3)
        assert answers["bad"].reason == answers["gone"].reason == "game file"
        assert str(broken) in answers["bad"].message and "generate" in answers["bad"].message
        assert answers["good"].observation.startswith("You are now in the ")
        assert pool.counters == QUIET | {"failures": 2}
