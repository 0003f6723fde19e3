"""One RL iteration's learning: trajectories → scored batch → advantages → optimizer steps."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxagentrl import (
    batching,
    branching,
    curriculum,
    diagnostics,
    divergences,
    estimate,
    filters,
    group_advantages,
    imitate,
    learner,
    losses,
    masking,
    objectives,
    optimizer,
    rewards,
    trees,
)
from jaxagentrl.models import decoder, sharding
from jaxagentrl.trajectory import Trajectory
from jaxagentrl.types import TrainState, TrajectoryBatch

Params = learner.Params


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled once per run by `make_programs`."""

    score: Callable[..., learner.Scores]
    estimate: Callable[..., Any]
    update: Callable[..., Any]
    needs_reference: bool
    needs_scores: bool
    mesh: jax.sharding.Mesh | None = None


def check(rl: Mapping[str, Any]) -> None:
    """Refuses settings that would silently train something else than they say.

    Raises:
        ValueError: with the key and the way out.
    """
    _check_values(rl)
    filters.check(rl["filter"], group_size=rl["group_size"])
    branching.check(rl["branching"]["members"], group_size=rl["group_size"])
    name, group_size = rl["advantage"]["name"], rl["group_size"]
    if name in estimate.NEEDS_GROUPS and group_size < 2:
        raise ValueError(
            f"rl.advantage.name {name!r} compares the members of a group, but rl.group_size is "
            f"{group_size}: every advantage would be 0. Use a group_size of 2 or more, or 'gae' or "
            "'reinforce_plus_plus'."
        )
    if name in estimate.NEEDS_CRITIC and rl["critic"] == "none":
        raise ValueError(
            f"rl.advantage.name {name!r} needs a critic: set rl.critic to 'head' or 'separate'."
        )
    if name not in estimate.NEEDS_CRITIC and rl["critic"] != "none":
        raise ValueError(
            f"rl.critic is {rl['critic']!r} but rl.advantage.name {name!r} uses no critic: set "
            "rl.critic to 'none'."
        )
    if (rl["kl"]["placement"] == "none") != (rl["kl"]["coefficient"] == 0):
        raise ValueError(
            f"rl.kl.placement is {rl['kl']['placement']!r} with coefficient "
            f"{rl['kl']['coefficient']}: 'none' and 0 go together."
        )
    if rl["kl"]["placement"] == "reward" and rl["kl"]["estimator"] != "k1":
        raise ValueError("rl.kl.estimator must be 'k1' in the reward: the others are biased there.")
    if rl["kl"]["placement"] == "loss" and rl["kl"]["estimator"] == "k1":
        raise ValueError(
            "rl.kl.estimator 'k1' has no gradient as a loss: use 'k2' or 'k3_straight_through'."
        )
    rows = rl["tasks_per_iteration"] * group_size
    if rows % rl["num_minibatches"]:
        raise ValueError(
            f"rl.num_minibatches ({rl['num_minibatches']}) must divide the {rows} episodes of an "
            "iteration (rl.tasks_per_iteration x rl.group_size)."
        )
    if rl["loss"]["surrogate"] == "policy_gradient" and rl["num_epochs"] * rl["num_minibatches"] > 1:
        raise ValueError(
            f"rl.loss.surrogate 'policy_gradient' has no ratio to the policy that acted, but rl.num_epochs "
            f"({rl['num_epochs']}) x rl.num_minibatches ({rl['num_minibatches']}) are several updates per "
            "iteration, of which it is right for the first alone: set both to 1, or use 'clipped'."
        )
    mode, constant = rl["aggregation"], rl["aggregation_constant"]
    if (mode == "constant") != (constant is not None):
        raise ValueError(
            f"rl.aggregation is {mode!r} and rl.aggregation_constant {constant}: 'constant' needs a "
            "number (the longest possible action, for example), the other modes None."
        )


def _check_values(rl: Mapping[str, Any]) -> None:
    """One key at a time."""
    advantage, loss, kl = rl["advantage"], rl["loss"], rl["kl"]
    for key, value, choices in (
        ("advantage.name", advantage["name"], estimate.NAMES),
        ("advantage.group_scale", advantage["group_scale"], ("std", "none")),
        ("advantage.turn_horizon", advantage["turn_horizon"], ("episode", "turn")),
        ("aggregation", rl["aggregation"], losses.AGGREGATION_MODES),
        ("critic", rl["critic"], learner.CRITICS),
        ("filter.name", rl["filter"]["name"], filters.NAMES),
        ("curriculum.order", rl["curriculum"]["order"], curriculum.ORDERS),
        ("loss.surrogate", loss["surrogate"], objectives.SURROGATES),
        ("kl.placement", kl["placement"], ("none", "reward", "loss")),
        ("kl.estimator", kl["estimator"], divergences.ESTIMATORS),
    ):
        if value not in choices:
            raise ValueError(f"rl.{key} must be one of {', '.join(choices)}, got {value!r}.")
    at_least_1 = ("tasks_per_iteration", "group_size", "num_epochs", "num_minibatches", "eval_every",
                  "save_every")
    infinity = float("inf")
    for key, value, low, high in (
        ("num_iterations", rl["num_iterations"], 0, infinity),
        *((key, rl[key], 1, infinity) for key in at_least_1),
        ("discount", rl["discount"], 0, 1),
        ("observation_weight", rl["observation_weight"], 0, infinity),
        ("aggregation_constant", rl["aggregation_constant"], 1e-6, infinity),
        ("critic_learning_rate", rl["critic_learning_rate"], 0, infinity),
        ("advantage.negative_weight", advantage["negative_weight"], 0, infinity),
        ("advantage.gae_lambda", advantage["gae_lambda"], 0, 1),
        ("advantage.turn_discount", advantage["turn_discount"], 0, 1),
        ("advantage.step_weight", advantage["step_weight"], 0, infinity),
        ("filter.max_rounds", rl["filter"]["max_rounds"], 1, infinity),
        ("curriculum.window", rl["curriculum"]["window"], 1, infinity),
        ("curriculum.horizon_iterations", rl["curriculum"]["horizon_iterations"], 1, infinity),
        ("branching.probability", rl["branching"]["probability"], 0, 1),
        ("branching.entropy_weight", rl["branching"]["entropy_weight"], 0, infinity),
        ("branching.entropy_tokens", rl["branching"]["entropy_tokens"], 1, infinity),
        ("loss.clip_low", loss["clip_low"], 0, 1),
        ("loss.clip_high", loss["clip_high"], 0, infinity),
        # Where A < 0 the loss is at most -cA, and at ratio 1 it is -A.
        ("loss.dual_clip", loss["dual_clip"], 1, infinity),
        ("loss.value_coefficient", loss["value_coefficient"], 0, infinity),
        ("loss.value_clip", loss["value_clip"], 1e-6, infinity),
        ("loss.entropy_coefficient", loss["entropy_coefficient"], 0, infinity),
        ("loss.importance_cap", loss["importance_cap"], 1, infinity),
        ("kl.coefficient", kl["coefficient"], 0, infinity),
    ):
        if value is not None and not low <= value <= high:
            expected = f"at least {low}" if high == infinity else f"in [{low}, {high}]"
            raise ValueError(f"rl.{key} must be {expected}, got {value}.")


def skips_rows(rl: Mapping[str, Any]) -> bool:
    """Whether rows without credit stay out of the update.

    `rl.skip_zero_signal` asks for it; it is without effect while something else than the advantages
    trains on every row: KL in the loss, entropy, observations, a critic.
    """
    return (
        rl["skip_zero_signal"]
        and rl["kl"]["placement"] != "loss"
        and rl["loss"]["entropy_coefficient"] == 0
        and rl["observation_weight"] == 0
        and rl["critic"] == "none"
    )


def needs_reference(rl: Mapping[str, Any]) -> bool:
    """Whether a KL term compares with the policy that RL starts from."""
    return rl["kl"]["placement"] != "none"


def make_programs(
    config: Mapping[str, Any],
    model: decoder.DecoderConfig,
    *,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[Programs, Any]:
    """Programs of RL and their optimizer, from the config."""
    rl, temperature = config["rl"], config["rollout"]["temperature"]
    check(rl)
    kl = rl["kl"]
    once = rl["num_epochs"] * rl["num_minibatches"] == 1
    chain = make_optimizer(rl)
    loss = objectives.make_rl_loss(
        model,
        **rl["loss"],
        temperature=temperature,
        kl_coefficient=kl["coefficient"] if kl["placement"] == "loss" else 0.0,
        kl_estimator=kl["estimator"],
        old_is_current=once,
        remat=config["learner"]["remat"],
        compute_dtype=config["learner"]["compute_dtype"],
    )
    in_reward = kl["coefficient"] if kl["placement"] == "reward" else 0.0
    programs = Programs(
        score=learner.make_score(
            model, temperature=temperature, compute_dtype=config["learner"]["compute_dtype"]
        ),
        estimate=estimate.make_estimate(
            **rl["advantage"],
            discount=rl["discount"],
            num_groups=rl["tasks_per_iteration"],
            max_turns=config["rollout"]["max_turns"],
            kl_in_reward=in_reward,
            skip_zero_signal=skips_rows(rl),
        ),
        update=learner.make_step(loss, chain),
        needs_reference=needs_reference(rl),
        needs_scores=rl["critic"] != "none" or bool(in_reward) or not once,
        mesh=mesh,
    )
    return programs, chain


def make_optimizer(rl: Mapping[str, Any]) -> Any:
    """The optimizer of RL; with a `critic_learning_rate` the critic has one of its own."""
    policy, rate = optimizer.make(**rl["optimizer"]), rl["critic_learning_rate"]
    if rate is None:
        return policy
    return optimizer.with_critic(policy, optimizer.make(**rl["optimizer"] | {"learning_rate": rate}))


def learn(
    state: TrainState,
    reference: Params,
    trajectories: Sequence[Trajectory],
    programs: Programs,
    config: Mapping[str, Any],
    *,
    iteration: int,
    frozen: Params | None = None,
) -> tuple[TrainState, dict[str, Any], list[np.ndarray]]:
    """All optimizer steps of one iteration.

    Args:
        state: donated.
        reference: {"policy": ...}, or {"adapters": ...}, of the KL term.
        trajectories: of at most rl.tasks_per_iteration groups; none of them empty.
        frozen: parameters that are not trained, see `learner`.

    Returns:
        The new state; metrics (losses as means over optimizer steps, facts of the batch); and for
        each trajectory its tokens' advantages, for the record.
    """
    rl, mesh = config["rl"], programs.mesh
    turn_rewards = [rewards.turn_rewards(t, **config["reward"]) for t in trajectories]
    host_batch = _to_batch(trajectories, turn_rewards, config, mesh)
    starts = imitate.starts_of(host_batch.tokens.shape, _contexts(trajectories, config))
    batch, starts = sharding.place_rows((host_batch, starts), mesh)
    whole = batch.tokens.shape[0]
    split = _splitter(host_batch.tokens, trajectories, config, mesh)
    used = np.arange(len(trajectories), dtype=np.int32)
    work = split(used)  # of all: groups and states are compared whole
    anchor_ids = batching.anchor_ids(
        trajectories, num_rows=whole, max_turns=config["rollout"]["max_turns"]
    )
    fixed = frozen or {}
    aims = _aim(batch, work, fixed | state.params, fixed | reference, anchor_ids, programs)
    is_used = filters.learned_from(trajectories, rl["filter"]["leave_out"])
    credit = sharding.fetch(aims.credit, mesh)
    if skips_rows(rl):
        is_used &= np.any(credit[: len(used)] != 0, axis=1)
    if not np.all(is_used):
        used = used[is_used]
        work = split(used)

    collected: list[dict[str, Any]] = []
    # Rows that are left out make minibatches smaller, not fewer.
    num_steps = min(rl["num_minibatches"], len(used))
    for epoch in range(rl["num_epochs"]):
        order = np.random.default_rng((config["seed"], iteration, epoch)).permutation(used)
        for rows in np.array_split(order, num_steps) if num_steps else ():
            targets = _targets(
                batch,
                starts,
                np.isin(np.arange(whole), rows),
                aims,
                aggregation=rl["aggregation"],
                constant=rl["aggregation_constant"],
                observation_weight=rl["observation_weight"],
            )
            mine = work if rl["num_minibatches"] == 1 else split(rows)
            state, metrics = programs.update(state, batch, targets, mine, frozen)
            collected.append(metrics)
    collected, diagnosed = jax.device_get((collected, _diagnose(batch, aims)))
    means = {
        key: float((max if key.endswith("_max") else np.mean)([m[key] for m in collected]))
        for key in (collected[0] if collected else {})  # nothing to learn from: no step was taken
    }
    means = imitate.with_observation_mean(means, rl["observation_weight"])
    if programs.needs_reference and programs.needs_scores:
        means["policy/reference_kl"] = float(diagnosed["reference_kl"])
    if rl["critic"] != "none":
        means["value/explained_variance"] = float(diagnosed["explained_variance"])
    facts = _facts(host_batch, credit, turn_rewards, trajectories, work, used)
    return state, means | facts, [row[: t.num_tokens] for row, t in zip(credit, trajectories)]


def _splitter(
    tokens: np.ndarray,
    trajectories: Sequence[Trajectory],
    config: Mapping[str, Any],
    mesh: jax.sharding.Mesh | None,
) -> Callable[[np.ndarray], learner.Work]:
    """How rows of the batch's tokens [B, L] become the work of a step."""
    lengths = np.array([trajectory.num_tokens for trajectory in trajectories])
    parts, most_rows = part_shapes(config["learner"], mesh), tokens.shape[0]
    if length := tree_length(config):
        sizes = {key: parts[key] for key in ("tokens_per_part", "row_multiple")}
        sizes |= {"length": length, "most_rows": most_rows}
        return lambda rows: (trees.grow(rows, tokens, lengths, **sizes),)
    return functools.partial(
        imitate.split,
        lengths=lengths,
        shape=tokens.shape,
        most_rows=most_rows,
        contexts=_contexts(trajectories, config),
        **parts,
    )


def _contexts(trajectories: Sequence[Trajectory], config: Mapping[str, Any]) -> imitate.Contexts:
    """Where episodes may be several texts, all are packed, in an iteration in which none is, too: whole rows as
    long as episodes may become would take a program of their own, and memory that no plan has counted."""
    return None if config["rollout"]["context"] == "end" else [trajectory.contexts for trajectory in trajectories]


def _to_batch(
    trajectories: Sequence[Trajectory],
    turn_rewards: Sequence[np.ndarray],
    config: Mapping[str, Any],
    mesh: jax.sharding.Mesh | None,
) -> TrajectoryBatch:
    """The host's batch, of one shape for all iterations."""
    rl = config["rl"]
    return batching.to_batch(
        trajectories,
        turn_rewards,
        discount=rl["discount"],
        length_buckets=[max(config["learner"]["length_buckets"])],
        row_multiple=sharding.num_row_shards(mesh),
        num_groups=rl["tasks_per_iteration"],
        num_rows=num_rows(rl, mesh),
    )


def num_rows(rl: Mapping[str, Any], mesh: jax.sharding.Mesh | None) -> int:
    """Of an iteration's batch."""
    return sharding.padded_rows(rl["tasks_per_iteration"] * rl["group_size"], mesh)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Aims:
    """What an iteration's updates aim at; all [B, L]."""

    scores: learner.Scores  # by the policy of before the first update
    ref_logprobs: Any
    credit: Any  # advantages
    returns: Any
    value_mask: Any  # where values are trained on the returns


def _aim(
    batch: TrajectoryBatch,
    work: learner.Work,
    params: Params,
    reference: Params,
    anchor_ids: np.ndarray,
    programs: Programs,
) -> _Aims:
    """Scores the batch, as far as the algorithm needs it, and gives credit."""
    scores = learner.empty_scores(batch.tokens.shape)
    ref_logprobs = np.zeros(batch.tokens.shape, np.float32)
    if programs.needs_scores:
        scores = programs.score(params, batch.tokens, batch.action_mask, work)
    if programs.needs_reference:
        ref_logprobs = programs.score(
            reference, batch.tokens, batch.action_mask, work
        ).logprobs
    return _Aims(scores, ref_logprobs, *programs.estimate(batch, scores, ref_logprobs, anchor_ids))


@jax.jit
def _diagnose(batch: TrajectoryBatch, aims: _Aims) -> dict[str, jax.Array]:
    """Before the updates: how far the policy is from the reference (k1), and what the critic explains."""
    k1 = losses.kl(
        aims.scores.logprobs, aims.ref_logprobs, estimator="k1", action_mask=batch.action_mask
    )
    return {
        "reference_kl": masking.masked_mean(k1, batch.action_mask),
        "explained_variance": diagnostics.explained_variance(
            aims.scores.values, aims.returns, aims.value_mask
        ),
    }


def records(
    trajectories: Sequence[Trajectory],
    learned: Sequence[Trajectory],
    credit: Sequence[np.ndarray],
    reward: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """JSON records of the trajectories with what they were rewarded and credited with: those of `learned`, which are
    among them, with `credit`, others (of groups that a filter left out) with none."""
    given = {id(trajectory): advantages for trajectory, advantages in zip(learned, credit, strict=True)}
    return [
        trajectory.to_json()
        | {
            "turn_rewards": rewards.turn_rewards(trajectory, **reward).tolist(),
            "advantages": given.get(id(trajectory), np.zeros(trajectory.num_tokens)).tolist(),
        }
        for trajectory in trajectories
    ]


def _targets(
    batch: TrajectoryBatch,
    starts: jax.Array,
    mine: jax.Array,
    aims: _Aims,
    *,
    aggregation: str,
    constant: float | None,
    observation_weight: float,
) -> learner.Targets:
    """Targets of one minibatch: `mine` [B] bool are its rows; `starts` are of `imitate.starts_of`."""
    action, valued = batch.action_mask & mine[:, None], aims.value_mask & mine[:, None]
    read = batch.valid_mask & ~batch.action_mask & ~starts & mine[:, None]
    weigh = functools.partial(losses.aggregation_weights, mode=aggregation, constant=constant)
    made = learner.Targets(
        advantages=aims.credit,
        returns=aims.returns,
        old_logprobs=aims.scores.logprobs,
        old_values=aims.scores.values,
        ref_logprobs=aims.ref_logprobs,
        weights=weigh(action),
        mean_weights=losses.aggregation_weights(action, mode="token_mean"),
        value_weights=weigh(valued),
        observation_weights=observation_weight
        * losses.aggregation_weights(read, mode="token_mean"),
    )
    return sharding.constrain_rows(made)  # where the plan's were


_targets = jax.jit(_targets, static_argnames=("aggregation", "constant", "observation_weight"))


def part_shapes(shapes: Mapping[str, Any], mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
    """How `imitate.split` cuts a step, from the config's `learner`: every device of the mesh that holds
    rows gets as many."""
    kept = {key: shapes[key] for key in ("length_buckets", "tokens_per_part", "packing")}
    shards = sharding.num_row_shards(mesh)
    return kept | {"row_multiple": math.lcm(shapes["row_multiple"], shards)}


def tree_length(config: Mapping[str, Any]) -> int:
    """`learner.tree_length`, or 0 where an episode may be several texts: those are packed."""
    return config["learner"]["tree_length"] if config["rollout"]["context"] == "end" else 0


def _facts(batch, credit, turn_rewards, trajectories, work, used) -> dict[str, float]:
    """What the batch was like: signal, padding, and what of it was computed once for several."""
    returns = np.array([float(np.sum(r)) for r in turn_rewards])
    places = sum(int(stack.count) * math.prod(stack.shape) for stack in work)
    tokens = computed = sum(trajectories[row].num_tokens for row in used)
    if isinstance(work[0], trees.Trees):
        computed = work[0].num_nodes()
    credit = credit[batch.action_mask]
    return _signal_of_groups(trajectories, returns) | {
        "batch/reward_mean": float(np.mean(returns)),
        "batch/advantage_std": float(np.std(credit)),
        "batch/padding_share": 1.0 - computed / max(1, places),
        "batch/shared_share": (tokens - computed) / max(1, tokens),
        "batch/rows_used_share": len(used) / len(trajectories),
    }


def _signal_of_groups(trajectories: Sequence[Trajectory], returns: Sequence[float]) -> dict[str, float]:
    """How returns differ within groups (sample std); nothing where no group has two members."""
    groups: dict[int, list[float]] = {}
    for trajectory, value in zip(trajectories, returns, strict=True):
        groups.setdefault(trajectory.group, []).append(value)
    if max(map(len, groups.values())) == 1:
        return {}
    deviations = [float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for values in groups.values()]
    # Of sums of the same rewards in another order, see `group_advantages.center`.
    rounding = [group_advantages.ROUNDING * max(map(abs, values)) for values in groups.values()]
    is_flat = [max(v) - min(v) <= least for v, least in zip(groups.values(), rounding, strict=True)]
    return {
        "batch/group_std_mean": float(np.mean(deviations)),
        "batch/groups_without_signal": float(np.mean(is_flat)),
    }
