"""What a run stands on before anything is learned: games, environments, tokenizer, model, engine.

Everything here is a pure function of the config and the game cache, so a restarted run prepares the
same things again.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from envs_host import collect, naming
from envs_host.pool import EnvPool
from envs_host.types import Task
from jaxagentrl import chat, demos, engine, hosts, progress, tasks, tokenizer
from jaxagentrl.models import decoder, lora, pretrained, sharding
from jaxagentrl.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Setup:
    """Made by `everything`; read by the training loops."""

    splits: Mapping[str, Sequence[Task]]  # "demo", "train", "test"
    pool: EnvPool
    replays: Sequence[demos.Replay]  # walkthroughs of "demo"
    chat_format: chat.ChatFormat
    model: decoder.DecoderConfig
    trainable: decoder.Params  # before training, on the mesh: {"policy"} or {"adapters"}
    frozen: decoder.Params | None  # what is not trained: the model under adapters
    engine: engine.Engine
    mesh: jax.sharding.Mesh | None  # None on one device

    @property
    def decoding_mesh(self) -> jax.sharding.Mesh | None:
        return None if self.mesh is None else sharding.decoding_mesh(self.mesh)


def check(config: Mapping[str, Any]) -> None:
    """Refuses settings that cannot work, before anything is made.

    Raises:
        ValueError: with the key, what was got, what was expected.
    """
    ranges = _ranges(config["splits"])
    further = [name for name in ranges if name.startswith("test_")]
    if set(ranges) - set(further) != {"demo", "train", "test"}:
        raise ValueError(
            "splits must be demo, train and test, and further held-out ones as test_<name>, got "
            f"{sorted(ranges)}."
        )
    _check_namings(config)
    for params in split_params(config["env"], config["splits"]).values():
        environment = collect.environment(params)
        if config["env"]["name"] != environment:
            raise ValueError(
                f"env.name is {config['env']['name']!r}, but games of the family "
                f"{params['family']!r} are played by {environment!r}."
            )
    sampling, learner, sft = config["sampling"], config["learner"], config["sft"]
    engine.check(**sampling)
    if max(learner["length_buckets"]) < sampling["max_length"]:
        raise ValueError(
            f"learner.length_buckets ends at {max(learner['length_buckets'])}, but an episode may "
            f"have sampling.max_length = {sampling['max_length']} tokens: add a bucket that holds it."
        )
    if config["rollout"]["context"] != "end":
        _check_contexts(config)
    if sft["num_steps"] and sft["batch_size"] > len(ranges["demo"]):
        raise ValueError(
            f"sft.batch_size is {sft['batch_size']} but splits.demo has {len(ranges['demo'])} "
            "seeds: lower the first or raise the second."
        )
    if sft["save_every"] % sft["log_every"]:
        raise ValueError(
            f"sft.save_every is {sft['save_every']}, which is no multiple of sft.log_every = "
            f"{sft['log_every']}: a line of the log is a mean over the steps since the line before, and "
            "a run that continues from a checkpoint must begin at one."
        )
    target = sft["target_loss"]
    if target is not None and not target > 0.0:
        raise ValueError(
            f"sft.target_loss must be above 0 (imitation ends at that loss), or None, got {target}."
        )
    temperatures = (config["eval"]["temperature"], *config["eval"]["other_temperatures"])
    if min(temperatures) < 0.0 or len(set(temperatures)) != len(temperatures):
        raise ValueError(
            f"eval.temperature and eval.other_temperatures are {temperatures}, expected different "
            "numbers from 0 (greedy) on: drop the double or negative one."
        )
    _check_learner(learner, config)


def _check_namings(config: Mapping[str, Any]) -> None:
    namings, params = config["namings"], split_params(config["env"], config["splits"])
    if set(namings) != {"demo", "train"} or min(namings.values()) < 1:
        raise ValueError(
            "namings must give demo and train a number of at least 1 each (held-out games are played "
            f"as they are), got {dict(namings)}."
        )
    for split, count in namings.items():
        if count > 1 and params[split].get("theme") != naming.THEME:
            raise ValueError(
                f"namings.{split} is {count}, but only TextWorld games of the theme {naming.THEME!r} "
                "have names that mean nothing: set it to 1."
            )


def _check_contexts(config: Mapping[str, Any]) -> None:
    """Episodes of several contexts lie in one row of the batch, and are packed for the learner."""
    rollout, longest = config["rollout"], max(config["learner"]["length_buckets"])
    # A window keeps a part of what it slides over; every turn of the others may fill a slot.
    needed = rollout["max_turns"] * config["sampling"]["max_length"]
    if longest < needed:
        raise ValueError(
            f"learner.length_buckets ends at {longest}, but with rollout.context "
            f"{rollout['context']!r} an episode may have rollout.max_turns x sampling.max_length = "
            f"{needed} tokens: add a bucket that holds it."
        )
    if config["rl"]["loss"]["surrogate"] == "gspo":
        raise ValueError(
            f"rollout.context {rollout['context']!r} puts several texts in a row, but "
            "rl.loss.surrogate 'gspo' takes a row for one episode: set rollout.context to 'end'."
        )


def _check_learner(learner: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    if learner["remat"] not in decoder.REMAT:
        raise ValueError(
            f"learner.remat must be one of {', '.join(decoder.REMAT)}, got {learner['remat']!r}."
        )
    if learner["compute_dtype"] not in ("float32", "bfloat16"):
        raise ValueError(
            "learner.compute_dtype must be 'float32' or 'bfloat16', got "
            f"{learner['compute_dtype']!r}."
        )
    lora_options = config["lora"]
    if lora_options["rank"]:
        lora.targeted(lora_options["targets"])
        if lora_options["export"] not in ("merged", "separate"):
            raise ValueError(
                f"lora.export must be 'merged' or 'separate', got {lora_options['export']!r}."
            )
        if config["rl"]["critic"] == "separate":
            raise ValueError(
                "rl.critic 'separate' is a second whole model, which lora.rank > 0 is there to "
                "avoid: use 'head'."
            )
    if learner["packing"] and config["rl"]["loss"]["surrogate"] == "gspo":
        raise ValueError(
            "learner.packing puts several episodes in a row, but rl.loss.surrogate 'gspo' takes a "
            "row for one episode: set learner.packing to False."
        )
    if config["rl"]["tasks_per_iteration"] % jax.process_count():
        raise ValueError(
            f"rl.tasks_per_iteration is {config['rl']['tasks_per_iteration']}, which "
            f"{jax.process_count()} processes cannot share equally: make it a multiple."
        )
    shards = sharding.num_row_shards(sharding.make_mesh(**config["mesh"]))
    if learner["row_multiple"] % shards:
        raise ValueError(
            f"learner.row_multiple is {learner['row_multiple']}, but mesh.data x mesh.fsdp splits "
            f"the rows of a micro-batch in {shards}: make it a multiple of that."
        )


def games(
    env: Mapping[str, Any], splits: Mapping[str, Any], namings: Mapping[str, int]
) -> dict[str, list[Task]]:
    """Generates (or finds in the cache) the games of every split; no game is in two of them.

    `namings` are under how many names each game of a split is played, see `envs_host.naming`.
    """
    ranges, params = _ranges(splits), split_params(env, splits)
    made = {}
    for name, seeds in ranges.items():
        # Official games are numbered within their own split of the data, from 0.
        same = [ranges[other].start for other in ranges if params[other] == params[name]]
        report = collect.tasks(
            params[name],
            seeds,
            first=min(same),
            cache_dir=env["cache_dir"],
            num_workers=env["num_workers"],
        )
        made[name] = report.tasks
        for told in report.notices:
            progress.notice(f"{name}: {told}")
    # The same small game can come out of two seeds: held-out games stay held out.
    held_out: list[Task] = []
    for name in sorted(made, key=lambda name: (not name.startswith("test"), name)):
        made[name] = tasks.without(made[name], held_out)
        held_out += made[name]
    tasks.check_splits(made)
    return made | {
        name: [naming.renamed(task, number) for number in range(count) for task in made[name]]
        for name, count in namings.items()
    }


def split_params(env: Mapping[str, Any], splits: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Parameters of each split's games: the environment's, changed by the third entry of the split.

    E.g. `test=(1, 100, {"split": "valid_unseen"})`.
    """
    return {
        name: dict(env["params"]) | dict(bounds[2] if len(bounds) > 2 else {})
        for name, bounds in splits.items()
    }


def held_out(splits: Mapping[str, Any]) -> dict[str, str]:
    """The held-out splits -> the prefix of their metrics: "eval" of "test", "eval_x" of "test_x"."""
    return {name: "eval" + name[4:] for name in splits if name.startswith("test")}


def _ranges(splits: Mapping[str, Any]) -> dict[str, range]:
    return tasks.seed_ranges({name: tuple(bounds[:2]) for name, bounds in splits.items()})


@contextlib.contextmanager
def everything(config: Mapping[str, Any], workdir: Workdir) -> Iterator[Setup]:
    """Prepares a run; worker processes live as long as the context."""
    mesh = sharding.make_mesh(**config["mesh"])
    hosts.connect(mesh)
    splits = games(config["env"], config["splits"], config["namings"])
    workdir.record("games", {name: _fingerprint(split) for name, split in splits.items()})
    with make_pool(config) as pool:
        with progress.bar("replaying walkthroughs", len(splits["demo"])) as advance:
            replays = demos.replay(
                splits["demo"], pool, advance=advance
            )
        loaded = _tokenizer(config, replays, workdir)
        chat_format = chat.make(loaded)
        model, policy = _model(config["model"], len(loaded), jax.random.key(config["seed"]), mesh)
        trainable, frozen = _with_lora(policy, config)
        with sharding.use(None if mesh is None else sharding.decoding_mesh(mesh)):
            decoding = engine.Engine(
                model,
                stop_ids=[chat_format.end_of_turn_id],
                notice=progress.notice,
                **config["sampling"],
            )
        yield Setup(
            splits=splits,
            pool=pool,
            replays=replays,
            chat_format=chat_format,
            model=model,
            trainable=sharding.place(trainable, mesh),
            frozen=sharding.place(frozen, mesh),
            engine=decoding,
            mesh=mesh,
        )


def make_pool(config: Mapping[str, Any], **env_options: Any) -> EnvPool:
    """Worker processes for the config's environment; `env_options` override its own."""
    options = {
        "intermediate_reward": config["reward"]["kind"] == "intermediate",
        "admissible_commands": config["prompt"]["show_admissible"],
    }
    options |= config["env"]["options"]
    return EnvPool(config["env"]["name"], options | env_options, **config["pool"])


def _tokenizer(config: Mapping[str, Any], replays: Sequence[demos.Replay], workdir: Workdir):
    """The tokenizer of a pretrained model, or one trained on the demonstrations' text."""
    options, prompt = dict(config["tokenizer"]), config["prompt"]
    directory = options.pop("directory")
    if directory is not None:
        return tokenizer.load(directory)
    if hosts.is_first() and not workdir.tokenizer.exists():
        texts = demos.texts(
            replays,
            prompt_style=prompt["style"],
            show_admissible=prompt["show_admissible"],
            history_turns=config["rollout"]["history_turns"],
        )
        tokenizer.train(texts, directory=workdir.tokenizer, **options)
    hosts.wait("tokenizer")
    return tokenizer.load(workdir.tokenizer)


def _model(
    options: Mapping[str, Any], vocab_size: int, key: jax.Array, mesh: jax.sharding.Mesh | None
) -> tuple[decoder.DecoderConfig, decoder.Params]:
    options = dict(options)
    directory = options.pop("directory")
    if directory is not None:
        return pretrained.load(directory, mesh=mesh)
    config = decoder.DecoderConfig(vocab_size=vocab_size, **options)
    return config, decoder.init(config, key)


def _with_lora(
    policy: decoder.Params, config: Mapping[str, Any]
) -> tuple[decoder.Params, decoder.Params | None]:
    """What is trained and what is frozen: the model, or adapters over it."""
    options = config["lora"]
    if options["rank"] == 0:
        return {"policy": policy}, None
    # Another stream than the model's own draw, which is that of the seed itself.
    key = jax.random.fold_in(jax.random.key(config["seed"]), 1)
    adapters = lora.init(policy, key, rank=options["rank"], targets=options["targets"])
    scale = jnp.float32(options["alpha"] / options["rank"])
    return {"adapters": adapters}, {"policy": policy, "lora_scale": scale}


def _fingerprint(split: Sequence[Task]) -> str:
    digests = (f"{task.digest} {task.params.get('naming', 0)}" for task in split)
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
