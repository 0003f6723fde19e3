"""The command line: what it says of flags that cannot work, and Ctrl-C whenever it comes."""

import pathlib
import subprocess
import sys
import types

import jax
import pytest
from absl import flags
from absl.testing import flagsaver

from jaxagentrl import hosts, main, settings

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def parse(monkeypatch):
    """Parses flags as the program does, and leaves none behind."""
    monkeypatch.chdir(ROOT)
    known = set(flags.FLAGS)

    def parsed(*arguments):
        monkeypatch.setattr(sys, "argv", ["main", "--workdir=nowhere", *arguments])  # the config's flags read it
        with flagsaver.flagsaver():
            try:
                main.parse(sys.argv)
                return main._CONFIG.value.to_dict()
            finally:
                for name in set(flags.FLAGS) - known:
                    delattr(flags.FLAGS, name)

    return parsed


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--config=configs/textworld_smoke.py", "--config.rl.grup_size=4"], ("grup_size", "group_size")),
        (["--config=configs/textworld_smoke.py", "--config.rl.groupsize=4"],
         ("--config.rl.groupsize names no key of the config: did you mean --config.rl.group_size? (",)),
        (["--config=configs/textworld_smoke.py", "--config.env.params.quest_breadth=2"],
         ("--config.env.params.quest_breadth cannot be set", "env.params of this config has no quest_breadth",
          "add it in a config file")),
        (["--config=configs/textworld_smoke.py", "--config.pool.max_replays=2"],
         ("pool of this config has no max_replays",)),
        (["--config=configs/nope.py"], ("configs/nope.py",)),
        (["--config=configs/textworld_smoke.py:grop"], ("grop names no published method", "ppo, grpo, dr_grpo")),
        (["--config=configs/textworld_smoke.py", "--config.rl.group_size=a"], ("--config.rl.group_size=a", "'a'")),
        (["--confg=configs/textworld_smoke.py"], ("'confg'", "Did you mean: config")),
    ],
    ids=["key", "its flag", "of the games", "with a default", "file", "method", "value", "flag"],
)
def test_flags_that_cannot_work_get_one_sentence(parse, arguments, named):
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    said = str(ended.value)
    assert said.startswith("error: ") and "\n" not in said
    assert all(name in said for name in (*named, "docs/config.md"))
    with pytest.raises((flags.Error, AttributeError, KeyError, OSError, ValueError, TypeError)):
        parse(*arguments, "--debug")


def test_a_config_without_methods_says_how_to_take_them(parse, tmp_path):
    (tmp_path / "own.py").write_text("import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict()\n")
    with pytest.raises(SystemExit, match="takes no method; give it a parameter `method` and return methods.apply"):
        parse(f"--config={tmp_path / 'own.py'}:grpo")


def test_what_must_be_given_is_named():
    with flagsaver.flagsaver(), pytest.raises(SystemExit, match="error: --config must be given: --config=configs"):
        main.parse(["main"])
    with flagsaver.flagsaver(), pytest.raises(SystemExit, match="error: --workdir must be given: a folder"):
        main.main(["main"])


def test_flags_change_what_a_method_has_set(parse):
    config = parse(
        "--config=configs/textworld_smoke.py:grpo", "--config.rl.kl.coefficient=0.001", "--config.rl.loss.dual_clip=3.0"
    )
    assert config["rl"]["advantage"]["name"] == "group_normalized"
    assert config["rl"]["kl"] == {"placement": "loss", "estimator": "k3", "coefficient": 0.001}
    assert config["rl"]["loss"]["dual_clip"] == 3.0


def test_none_is_a_value(parse):
    keys = ("reward.intermediate_scale", "rollout.max_refusals", "compilation_cache_dir")
    config = parse("--config=configs/textworld_smoke.py", *(f"--config.{key}=None" for key in keys))
    assert [dict(settings.flat(config))[key] for key in keys] == [None] * 3
    settings.check(config | {"reward": config["reward"] | {"kind": "dense"}})


def test_none_of_a_number_has_any_spelling_and_none_of_a_text_may_be_a_value(parse):
    given = ("--config.rollout.max_refusals=none", "--config.reward.intermediate_scale=NONE", "--config.learner.remat=none")
    config = parse("--config=configs/textworld_smoke.py", *given)
    assert config["rollout"]["max_refusals"] is None is config["reward"]["intermediate_scale"]
    assert config["learner"]["remat"] == "none"


# As jax raises them, and Orbax.
@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_an_error_of_the_devices_may_be_another_process_that_has_ended(num_processes, kind, monkeypatch):
    given = {"_DEBUG", "_DISTRIBUTED", "_COORDINATOR", "_NUM_PROCESSES", "_PROCESS_ID"}
    for name in given:
        monkeypatch.setattr(main, name, types.SimpleNamespace(value=None))
    monkeypatch.setattr(main, "_WORKDIR", types.SimpleNamespace(value="nowhere"))
    monkeypatch.setattr(main, "_CONFIG", types.SimpleNamespace(value=types.SimpleNamespace(to_dict=dict)))
    monkeypatch.setattr(main.interrupts, "raise_where_heard", lambda: None)
    monkeypatch.setattr(jax, "process_count", lambda: num_processes)

    def fails(config, directory):
        raise kind("UNKNOWN: Gloo AllGather failed: Connection closed by peer")

    monkeypatch.setattr(main.train, "run", fails)
    # Of one process it is no other's: told, or raised where it has no message of ours.
    alone = SystemExit if kind is ValueError else kind
    expected = {1: (alone, "closed by peer"), 2: (SystemExit, "another process has ended")}
    error, said = expected[num_processes]
    with pytest.raises(error, match=said):
        main.main(["main"])


def test_an_error_of_ones_own_is_told_where_there_are_others(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert not hosts.may_be_of_another(ValueError("rl.group_size is 0, expected at least 1"))


def test_garbage_is_collected_in_a_run_but_for_what_was_imported(tmp_path):
    config = tmp_path / "asks.py"
    config.write_text(
        "import gc\n"
        "def get_config():\n"
        "    raise ValueError(f'collecting: {gc.isenabled()}, of imports: {gc.get_freeze_count() < 100_000}')\n"
    )
    failed = run("-m", "jaxagentrl.main", "--workdir=nowhere", f"--config={config}")
    assert "collecting: True, of imports: False" in failed.stderr, failed.stderr


def test_the_command_line_of_a_shell_ends_with_the_sentence():
    failed = run("-m", "jaxagentrl.main", "--workdir=nowhere", "--config=configs/textworld_smoke.py", "--config.rl.grup_size=4")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert "error: --config.rl.grup_size names no key" in failed.stderr


def test_an_interrupt_where_exceptions_are_ignored_is_heard_after_it():
    code = """
import gc, os, signal, time
gc.disable()  # but for where it is called
signal.signal(signal.SIGINT, signal.default_int_handler)  # the suite may run where it is ignored
from jaxagentrl import interrupts
def callback(phase, info):
    if phase == "start" and not sent:
        sent.append(True)
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
sent = []
gc.callbacks.append(callback)
interrupts.raise_where_heard()
class Given:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
for way in (gc.collect, Given, lambda: os.kill(os.getpid(), signal.SIGINT)):
    try:
        way()
        time.sleep(5)
        print("not heard")
    except KeyboardInterrupt:
        print("heard")
signal.signal(signal.SIGINT, signal.SIG_IGN)
interrupts.raise_where_heard()
os.kill(os.getpid(), signal.SIGINT)
print("ignored as before")
"""
    assert run("-c", code).stdout.splitlines() == ["heard", "heard", "heard", "ignored as before"]


def test_an_interrupt_ends_the_process_without_taking_the_interpreter_down():
    code = """
import atexit, sys
from jaxagentrl import main
class Left:
    def __del__(self):
        print("taken down")
left = Left()
def run(config, directory):
    raise KeyboardInterrupt
main.train.run = run
atexit.register(print, "ended")
sys.argv = ["main", "--config=configs/textworld_smoke.py", "--workdir=nowhere"]
main.run()
"""
    stopped = run("-c", code)
    assert stopped.returncode == 1 and stopped.stdout.splitlines() == ["ended"]
    assert stopped.stderr.splitlines()[-1] == "stopped; the same command continues from the last checkpoint"


@pytest.mark.parametrize("has_begun", [True, False])
def test_where_an_error_came_from_is_kept_beside_a_run_that_has_begun(has_begun, monkeypatch, tmp_path):
    def fails(config, directory):
        if has_begun:
            (tmp_path / "config.json").write_text("{}")
        raise ValueError("of three things one is missing")

    monkeypatch.setattr(main.train, "run", fails)
    config = types.SimpleNamespace(value=types.SimpleNamespace(to_dict=dict))
    monkeypatch.setattr(main, "_CONFIG", config)
    with flagsaver.flagsaver(workdir=str(tmp_path)), pytest.raises(SystemExit) as raised:
        main.main(["main"])
    kept = tmp_path / "error.txt"
    assert str(raised.value) == (
        f"error: of three things one is missing\n({kept if has_begun else '--debug'} shows where)"
    )
    assert kept.exists() == has_begun
    if has_begun:
        assert ", in fails" in kept.read_text()
