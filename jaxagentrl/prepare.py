"""What a run stands on before anything is learned: games, environments, tokenizer, model, engine.

Everything here is a pure function of the config and the game cache, so a restarted run prepares the
same things again.
"""

import contextlib
import dataclasses
import hashlib
import math
import os
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import envs_host
from envs_host import collect, naming
from envs_host.pool import EnvPool
from envs_host.types import Task
from jaxagentrl import (
    chat,
    checkpoints,
    curriculum,
    demos,
    engine,
    hosts,
    plan,
    plan_sampling,
    progress,
    tasks,
    tokenizer,
)
from jaxagentrl.models import decoder, lora, pretrained, pretrained_config, sharding
from jaxagentrl.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Setup:
    """Made by `everything`; read by the training loops."""

    splits: Mapping[str, Sequence[Task]]  # as `together`: "test", every "test_<x>", and for training "demo" and "train"
    levels: Mapping[str, Sequence[Task]]  # of "train" by split, in the order of their names
    pool: EnvPool
    replays: Sequence[demos.Replay]  # walkthroughs of "demo"
    chat_format: chat.ChatFormat
    stop_ids: tuple[int, ...]  # that end a turn: the chat format's, then the others of the model's files
    model: decoder.DecoderConfig
    trainable: decoder.Params  # before training, on the mesh: {"policy"} or {"adapters"}
    frozen: decoder.Params | None  # what is not trained: the model under adapters
    engine: engine.Engine
    mesh: jax.sharding.Mesh | None  # None on one device

    @property
    def decoding_mesh(self) -> jax.sharding.Mesh | None:
        return None if self.mesh is None else sharding.decoding_mesh(self.mesh)


def games(
    env: Mapping[str, Any],
    splits: Mapping[str, Any],
    namings: Mapping[str, int],
    *,
    only: Container[str] | None = None,
) -> dict[str, list[Task]]:
    """Generates (or finds in the cache) the games of every split; no game is in two of them.

    Args:
        namings: under how many names each game of a split is played, see `envs_host.naming`.
        only: the splits to make, by default all. Held-out games do not depend on the other splits'.
    """
    ranges, params = seed_ranges(splits), split_params(env, splits)
    _make_folder("env.cache_dir", env["cache_dir"])
    made = {}
    for name, seeds in ranges.items():
        if only is not None and name not in only:
            continue
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
    seen: list[Task] = []
    before: list[str] = []
    for name in sorted(made, key=lambda name: (not name.startswith("test"), name)):
        kept = tasks.without(made[name], seen)
        if left_out := len(made[name]) - len(kept):
            others = f" or of {', '.join(before)}" if before else ""
            told = f"{left_out} of {len(made[name])} games left out: other seeds of it{others} gave the same"
            progress.notice(f"{name}: {told}")
        made[name] = kept
        seen += kept
        before.append(name)
    tasks.check_splits(made)
    return {
        name: [naming.renamed(task, number) for number in range(namings.get(kind(name), 1)) for task in split]
        for name, split in made.items()
    }


def kind(split: str) -> str:
    """What a split is for: "train_rooms" is a further one of the kind "train"."""
    return split.partition("_")[0]


def together(splits: Mapping[str, Sequence[Task]]) -> dict[str, Sequence[Task]]:
    """Splits of one kind as one: all demonstrations, all games of RL. Held-out splits stay apart."""
    united: dict[str, Sequence[Task]] = {}
    for name, split in splits.items():
        united_name = name if kind(name) == "test" else kind(name)
        united[united_name] = [*united.get(united_name, ()), *split]
    return united


def needs_demonstrations(config: Mapping[str, Any]) -> bool:
    """For imitation, and a tokenizer is trained on them, too."""
    return config["sft"]["num_steps"] > 0 or config["tokenizer"]["directory"] is None


def _needed_splits(config: Mapping[str, Any], stages: tuple[plan.Stage, ...]) -> set[str]:
    needed = {*config["splits"]}
    if not needs_demonstrations(config):
        needed = {name for name in needed if kind(name) != "demo"}
    if stages == ("evaluation",):
        needed = {name for name in needed if kind(name) != "train"}
    return needed


def _make_folder(key: str, folder: str) -> None:
    try:
        os.makedirs(os.path.expanduser(folder), exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{key} is {folder!r}, which cannot be made ({error.strerror}): give a folder that may be written to."
        ) from error


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
    return {name: "eval" + name[4:] for name in splits if kind(name) == "test"}


def seed_ranges(splits: Mapping[str, Any]) -> dict[str, range]:
    """The seeds of every split; raises where two of them share some."""
    return tasks.seed_ranges({name: tuple(bounds[:2]) for name, bounds in splits.items()})


@contextlib.contextmanager
def everything(config: Mapping[str, Any], workdir: Workdir) -> Iterator[Setup]:
    """Prepares a run; worker processes live as long as the context."""
    mesh = sharding.make_mesh(**config["mesh"])
    hosts.connect(mesh)
    _check_model(config)
    envs_host.check_here(config["env"]["name"], config["env"]["options"])
    stages = stages_ahead(config, workdir)
    splits = games(
        config["env"],
        config["splits"],
        config["namings"],
        only=_needed_splits(config, stages),
    )
    _check_games(config["sft"], splits)
    _check_tasks(config["env"]["name"], splits)
    workdir.record("games", {name: _fingerprint(split) for name, split in splits.items()})
    levels = {name: splits[name] for name in sorted(splits) if kind(name) == "train"}
    splits = together(splits)
    curriculum.check_games(splits.get("train", []), config["rl"]["curriculum"]["order"])
    with make_pool(config) as pool:
        replays = _replays(splits.get("demo", []), pool)
        loaded = _tokenizer(config, replays, workdir)
        chat_format = make_chat(loaded, config["prompt"])
        model = _model(config["model"], chat_format)
        _check_memory(config, model, mesh, stages)
        policy = _policy(config, model, jax.random.key(config["seed"]), mesh)
        ends = stop_ids(config["model"]["directory"], chat_format)
        _note_long_texts(config["sampling"]["max_length"], model)
        trainable, frozen = sharding.place(_with_lora(policy, config), mesh)
        del policy  # drawn, it lay whole on the first device
        with sharding.use(None if mesh is None else sharding.decoding_mesh(mesh)):
            decoding = engine.Engine(
                model,
                stop_ids=ends,
                notice=progress.notice,
                **config["sampling"],
            )
        yield Setup(
            splits=splits,
            levels=levels,
            pool=pool,
            replays=replays,
            chat_format=chat_format,
            stop_ids=ends,
            model=model,
            trainable=trainable,
            frozen=frozen,
            engine=decoding,
            mesh=mesh,
        )


def _check_games(sft: Mapping[str, Any], splits: Mapping[str, Sequence[Task]]) -> None:
    """Seeds may give fewer games than there are of them: some are set aside, some are in another split."""
    if empty := [name for name, split in splits.items() if not split and name != "demo"]:
        raise ValueError(
            f"there is no game in {', '.join(f'splits.{name}' for name in empty)}: of all of its seeds the game was set "
            "aside, or is in a split before it; change the seeds or env.params."
        )
    there = len(together(splits).get("demo", ()))
    if sft["num_steps"] and sft["batch_size"] > there:
        raise ValueError(
            f"sft.batch_size is {sft['batch_size']}, but of the games of splits.demo, with any demo_<name>, there are only {there}: "
            "give them more seeds, or lower the batch size."
        )


def _check_tasks(env: str, splits: Mapping[str, Sequence[Task]]) -> None:
    for name, split in splits.items():
        if bad := [task.name for task in split if not 0 < task.max_score < math.inf]:
            raise ValueError(f"the task {bad[0]} of splits.{name} has no max_score above 0, by which scores are divided.")
        if others := sorted({task.env for task in split} - {"", env}):  # a file of tasks need not name it
            raise ValueError(f"env.name is {env!r}, but splits.{name} has tasks of {', '.join(others)}.")


def _check_model(config: Mapping[str, Any]) -> None:
    """Reads of the model's and the tokenizer's folder what is small, and looks whether a model of the config's
    shape can be written as the run ends: games take minutes to make.

    Raises:
        ValueError: with what is missing or wrong in a folder, or of which settings there is no published model.
    """
    if config["tokenizer"]["directory"] is not None:
        tokenizer.load(config["tokenizer"]["directory"])
    directory = config["model"]["directory"]
    if directory is not None:
        pretrained_config.read_config(directory)
    else:  # the vocabulary is not there yet, and makes no difference
        model = drawn(config["model"], config["tokenizer"]["vocab_size"])
        pretrained_config.to_json(model, config["export_dtype"])


def drawn(options: Mapping[str, Any], vocab_size: int) -> decoder.DecoderConfig:
    """The shape of a model that is made here, of the config's `model`."""
    shape = {key: value for key, value in options.items() if key != "directory"}
    if shape.get("rope_scaling") is not None:
        shape["rope_scaling"] = pretrained_config.scaling(
            "model.rope_scaling", shape["rope_scaling"], shape.get("max_position_embeddings")
        )
    return decoder.DecoderConfig(vocab_size=vocab_size, **shape)


def stages_ahead(config: Mapping[str, Any], workdir: Workdir) -> tuple[plan.Stage, ...]:
    """The stages that a run has still to go through; one that trains nothing evaluates."""
    has_imitated = checkpoints.latest_host(workdir.checkpoints / "sft").get("is_evaluated", False)
    if checkpoints.latest_step(workdir.checkpoints / "rl") is not None or (
        has_imitated and config["rl"]["num_iterations"] > 0
    ):
        return ("RL",)
    steps = {"imitation": config["sft"]["num_steps"], "RL": config["rl"]["num_iterations"]}
    return tuple(stage for stage, count in steps.items() if count) or ("evaluation",)


def make_chat(loaded: Any, prompt: Mapping[str, Any]) -> chat.ChatFormat:
    """The chat format of a tokenizer, with the config's system message and template variables."""
    made = chat.make(loaded, system=prompt["system"], template_options=prompt["template_options"])
    for difference in made.differences:
        progress.notice(f"chat: {difference}")
    return made


def make_pool(config: Mapping[str, Any], **env_options: Any) -> EnvPool:
    """Worker processes for the config's environment; `env_options` override its own."""
    return EnvPool(config["env"]["name"], pool_options(config) | env_options, **config["pool"])


def pool_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What environments of a run's pool are asked for."""
    name = config["env"]["name"]
    options = {
        "intermediate_reward": config["reward"]["kind"] == "intermediate",
        "admissible_commands": config["prompt"]["show_admissible"],
    }
    # A class of the user's own need not have these two; that it has what a config asks for, `settings` sees to.
    options = {option: value for option, value in options.items() if envs_host.takes(name, option)}
    return options | config["env"]["options"]


def _replays(demonstrated: Sequence[Task], pool: EnvPool) -> list[demos.Replay]:
    if not demonstrated:
        return []
    with progress.bar("replaying walkthroughs", len(demonstrated)) as advance:
        return demos.replay(demonstrated, pool, advance=advance)


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


def _model(options: Mapping[str, Any], chat_format: chat.ChatFormat) -> decoder.DecoderConfig:
    """The model's shape, of its folder's config.json or of the config."""
    directory = options["directory"]
    if directory is None:
        return drawn(options, len(chat_format.tokenizer))
    model = pretrained_config.read_config(directory)
    chat.check_vocabulary(chat_format, model.vocab_size)
    return model


def _check_memory(
    config: Mapping[str, Any],
    model: decoder.DecoderConfig,
    mesh: jax.sharding.Mesh | None,
    stages: Sequence[plan.Stage],
) -> None:
    """Refuses, before anything of the model is on a device, what fits none whatever its programs take.

    Raises:
        plan.PlanError: with what it would hold, and advice.
    """

    trainable, frozen = shapes(config, model, mesh)
    at_sampling = plan_sampling.counted(
        model,
        trainable,
        frozen,
        mesh,
        options=config["sampling"],
        compute_dtype=config["learner"]["compute_dtype"],
    )
    for stage in plan.of_shapes(
        config,
        model,
        trainable,
        frozen,
        mesh=mesh,
        stages=stages,
        at_sampling=at_sampling,
        limit=plan.device_limit(config["memory_limit_gb"]),
    ):
        stage.check()


def shapes(
    config: Mapping[str, Any], model: decoder.DecoderConfig, mesh: jax.sharding.Mesh | None
) -> tuple[decoder.Params, decoder.Params | None]:
    """Shapes, types and places of what is trained and of what is frozen; nothing is made."""

    def made() -> tuple[decoder.Params, decoder.Params | None]:
        policy = decoder.init(model, jax.random.key(0))
        return _with_lora(jax.tree.map(lambda x: x.astype(_dtype_in_memory(config)), policy), config)

    return sharding.abstract(jax.eval_shape(made), mesh)


def _policy(
    config: Mapping[str, Any],
    model: decoder.DecoderConfig,
    key: jax.Array,
    mesh: jax.sharding.Mesh | None,
) -> decoder.Params:
    """The model of a folder, or one that is drawn."""
    directory = config["model"]["directory"]
    if directory is None:
        return decoder.init(model, key)
    _, params = pretrained.load(directory, dtype=_dtype_in_memory(config), mesh=mesh)
    return params


def _dtype_in_memory(config: Mapping[str, Any]) -> str:
    """Of the weights: what is trained is float32, and what lies frozen under adapters, if it is a folder's,
    is never read but in the dtype of the computation."""
    is_frozen = config["lora"]["rank"] > 0 and config["model"]["directory"] is not None
    return config["learner"]["compute_dtype"] if is_frozen else "float32"


def stop_ids(directory: str | os.PathLike | None, chat_format: chat.ChatFormat) -> tuple[int, ...]:
    """A model may end its turn with another id than the template's, such as Qwen2.5's
    `<|endoftext|>`: what it would say after that belongs to no answer."""
    published = () if directory is None else pretrained.stop_ids(directory)
    return tuple(dict.fromkeys((chat_format.end_of_turn_id, *published)))


def _note_long_texts(max_length: int, model: decoder.DecoderConfig) -> None:
    made_for = model.max_position_embeddings
    if made_for is not None and max_length > made_for:
        progress.notice(
            f"sampling.max_length is {max_length}, but the model was made for texts of {made_for} tokens "
            "(max_position_embeddings): what it says beyond them may make no sense."
        )


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
