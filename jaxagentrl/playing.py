"""Playing with the policy that is trained: the episodes of a stage, held-out tasks, and the agents that bound it."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax

import envs_host
from envs_host.types import Task
from jaxagentrl import (
    branching,
    curriculum,
    evaluate,
    filters,
    hosts,
    learner,
    metrics,
    prepare,
    progress,
    rollout,
    rules,
    workdir,
)
from jaxagentrl.models import decoding_layout, sharding
from jaxagentrl.trajectory import Trajectory

# Words of the random streams, so that no two uses of one seed coincide.
STREAM_EVALUATE, STREAM_RL = 1, 2


@dataclasses.dataclass
class Session:
    """What the stages of one run share."""

    config: Mapping[str, Any]
    folder: workdir.Workdir
    setup: prepare.Setup
    writer: metrics.Writer


def play(
    session: Session,
    params: learner.Params,
    episodes: list[rollout.Episode],
    *,
    changes: Mapping[str, Any],
    **options: Any,
) -> rollout.Rollout:
    """Plays episodes with the policy, by the config's rules with `changes`; each process its share."""
    config, setup = session.config, session.setup
    before = setup.pool.counters
    with decoding(config, setup, params) as policy:
        played = rollout.collect(
            hosts.share(episodes),
            rules=rules.of_config(config, **changes),
            pool=setup.pool,
            engine=setup.engine,
            params=policy,
            chat_format=setup.chat_format,
            **options,
        )
    happened = {f"env_{key}": count - before[key] for key, count in setup.pool.counters.items()}
    parts = hosts.gather((played.trajectories, played.failures, played.ledger | happened))
    return rollout.Rollout(
        trajectories=[trajectory for part, _, _ in parts for trajectory in part],
        failures=[failure for _, part, _ in parts for failure in part],
        ledger=metrics.of_processes([ledger for _, _, ledger in parts]),
    )


def iteration(
    session: Session, params: learner.Params, sampler: curriculum.Sampler, *, number: int
) -> tuple[rollout.Rollout, list[Trajectory], dict[str, float]]:
    """Plays an iteration's games. With dynamic sampling further ones, in rounds, until as many groups are kept as an
    iteration has games; then a round has as many as have the missing groups among them, if it goes on like this.

    Returns:
        All that was played; the trajectories to learn from, which are among them; and the counts of a filter and of
        branches, and how far a curriculum has come.
    """
    rl = session.config["rl"]
    wanted, options = rl["tasks_per_iteration"], rl["filter"]
    num_rounds = options["max_rounds"] if options["name"] == "dynamic_sampling" else 1
    plan = rl["curriculum"]
    max_turns = curriculum.max_turns(
        number,
        horizons=plan["horizons"],
        horizon_iterations=plan["horizon_iterations"],
        longest=session.config["rollout"]["max_turns"],
    )
    parts: list[rollout.Rollout] = []
    kept: list[Trajectory] = []
    rounds = num_games = num_kept = num_branched = 0
    while rounds < num_rounds and num_kept < wanted:
        num_missing = wanted - num_kept
        count = filters.games_to_play(
            num_missing, kept=num_kept, played=num_games, most=wanted, multiple=jax.process_count()
        )
        # The sampler may come to a task again within an iteration, which is not to be played alike.
        again = (rounds,) if rounds else ()
        stream = (session.config["seed"], STREAM_RL, number, *again)
        drawn = sampler.take(count)
        played, branched = _groups(
            session,
            params,
            drawn,
            stream=stream,
            first_group=num_games,
            head_starts=sampler.head_starts(drawn),
            changes={"max_turns": max_turns},
        )
        found = filters.kept(
            [trajectory for part in played for trajectory in part.trajectories],
            name=options["name"],
            fraction=options["fraction"],
            num_groups=wanted,
            group_size=rl["group_size"],
            reward=session.config["reward"],
        )
        parts += played
        kept += filters.of_groups(found, num_missing)
        rounds, num_branched = rounds + 1, num_branched + branched
        num_games, num_kept = num_games + count, filters.num_groups(kept)
    everything = joined(parts)
    told = sampler.tell(everything.trajectories)
    if plan["horizons"]:
        told["curriculum/max_turns"] = float(max_turns)
    if options["name"] != "none":
        counts = {"rounds": rounds, "groups_played": num_games, "groups_kept": num_kept}
        told |= {f"filter/{key}": float(count) for key, count in counts.items()}
    if rl["branching"]["members"]:
        told["rollout/branched"] = float(num_branched)
    return everything, kept, told


def _groups(
    session: Session,
    params: learner.Params,
    drawn: list[Task],
    *,
    stream: tuple[int, ...],
    first_group: int,
    head_starts: list[int],
    changes: Mapping[str, Any],
) -> tuple[list[rollout.Rollout], int]:
    """Plays a group of each task: from the start and, with `rl.branching`, those after it that branch off.

    Returns:
        What was played first and then, and how many episodes branched.
    """
    rl = session.config["rl"]
    sizes = dict(group_size=rl["group_size"], stream=stream, first_group=first_group, head_starts=head_starts)
    num_first = rl["group_size"] - rl["branching"]["members"]
    begun = [episode for episode in rollout.episodes(drawn, **sizes) if episode.member < num_first]
    first = play(session, params, begun, changes=changes)
    if num_first == rl["group_size"]:
        return [first], 0
    options = dict(rl["branching"], vocab_size=session.setup.model.vocab_size)
    rest = branching.second(drawn, first.trajectories, **sizes, **options)
    then = play(session, params, rest, changes=changes)
    return [first, then], sum(bool(episode.prefix) for episode in rest)


def joined(parts: list[rollout.Rollout]) -> rollout.Rollout:
    """What was played one after the other, as one."""
    return rollout.Rollout(
        trajectories=[trajectory for played in parts for trajectory in played.trajectories],
        failures=[failure for played in parts for failure in played.failures],
        ledger=metrics.of_rounds([played.ledger for played in parts]),
    )


@contextlib.contextmanager
def decoding(
    config: Mapping[str, Any], setup: prepare.Setup, params: learner.Params
) -> Iterator[learner.Params]:
    """The decoder's parameters, adapters included, where and as the engine takes them.

    In the dtype that the learner computes in: sampler and learner are to be one policy.
    """
    policy = learner.policy_of((setup.frozen or {}) | params)
    policy = decoding_layout.for_decoding(policy, config["learner"]["compute_dtype"])
    policy = sharding.for_decoding(policy, setup.mesh)
    with sharding.use(setup.decoding_mesh):
        yield policy


def warm_up(config: Mapping[str, Any], setup: prepare.Setup, params: learner.Params) -> None:
    """Compiles the programs of sampling. The decoder's copy of the parameters ends with the call."""
    with decoding(config, setup, params) as policy:
        setup.engine.warm_up(policy, restricted=rules.is_restricted(config["rollout"]))


def baselines(session: Session, params: learner.Params) -> dict[str, float]:
    """Floor and ceiling on the held-out tasks: random agent, walkthrough agent (where the environment lists
    commands, and where there are walkthroughs), untrained model."""
    config, test = session.config, session.setup.splits["test"]
    values: dict[str, float] = {}
    agents, options = {}, {}
    if envs_host.takes(config["env"]["name"], "admissible_commands"):  # else there is nothing to draw from
        agents["random"], options = evaluate.random_policy(config["seed"]), {"admissible_commands": True}
    if any(task.walkthrough for task in test):
        agents["walkthrough"] = evaluate.walkthrough_policy
    own = prepare.pool_options(config)
    is_same = own | options == own  # workers take seconds to start
    with contextlib.nullcontext(session.setup.pool) if is_same else prepare.make_pool(config, **options) as pool:
        for name, agent in agents.items():
            with progress.bar(f"{name} agent", len(test)) as advance:
                won, n, failures = evaluate.play(
                    test, pool, agent, max_turns=config["rollout"]["max_turns"], advance=advance
                )
            values |= metrics.success_metrics(name, won, n)
            values[f"{name}/env_failures"] = failures
    return values | held_out(session, params, "untrained")


def held_out(
    session: Session, params: learner.Params, name: str, *, keep: bool = True
) -> dict[str, float]:
    """Success on the held-out tasks, always with the same random streams.

    Where the record is kept, at the stages' ends, further held-out splits ("test_<x>") are played, everything at
    further temperatures, and each game as often as `eval.attempts` says, but for greedy agents.
    """
    options, values = session.config["eval"], {}
    temperatures = {"": options["temperature"]}
    if keep:
        temperatures |= {evaluate.temperature_suffix(t): t for t in options["other_temperatures"]}
    for split, prefix in prepare.held_out(session.config["splits"]).items():
        if split != "test" and not keep:
            continue
        for suffix, temperature in temperatures.items():
            values |= _held_out_at(
                session, params, split, prefix + suffix, temperature, name if keep else None
            )
    return values


def _held_out_at(
    session: Session,
    params: learner.Params,
    split: str,
    prefix: str,
    temperature: float,
    name: str | None,
) -> dict[str, float]:
    """A held-out split at a temperature; its episodes are written down under `name`, if it has one. Then there are
    further attempts at each game; all metrics but pass@k, and what happened to environments, are of the first."""
    test, stream = session.setup.splits[split], (session.config["seed"], STREAM_EVALUATE, 0)
    attempts = session.config["eval"]["attempts"] if name is not None and temperature > 0 else 1
    with progress.bar(f"evaluating ({split}, T {temperature:g})", attempts * len(test)) as advance:
        everything = play(
            session,
            params,
            rollout.episodes(test, group_size=attempts, stream=stream),
            advance=advance,
            changes={"temperature": temperature},
        )
    played = rollout.Rollout(
        trajectories=[t for t in everything.trajectories if t.member == 0],
        failures=[(episode, failure) for episode, failure in everything.failures if episode.member == 0],
        ledger=everything.ledger,
    )
    values = evaluate.summary(prefix, played) | evaluate.breakdown(prefix, played)
    if name is not None:
        write_episodes(session, f"{prefix}_{name}", [t.to_json() for t in played.trajectories])
    if attempts > 1:
        further = [t.to_json() for t in everything.trajectories if t.member > 0]
        write_episodes(session, f"{prefix}_{name}_attempts", further)
        won: dict[str, list[bool]] = {}
        for trajectory in everything.trajectories:
            won.setdefault(trajectory.task.name, []).append(trajectory.won)
        values |= evaluate.pass_at(prefix, won, attempts)
    return values | {
        f"ledger/{prefix}_{key}": count
        for key, count in everything.ledger.items()
        if key == "compiles" or key.startswith("env_")
    }


def write_episodes(session: Session, name: str, records: list[dict[str, Any]]) -> None:
    """Writes trajectories/<name>.jsonl, one episode a line."""
    session.folder.trajectories.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    workdir.write_atomic(session.folder.trajectories / f"{name}.jsonl", lines)
