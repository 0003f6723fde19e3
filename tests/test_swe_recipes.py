"""The configs of repositories end to end: a real repository and clone, random weights of a tiny shape."""

import json
import pathlib
import runpy

import jax
import pytest

from envs_host import swe_tests, swe_text
from jaxagentrl import metrics, settings, tokenizer, train
from jaxagentrl.models import decoder, pretrained
from jaxagentrl.models.decoder import DecoderConfig
from tests import repositories
from tests.test_swe_data import instance as instance  # a fixture

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
SHAPE = dict(hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, intermediate_size=32)


def tiny(name):
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]()
    config = json.loads(json.dumps(config.to_dict()))  # as a workdir keeps it
    config["env"]["options"]["sandbox"] = "none"
    config["pool"]["num_workers"] = config["env"]["num_workers"] = 1
    config["rl"] |= dict(tasks_per_iteration=2, group_size=2, num_iterations=1, eval_every=1, save_every=1)
    config["rollout"] |= dict(max_turns=2, cut_turns="send")
    config["compilation_cache_dir"] = None
    config["mesh"] = dict(data=1, fsdp=1, tensor=1)
    return config


def test_a_sandbox_that_is_not_there_is_found_out_before_tasks_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(swe_tests, "_bubblewrap_fails", lambda: "there is no program bwrap")
    config = tiny("swe_quickstart")
    config["env"]["options"]["sandbox"] = "bubblewrap"
    config["env"]["params"]["repository"] = "/nowhere"
    with pytest.raises(ValueError, match="there is no program bwrap.*apt install"):
        train.run(config, str(tmp_path / "run"))


def test_a_looker_that_sees_other_windows_is_refused():
    config = tiny("swe_quickstart")
    config["env"]["params"]["expert"] = "looker"
    with pytest.raises(ValueError, match="'looker' of demo takes windows to have 40 .* they have 12"):
        settings.check(config)
    config["env"]["params"]["window_lines"] = 12
    settings.check(config)
    config["splits"]["demo"] = (0, 280, {"window_lines": 16})
    with pytest.raises(ValueError, match="'looker' of demo takes windows to have 16"):
        settings.check(config)


@pytest.mark.slow
def test_the_practitioners_recipe(tmp_path, instance):
    """Instances in SWE-Gym's form; GRPO, with KL in the loss and thoughts of a system message."""
    # Tasks are told apart by their tests.
    others = [f"tests/test_hidden.py::test_always[{n}]" for n in range(5)]
    instances = [instance | {"instance_id": f"shelf-{n}", "PASS_TO_PASS": [others[n]]} for n in range(5)]
    (tmp_path / "instances.jsonl").write_text("".join(json.dumps(one) + "\n" for one in instances))
    words = tokenizer.train([swe_text.HELP] * 4, vocab_size=400, directory=tmp_path / "tokenizer")
    model = DecoderConfig(vocab_size=len(words), qk_norm=True, **SHAPE)
    pretrained.save(tmp_path / "model", model, decoder.init(model, jax.random.key(0)), tokenizer=words)
    config = tiny("swe_gym_qwen3_8b")
    folders = dict(instances=str(tmp_path / "instances.jsonl"), repositories=str(tmp_path / "clones"))
    config["env"]["params"] |= folders | dict(python=None, repos=("corner/shelf",))
    config["env"]["cache_dir"] = str(tmp_path / "cache")
    config["splits"] = dict(demo=(0, 1), train=(1, 2), test=(3, 2))
    config["model"]["directory"] = config["tokenizer"]["directory"] = str(tmp_path / "model")
    config["sampling"] |= dict(
        num_slots=4, max_length=1024, max_turn_tokens=8, filled_buckets=(1024,), width_buckets=(768,),
        row_divisors=(1,), cache_dtype="float32",
    )  # fmt: skip
    config["learner"] |= dict(length_buckets=(1024,), tokens_per_part=4096, compute_dtype="float32", remat="none")
    train.run(config, str(tmp_path / "run"))
    found = {line["phase"]: line for line in metrics.read(tmp_path / "run" / "metrics.jsonl")}
    assert found["baseline"]["random/successes"] == found["rl"]["eval/successes"] == 0
    assert found["rl"]["eval/corner/shelf/patch_1_8/episodes"] == found["rl"]["eval/episodes"] == 2
    told = json.loads((tmp_path / "run" / "trajectories" / "rl_000001.jsonl").read_text().splitlines()[0])
    assert told["turns"][0]["observation"] == "README.md\nshelf/\ntests/"


@pytest.mark.slow
def test_the_quick_start(tmp_path):
    repository = repositories.make(tmp_path / "shelf")
    config = tiny("swe_quickstart")
    config["rollout"]["max_turns"] = 3  # as many as its demonstrations have
    config["env"] |= dict(cache_dir=str(tmp_path / "cache"))
    config["env"]["params"] |= dict(repository=str(repository), files="shelf/*.py", tests="tests")
    config["splits"] = dict(demo=(0, 4), train=(4, 4), test=(8, 4))
    config["model"] |= SHAPE
    config["tokenizer"] |= dict(vocab_size=384)
    config["sft"] |= dict(num_steps=2, batch_size=1, log_every=1, save_every=2)
    config["sampling"] |= dict(
        num_slots=4, max_length=1024, max_turn_tokens=64, filled_buckets=(1024,), width_buckets=(512,), row_divisors=(1,)
    )
    config["learner"] |= dict(length_buckets=(1024,))
    train.run(config, str(tmp_path / "run"))
    found = {line["phase"]: line for line in metrics.read(tmp_path / "run" / "metrics.jsonl")}
    held_out = found["baseline"]["walkthrough/episodes"]
    assert found["baseline"]["walkthrough/successes"] == found["rl"]["eval/episodes"] == held_out > 0
    assert found["sft"]["loss/action"] > 0


def test_tests_have_less_time_than_a_step():
    config = tiny("swe_quickstart")
    config["env"]["options"]["test_limit_s"] = 20.0
    with pytest.raises(ValueError, match="pool.step_limit_s is 10.0, but a step may run tests for .* = 20.0 seconds"):
        settings.check(config)
