"""From a scored batch to advantages and value targets: the algorithm, by the config's name.

    gae                   PPO: token GAE across turns, with a critic
    turn_gae              turn-level PPO
    bilevel_gae           RAGEN's: over turns with a discount of their own, then within each turn
    group_normalized      GRPO (scale "std") and Dr. GRPO (scale "none")
    leave_one_out         RLOO
    opo                   OPO: the group's mean weighted by lengths
    reinforce_plus_plus   REINFORCE++
    reinforce_plus_plus_baseline   the same against the group's mean, whitened over the batch
    rewards_to_go_group   dense turn rewards against the group at equal turn, without a critic
    gigpo                 GiGPO: the episode against its group, a turn against its anchor state
    mt_grpo               MT-GRPO: the outcome against the group, a turn's reward against the same turn of the others

KL in the reward is the k1 estimate of the scored policy against the reference, paid on every action
token before anything else sees the rewards (docs/estimators.md).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxagentrl import advantages, losses, masking
from jaxagentrl.learner import Scores
from jaxagentrl.types import Array, TrajectoryBatch

NEEDS_CRITIC = ("gae", "turn_gae", "bilevel_gae")
NEEDS_GROUPS = (
    "group_normalized", "leave_one_out", "opo", "reinforce_plus_plus_baseline", "rewards_to_go_group", "gigpo", "mt_grpo"
)
NAMES = (*NEEDS_CRITIC, *NEEDS_GROUPS, "reinforce_plus_plus")


Credit = Callable[[Array, TrajectoryBatch, Array, Array], Array]


def _make_credit(
    name: str,
    *,
    num_groups: int,
    discount: float,
    gae_lambda: float,
    group_scale: str,
    turn_horizon: str,
    turn_discount: float,
    step_weight: float,
    first_visit: bool,
    max_turns: int,
) -> Credit:
    """Function (rewards, batch, values, anchor_ids) → advantages [B, L]. Arguments as below."""

    def gae(rewards: Array, batch: TrajectoryBatch, values: Array, _: Array) -> Array:
        mask, discounts = batch.action_mask, batch.discounts
        return advantages.gae(rewards, values, discounts, mask, gae_lambda=gae_lambda)

    def turn_gae(rewards: Array, batch: TrajectoryBatch, values: Array, _: Array) -> Array:
        mask, discounts = batch.action_mask, batch.discounts
        return advantages.turn_gae(
            rewards, values, discounts, mask, batch.turn_ends, gae_lambda=gae_lambda
        )

    def bilevel_gae(rewards: Array, batch: TrajectoryBatch, values: Array, _: Array) -> Array:
        options = dict(token_discount=discount, turn_discount=turn_discount, gae_lambda=gae_lambda)
        return advantages.bilevel_gae(rewards, values, batch.action_mask, batch.turn_ends, **options)

    def reinforce_plus_plus(rewards: Array, batch: TrajectoryBatch, *_: Array) -> Array:
        return advantages.reinforce_plus_plus(rewards, batch.discounts, batch.action_mask)

    def rewards_to_go_group(rewards: Array, batch: TrajectoryBatch, *_: Array) -> Array:
        return advantages.rewards_to_go_group(
            rewards,
            batch.discounts,
            batch.action_mask,
            batch.turn_ids,
            batch.group_ids,
            num_groups=num_groups,
            num_turns=max_turns,
            horizon=turn_horizon,
            baseline="leave_one_out" if group_scale == "none" else "mean",
            scale=group_scale,
        )

    def gigpo(rewards: Array, batch: TrajectoryBatch, _: Array, anchor_ids: Array) -> Array:
        rows, turns = anchor_ids.shape
        return advantages.gigpo(
            rewards,
            batch.action_mask,
            batch.turn_ids,
            anchor_ids,
            batch.group_ids,
            num_groups=num_groups,
            num_anchors=-(-rows // num_groups) * turns,  # of a group, see `batching.anchor_ids`
            turn_discount=turn_discount,
            step_weight=step_weight,
            scale=group_scale,
            first_visit=first_visit,
        )

    def mt_grpo(rewards: Array, batch: TrajectoryBatch, *_: Array) -> Array:
        mask, turn_ids = batch.action_mask, batch.turn_ids
        last = jnp.max(jnp.where(mask, turn_ids, -1), axis=-1, keepdims=True)
        is_last = mask & (turn_ids == last)
        return advantages.mt_grpo(
            jnp.where(is_last, 0.0, rewards),
            masking.masked_sum(rewards, is_last, axis=-1),  # the outcome is what the last turn is paid
            mask,
            turn_ids,
            batch.group_ids,
            num_groups=num_groups,
            num_turns=max_turns,
            turn_weight=step_weight,
        )

    def leave_one_out(rewards: Array, batch: TrajectoryBatch, *_: Array) -> Array:
        scores = masking.masked_sum(rewards, batch.action_mask, axis=-1)
        credit = advantages.leave_one_out(scores, batch.group_ids, num_groups=num_groups)
        return advantages.spread(credit, batch.action_mask)

    def group_normalized(rewards: Array, batch: TrajectoryBatch, *_: Array) -> Array:
        scores = masking.masked_sum(rewards, batch.action_mask, axis=-1)
        credit = advantages.group_normalized(
            scores, batch.group_ids, num_groups=num_groups, scale=group_scale
        )
        return advantages.spread(credit, batch.action_mask)

    def opo(rewards: Array, batch: TrajectoryBatch, *_: Array) -> Array:
        scores = masking.masked_sum(rewards, batch.action_mask, axis=-1)
        lengths = jnp.sum(batch.action_mask, axis=-1, dtype=jnp.float32)
        credit = advantages.opo(scores, lengths, batch.group_ids, num_groups=num_groups)
        return advantages.spread(credit, batch.action_mask)

    def reinforce_plus_plus_baseline(rewards: Array, batch: TrajectoryBatch, *_: Array) -> Array:
        scores = masking.masked_sum(rewards, batch.action_mask, axis=-1)
        return advantages.reinforce_plus_plus_baseline(
            scores, batch.group_ids, batch.action_mask, num_groups=num_groups
        )

    makers = (
        gae,
        turn_gae,
        bilevel_gae,
        reinforce_plus_plus,
        reinforce_plus_plus_baseline,
        rewards_to_go_group,
        gigpo,
        mt_grpo,
        leave_one_out,
        opo,
        group_normalized,
    )
    return {maker.__name__: maker for maker in makers}[name]


def make_estimate(
    *,
    name: str,
    num_groups: int,
    whiten: bool,
    negative_weight: float,
    discount: float,
    gae_lambda: float,
    group_scale: str,
    turn_horizon: str,
    turn_discount: float,
    step_weight: float,
    first_visit: bool,
    max_turns: int,
    kl_in_reward: float,
    skip_zero_signal: bool,
) -> Callable[[TrajectoryBatch, Scores, Array, Array], tuple[Array, Array, Array]]:
    """Program (batch, scores, ref_logprobs, anchor_ids [B, max_turns]) → (advantages, returns,
    value_mask).

    All results are [B, L]; `value_mask` is where the critic is trained on the returns: on all action
    tokens, but with turn_gae on the first of each turn, whose value alone is compared with a return.
    `anchor_ids` are those of `batching.anchor_ids`; only gigpo reads them, and takes groups to have at most
    ⌈B / num_groups⌉ rows.

    Nothing is bootstrapped: an episode that was truncated is worth nothing more, as in the seed paper
    (arXiv 2510.01132). Its limits of turns and tokens are part of the task that is learned.

    Args:
        name: see the module's docstring.
        num_groups: static number of groups; padding rows carry this id.
        whiten: standardize advantages over all action tokens of the batch.
        negative_weight: factor on negative advantages, after whitening. 1 is the plain policy
            gradient, 0 learns from better-than-baseline turns only (self-imitation, Oh et al. 2018,
            https://arxiv.org/abs/1806.05635). Below 1 is biased but bounded: pushing a sampled token
            down says nothing about where its probability should go, and a small model trained from
            scratch at a high rate loses its entropy control over it.
        discount: γ from token to token within a turn, of bilevel_gae; the batch brings that of the others.
        gae_lambda: λ of the GAE estimators; the others have none.
        group_scale: "std" or "none", of group_normalized, rewards_to_go_group and gigpo.
        turn_horizon: "episode" or "turn", of rewards_to_go_group.
        turn_discount: γ per turn of gigpo's step returns and of bilevel_gae.
        step_weight: ω of gigpo, w_I of mt_grpo: weight of the turn's credit beside the episode's.
        first_visit: of gigpo: a state's mean is over each trajectory's first visit of it.
        max_turns: static bound on turns, of rewards_to_go_group, gigpo and mt_grpo.
        kl_in_reward: coefficient of −k1 on every action token; 0 for none.
        skip_zero_signal: rows whose credit is 0 throughout, such as those of a group that was won or
            lost by all, are no part of the whitening statistics and keep their 0.
    """
    if name not in NAMES:
        raise ValueError(f"rl.advantage.name must be one of {', '.join(NAMES)}, got {name!r}.")

    to_advantages = _make_credit(
        name,
        num_groups=num_groups,
        discount=discount,
        gae_lambda=gae_lambda,
        group_scale=group_scale,
        turn_horizon=turn_horizon,
        turn_discount=turn_discount,
        step_weight=step_weight,
        first_visit=first_visit,
        max_turns=max_turns,
    )

    @jax.jit
    def estimate(
        batch: TrajectoryBatch, scores: Scores, ref_logprobs: Array, anchor_ids: Array
    ) -> tuple[Array, Array, Array]:
        rewards = batch.rewards
        if kl_in_reward:
            k1 = losses.kl(
                scores.logprobs, ref_logprobs, estimator="k1", action_mask=batch.action_mask
            )
            rewards = rewards - kl_in_reward * k1
        credit = to_advantages(rewards, batch, scores.values, anchor_ids)
        value_mask = batch.action_mask
        if name == "turn_gae":
            value_mask = masking.turn_firsts(batch.action_mask, batch.turn_ends)
        returns = jnp.where(value_mask, credit + scores.values, 0.0)
        if whiten:
            mask = batch.action_mask
            if skip_zero_signal:
                mask = mask & jnp.any(credit != 0, axis=-1, keepdims=True)
            credit = advantages.whiten(credit, mask)
        credit = jnp.where(credit < 0, negative_weight * credit, credit)
        return credit, returns, value_mask

    return estimate
