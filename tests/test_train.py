"""The whole run through the real command line: what it leaves, and that kill -9 changes nothing."""

import contextlib
import dataclasses
import gc
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from records import make_task, make_trajectory, make_turn
from test_sharding import Device, assert_placed

from envs_host.types import EnvFailure
from jaxagentrl import (
    checkpoints,
    main,
    metrics,
    plan,
    playing,
    prepare,
    progress,
    reinforce,
    rollout,
    settings,
    states,
    train,
    workdir,
)
from jaxagentrl.models import decoder, lora, pretrained, sharding
from jaxagentrl.types import TrainState

ROOT = pathlib.Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("compiled_as_users_do")


def command(workdir: pathlib.Path, cache: pathlib.Path, *overrides: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "jaxagentrl.main",
        f"--config={ROOT / 'configs' / 'textworld_smoke.py'}",
        f"--workdir={workdir}",
        f"--config.env.cache_dir={cache}",
        f"--config.compilation_cache_dir={os.environ['JAX_COMPILATION_CACHE_DIR']}",
        "--config.eval.attempts=2",
        "--config.rl.curriculum.order=learnability",  # whose state must be restored, too
        *overrides,
    ]


def run(*arguments, check=True, **options) -> subprocess.CompletedProcess:
    done = subprocess.run(
        command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=600, **options
    )
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def cache(smoke_games) -> pathlib.Path:
    return smoke_games


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cache, compiled_as_users_do) -> pathlib.Path:
    """A workdir of an uninterrupted smoke run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    done = run(workdir, cache)
    assert "after RL" in done.stdout
    return workdir


def comparable(workdir: pathlib.Path) -> list[dict]:
    return [metrics.without_time(line) for line in metrics.read(workdir / "metrics.jsonl")]


def test_a_run_leaves_what_the_design_promises(finished):
    for name in ("config.json", "metrics.jsonl", "curves.png", "report.html", "model/README.md"):
        assert (finished / name).stat().st_size > 0, name
    assert list((finished / "tensorboard").rglob("events.*"))
    config = json.loads((finished / "config.json").read_text())
    assert config["versions"]["textworld"] and config["facts"]["games"]
    lines = comparable(finished)
    assert [line["step"] for line in lines if line["phase"] == "rl"] == [1, 2, 3, 4]
    baseline = lines[0]
    assert baseline["walkthrough/success_rate"] == 1.0
    for prefix in ("random", "walkthrough", "eval"):
        assert baseline[f"{prefix}/episodes"] == 8
        assert baseline[f"{prefix}/success_low"] <= baseline[f"{prefix}/success_high"]
    first = next(line for line in metrics.read(finished / "metrics.jsonl") if line["phase"] == "rl")
    assert first["ledger/env_crashes"] == first["ledger/env_replays"] == 0
    gaps = [line["policy/sampler_gap_max"] for line in lines if line["phase"] == "rl"]
    assert max(gaps) <= 1e-4  # promise 2, on every run
    episodes = [json.loads(row) for row in (finished / "trajectories" / "eval_rl.jsonl").open()]
    assert len(episodes) == 8 and episodes[0]["turns"][0]["action_ids"]
    # The stages' ends, and no other line, are played at every temperature.
    for key in ("eval.t0/episodes", "eval.t1/episodes"):
        assert [line["step"] for line in lines if line["phase"] == "rl" and key in line] == [4]
        assert [line["phase"] for line in lines if key in line] == ["baseline", "eval", "rl"]
    assert (finished / "trajectories" / "eval.t1_rl.jsonl").exists()
    further = [json.loads(row) for row in (finished / "trajectories" / "eval.t1_rl_attempts.jsonl").open()]
    assert [row["member"] for row in further] == [1] * 8 and "eval.t1/pass_at_2_low" in lines[-1]
    assert "eval.t0/pass_at_1" not in lines[-1] and "eval/pass_at_2" not in lines[-2]  # greedy, or no end of a stage


def test_the_model_loads_in_transformers(finished):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(finished / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished / "model")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "open box"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = ids if hasattr(ids, "shape") else ids["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_the_model_plays_in_the_terminal_what_it_played_in_the_run(finished, play, capsys):
    """Greedily, so that nothing is drawn; game by game as in the record."""
    record = [json.loads(row) for row in (finished / "trajectories" / "eval.t0_rl.jsonl").open()][2]
    play([str(finished), "--agent", "model", "--game", "2", "--temperature", "0"])
    shown = capsys.readouterr().out
    assert shown.startswith(record["task"]["name"])
    for number, turn in enumerate(record["turns"], 1):
        assert turn["observation"] in shown and f"{number}> {turn['action']}" in shown
    assert f"not won ({record['stop_reason']}), score {record['score']:g} of 1" in shown


@pytest.mark.parametrize("phase, step", [pytest.param("sft", 6, marks=pytest.mark.slow), ("rl", 3)])
def test_kill_9_and_go_on_equals_an_uninterrupted_run(finished, cache, tmp_path, phase, step):
    workdir = tmp_path / "killed"
    # Meant to be longer, too: where a run ends may change.
    longer = command(workdir, cache, "--config.rl.num_iterations=9")
    process = subprocess.Popen(
        longer, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        lines = metrics.read(workdir / "metrics.jsonl")
        if any(line["phase"] == phase and line["step"] >= step for line in lines):
            break
        time.sleep(0.05)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    interrupted = comparable(workdir)
    assert len(interrupted) < len(comparable(finished))
    resumed = run(workdir, cache)
    assert "continuing after" in resumed.stderr
    assert comparable(workdir) == comparable(finished)


@pytest.mark.slow
def test_imitation_ends_at_its_target_and_is_not_taken_up_again(finished, cache, tmp_path):
    logged = [line for line in comparable(finished) if line["phase"] == "sft"]
    # Between the losses of the second line and the first: 4 of 12 steps.
    target = (logged[0]["loss/action"] + logged[1]["loss/action"]) / 2
    assert logged[1]["loss/action"] < target < logged[0]["loss/action"]
    arguments = (tmp_path / "new", cache, f"--config.sft.target_loss={target}", "--config.rl.num_iterations=1")
    run(*arguments)
    lines = comparable(tmp_path / "new")
    assert [line for line in lines if line["phase"] == "sft"] == logged[:2]
    assert [line["phase"] for line in lines[-2:]] == ["eval", "rl"] and (tmp_path / "new" / "model").exists()
    # As if killed between imitation's last checkpoint and the first of RL.
    shutil.rmtree(tmp_path / "new" / "checkpoints" / "rl")
    assert "continuing after sft step 4" in run(*arguments).stderr
    assert comparable(tmp_path / "new") == lines
    # With one more iteration the run goes on from its end, which is no end any more.
    longer = (*arguments[:-1], "--config.rl.num_iterations=2")
    assert "continuing after rl step 1" in run(*longer).stderr
    more = comparable(tmp_path / "new")
    assert more[:-1] == lines and (more[-1]["phase"], more[-1]["step"]) == ("rl", 2)
    with pytest.raises(ValueError, match="rl.num_iterations is 1, but the run in .* has done 2"):
        train._check_end(tmp_path / "new", 1)
    kept = json.loads((tmp_path / "new" / "config.json").read_text())
    assert kept["config"]["rl"]["num_iterations"] == 2


@pytest.mark.slow
def test_a_fork_goes_on_with_what_was_changed(finished, cache, tmp_path):
    """One iteration more, with a learning rate of 0: the policy of the checkpoint plays and stays as it is."""
    arguments = (tmp_path / "new", cache, "--config.rl.num_iterations=5", "--config.rl.optimizer.learning_rate=0.0")
    _, _, _, *flags = command(*arguments)
    forked = [sys.executable, str(ROOT / "tools" / "fork_run.py"), f"--from={finished}", *flags]
    done = subprocess.run(forked, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "after RL iteration 4, rl.num_iterations: 4 → 5; rl.optimizer.learning_rate:" in done.stdout
    assert "continuing after rl step 4" in run(*arguments).stderr
    *earlier, last = comparable(tmp_path / "new")
    assert earlier == comparable(finished) and (last["phase"], last["step"]) == ("rl", 5)
    played = [key for key in last if key.startswith("eval/") and "pass_at" not in key]
    assert played and [last[key] for key in played] == [earlier[-1][key] for key in played]
    assert "After RL iteration 4 was changed" in (tmp_path / "new" / "model" / "README.md").read_text()


def test_a_model_is_evaluated_without_what_training_needs(finished, cache, tmp_path):
    folder = finished / "model"
    arguments = (
        tmp_path / "new", cache, f"--config.model.directory={folder}",
        f"--config.tokenizer.directory={folder}", "--config.sft.num_steps=0",
    )
    plan_of = "memory per device in "
    told = run(*arguments, "--config.rl.num_iterations=0").stderr
    assert plan_of + "evaluation" in told and plan_of + "RL" not in told and "optimizer  " not in told
    (line,) = comparable(tmp_path / "new")
    ended = comparable(finished)[-1]
    played = [key for key in ended if key.startswith("eval")]
    assert len(played) > 20 and [line[key] for key in played] == [ended[key] for key in played]
    facts = lambda: json.loads((tmp_path / "new" / "config.json").read_text())["facts"]["games"]
    assert list(facts()) == ["test"]  # no other games were made
    (saved,) = (tmp_path / "new" / "checkpoints" / "sft").iterdir()
    leaves = json.loads((saved / "checkpoint.json").read_text())["leaves"]
    assert leaves and not any("opt_state" in name for name in leaves)
    # Trained further, it is not evaluated anew where RL begins.
    told = run(*arguments, "--config.rl.num_iterations=1").stderr
    assert "continuing after sft step 0" in told and plan_of + "RL" in told
    lines = comparable(tmp_path / "new")
    assert lines[0] == line and [each["phase"] for each in lines] == ["baseline", "rl"]
    assert lines[1]["policy/sampler_gap_max"] <= 1e-4 and set(facts()) == {"train", "test"}


def smoke_config() -> dict:
    return runpy.run_path(str(ROOT / "configs" / "textworld_smoke.py"))["get_config"]().to_dict()


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("rl.group_size", 1, "rl.group_size is 1"),
        ("rl.advantage.name", "gea", "rl.advantage.name"),
        ("rl.advantage.name", "gae", "rl.critic"),
        ("rl.critic", "head", "uses no critic"),
        ("rl.kl.placement", "loss", "rl.kl"),
        ("rl.kl.placement", "los", "rl.kl.placement"),
        ("rl.num_minibatches", 5, "num_minibatches"),
        ("rollout.max_refusals", 0, "rollout.max_refusals must be at least 1, or None"),
        ("sampling.max_length", 100, "filled_buckets"),
        ("sampling.num_slots", 7, "num_waves"),
        ("sft.batch_size", 99, "sft.batch_size"),
        ("sft.save_every", 3, "no multiple of sft.log_every = 2"),
        ("sft.target_loss", -1.0, "sft.target_loss must be above 0"),
        ("eval.other_temperatures", (0.4, 1.0), "drop the double"),
        ("eval.other_temperatures", (-1.0,), "negative or tiny one"),
        ("splits.test", (40001, 8), "share the seeds"),
        ("namings.train", 0, "namings must give"),
        ("env.params.theme", "house", "namings.demo is 2"),
        ("env.name", "zork", "env.name"),
        ("learner.length_buckets", (64,), "length_buckets"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_made(tmp_path, path, value, words):
    config = smoke_config()
    *parents, key = path.split(".")
    place = config
    for parent in parents:
        place = place[parent]
    assert key in place
    place[key] = value
    with pytest.raises(ValueError, match=words):
        train.run(config, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_wrong_setting_is_one_paragraph_and_no_traceback(tmp_path, cache):
    done = run(tmp_path / "new", cache, "--config.rl.group_size=1", check=False)
    assert done.returncode != 0
    assert "error: rl.advantage.name" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_first_prompt_that_fits_no_slot_is_refused_before_training(tmp_path, cache):
    """Not in the iteration that draws its task; demonstrations are not sampled and may be longer."""
    options = ("--config.sampling.max_turn_tokens=150", "--config.reward.no_end_of_turn_penalty=0.0")
    done = run(tmp_path / "new", cache, *options, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "RL may learn to break off" in done.stderr
    assert re.search(r"error: sampling.max_length is 176, but the first prompts of 16 of 16 tasks", done.stderr)
    assert not (tmp_path / "new" / "checkpoints").exists()


def test_a_workdir_of_another_config_is_refused_and_untouched(finished):
    before = (finished / "metrics.jsonl").read_text()
    config = json.loads((finished / "config.json").read_text())["config"] | {"seed": 1}
    with pytest.raises(workdir.WorkdirError, match="another config.*seed"):
        train.run(config, finished)
    assert (finished / "metrics.jsonl").read_text() == before


LEDGER = {
    **{f"{part}_share": 0.0 for part in ("extend", "transfer", "compile", "environment", "padding")},
    **dict(seconds=2.5, decode_share=0.75, host_share=0.25, slot_occupancy=0.9),
    **dict(tokens_decoded=1234, tokens_prefilled=2345, tokens_reprefill=9999),
}


def test_later_keys_are_keys_and_what_the_quick_start_says():
    """It was the same before there were keys for it."""
    values = dict(settings.flat(runpy.run_path(str(ROOT / "configs" / "textworld_quickstart.py"))["get_config"]().to_dict()))
    for key, value in train.LATER_KEYS.items():
        assert value is workdir.ANY or json.loads(json.dumps(values[key])) == value, key
        assert key in values


def test_the_bar_tells_the_ledger():
    values = {f"ledger/{key}": value for key, value in LEDGER.items()} | {"rollout/success_rate": 0.5}
    assert train._note(values) == (
        "success 0.50, sampling 2.5 s: decode 75%, host 25%; tokens 1,234 sampled, 2,345 prefilled "
        "(again each turn: 9,999); slots 90% taken, padding 0%"
    )


def test_an_iteration_whose_environments_all_fail_is_counted_and_passed(monkeypatch):
    config = smoke_config()
    config["rl"] |= dict(num_iterations=2, tasks_per_iteration=1, group_size=2)
    task = dataclasses.replace(make_task("game", 0), digest="0" * 64)
    failed = [(episode, EnvFailure("crash", "gone")) for episode in range(2)]
    ledger = LEDGER
    played = rollout.Rollout([], failed, ledger)
    written = []
    monkeypatch.setattr(playing, "play", lambda *_, **__: played)
    for module, unused in ((playing, "held_out"), (playing, "write_episodes"), (train, "_save")):
        monkeypatch.setattr(module, unused, lambda *_, **__: {})
    session = types.SimpleNamespace(
        config=config,
        setup=types.SimpleNamespace(levels={"train": [task]}, frozen=None),
        writer=types.SimpleNamespace(of_phase=lambda _: [], write=lambda *line: written.append(line) or line[2]),
    )
    state = TrainState(jnp.int32(0), jnp.int32(0), params={"policy": jnp.ones(2)}, opt_state=())
    programs = types.SimpleNamespace(needs_reference=False)
    host = {"step": 0, "sampler": {}}
    after = train._reinforce(session, state, host, programs)
    assert after.iteration == 2 and after.params is state.params
    assert [(phase, step) for phase, step, _ in written] == [("rl", 1), ("rl", 2)]
    assert written[0][2]["rollout/env_failures"] == 2


def test_iterations_that_a_filter_leaves_nothing_of_are_told_once_in_a_row(monkeypatch):
    config = smoke_config()
    config["rl"] |= dict(num_iterations=4, tasks_per_iteration=1, group_size=2)
    config["rl"]["filter"] |= dict(name="dynamic_sampling", max_rounds=1)
    task = dataclasses.replace(make_task("game", 0), digest="0" * 64)
    played = rollout.Rollout([make_trajectory([make_turn([1], [2])], group=0)], [], LEDGER)
    kept = iter([False, False, True, False])

    def iteration(*_, **__):
        groups = int(next(kept))
        counts = {"filter/groups_played": 1.0, "filter/groups_kept": float(groups), "filter/rounds": 1.0}
        return played, played.trajectories * groups, counts

    monkeypatch.setattr(playing, "iteration", iteration)
    monkeypatch.setattr(reinforce, "learn", lambda state, *_, **__: (state, {}, [[0.0]]))
    for module, unused in ((playing, "held_out"), (playing, "write_episodes"), (train, "_save")):
        monkeypatch.setattr(module, unused, lambda *_, **__: {})
    told = []
    monkeypatch.setattr(progress, "notice", told.append)
    session = types.SimpleNamespace(
        config=config,
        setup=types.SimpleNamespace(levels={"train": [task]}, frozen=None),
        writer=types.SimpleNamespace(of_phase=lambda _: [], write=lambda *line: line[2]),
    )
    state = TrainState(jnp.int32(0), jnp.int32(0), params={"policy": jnp.ones(2)}, opt_state=())
    programs = types.SimpleNamespace(needs_reference=False)
    train._reinforce(session, state, {"step": 0, "sampler": {}}, programs)
    assert [text.partition(":")[0] for text in told] == ["iteration 1 learned nothing", "iteration 4 learned nothing"]


def test_the_sampler_decodes_in_the_dtype_that_the_learner_computes_in():
    setup = types.SimpleNamespace(frozen=None, mesh=None, decoding_mesh=None)
    params = {"policy": {"embed": {"embedding": jnp.ones((4, 2))}, "layers": {}}}
    for dtype in ("float32", "bfloat16"):
        config = {"learner": {"compute_dtype": dtype}}
        with playing.decoding(config, setup, params) as policy:
            assert policy["embed"]["embedding"].dtype == dtype


SMALL = decoder.DecoderConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
)
NO_SETUP = {field.name: None for field in dataclasses.fields(prepare.Setup)}


def small_setup(mesh=None, **options) -> prepare.Setup:
    trainable = sharding.place({"policy": decoder.init(SMALL, jax.random.key(0))}, mesh)
    given = {"model": SMALL, "trainable": trainable, "mesh": mesh, "stop_ids": (3,)}
    return prepare.Setup(**NO_SETUP | given | options)


def held() -> int:
    """Bytes of all arrays on one device."""
    gc.collect()
    device = jax.devices()[0]
    buffers = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes
        for array in jax.live_arrays()
        for shard in array.addressable_shards
        if shard.device == device
    }
    return sum(buffers.values())


@pytest.mark.parametrize("stage", ["rl", "sft"])
@pytest.mark.parametrize("sizes", [None, (1, 2, 1)], ids=["one device", "mesh"])
def test_continuing_needs_no_more_memory_than_the_state(tmp_path, monkeypatch, stage, sizes):
    mesh = sizes and sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    config, setup = smoke_config(), small_setup(mesh)
    with sharding.use(mesh):
        start = {"sft": states.for_sft, "rl": states.for_rl}[stage]
        state = start(jax.tree.map(jnp.copy, setup.trainable), config, setup)
        saved = jax.device_get(state)
        checkpoints.save(tmp_path / stage, step=7, state=state, host={"step": 7})
        size = plan.per_device(state)
        del state
    before = held() - plan.per_device(setup.trainable)
    seen = []
    restore = checkpoints.restore

    def spy(*arguments):
        seen.append(held() - before)
        return restore(*arguments)

    monkeypatch.setattr(checkpoints, "restore", spy)
    with sharding.use(mesh):
        state, host = states.restore(types.SimpleNamespace(checkpoints=tmp_path), config, setup)
    assert seen == [0] and host["step"] == 7  # what the run would start from has made room
    assert held() - before == size
    jax.tree.map(np.testing.assert_array_equal, saved, jax.device_get(state))
    if mesh is not None:
        assert_placed(state, mesh)


def test_an_interrupted_run_lets_go_of_its_folder(tmp_path, monkeypatch):
    """Also where its frames are kept, as a notebook does for its debugger."""

    def interrupted(config, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_run", interrupted)
    kept = []
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt) as interrupt:
            train.run(smoke_config(), str(tmp_path / "run"))
        kept.append(interrupt)
    assert all(interrupt.tb is not None for interrupt in kept)


def test_what_a_kill_left_of_a_checkpoint_goes_when_the_run_continues(tmp_path):
    with contextlib.closing(train._open(tmp_path, smoke_config())) as folder:
        left = folder.checkpoints / "sft" / ".removing-000000_step_0"
    left.mkdir(parents=True)
    (left / "checkpoint.json").write_text("{}")
    with contextlib.closing(train._open(tmp_path, smoke_config())):
        assert not left.exists()


def test_the_folder_that_a_run_is_started_in_is_no_workdir_by_mistake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="workdir is empty"):
        train.run(smoke_config(), "")
    assert not list(tmp_path.iterdir())


def test_a_process_that_is_new_in_a_run_has_its_lines(tmp_path):
    own = tmp_path / "processes" / "001"
    own.mkdir(parents=True)
    with metrics.Writer(tmp_path) as first:
        for step in range(5):
            first.write("sft", step, {"loss/action": 1 / (step + 3)})
    for known in (0, 2):  # it was never there, or not of late
        metrics.Writer(own, resume_lines=known).close()
        metrics.catch_up(own, tmp_path, 4)
        assert metrics.read(own / "metrics.jsonl") == metrics.read(tmp_path / "metrics.jsonl")[:4]
    metrics.catch_up(own, tmp_path, 3)  # what is there stays, and is for the writer to cut
    assert len(metrics.read(own / "metrics.jsonl")) == 4


def test_a_new_run_starts_with_what_was_prepared(tmp_path):
    setup = small_setup()
    before = held()
    state, host = states.restore(types.SimpleNamespace(checkpoints=tmp_path), smoke_config(), setup)
    assert host["stage"] == "start"
    assert held() - before == plan.per_device((state.opt_state, state.step, state.iteration))


def test_rl_makes_its_optimizer_when_that_of_imitation_is_gone(monkeypatch):
    config, setup = smoke_config(), small_setup()
    state = states.for_sft(setup.trainable, config, setup)
    before, seen = held(), []
    fresh = states.fresh
    monkeypatch.setattr(states, "fresh", lambda *x: seen.append(held() - before) or fresh(*x))
    after = states.begin_rl(state, config, setup)
    assert seen == [-plan.per_device(state.opt_state)]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def test_the_copy_that_sampling_is_compiled_with_does_not_stay():
    config, setup = smoke_config(), small_setup()
    config["learner"]["compute_dtype"] = "bfloat16"
    copy = plan.per_device(setup.trainable) // 2
    before, seen = held(), []
    engine = types.SimpleNamespace(warm_up=lambda *x, **y: seen.append(held() - before))
    playing.warm_up(config, dataclasses.replace(setup, engine=engine), setup.trainable)
    assert seen == [copy] and held() == before


@pytest.mark.parametrize("limit, is_kept", [(4000, True), (3999, False)])
def test_memory_is_kept_where_there_is_room_for_four_times_the_plan(monkeypatch, limit, is_kept):
    made = plan.Plan("RL", {"parameters": 600}, {"update": 400}, {}, limit)
    monkeypatch.setattr(train.plan, "make", lambda *_, **__: made)
    kept = []
    monkeypatch.setattr(train.pages, "keep", lambda: kept.append(True))
    config = smoke_config() | {"memory_limit_gb": limit / 1e9}
    setup = small_setup()
    train._plan(config, setup, ("RL",), None, *reinforce.make_programs(config, setup.model))
    assert bool(kept) == is_kept


@pytest.mark.parametrize("sizes", [None, (1, 2, 1)], ids=["one device", "mesh"])
def test_the_plan_of_rl_makes_no_critic(monkeypatch, sizes):
    mesh = sizes and sharding.make_mesh(**dict(zip(sharding.AXES, sizes, strict=True)))
    config, setup = smoke_config() | {"memory_limit_gb": 1.0}, small_setup(mesh)
    config["rl"] |= {"critic": "separate", "advantage": config["rl"]["advantage"] | {"name": "gae"}}
    before, seen = held(), []

    def spy(stage, update, *, trainable, at_hand, **_):
        seen.append((held() - before, plan.per_device(trainable), at_hand))
        return plan.Plan(stage, {}, {}, {}, 0)

    monkeypatch.setattr(train.plan, "make", spy)
    with sharding.use(mesh):
        programs = reinforce.make_programs(config, setup.model, mesh=mesh)
        train._plan(config, setup, ("RL",), None, *programs)
    policy, head = plan.per_device(setup.trainable), 4 * (SMALL.hidden_size + 1)
    assert seen == [(0, 2 * policy + head, policy)]


def test_an_export_brings_nothing_to_the_host_that_it_does_not_write(tmp_path, monkeypatch):
    config, mesh = smoke_config(), sharding.make_mesh(data=1, fsdp=2, tensor=1)
    chat_format = types.SimpleNamespace(tokenizer=None, end_of_turn_id=3)
    setup = small_setup(mesh, chat_format=chat_format, stop_ids=(3, 5))
    folder = types.SimpleNamespace(model=tmp_path / "model", adapters=tmp_path / "adapters")
    state = types.SimpleNamespace(params=setup.trainable | {"critic": "not to be touched"})
    written, save = [], pretrained.save
    monkeypatch.setattr(
        pretrained, "save", lambda *x, **y: written.append(x[2]) or save(*x, **y)
    )
    states.export(folder, config, setup, state)
    assert written[0] is setup.trainable["policy"]  # whose tensors are read one by one
    _, params = pretrained.load(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, setup.trainable["policy"], params)
    assert pretrained.stop_ids(tmp_path / "model") == (3, 5)  # as the run's turns did
    # Separate adapters over a model that is in a folder: the model stays where it is.
    config["lora"].update(rank=2, export="separate")
    config["model"]["directory"] = "some/model"
    adapters = lora.init(setup.trainable["policy"], jax.random.key(1), rank=2, targets=["q"])
    state = types.SimpleNamespace(params={"adapters": adapters})
    frozen = {"policy": "not to be touched", "lora_scale": jnp.float32(1)}
    states.export(folder, config, dataclasses.replace(setup, frozen=frozen), state)
    assert len(written) == 1 and (tmp_path / "adapters" / "adapter_model.safetensors").exists()


def test_adapters_name_the_folder_of_their_model_from_the_root(tmp_path, monkeypatch):
    """Over a model that was drawn here, which is exported beside them; the workdir is given relative."""
    monkeypatch.chdir(tmp_path)
    config = smoke_config()
    config["lora"].update(rank=2, export="separate")
    config["model"]["directory"] = None
    setup = small_setup(chat_format=types.SimpleNamespace(tokenizer=None), stop_ids=())
    policy = setup.trainable["policy"]
    adapters = lora.init(policy, jax.random.key(1), rank=2, targets=["q"])
    folder = types.SimpleNamespace(model=pathlib.Path("model"), adapters=pathlib.Path("adapters"))
    setup = dataclasses.replace(setup, frozen={"policy": policy, "lora_scale": jnp.float32(1)})
    state = types.SimpleNamespace(params={"adapters": adapters})
    states.export(folder, config, setup, state)
    said = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(tmp_path / "model")
    assert pretrained.load(tmp_path / "model")[0] == SMALL


def test_idle_devices_are_named(monkeypatch):
    told = []
    monkeypatch.setattr(progress, "notice", told.append)
    train._name_idle_devices(sharding.make_mesh(data=-1, fsdp=2, tensor=1))
    assert told == []
    train._name_idle_devices(None)
    train._name_idle_devices(sharding.make_mesh(data=2, fsdp=1, tensor=2))
    assert told[0].startswith("1 of 8 devices are used: mesh.data=-1")
    assert told[1].startswith("4 of 8 devices")


def documented() -> list[str]:
    """The arguments of every command of docs/scale.md."""
    text = (ROOT / "docs" / "scale.md").read_text().replace("\\\n", " ")
    return re.findall(r'jaxagentrl\.main([^"#\n]*)', text)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
def test_the_documented_commands_of_several_devices_pass_every_check(monkeypatch):
    """Parsed by the real flags, on as many devices and processes as the text says."""
    monkeypatch.chdir(ROOT)
    # Box, pod slice, Slurm, two commands for anywhere, laptop: (processes, devices of each).
    machines = [(1, 8), (4, 4), (4, 8), (2, 8), (2, 8), (1, 8)]
    assert len(documented()) == len(machines)
    text = (ROOT / "docs" / "scale.md").read_text()
    assert "srun --nodes=4 --ntasks-per-node=1 --gpus-per-node=8" in text
    known = set(flags.FLAGS)
    for line, (num_processes, each) in zip(documented(), machines, strict=True):
        rest = "--config=configs/textworld_quickstart.py --workdir=runs/a --config.mesh.data=-1"
        line = line.replace("…", rest)
        monkeypatch.setattr(sys, "argv", ["main", *shlex.split(line)])  # the config's flags read it
        with flagsaver.flagsaver():
            assert flags.FLAGS(sys.argv) == ["main"]
            config = main._CONFIG.value.to_dict()
            if not main._DISTRIBUTED.value:
                assert (main._NUM_PROCESSES.value or 1) == num_processes
            for name in set(flags.FLAGS) - known:
                delattr(flags.FLAGS, name)
        devices = [Device(id, process_index=id // each) for id in range(num_processes * each)]
        monkeypatch.setattr(jax, "devices", lambda devices=devices: devices)
        monkeypatch.setattr(jax, "process_count", lambda count=num_processes: count)
        settings.check(config)
        mesh = sharding.make_mesh(**config["mesh"])
        assert mesh.size == len(devices)  # none is idle
        assert sharding.decoding_mesh(mesh).size == each
        shapes = reinforce.part_shapes(config["learner"], mesh)
        num_rows = config["rl"]["tasks_per_iteration"] * config["rl"]["group_size"]
        for rows in (num_rows, shapes["row_multiple"]):
            assert rows % sharding.num_row_shards(mesh) == 0
        assert plan.largest_works(num_rows, **shapes)
