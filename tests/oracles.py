"""What the papers define, in float64 numpy with plain loops. Imports nothing of ours.

Sums run forward from the definition (all later terms of each position), not by the backward
recursions under test. Groups are lists of row numbers. Slow on purpose: nothing here is clever.
"""

import math

import numpy as np


def action_positions(mask):
    return [t for t in range(len(mask)) if mask[t]]


# --- along one trajectory ----------------------------------------------------------------------


def gae(rewards, values, discounts, mask, *, gae_lambda, bootstrap=0.0):
    """Aⱼ = Σ_{l ≥ j} (Π_{j ≤ i < l} γᵢ λ) δₗ over the action tokens of one row."""
    places = action_positions(mask)
    out = np.zeros(len(mask))
    for j, t in enumerate(places):
        for l in range(j, len(places)):
            weight = 1.0
            for i in range(j, l):
                weight *= discounts[places[i]] * gae_lambda
            here = places[l]
            following = values[places[l + 1]] if l + 1 < len(places) else bootstrap
            # 0 · ∞ is not a term: what comes after a terminal does not exist.
            if weight == 0.0:
                continue
            gain = discounts[here] * following if discounts[here] != 0.0 else 0.0
            out[t] += weight * (float(rewards[here]) + gain - float(values[here]))
    return out


def turns_of(mask, ends):
    """Lists of action positions, one per turn; what follows the last end is a turn as well."""
    turns, current = [], []
    for t in action_positions(mask):
        current.append(t)
        if ends[t]:
            turns.append(current)
            current = []
    return turns + [current] if current else turns


def turn_gae(rewards, values, discounts, mask, ends, *, gae_lambda, bootstrap=0.0):
    turns = turns_of(mask, ends)
    n = len(turns)
    credit = gae(
        [sum(float(rewards[t]) for t in turn) for turn in turns],
        [values[turn[0]] for turn in turns],
        [discounts[turn[-1]] for turn in turns],
        [True] * n,
        gae_lambda=gae_lambda,
        bootstrap=bootstrap,
    )
    out = np.zeros(len(mask))
    for k, turn in enumerate(turns):
        for t in turn:
            out[t] = credit[k]
    return out


def bilevel_gae(
    rewards, values, mask, ends, *, token_discount, turn_discount, gae_lambda, bootstrap=0.0
):
    turns = turns_of(mask, ends)
    last = [turn[-1] for turn in turns]
    out = np.zeros(len(mask))
    for k, end in enumerate(last):
        for l in range(k, len(last)):
            following = values[last[l + 1]] if l + 1 < len(last) else bootstrap
            delta = rewards[last[l]] + turn_discount * following - values[last[l]]
            out[end] += (turn_discount * gae_lambda) ** (l - k) * delta
    for turn in turns:
        for j, t in enumerate(turn[:-1]):
            total = 0.0
            for l in range(j, len(turn) - 1):
                delta = rewards[turn[l]] + token_discount * values[turn[l + 1]] - values[turn[l]]
                total += (token_discount * gae_lambda) ** (l - j) * delta
            remaining = len(turn) - 1 - j
            out[t] = total + (token_discount * gae_lambda) ** remaining * out[turn[-1]]
    return out


def rewards_to_go(rewards, discounts, mask):
    places = action_positions(mask)
    out = np.zeros(len(mask))
    for j, t in enumerate(places):
        for l in range(j, len(places)):
            weight = 1.0
            for i in range(j, l):
                weight *= discounts[places[i]]
            out[t] += weight * rewards[places[l]]
    return out


# --- groups ------------------------------------------------------------------------------------


def members(group_ids, group):
    return [i for i in range(len(group_ids)) if group_ids[i] == group]


def std(xs, ddof):
    if len(xs) <= ddof:
        return 0.0
    mean = sum(xs) / len(xs)
    return math.sqrt(sum((x - mean) ** 2 for x in xs) / (len(xs) - ddof))


def against(x, others, *, scale, ddof, epsilon, spread=None):
    """x less the mean of `others`, over the std of `spread`, by default theirs; 0 with fewer than two."""
    if len(others) < 2:
        return 0.0
    difference = x - sum(others) / len(others)
    divisor = std(others if spread is None else spread, ddof) + epsilon
    return difference / divisor if scale == "std" else difference


def group_normalized(scores, group_ids, *, num_groups, scale="std", ddof=1, epsilon=1e-6):
    out = np.zeros(len(scores))
    for group in range(num_groups):
        rows = members(group_ids, group)
        for i in rows:
            others = [float(scores[j]) for j in rows]
            out[i] = against(float(scores[i]), others, scale=scale, ddof=ddof, epsilon=epsilon)
    return out


def leave_one_out(scores, group_ids, *, num_groups):
    out = np.zeros(len(scores))
    for group in range(num_groups):
        rows = members(group_ids, group)
        for i in rows:
            others = [float(scores[j]) for j in rows if j != i]
            out[i] = float(scores[i]) - sum(others) / len(others) if others else 0.0
    return out


def opo(scores, lengths, group_ids, *, num_groups):
    out = np.zeros(len(scores))
    for group in range(num_groups):
        rows = members(group_ids, group)
        weight = sum(float(lengths[j]) for j in rows)
        for i in rows:
            baseline = sum(float(lengths[j]) * float(scores[j]) for j in rows)
            # Without any length the mean is all there is.
            mean = sum(float(scores[j]) for j in rows) / len(rows)
            out[i] = float(scores[i]) - (baseline / weight if weight else mean)
    return out


def whiten(x, mask, *, shift_mean=True, ddof=1, epsilon=1e-8):
    kept = [float(v) for v, m in zip(x.ravel(), mask.ravel()) if m]
    out = np.zeros(x.size)
    if kept:
        mean = sum(kept) / len(kept)
        root = math.sqrt(std(kept, ddof) ** 2 + epsilon)
        for i, (v, m) in enumerate(zip(x.ravel(), mask.ravel())):
            if m:
                out[i] = (float(v) - (mean if shift_mean else 0.0)) / root
    return out.reshape(x.shape)


def turn_tokens(mask, turn_ids):
    """{turn: its action positions}, for one row."""
    found = {}
    for t in action_positions(mask):
        found.setdefault(int(turn_ids[t]), []).append(t)
    return found


def turn_rewards(rewards, mask, turn_ids):
    """{turn: sum of its rewards}, for one row."""
    turns = turn_tokens(mask, turn_ids)
    return {k: sum(float(rewards[t]) for t in places) for k, places in turns.items()}


def step_returns(rewards, mask, turn_ids, gamma_of):
    """{turn: Σ_{l ≥ k} Π γ · R_l}; gamma_of(positions of a turn) is the turn's discount."""
    turns = turn_tokens(mask, turn_ids)
    order = sorted(turns)
    found = {}
    for a, k in enumerate(order):
        total, weight = 0.0, 1.0
        for l in order[a:]:
            total += weight * sum(float(rewards[t]) for t in turns[l])
            weight *= gamma_of(turns[l])
        found[k] = total
    return found


def spread_turns(per_row, mask, turn_ids):
    """[{turn: number}] → [B, L]."""
    out = np.zeros(np.shape(mask))
    for i, numbers in enumerate(per_row):
        for k, places in turn_tokens(mask[i], turn_ids[i]).items():
            for t in places:
                out[i, t] = numbers.get(k, 0.0)
    return out


def rewards_to_go_group(
    rewards, discounts, mask, turn_ids, group_ids, *, num_groups,
    horizon="episode", baseline="mean", scale="none", ddof=1, epsilon=1e-6,
):  # fmt: skip
    returns = []
    for i in range(len(mask)):
        if horizon == "turn":
            gamma = lambda places: 0.0  # noqa: E731
        else:
            gamma = lambda places, i=i: discounts[i][places[-1]]  # noqa: E731
        returns.append(step_returns(rewards[i], mask[i], turn_ids[i], gamma))
    credit = [{} for _ in returns]
    for group in range(num_groups):
        rows = members(group_ids, group)
        for i in rows:
            for k, x in returns[i].items():
                cell = [returns[j][k] for j in rows if k in returns[j]]
                if len(cell) < 2:
                    credit[i][k] = 0.0
                    continue
                mean = sum(cell) / len(cell)
                if baseline == "leave_one_out":
                    mean = (sum(cell) - x) / (len(cell) - 1)
                credit[i][k] = x - mean
                if scale == "std":
                    credit[i][k] /= std(cell, ddof) + epsilon
    return spread_turns(credit, mask, turn_ids)


def gigpo(
    rewards, mask, turn_ids, anchor_ids, group_ids, *, num_groups, turn_discount=0.95,
    step_weight=1.0, scale="std", episode_mean_over="trajectories", first_visit=False,
    ddof=1, epsilon=1e-6,
):  # fmt: skip
    options = {"scale": scale, "ddof": ddof, "epsilon": epsilon}
    count = len(mask)
    returns = [
        step_returns(rewards[i], mask[i], turn_ids[i], lambda places: turn_discount)
        for i in range(count)
    ]
    scores = [sum(float(rewards[i][t]) for t in action_positions(mask[i])) for i in range(count)]
    credit = [{} for _ in range(count)]
    for group in range(num_groups):
        rows = members(group_ids, group)
        if episode_mean_over == "steps":
            population = [scores[j] for j in rows for _ in returns[j]]
        else:
            population = [scores[j] for j in rows if returns[j]]
        visits, firsts = {}, {}  # anchor → returns there, and those that its mean is of
        for j in rows:
            seen = set()
            for k in sorted(returns[j]):
                anchor = int(anchor_ids[j][k])
                if anchor < 0:
                    continue
                visits.setdefault(anchor, []).append(returns[j][k])
                if not (first_visit and anchor in seen):
                    firsts.setdefault(anchor, []).append(returns[j][k])
                seen.add(anchor)
        for i in rows:
            for k, x in returns[i].items():
                episode = against(scores[i], population, **options)
                anchor = int(anchor_ids[i][k])
                step = against(x, firsts.get(anchor, []), spread=visits.get(anchor), **options)
                credit[i][k] = episode + step_weight * step
    return spread_turns(credit, mask, turn_ids)


def mt_grpo(
    rewards, outcomes, mask, turn_ids, group_ids, *, num_groups,
    turn_weight=1.0, outcome_weight=1.0, ddof=1, epsilon=1e-6,
):  # fmt: skip
    options = {"scale": "std", "ddof": ddof, "epsilon": epsilon}
    own = [turn_rewards(*row) for row in zip(rewards, mask, turn_ids)]
    credit = [{} for _ in own]
    for group in range(num_groups):
        rows = members(group_ids, group)
        finals = {i: max(own[i]) if own[i] else None for i in rows}
        for i in rows:
            outcome = against(float(outcomes[i]), [float(outcomes[j]) for j in rows], **options)
            sums = [float(outcomes[j]) + sum(own[j].values()) for j in rows]
            summed = against(float(outcomes[i]) + sum(own[i].values()), sums, **options)
            for k, x in own[i].items():
                if k == finals[i]:
                    credit[i][k] = outcome if len(own[i]) > 1 else summed
                else:
                    cell = [own[j][k] for j in rows if k in own[j] and k != finals[j]]
                    turn = against(x, cell, **options)
                    credit[i][k] = turn_weight * turn + outcome_weight * outcome
    return spread_turns(credit, mask, turn_ids)


def istar(
    scores, rewards, mask, turn_ids, group_ids, *, num_groups,
    step_weight=1.0, baseline="mean", ddof=1, epsilon=1e-6,
):  # fmt: skip
    own = [turn_rewards(*row) for row in zip(rewards, mask, turn_ids)]

    def compare(x, others):
        if baseline == "mean":
            return against(x, others, scale="std", ddof=ddof, epsilon=epsilon)
        n = len(others)
        return x - (sum(others) - x) / (n - 1) if n > 1 else 0.0

    credit = [{} for _ in own]
    for group in range(num_groups):
        rows = members(group_ids, group)
        steps = [x for j in rows for x in own[j].values()]
        for i in rows:
            episode = compare(float(scores[i]), [float(scores[j]) for j in rows])
            for k, x in own[i].items():
                credit[i][k] = episode + step_weight * compare(x, steps)
    return spread_turns(credit, mask, turn_ids)


# --- losses, one token at a time ---------------------------------------------------------------


def surrogate(ratio, advantage, low, high, dual=None):
    clipped = min(max(ratio, 1.0 - low), 1.0 + high)
    loss = -min(ratio * advantage, clipped * advantage)
    if dual is not None and advantage < 0:
        loss = min(loss, -dual * advantage)
    return loss


def clipped_surrogate(new, old, advantages, mask, *, low, high, dual=None):
    out = np.zeros(np.shape(mask))
    for i, t in zip(*np.nonzero(mask)):
        ratio = math.exp(float(new[i, t]) - float(old[i, t]))
        out[i, t] = surrogate(ratio, float(advantages[i, t]), low, high, dual)
    return out


def sequence_surrogate(new, old, advantages, mask, *, low, high, turn_ids=None):
    out = np.zeros(np.shape(mask))
    for i in range(len(mask)):
        ids = np.zeros(len(mask[i]), int) if turn_ids is None else turn_ids[i]
        for places in turn_tokens(mask[i], ids).values():
            gaps = [float(new[i, t]) - float(old[i, t]) for t in places]
            ratio = math.exp(sum(gaps) / len(gaps))
            for t in places:
                out[i, t] = surrogate(ratio, float(advantages[i, t]), low, high)
    return out


def value_loss(value, old, target, clip):
    error = (value - target) ** 2
    if clip is not None:
        near = old + min(max(value - old, -clip), clip)
        error = max(error, (near - target) ** 2)
    return 0.5 * error


def aggregate(loss, mask, *, mode, constant=None, sequence_ids=None):
    sequences = []
    for i in range(len(mask)):
        ids = np.zeros(len(mask[i]), int) if sequence_ids is None else sequence_ids[i]
        for places in turn_tokens(mask[i], ids).values():
            sequences.append([float(loss[i, t]) for t in places])
    if not sequences:
        return 0.0
    if mode == "token_mean":
        return sum(map(sum, sequences)) / sum(map(len, sequences))
    if mode == "sequence_mean_token_mean":
        return sum(sum(s) / len(s) for s in sequences) / len(sequences)
    total = sum(map(sum, sequences)) / len(sequences)
    return total if mode == "sequence_mean_token_sum" else total / constant


def importance_ratios(old, sampler, mask, *, level, turn_ids=None, geometric=False):
    out = np.zeros(np.shape(mask))
    for i in range(len(mask)):
        ids = {"token": np.arange(len(mask[i])), "sequence": np.zeros(len(mask[i]), int)}.get(
            level, None if turn_ids is None else turn_ids[i]
        )
        for places in turn_tokens(mask[i], ids).values():
            gap = sum(float(old[i, t]) - float(sampler[i, t]) for t in places)
            if geometric:
                gap /= len(places)
            for t in places:
                out[i, t] = math.exp(min(max(gap, -20.0), 20.0))
    return out


def trajectory_dpo(new, old, mask, succeeded, group_ids, *, num_groups, beta):
    losses = []
    for group in range(num_groups):
        rows = members(group_ids, group)
        score = {
            i: beta * sum(float(new[i, t]) - float(old[i, t]) for t in action_positions(mask[i]))
            for i in rows
        }
        for i in rows:
            for j in rows:
                if succeeded[i] and not succeeded[j]:
                    losses.append(math.log1p(math.exp(-(score[i] - score[j]))))
    return sum(losses) / len(losses) if losses else 0.0


# --- transforms --------------------------------------------------------------------------------


def uncertainty_keep(scores, group_ids, *, num_groups, fraction, ddof=1):
    groups = [g for g in range(num_groups) if members(group_ids, g)]
    spread = {g: std([float(scores[i]) for i in members(group_ids, g)], ddof) for g in groups}
    wanted = max(1, math.floor(round(fraction * len(groups), 6)))
    best = sorted(groups, key=lambda g: (-spread[g], g))[:wanted]
    return np.array([g in best for g in group_ids])
