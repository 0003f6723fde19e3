"""Whether a config can be run, asked before anything is made, and what of it is without effect.

`check` refuses what cannot work, with the key, what it says, what it could say and what to do. Sizes of
a part are checked by that part (`sampling.check`, `rules.Rules`, `optimizer.make`, `rewards.check`); here
are the other keys, and those that must agree with one another.

`unused` names the keys that this run does not read: configs are made by changing others, so that such
keys are usual, but somebody who has just set one should hear of it.
"""

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

import envs_host
from envs_host import collect, naming, swe_tests, swe_text
from jaxagentrl import (
    curriculum,
    optimizer,
    prepare,
    reinforce,
    rewards,
    rules,
    sampling,
    tokenizer,
    turns,
    windowed,
)
from jaxagentrl.chat import PROMPT_STYLES
from jaxagentrl.models import decoder, lora, sharding

# Every key, by section; "?" marks those that may be None, which docs/config.md explains. What is in
# those of `_WHOLE` is checked elsewhere.
_OPTIMIZER = (
    "learning_rate warmup_steps decay_steps? final_fraction b1 b2 weight_decay max_grad_norm moment_dtype"
)
_SECTIONS = {
    "": "seed compilation_cache_dir? memory_limit_gb? export_dtype splits namings",
    "env": "name params cache_dir options num_workers?",
    "pool": "num_workers step_limit_s reset_limit_s worker_memory_mb",
    "prompt": "style show_admissible system? template_options",
    "tokenizer": "directory? vocab_size names phrases glue_tokens lexicon",
    "model": "directory? hidden_size num_layers num_heads num_kv_heads head_dim intermediate_size",
    "sampling": "num_slots num_waves max_length max_turn_tokens filled_buckets width_buckets "
    "row_divisors cache_dtype linger_share",
    "rollout": "max_turns max_refusals? temperature top_k top_p min_p cut_turns stop_strings context "
    "context_keep history_turns straggler_s? episode_limit_s?",
    "reward": "kind invalid_penalty no_end_of_turn_penalty intermediate_scale? overlong_penalty overlong_length? "
    "overlong_margin?",
    "learner": "length_buckets tokens_per_part row_multiple packing tree_length remat compute_dtype",
    "mesh": "data fsdp tensor",
    "lora": "rank alpha targets export",
    "sft": "num_steps target_loss? batch_size observation_weight log_every save_every",
    "sft.optimizer": _OPTIMIZER,
    "rl": "num_iterations tasks_per_iteration group_size num_epochs num_minibatches discount critic "
    "critic_learning_rate? "
    "aggregation aggregation_constant? observation_weight skip_zero_signal eval_every save_every",
    "rl.advantage": "name whiten negative_weight gae_lambda group_scale turn_horizon turn_discount "
    "step_weight first_visit",
    "rl.filter": "name fraction max_rounds leave_out",
    "rl.curriculum": "order share threshold window horizons horizon_iterations",
    "rl.branching": "members probability entropy_weight entropy_tokens",
    "rl.loss": "surrogate clip_low clip_high dual_clip? entropy_coefficient value_coefficient value_clip? "
    "importance_cap?",
    "rl.kl": "placement estimator coefficient",
    "rl.optimizer": _OPTIMIZER,
    "eval": "temperature other_temperatures attempts",
}
_MARKED = [
    f"{section}.{name}".removeprefix(".")
    for section, names in _SECTIONS.items()
    for name in names.split()
]
KEYS = tuple(path.removesuffix("?") for path in _MARKED)
# Those that have a default of their own. The model's vocabulary is the tokenizer's.
_MODEL = {f"model.{field.name}": field for field in dataclasses.fields(decoder.DecoderConfig)}
del _MODEL["model.vocab_size"]
_FURTHER = ("pool.max_replays", *(path for path in _MODEL if path not in KEYS))
OPTIONAL = (
    *(path.removesuffix("?") for path in _MARKED if path.endswith("?")),
    *(path for path, field in _MODEL.items() if field.default is None),
)
_WHOLE = ("env.params", "env.options", "splits", "namings", "prompt.template_options", "model.rope_scaling")

# What the keys hold; those that are not here, a number.
_HELD = {
    "an integer": "seed env.num_workers pool.num_workers pool.max_replays tokenizer.vocab_size sampling.num_slots "
    "sampling.num_waves sampling.max_length sampling.max_turn_tokens rollout.max_turns rollout.max_refusals "
    "rollout.top_k rollout.history_turns learner.tokens_per_part learner.row_multiple learner.tree_length mesh.data "
    "mesh.fsdp mesh.tensor lora.rank sft.num_steps sft.batch_size sft.log_every sft.save_every "
    "sft.optimizer.warmup_steps sft.optimizer.decay_steps rl.optimizer.warmup_steps rl.optimizer.decay_steps "
    "rl.num_iterations rl.tasks_per_iteration rl.group_size rl.num_epochs rl.num_minibatches rl.eval_every "
    "rl.save_every rl.filter.max_rounds rl.curriculum.window rl.curriculum.horizon_iterations rl.branching.members "
    "rl.branching.entropy_tokens reward.overlong_length reward.overlong_margin eval.attempts",
    "True or False": "prompt.show_admissible tokenizer.phrases tokenizer.glue_tokens learner.packing "
    "rl.skip_zero_signal rl.advantage.whiten rl.advantage.first_visit",
    "a text": "compilation_cache_dir export_dtype env.name env.cache_dir prompt.style prompt.system "
    "tokenizer.directory tokenizer.names model.directory sampling.cache_dtype rollout.cut_turns rollout.context "
    "reward.kind learner.remat learner.compute_dtype lora.export sft.optimizer.moment_dtype "
    "rl.optimizer.moment_dtype rl.critic rl.aggregation rl.advantage.name rl.advantage.group_scale "
    "rl.advantage.turn_horizon rl.loss.surrogate rl.kl.placement rl.kl.estimator "
    "rl.filter.name rl.curriculum.order",
    "a tuple of integers": "sampling.filled_buckets sampling.width_buckets sampling.row_divisors "
    "learner.length_buckets rl.curriculum.horizons",
    "a tuple of numbers": "eval.other_temperatures",
    "a tuple of texts": "rollout.stop_strings lora.targets tokenizer.lexicon rl.filter.leave_out",
    "a dict": " ".join(_WHOLE),
}
_KINDS = {path: kind for kind, paths in _HELD.items() for path in paths.split()}
# By the types of their fields, without the None of some.
_OF_TYPES = {int: "an integer", bool: "True or False", str: "a text", tuple[bool, ...]: "a tuple of True and False"}
_KINDS |= {
    path: _OF_TYPES[kind]
    for path, field in _MODEL.items()
    if (kind := (typing.get_args(field.type) or (field.type,))[0]) in _OF_TYPES and path not in _KINDS
}
# Where infinity says that there is no bound.
_ENDLESS = (
    "pool.step_limit_s", "pool.reset_limit_s", "pool.worker_memory_mb", "rollout.straggler_s",
    "rollout.episode_limit_s", "sft.optimizer.max_grad_norm", "rl.optimizer.max_grad_norm", "rl.loss.clip_high",
    "rl.loss.dual_clip", "rl.loss.value_clip", "rl.loss.importance_cap",
)

Config = Mapping[str, Any]


def check(config: Config) -> None:
    """Refuses settings that cannot work.

    Raises:
        ValueError: with the key, what was got, what was expected.
    """
    _check_keys(config)
    _check_kinds(config)
    _check_values(config)
    _check_games(config)
    sampling.check(**config["sampling"])
    rules.of_config(config)
    rewards.check(**config["reward"])
    reinforce.check(config["rl"])
    num_levels = sum(prepare.kind(name) == "train" for name in config["splits"])
    curriculum.check(config["rl"]["curriculum"], max_turns=config["rollout"]["max_turns"], num_levels=num_levels)
    for stage in ("sft", "rl"):
        optimizer.make(**config[stage]["optimizer"], where=f"{stage}.optimizer")
    if config["tokenizer"]["directory"] is None:
        tokenizer.check_size(config["tokenizer"]["vocab_size"], glue_tokens=config["tokenizer"]["glue_tokens"])
    _check_lengths(config)
    _check_trees(config)
    _check_imitation(config)
    _check_model(config)
    if config["rl"]["tasks_per_iteration"] % jax.process_count():
        raise ValueError(
            f"rl.tasks_per_iteration is {config['rl']['tasks_per_iteration']}, which "
            f"{jax.process_count()} processes cannot share equally: make it a multiple."
        )
    if (mesh := sharding.make_mesh(**config["mesh"])) is not None:
        sharding.decoding_mesh(mesh)


def can_be_added(path: str) -> bool:
    """Whether a file may give a config this key if it has none of the name."""
    return path in _FURTHER or path.startswith(tuple(f"{whole}." for whole in _WHOLE if whole != "namings"))


def flat(config: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """("rl.loss.clip_low", 0.2) and so on."""
    for key, value in config.items():
        path = prefix + key
        if isinstance(value, Mapping) and path not in _WHOLE:
            yield from flat(value, f"{path}.")
        else:
            yield path, value


def _check_keys(config: Config) -> None:
    """Every key is there, none beside them, and None only where it means something.

    A config file may give a ConfigDict new keys: a misspelt one would be read by nobody.
    """
    values = dict(flat(config))
    for path in values:
        if path not in KEYS and path not in _FURTHER:
            similar = difflib.get_close_matches(path, (*KEYS, *_FURTHER), n=1)
            hint = f": did you mean {similar[0]}?" if similar else ", see docs/config.md for those it has."
            raise ValueError(f"the config has a key {path}, which nothing reads{hint}")
    missing = [path for path in KEYS if path not in values]
    if missing:
        raise ValueError(
            f"the config lacks {', '.join(missing)}: build it on configs/textworld_quickstart.py, which "
            "has every key."
        )
    unset = [path for path, value in values.items() if value is None and path not in OPTIONAL]
    if unset:
        raise ValueError(f"{', '.join(unset)} must not be None.")


def _check_kinds(config: Config) -> None:
    """What stands in a key is of the kind that the quick start has there; a file may replace whole sections, of
    which nobody has looked at the types. None is `_check_keys`' matter."""
    for path, value in flat(config):
        kind = _KINDS.get(path, "a number")
        if value is None:
            continue
        if not _is(value, kind):
            raise ValueError(f"{path} must be {kind}, got {value!r}.")
        numbers = value if isinstance(value, tuple | list) else [value]
        if any(isinstance(number, float) and not _is_usable(number, path) for number in numbers):
            raise ValueError(f"{path} must be finite, got {value!r}.")


def _is(value: Any, kind: str) -> bool:
    if kind.startswith("a tuple of "):
        entry = {
            "integers": "an integer", "numbers": "a number", "texts": "a text", "True and False": "True or False",
        }[kind.removeprefix("a tuple of ")]
        return isinstance(value, tuple | list) and all(_is(one, entry) for one in value)
    types = {"an integer": int, "a number": int | float, "True or False": bool, "a text": str, "a dict": Mapping}
    return isinstance(value, types[kind]) and isinstance(value, bool) == (kind == "True or False")


def _is_usable(number: float, path: str) -> bool:
    return math.isfinite(number) or (number == math.inf and path in _ENDLESS)


def _check_values(config: Config) -> None:
    """One key at a time."""
    values = dict(flat(config))
    styles = (*PROMPT_STYLES, windowed.STYLE)
    for path, is_right, expected in (
        *((key, _at_least(1), "at least 1") for key in (
            "env.num_workers", "pool.num_workers", "learner.tokens_per_part", "learner.row_multiple", "sft.batch_size",
            "sft.log_every", "sft.save_every", "eval.attempts",
        )),
        *((key, _at_least(0), "0 or more") for key in (
            "learner.tree_length", "lora.rank", "sft.num_steps", "sft.observation_weight", "pool.max_replays",
        )),
        # An empty one would be the folder that the run is started in.
        *((key, bool, "the name of a folder") for key in (
            "compilation_cache_dir", "env.cache_dir", "tokenizer.directory", "model.directory",
        )),
        # A word of the random streams.
        ("seed", lambda seed: 0 <= seed < 2**32, "0 or more and below 2**32"),
        *((key, _above(0), "more than 0") for key in (
            "pool.step_limit_s", "pool.reset_limit_s", "pool.worker_memory_mb", "lora.alpha",
            "memory_limit_gb",
        )),
        ("rollout.temperature", _at_least(turns.COLDEST), f"{turns.COLDEST} or more"),
        ("sft.target_loss", _above(0), "above 0 (imitation ends at that loss), or None"),
        ("prompt.style", styles.__contains__, f"one of {', '.join(styles)}"),
        ("tokenizer.names", tokenizer.NAMES.__contains__, f"one of {', '.join(tokenizer.NAMES)}"),
        ("learner.remat", decoder.REMAT.__contains__, f"one of {', '.join(decoder.REMAT)}"),
        ("learner.compute_dtype", ("float32", "bfloat16").__contains__, "float32 or bfloat16"),
        ("export_dtype", ("float32", "bfloat16", "float16").__contains__, "float32, bfloat16 or float16"),
        ("lora.export", ("merged", "separate").__contains__, "merged or separate"),
    ):
        value = values.get(path)
        if value is not None and not is_right(value):
            raise ValueError(f"{path} must be {expected}, got {value!r}.")
    temperatures = (config["eval"]["temperature"], *config["eval"]["other_temperatures"])
    is_possible = all(value == 0 or value >= turns.COLDEST for value in temperatures)
    if not is_possible or len(set(temperatures)) != len(temperatures):
        raise ValueError(
            f"eval.temperature and eval.other_temperatures are {temperatures}, expected different numbers, each 0 "
            f"(greedy) or {turns.COLDEST} and more: drop the double, negative or tiny one."
        )


def _at_least(bound: float) -> Callable[[Any], bool]:
    return lambda value: value >= bound


def _above(bound: float) -> Callable[[Any], bool]:
    return lambda value: value > bound


def _check_games(config: Config) -> None:
    for name, split in config["splits"].items():
        is_right = isinstance(split, tuple | list) and len(split) in (2, 3)
        is_right = is_right and all(_is(seed, "an integer") for seed in split[:2])
        if not is_right or not isinstance(split[2] if len(split) > 2 else {}, Mapping):
            raise ValueError(
                f"splits.{name} must be (first seed, number of seeds), and perhaps a dict of parameters that these "
                f"games have otherwise, got {split!r}."
            )
    ranges = prepare.seed_ranges(config["splits"])
    needed = {"train", "test"} | ({"demo"} if prepare.needs_demonstrations(config) else set())
    if {prepare.kind(name) for name in ranges} - {"demo", "train", "test"} or needed - set(ranges):
        raise ValueError(
            "splits must be demo, train and test, and further ones of their kinds as train_<name> (demo may be missing "
            f"where sft.num_steps is 0 and tokenizer.directory is given), got {sorted(ranges)}."
        )
    params, namings = prepare.split_params(config["env"], config["splits"]), config["namings"]
    for games in params.values():
        environment = collect.environment(games)
        if environment not in (None, config["env"]["name"]):
            raise ValueError(
                f"env.name is {config['env']['name']!r}, but games of the family "
                f"{games['family']!r} are played by {environment!r}."
            )
    envs_host.check_options(config["env"]["name"], config["env"]["options"])
    asked = {
        "intermediate_reward": ("reward.kind is 'intermediate'", config["reward"]["kind"] == "intermediate"),
        "admissible_commands": ("prompt.show_admissible is True", config["prompt"]["show_admissible"]),
    }
    for option, (said, is_asked) in asked.items():
        if is_asked and not envs_host.takes(config["env"]["name"], option):
            raise ValueError(f"{said}, but environment {config['env']['name']!r} has no option {option} to ask it by.")
    _check_limits(config)
    _check_windows(config, params)
    is_right = set(namings) == {"demo", "train"} and all(_is(count, "an integer") for count in namings.values())
    if not is_right or min(namings.values()) < 1:
        raise ValueError(
            "namings must give demo and train a number of at least 1 each (held-out games are played "
            f"as they are), got {dict(namings)}."
        )
    for split, games in params.items():
        count = namings.get(prepare.kind(split), 1)
        if count > 1 and games.get("theme") != naming.THEME:
            raise ValueError(
                f"namings.{prepare.kind(split)} is {count}, but only TextWorld games of the theme {naming.THEME!r} "
                f"have names that mean nothing, which splits.{split} is not of: set it to 1."
            )


def _check_limits(config: Config) -> None:
    """A run of tests that does not end is the agent's failure, unless the pool gives up on it first."""
    if config["env"]["name"] == "swe":
        needed = config["env"]["options"].get("test_limit_s", swe_tests.Limits().seconds)
        if config["pool"]["step_limit_s"] <= needed:
            raise ValueError(
                f"pool.step_limit_s is {config['pool']['step_limit_s']}, but a step may run tests for "
                f"env.options.test_limit_s = {needed} seconds: make the first longer by what else a step takes, 10 "
                "seconds say."
            )


def _check_windows(config: Config, params: Mapping[str, Mapping[str, Any]]) -> None:
    """A walkthrough that goes down until it sees the mistake would otherwise edit what was not shown."""
    shown = config["env"]["options"].get("window_lines", swe_text.WINDOW_LINES)
    for split, games in params.items():
        taken = games.get("window_lines") or swe_text.WINDOW_LINES
        if games.get("expert") == "looker" and taken != shown:
            raise ValueError(
                f"the expert 'looker' of {split} takes windows to have {taken} lines (env.params.window_lines), but "
                f"they have {shown} (env.options.window_lines): make them equal."
            )


def _check_lengths(config: Config) -> None:
    sampling, rollout = config["sampling"], config["rollout"]
    buckets = config["learner"]["length_buckets"]
    if not buckets or min(buckets) < 1:
        raise ValueError(f"learner.length_buckets must be positive lengths, got {tuple(buckets)}.")
    if max(buckets) < sampling["max_length"]:
        raise ValueError(
            f"learner.length_buckets ends at {max(buckets)}, but an episode may have "
            f"sampling.max_length = {sampling['max_length']} tokens: add a bucket that holds it."
        )
    # Episodes of several contexts lie in one row of the batch. A window keeps a part of what it slides
    # over; every turn of the others may fill a slot.
    needed = rollout["max_turns"] * sampling["max_length"]
    if rollout["context"] != "end" and max(buckets) < needed:
        raise ValueError(
            f"learner.length_buckets ends at {max(buckets)}, but with rollout.context "
            f"{rollout['context']!r} an episode may have rollout.max_turns x sampling.max_length = "
            f"{needed} tokens: add a bucket that holds it."
        )


def _check_trees(config: Config) -> None:
    length, longest = reinforce.tree_length(config), config["sampling"]["max_length"]
    if 0 < length < longest:
        raise ValueError(
            f"learner.tree_length is {length}, but an episode may have sampling.max_length = {longest} "
            "tokens: set it to as many or more, or to 0, which is no trees."
        )


def _check_imitation(config: Config) -> None:
    sft = config["sft"]
    ranges = prepare.seed_ranges(config["splits"])
    num_demos = sum(len(seeds) for name, seeds in ranges.items() if prepare.kind(name) == "demo")
    if sft["num_steps"] and sft["batch_size"] > num_demos:
        raise ValueError(
            f"sft.batch_size is {sft['batch_size']} but splits.demo, with any demo_<name>, has {num_demos} "
            "seeds: lower the first or raise the second."
        )
    if sft["save_every"] % sft["log_every"]:
        raise ValueError(
            f"sft.save_every is {sft['save_every']}, which is no multiple of sft.log_every = "
            f"{sft['log_every']}: a line of the log is a mean over the steps since the line before, and "
            "a run that continues from a checkpoint must begin at one."
        )


def _check_model(config: Config) -> None:
    if config["model"]["directory"] is not None and config["tokenizer"]["directory"] is None:
        raise ValueError(
            f"model.directory is {config['model']['directory']!r} but tokenizer.directory is None, "
            "which trains a new tokenizer whose ids mean nothing to that model: set "
            "tokenizer.directory, usually to the same folder."
        )
    if config["lora"]["rank"]:
        lora.targeted(config["lora"]["targets"])
        if config["rl"]["critic"] == "separate":
            raise ValueError(
                "rl.critic 'separate' is a second whole model, which lora.rank > 0 is there to "
                "avoid: use 'head'."
            )


def unused(config: Config) -> list[str]:
    """Paths of the keys that this run does not read because of what others say, in the config's order;
    "sft.*" where that is all of a section but the key that says so."""
    rl, rollout = config["rl"], config["rollout"]
    name, surrogate = rl["advantage"]["name"], rl["loss"]["surrogate"]
    has_critic = rl["critic"] != "none"
    # With one update per batch the ratio to the old policy is 1 and values are the old ones: nothing is clipped.
    clips = rl["num_epochs"] * rl["num_minibatches"] > 1  # never of "policy_gradient", which refuses this
    trains = config["sft"]["num_steps"] > 0 or rl["num_iterations"] > 0
    at_training = set(config["learner"]) - {"compute_dtype"}  # which sampling shares
    readers = {  # key: whether something reads it
        "tokenizer": config["tokenizer"]["directory"] is None,
        "model": config["model"]["directory"] is None,
        "rollout.context_keep": rollout["context"] == "window",
        "rollout.history_turns": rollout["context"] == "last_turns",
        # Several texts are always packed, and trees never.
        "learner.packing": rollout["context"] == "end"
        and (config["sft"]["num_steps"] > 0 or not reinforce.tree_length(config)),
        "learner.tree_length": reinforce.tree_length(config) == config["learner"]["tree_length"],
        "lora": config["lora"]["rank"] > 0,
        # Adapters that are written alone have the dtype that they were trained in.
        "export_dtype": not (config["lora"]["rank"] > 0 and config["lora"]["export"] == "separate")
        or config["model"]["directory"] is None,
        "sft": config["sft"]["num_steps"] > 0,
        **dict.fromkeys(
            (f"reward.{key}" for key in config["reward"] if key != "kind"), rl["num_iterations"] > 0
        ),
        "rollout.temperature": rl["num_iterations"] > 0,
        "rl": rl["num_iterations"] > 0,
        "sft.optimizer.final_fraction": config["sft"]["optimizer"]["decay_steps"] is not None,
        "rl.optimizer.final_fraction": rl["optimizer"]["decay_steps"] is not None,
        "rl.critic_learning_rate": has_critic or rl["critic_learning_rate"] is None,
        "rl.advantage.gae_lambda": has_critic,
        "rl.advantage.group_scale": name in ("group_normalized", "rewards_to_go_group", "gigpo"),
        "rl.advantage.turn_horizon": name == "rewards_to_go_group",
        "rl.advantage.turn_discount": name in ("gigpo", "bilevel_gae"),
        "rl.advantage.step_weight": name in ("gigpo", "mt_grpo"),
        "rl.advantage.first_visit": name == "gigpo",
        "rl.filter.fraction": rl["filter"]["name"] == "uncertainty",
        "rl.filter.max_rounds": rl["filter"]["name"] == "dynamic_sampling",
        "eval.attempts": config["eval"]["attempts"] == 1
        or max(config["eval"]["temperature"], *config["eval"]["other_temperatures"], 0) > 0,
        "rl.curriculum.share": rl["curriculum"]["order"] != "uniform",
        "rl.curriculum.threshold": rl["curriculum"]["order"] in ("levels", "reverse"),
        "rl.curriculum.window": rl["curriculum"]["order"] in ("levels", "reverse"),
        "rl.curriculum.horizon_iterations": len(rl["curriculum"]["horizons"]) > 0,
        **dict.fromkeys(
            (f"rl.branching.{key}" for key in rl["branching"] if key != "members"), rl["branching"]["members"] > 0
        ),
        # Estimators that take an episode's summed reward, or discount by turns.
        "rl.discount": name in ("gae", "turn_gae", "bilevel_gae", "reinforce_plus_plus")
        or (name == "rewards_to_go_group" and rl["advantage"]["turn_horizon"] == "episode"),
        "rl.skip_zero_signal": reinforce.skips_rows(rl) or not rl["skip_zero_signal"],
        "reward.no_end_of_turn_penalty": rollout["cut_turns"] == "end" and rl["num_iterations"] > 0,
        "rl.loss.clip_low": clips,
        "rl.loss.clip_high": clips,
        "rl.loss.dual_clip": clips and surrogate != "cispo",
        "rl.loss.value_coefficient": has_critic,
        "rl.loss.value_clip": has_critic and clips,
        "rl.kl.estimator": rl["kl"]["placement"] != "none",
    }
    readers |= {} if trains else dict.fromkeys((f"learner.{name}" for name in at_training), False)
    deciding = (
        "tokenizer.directory", "model.directory", "lora.rank", "sft.num_steps", "rl.num_iterations"
    )
    found: dict[str, None] = {}  # in order, each once
    for path, _ in flat(config):
        section = path.partition(".")[0]
        if section != path and not readers.get(section, True):
            if path not in deciding:
                found[f"{section}.*"] = None
        elif not readers.get(path, True):
            found[path] = None
    return list(found)
