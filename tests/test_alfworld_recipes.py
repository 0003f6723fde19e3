"""The ALFWorld configs end to end: real environments, real files, random weights of a tiny
shape."""

import json
import pathlib
import runpy

import jax
import pytest

pytest.importorskip("alfworld", reason="needs the files of alfworld")

from envs_host import games
from envs_host.specs import TASK_TYPES
from jaxagentrl import metrics, prepare, tokenizer, train
from jaxagentrl.models import decoder, pretrained
from jaxagentrl.models.decoder import DecoderConfig

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
WORDS = "put a hot mug in desk. You arrive at drawer 1. The drawer 1 is closed. go to take move"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder as of a published Qwen2.5 model, of a tiny shape, with random weights."""
    folder = tmp_path_factory.mktemp("qwen")
    words = tokenizer.train([WORDS] * 4, vocab_size=400, directory=folder / "tokenizer")
    shape = DecoderConfig(
        vocab_size=len(words), hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1,
        head_dim=8, intermediate_size=32, attention_bias=True, rope_theta=1e6)
    params = decoder.init(shape, jax.random.key(0))
    pretrained.save(folder / "model", shape, params, tokenizer=words)
    return folder / "model"


def tiny(name, weights, cache, **rl):
    """The config with its own algorithm and prompts, on small houses instead of the download."""
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    config.unlock()
    config.env.params = dict(family="alfworld", num_receptacles=4, num_objects=4)
    config.env.update(cache_dir=str(cache), num_workers=1)
    config.pool.update(num_workers=1)
    config.splits = dict(
        demo=(1, 4, {"expert": "handcoded"}),
        train=(101, 4),
        test=(201, 3, {"split": "valid_unseen"}),
        test_seen=(301, 2, {"split": "valid_seen"}),
    )
    if weights is not None:
        config.model.directory = config.tokenizer.directory = str(weights)
    config.rl.update(tasks_per_iteration=2, num_iterations=1, eval_every=1, save_every=1, **rl)
    config.rollout.update(max_turns=3)
    config.sft.update(batch_size=2, log_every=1)
    config = json.loads(json.dumps(config.to_dict()))  # As a workdir keeps it.
    config["compilation_cache_dir"] = None
    config["mesh"] = dict(data=1, fsdp=1, tensor=1)
    config["learner"] |= dict(compute_dtype="float32", remat="none")
    return config


def lines(workdir):
    return {line["phase"]: line for line in metrics.read(workdir / "metrics.jsonl")}


def check(workdir):
    found = lines(workdir)
    last = found["rl"]
    for prefix, split in (("eval", "valid_unseen"), ("eval_seen", "valid_seen")):
        assert last[f"{prefix}/{split}/episodes"] == last[f"{prefix}/episodes"] > 0
        by_type = [last.get(f"{prefix}/{split}/{kind}/episodes", 0) for kind in TASK_TYPES]
        assert sum(by_type) == last[f"{prefix}/episodes"]
    assert found["baseline"]["walkthrough/successes"] <= 3
    assert json.loads((workdir / "config.json").read_text())["versions"]["alfworld"] >= "0.4.2"
    # Nothing is learned from, and no gap measured, where all episodes of all groups fared alike.
    assert last.get("policy/sampler_gap_max", 0.0) < 0.05
    return found


@pytest.mark.slow
def test_the_practitioners_recipe(tmp_path, weights, smoke_games):
    """Imitation, PPO with a critic of its own, one conversation of free text."""
    config = tiny("alfworld_qwen2_5_7b", weights, smoke_games, num_minibatches=1)
    config["sft"]["num_steps"] = 2
    config["sampling"] |= dict(num_slots=4, max_length=2048, max_turn_tokens=8,
                               filled_buckets=(2048,), width_buckets=(512,), row_divisors=(1,),
                               cache_dtype="float32")
    config["learner"] |= dict(length_buckets=(2048,), tokens_per_part=8192, row_multiple=1)
    train.run(config, str(tmp_path / "run"))
    found = check(tmp_path / "run")
    assert found["sft"]["loss/action"] > 0 and "loss/value" in found["rl"]


@pytest.mark.slow
def test_the_recipe_of_gigpo(tmp_path, weights, smoke_games):
    """Turns that are conversations of their own, commands listed, tags, KL in the loss; by adapters
    here, whose reference is the adapters of the beginning."""
    config = tiny("alfworld_qwen2_5_1_5b", weights, smoke_games, group_size=2)
    config["sampling"] |= dict(num_slots=4, max_length=2560, max_turn_tokens=8,
                               filled_buckets=(2560,), width_buckets=(512,), row_divisors=(1,),
                               cache_dtype="float32")
    config["learner"] |= dict(length_buckets=(2560, 8192), tokens_per_part=8192, row_multiple=1)
    config["lora"] |= dict(rank=2, export="separate")
    train.run(config, str(tmp_path / "run"))
    found = check(tmp_path / "run")
    assert found["rl"]["loss/kl"] >= 0
    assert (tmp_path / "run" / "adapters" / "adapter_config.json").exists()
    assert not (tmp_path / "run" / "model").exists()  # the base is the folder that was given
    records = (tmp_path / "run" / "trajectories" / "rl_000001.jsonl").read_text().splitlines()
    # Random weights write no tags, nor an end of turn, without which nothing is sent and nothing refused.
    played = [json.loads(record) for record in records]
    assert not any(turn["valid_command"] for episode in played for turn in episode["turns"])
    was_sent = any(len(e["turns"]) > 1 or e["stop_reason"] != "no_end_of_turn" for e in played)
    assert found["rl"].get("rollout/invalid_command_rate") == (1.0 if was_sent else None)
    turns = played[0]["turns"]
    assert [turn["fresh"] for turn in turns] == [False] + [True] * (len(turns) - 1)


@pytest.mark.slow
def test_the_quick_start(tmp_path, smoke_games):
    config = tiny("alfworld_quickstart", None, smoke_games, group_size=2)
    config["model"] |= dict(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
                            intermediate_size=32)
    config["sft"]["num_steps"] = 2
    config["sampling"] |= dict(num_slots=4, max_length=448, filled_buckets=(448,),
                               width_buckets=(96,), row_divisors=(1,))
    config["learner"] |= dict(length_buckets=(448,))
    train.run(config, str(tmp_path / "run"))
    check(tmp_path / "run")


def test_options_of_the_environment_come_from_the_config(smoke_games):
    spec = {"family": "alfworld", "task_type": TASK_TYPES[0], "num_receptacles": 5, "num_objects": 5}
    task = games.generate([spec | {"seed": 1}], cache_dir=smoke_games, progress=False).tasks[0]
    *before, last = task.walkthrough
    put = last.replace("move", "put").replace(" to ", " in/on ")
    for accept in (False, True):
        config = tiny("alfworld_quickstart", None, smoke_games)
        config["env"]["options"]["accept_put"] = accept
        with prepare.make_pool(config) as pool:
            pool.reset("game", task)
            ((_, answer),) = pool.poll(60.0)
            for command in (*before, put):
                pool.step("game", command)
                ((_, answer),) = pool.poll(60.0)
        assert answer.info.won == accept
