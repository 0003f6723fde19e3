"""Advantage estimators for episodes of many turns.

The token axis is last and any leading axes are batch, except where groups are formed: those
functions take one row per trajectory. Arithmetic is float32, results are exactly 0 off the mask,
and nothing off the mask is ever read. Everything is pure and works eagerly and under `jit`,
`vmap`, `pmap` and `shard_map`; where a statistic spans the global batch, `axis_name` names the
mapped axis. No gradient is stopped here: callers stop it at the values they pass.

Truncated and terminated episodes differ in one number only. `discounts` is 0 on the last action
token of a terminated episode, so nothing is added after it; a truncated episode keeps γ there,
and `bootstrap_values` says what the rest of it is believed to be worth (0 ignores the rest).

This module holds the recursions along one trajectory. The estimators that compare trajectories
of a group live in `group_advantages`, `turn_credit` and `anchors` and are public here.
"""

import jax.numpy as jnp

from jaxagentrl import arguments, masking
from jaxagentrl.anchors import gigpo, gigpo_steps
from jaxagentrl.group_advantages import (
    group_normalized,
    leave_one_out,
    opo,
    reinforce_plus_plus_baseline,
    remax,
    spread,
    whiten,
)
from jaxagentrl.turn_credit import (
    istar,
    mt_grpo,
    returns_to_go,
    rewards_to_go_group,
    turn_returns,
)
from jaxagentrl.types import Array

__all__ = [
    "bilevel_gae",
    "gae",
    "gigpo",
    "gigpo_steps",
    "group_normalized",
    "istar",
    "leave_one_out",
    "mt_grpo",
    "opo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "rewards_to_go",
    "rewards_to_go_group",
    "spread",
    "turn_gae",
    "turn_returns",
    "whiten",
]


def gae(
    rewards: Array,
    values: Array,
    discounts: Array,
    action_mask: Array,
    *,
    gae_lambda: float,
    bootstrap_values: Array | float = 0.0,
) -> Array:
    """Generalized advantage estimation along the action tokens of a trajectory.

        δₜ = rₜ + γₜ V₍ₜ₊₎ − Vₜ          Aₜ = δₜ + γₜ λ A₍ₜ₊₎

    where t₊ is the next *action* token: prompt and observation tokens between two actions are
    skipped, neither discounted nor bootstrapped from. After the last action token V is the
    bootstrap value. λ = 1 gives return − value, λ = 0 the TD error. Eq. 16 of Schulman et al. 2016,
    https://arxiv.org/abs/1506.02438. γ and λ are per token: with hundreds of tokens in a turn, any
    γ < 1 vanishes inside the turn (`bilevel_gae` and `turn_gae` discount per turn instead).

    Rewards on tokens off the mask are ignored: the environment's reward for an action belongs on
    the action's last token, not on the observation that follows.

    Args:
        rewards: [..., L] float, paid on the action token that earned it.
        values: [..., L] float, V read before token t is emitted.
        discounts: [..., L] float, γ, and 0 where the episode terminates.
        action_mask: [..., L] bool, True on tokens the policy sampled.
        gae_lambda: λ in [0, 1].
        bootstrap_values: [...] or scalar float, finite, value after the last action token. It counts
            only where that token's discount is not 0.

    Returns:
        [..., L] float32 advantages A, 0 off the mask. Targets for the value are A + V.

    >>> mask = jnp.array([True, False, True])
    >>> gae(jnp.array([0.0, 9.0, 1.0]), jnp.array([0.5, 9.0, 0.25]), jnp.array([1.0, 1.0, 0.0]),
    ...     mask, gae_lambda=1.0)
    Array([0.5 , 0.  , 0.75], dtype=float32)
    """
    rewards, values, discounts = _clean_rows(action_mask, rewards=rewards, values=values, discounts=discounts)
    zero, bootstrap = _scan_start([rewards, values, discounts], bootstrap_values)

    def step(carry, inputs):
        next_adv, next_value = carry
        r, v, d, is_action = inputs
        adv = r + d * next_value - v + d * gae_lambda * next_adv
        carry = (jnp.where(is_action, adv, next_adv), jnp.where(is_action, v, next_value))
        return carry, jnp.where(is_action, adv, 0.0)

    return masking.scan_back(step, (zero, bootstrap), [rewards, values, discounts, action_mask])


def turn_gae(
    rewards: Array,
    values: Array,
    discounts: Array,
    action_mask: Array,
    turn_ends: Array,
    *,
    gae_lambda: float,
    bootstrap_values: Array | float = 0.0,
) -> Array:
    """GAE in which one whole turn is one step; every token of the turn gets its advantage.

        δₖ = Rₖ + γₖ Vₖ₊₁ − Vₖ          Âₖ = δₖ + γₖ λ Âₖ₊₁          Aₜ = Âₖ for t in turn k

    Rₖ is the plain sum of the rewards on the turn's action tokens (so KL-shaped rewards count),
    Vₖ the value on its *first* action token (the state before the action), γₖ the discount on its
    last action token. Turn-PPO, https://arxiv.org/abs/2512.17008. With one token per turn this is
    `gae`. Train the value on first tokens only, against Âₖ + Vₖ.

    Args:
        rewards: [..., L] float.
        values: [..., L] float.
        discounts: [..., L] float, read at turn ends only: γ per turn, 0 where the episode
            terminates.
        action_mask: [..., L] bool.
        turn_ends: [..., L] bool, True on the last action token of each turn. Given, never guessed
            from the rewards: a turn without reward is a turn. The last action token of a row ends
            its turn whether marked or not.
        gae_lambda: λ in [0, 1], per turn.
        bootstrap_values: [...] or scalar float, value after the last turn.

    Returns:
        [..., L] float32, 0 off the mask.
    """
    rewards, values, discounts = _clean_rows(action_mask, rewards=rewards, values=values, discounts=discounts)
    ends = masking.closed_turn_ends(action_mask, turn_ends)
    turn_ids = masking.count_turns(action_mask, turn_ends)
    num_turns = action_mask.shape[-1]  # as many as there could be
    first = masking.turn_first_position(turn_ids, action_mask, num_turns=num_turns)
    advantages = gae(
        masking.turn_sum(rewards, turn_ids, action_mask, num_turns=num_turns),
        masking.take_positions(values, first),
        masking.turn_sum(discounts, turn_ids, ends, num_turns=num_turns),
        first >= 0,
        gae_lambda=gae_lambda,
        bootstrap_values=bootstrap_values,
    )
    return masking.spread_turns(advantages, turn_ids, action_mask)


def bilevel_gae(
    rewards: Array,
    values: Array,
    action_mask: Array,
    turn_ends: Array,
    *,
    token_discount: float,
    turn_discount: float,
    gae_lambda: float,
    bootstrap_values: Array | float = 0.0,
) -> Array:
    """GAE over turns, then over the tokens inside each turn (turn-aware GAE of VAGEN and RAGEN).

    Over the turn ends e₁ … e_K, then leftwards inside each turn:

        δₖ = r(eₖ) + γ_turn V(eₖ₊₁) − V(eₖ)       A(eₖ) = δₖ + γ_turn λ A(eₖ₊₁)
        δₜ = r(t)  + γ_tok  V(t₊)   − V(t)        A(t)  = δₜ + γ_tok  λ A(t₊)

    RAGEN, https://arxiv.org/abs/2504.20073, appendix on bi-level GAE. The papers have no reward
    inside a turn; here r(t) is counted wherever it stands, so KL-shaped rewards work. Public code
    takes "reward ≠ 0" for turn ends and so loses turns that paid nothing; here they are given.

    Equals `gae` when every turn is one token and γ_turn is the discount, and for turns of any
    length when γ_tok = γ_turn = λ = 1.

    Args:
        rewards: [..., L] float.
        values: [..., L] float.
        action_mask: [..., L] bool.
        turn_ends: [..., L] bool, True on the last action token of each turn. The last action
            token of a row ends its turn whether marked or not.
        token_discount: γ_tok, between tokens of one turn.
        turn_discount: γ_turn, from one turn end to the next.
        gae_lambda: λ in [0, 1], at both levels.
        bootstrap_values: [...] or scalar float, value after the last turn: 0 for a terminated
            episode (there are no `discounts` here to cancel it).

    Returns:
        [..., L] float32, 0 off the mask.
    """
    rewards, values = _clean_rows(action_mask, rewards=rewards, values=values)
    ends = masking.closed_turn_ends(action_mask, turn_ends)
    zero, bootstrap = _scan_start([rewards, values], bootstrap_values)

    def step(carry, inputs):
        (next_adv, next_value), (turn_adv, turn_value) = carry
        r, v, is_action, is_end = inputs
        inside = r + token_discount * next_value - v + token_discount * gae_lambda * next_adv
        at_end = r + turn_discount * turn_value - v + turn_discount * gae_lambda * turn_adv
        adv = jnp.where(is_end, at_end, inside)
        token = (jnp.where(is_action, adv, next_adv), jnp.where(is_action, v, next_value))
        turn = (jnp.where(is_end, adv, turn_adv), jnp.where(is_end, v, turn_value))
        return (token, turn), jnp.where(is_action, adv, 0.0)

    start = ((zero, bootstrap), (zero, bootstrap))
    return masking.scan_back(step, start, [rewards, values, action_mask, ends])


def rewards_to_go(rewards: Array, discounts: Array, action_mask: Array) -> Array:
    """Discounted sum of the rewards from each action token on.

        Gₜ = rₜ + γₜ G₍ₜ₊₎

    over action tokens t₊ only: tokens off the mask are skipped. (Multiplying the running return by
    the mask instead, as public code does, resets it on every observation, so that only the last
    turn ever sees the final reward.)

    Args:
        rewards: [..., L] float.
        discounts: [..., L] float, γ, and 0 where the episode terminates.
        action_mask: [..., L] bool.

    Returns:
        [..., L] float32, 0 off the mask.

    >>> rewards_to_go(jnp.array([0.0, 0.0, 1.0]), jnp.ones(3), jnp.array([True, False, True]))
    Array([1., 0., 1.], dtype=float32)
    """
    rewards, discounts = _clean_rows(action_mask, rewards=rewards, discounts=discounts)
    return returns_to_go(rewards, discounts, action_mask)


def reinforce_plus_plus(
    rewards: Array, discounts: Array, action_mask: Array, *, axis_name: masking.AxisName = None
) -> Array:
    """REINFORCE++: rewards-to-go, whitened over the action tokens of the global batch.

        Aₜ = (Gₜ − mean G) / √(var G + 1e-8)

    https://arxiv.org/abs/2501.03262, in its multi-turn form: the return skips observation tokens.
    The penalty k1 = log π_old − log π_ref belongs in the rewards. No groups, no critic.

    Args:
        rewards: [B, L] float, KL-shaped if so wished.
        discounts: [B, L] float.
        action_mask: [B, L] bool.
        axis_name: mapped axis over which the batch is spread.

    Returns:
        [B, L] float32, 0 off the mask.
    """
    returns = rewards_to_go(rewards, discounts, action_mask)
    return whiten(returns, action_mask, axis_name=axis_name)


def _clean_rows(action_mask: Array, **rows: Array) -> list[Array]:
    """Checks [..., L] arrays against the mask and zeroes them off it."""
    arguments.check(
        **{name: (row, float, "... L") for name, row in rows.items()}, action_mask=(action_mask, bool, "... L")
    )
    return [masking.zero_off(row, action_mask) for row in rows.values()]


def _scan_start(rows: list[Array], bootstrap_values: Array | float) -> tuple[Array, Array]:
    """The carry after the last token: zeros and the bootstrap values, both [...]."""
    zero = masking.zero_carry(rows)
    bootstrap = jnp.asarray(bootstrap_values).astype(jnp.float32)
    if bootstrap.ndim:
        arguments.check(bootstrap_values=(bootstrap, float, " ".join(map(str, zero.shape))))
    return zero, bootstrap + zero
