"""Configs: every key is read, every wrong one refused before anything is made, idle ones named."""

import pathlib
import runpy

import pytest

from jaxagentrl import settings

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def load(name: str) -> dict:
    return runpy.run_path(str(ROOT / "configs" / name))["get_config"]().to_dict()


def changed(name: str, **changes) -> dict:
    config = load(name)
    for path, value in changes.items():
        *parents, key = path.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[key] = value
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_passes_with_the_folders_that_it_asks_for(path):
    config = load(path.name)
    if "qwen" in path.stem:
        config["model"]["directory"] = config["tokenizer"]["directory"] = "some/model"
    settings.check(config)


def test_the_quick_start_has_every_key_and_the_docs_tell_of_each():
    paths = [path for path, _ in settings.flat(load("textworld_quickstart.py"))]
    assert sorted(paths) == sorted(settings.KEYS)
    told = (ROOT / "docs" / "config.md").read_text()
    assert [path for path in settings.KEYS if f"`{path}`" not in told] == []


@pytest.mark.parametrize(
    "path, value, words",
    [
        ("rl.loss.surrogate", "ppo", "rl.loss.surrogate must be one of clipped, gspo"),
        ("rl.aggregation", "mean", "rl.aggregation must be one of token_mean"),
        ("rl.aggregation", "constant", "rl.aggregation_constant None: 'constant' needs a number"),
        ("rl.aggregation_constant", 12.0, "the other modes None"),
        ("rl.advantage.group_scale", "var", "rl.advantage.group_scale must be one of std, none"),
        ("rl.advantage.turn_horizon", "all", "rl.advantage.turn_horizon must be one of"),
        ("rl.advantage.gae_lambda", 1.5, r"gae_lambda must be in \[0, 1\], got 1.5"),
        ("rl.kl.estimator", "k4", "rl.kl.estimator must be one of k1, k2"),
        ("rl.loss.dual_clip", 0.5, "rl.loss.dual_clip must be at least 1"),
        ("rl.eval_every", 0, "rl.eval_every must be at least 1, got 0"),
        ("rl.save_every", 0, "rl.save_every"),
        ("rl.num_epochs", 0, "rl.num_epochs"),
        ("rl.num_minibatches", 0, "rl.num_minibatches must be at least 1"),
        ("rl.discount", -0.1, "rl.discount"),
        ("sft.log_every", 0, "sft.log_every must be at least 1"),
        ("sft.save_every", 0, "sft.save_every must be at least 1"),
        ("seed", -1, "seed must be 0 or more"),
        ("splits.test", (1,), r"splits.test must be \(first seed, number of seeds\)"),
        ("splits.test", (1, 2, 3), "splits.test must be .*a dict of parameters"),
        ("splits.test", 1, "splits.test must be"),
        ("rl.num_minibatches", 3, "num_minibatches"),
        ("rl.optimizer.max_grad_norm", 0.0, "rl.optimizer.max_grad_norm must be above 0"),
        ("sft.optimizer.learning_rate", -1.0, "sft.optimizer.learning_rate must be at least 0"),
        ("rl.loss.entropy_coefficient", -0.1, "rl.loss.entropy_coefficient must be at least 0"),
        ("rollout.temperature", 0.0, "rollout.temperature must be 1e-06 or more"),
        ("rollout.stop_strings", "Obs:", "rollout.stop_strings must be a tuple of texts"),
        ("reward.kind", "sparse", "reward.kind must be one of single, dense, intermediate"),
        ("reward.kind", "dense", "set it to None"),
        ("reward.invalid_penalty", -0.1, "reward.invalid_penalty is subtracted"),
        ("prompt.style", "terse", "prompt.style must be one of"),
        ("sampling.num_slots", 0, "must be a positive multiple"),
        ("sampling.width_buckets", (), "sampling.width_buckets must have at least one entry"),
        ("seed", 2**32, "seed must be 0 or more and below 2\\*\\*32"),
        ("sampling.filled_buckets", (0, 240), "filled_buckets must be positive"),
        ("learner.length_buckets", (), "learner.length_buckets must be positive lengths"),
        ("learner.tree_length", -1, "learner.tree_length must be 0 or more"),
        ("learner.tree_length", 200, "tree_length is 200, but an episode may have .* 240 tokens: .* or to 0"),
        ("learner.remat", "some", "learner.remat must be one of"),
        ("model.directory", "some/model", "set tokenizer.directory"),
        ("pool.step_limit_s", 0.0, "pool.step_limit_s must be more than 0"),
        ("rollout.max_turns", None, "rollout.max_turns must not be None"),
        ("rl.skip_zero_signl", False, "did you mean rl.skip_zero_signal"),
        ("unheard_of", 1, "nothing reads, see docs/config.md"),
        ("model.vocab_size", 512, "a key model.vocab_size, which nothing reads: did you mean tokenizer.vocab_size"),
        ("model.rope_thet", 1e6, "did you mean model.rope_theta"),
        ("env.num_workers", -1, "env.num_workers must be at least 1"),
        ("env.options", {"accept_put": True, "remember": True},
         "environment 'textworld' has no option accept_put; it takes admissible_commands"),
        ("tokenizer.vocab_size", 262, "vocab_size is 262, but 256 bytes and 7 special tokens need at least 263"),
        ("tokenizer.names", "half", "tokenizer.names must be one of whole, parts"),
        ("sampling.width_buckets", (96.5,), "sampling.width_buckets must be a tuple of integers"),
        ("sampling.row_divisors", (1, 1.5), "sampling.row_divisors must be a tuple of integers"),
        ("learner.length_buckets", ("80", 240), "learner.length_buckets must be a tuple of integers"),
        ("eval.other_temperatures", ("a",), "eval.other_temperatures must be a tuple of numbers"),
        ("rollout.stop_strings", (1,), "rollout.stop_strings must be a tuple of texts"),
        ("eval.temperature", float("nan"), "eval.temperature must be finite, got nan"),
        ("eval.temperature", 1e-9, "each 0 .greedy. or 1e-06 and more"),
        ("pool.num_workers", "2", "pool.num_workers must be an integer, got '2'"),
        ("pool.max_replays", 2.5, "pool.max_replays must be an integer, got 2.5"),
        ("pool.max_replays", -1, "pool.max_replays must be 0 or more, got -1"),
        ("rl.group_size", True, "rl.group_size must be an integer, got True"),
        ("rl.skip_zero_signal", 1, "rl.skip_zero_signal must be True or False, got 1"),
        ("rl.optimizer", 1, "a key rl.optimizer, which nothing reads"),
        ("env.options", None, "env.options must not be None"),
        ("env.params", "custom", "env.params must be a dict, got 'custom'"),
        ("namings", {"demo": 1, "train": None}, "namings must give demo and train a number of at least 1 each"),
        ("env.options", {"remember": 1}, "env.options.remember must be True or False, got 1"),
        ("tokenizer.lexicon", [1, 2], r"tokenizer.lexicon must be a tuple of texts, got \[1, 2\]"),
        ("model.rope_theta", "1e6", "model.rope_theta must be a number, got '1e6'"),
        ("model.window_layers", (1, 0), "model.window_layers must be a tuple of True and False"),
        ("splits.test", (True, 100), "splits.test must be"),
        ("splits.tests", (90_001, 4), r"further ones of their kinds as train_<name> .*'tests'"),
        ("splits.train_house", (90_001, 4, {"theme": "house"}), "namings.train is 4, .*which splits.train_house is not of"),
        ("reward.intermediate_scale", float("nan"), "reward.intermediate_scale must be finite, got nan"),
        ("reward.invalid_penalty", float("inf"), "reward.invalid_penalty must be finite, got inf"),
        ("rl.advantage.step_weight", float("inf"), "rl.advantage.step_weight must be finite"),
        ("sft.observation_weight", float("inf"), "sft.observation_weight must be finite"),
        ("eval.other_temperatures", (1e999,), "eval.other_temperatures must be finite"),
        ("pool.step_limit_s", float("nan"), "pool.step_limit_s must be finite, got nan"),
        ("env.cache_dir", "", "env.cache_dir must be the name of a folder, got ''"),
        ("rl.loss.value_clip", 0.0, "rl.loss.value_clip must be at least 1e-06"),
    ],
)
def test_wrong_settings_are_refused_with_their_key(path, value, words):
    with pytest.raises(ValueError, match=words):
        settings.check(changed("textworld_quickstart.py", **{path: value}))


NUMBERS = [path for path in settings.KEYS if settings._KINDS.get(path, "a number") in ("an integer", "a number")]


@pytest.mark.parametrize("path", NUMBERS)
def test_a_text_is_no_number(path):
    with pytest.raises(ValueError, match=f"{path} must be an? (integer|number), got 'x'"):
        settings.check(changed("textworld_quickstart.py", **{path: "x"}))


def test_the_kinds_are_those_of_the_quick_start():
    kinds = {
        int: {"an integer"}, float: {"a number"}, bool: {"True or False"}, str: {"a text"},
        tuple: {"a tuple of integers", "a tuple of numbers", "a tuple of texts"},
    }  # fmt: skip
    config = runpy.run_path(str(ROOT / "configs" / "textworld_quickstart.py"))["get_config"]()
    for path in settings.KEYS:
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section[name]
        kind = settings._KINDS.get(path, "a number")
        assert kind == "a dict" or kind in kinds[section.get_type(key)], path


def test_a_mesh_that_no_process_can_sample_on_is_refused(monkeypatch):
    """Before games are made: a tensor group must not span processes."""

    def spans(mesh):
        raise settings.sharding.ShardingError(f"mesh.tensor is {mesh.shape['tensor']}, of several processes")

    config = load("textworld_smoke.py") | {"mesh": dict(data=1, fsdp=1, tensor=2)}
    settings.check(config)
    monkeypatch.setattr(settings.sharding, "decoding_mesh", spans)
    with pytest.raises(ValueError, match="mesh.tensor is 2"):
        settings.check(config)


def test_infinity_is_no_bound():
    endless = dict.fromkeys(settings._ENDLESS, float("inf"))
    settings.check(changed("textworld_quickstart.py", **endless))


def test_a_missing_key_is_refused():
    config = load("textworld_quickstart.py")
    del config["rl"]["aggregation_constant"]
    with pytest.raises(ValueError, match="lacks rl.aggregation_constant"):
        settings.check(config)


def test_keys_with_a_default_of_their_own_are_allowed():
    further = {"model.rope_theta": 1e6, "model.sliding_window": None, "pool.max_replays": 2}
    further |= {"model.rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    settings.check(changed("textworld_quickstart.py", **further))


def test_what_a_run_does_not_read_is_named():
    unused = settings.unused(load("textworld_quickstart.py"))
    assert "rl.advantage.gae_lambda" in unused and "lora.*" in unused
    assert "rl.loss.clip_low" in unused  # one update a batch
    for used in ("rl.advantage.step_weight", "model.*", "model.hidden_size", "rl.skip_zero_signal"):
        assert used not in unused
    ppo = {
        "rl.advantage.name": "gae",
        "rl.critic": "head",
        "rl.num_minibatches": 4,
        "sft.num_steps": 0,
        "lora.rank": 4,
    }
    assert "learner.tree_length" not in unused
    windowed = {"rollout.context": "window", "learner.length_buckets": (12 * 240,)}
    windowed = changed("textworld_quickstart.py", **windowed)
    settings.check(windowed)
    assert "learner.tree_length" in settings.unused(windowed)  # several texts are packed
    config = changed("textworld_quickstart.py", **ppo)
    settings.check(config)
    unused = settings.unused(config)
    assert {"rl.advantage.step_weight", "rl.skip_zero_signal", "sft.*"} <= set(unused)
    assert "rl.loss.value_clip" not in unused
    assert "rl.optimizer.final_fraction" not in unused  # its rate decays
    constant = changed("textworld_quickstart.py", **{"rl.optimizer.decay_steps": None})
    assert {"sft.optimizer.final_fraction", "rl.optimizer.final_fraction"} <= set(settings.unused(constant))
    only_played = settings.unused(changed("textworld_quickstart.py", **{"rl.num_iterations": 0}))
    assert "rl.*" in only_played and "rl.group_size" not in only_played
    assert "learner.remat" not in only_played  # imitation reads it
    none = settings.unused(
        changed("textworld_quickstart.py", **{"rl.num_iterations": 0, "sft.num_steps": 0})
    )
    assert {"learner.remat", "rollout.temperature"} <= set(none) and "learner.compute_dtype" not in none
    for used in ("rl.advantage.gae_lambda", "rl.loss.clip_low", "lora.alpha", "lora.*", "model.*"):
        assert used not in unused


@pytest.mark.parametrize(
    "key, changes, is_read",
    [
        ("learner.packing", {}, True),  # by imitation
        ("learner.packing", {"sft.num_steps": 0}, False),
        ("learner.packing", {"sft.num_steps": 0, "learner.tree_length": 0}, True),
        ("learner.packing", {"rollout.context": "window"}, False),
        ("rl.discount", {"rl.advantage.name": "rewards_to_go_group"}, True),
        ("rl.discount", {"rl.advantage.name": "rewards_to_go_group", "rl.advantage.turn_horizon": "turn"}, False),
        ("export_dtype", {"lora.rank": 4, "lora.export": "separate"}, True),  # of the model that is drawn
        ("export_dtype", {"lora.rank": 4, "lora.export": "separate", "model.directory": "qwen"}, False),
        ("export_dtype", {"lora.rank": 4, "model.directory": "qwen"}, True),
    ],
)
def test_what_is_read_hangs_on_other_keys(key, changes, is_read):
    unused = settings.unused(changed("textworld_quickstart.py", **changes))
    assert (key not in unused) == is_read, unused


def test_a_surrogate_without_a_ratio_is_for_one_update_per_iteration():
    one = changed("textworld_quickstart.py", **{"rl.loss.surrogate": "policy_gradient"})
    settings.check(one)
    for path in ("rl.num_epochs", "rl.num_minibatches"):
        several = changed("textworld_quickstart.py", **{"rl.loss.surrogate": "policy_gradient", path: 2})
        with pytest.raises(ValueError, match="policy_gradient.*right for the first alone"):
            settings.check(several)
