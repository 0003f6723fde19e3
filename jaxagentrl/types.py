"""The batch that crosses to the device, the training state, and the shape legend. No logic.

Shapes
    B sequences (rows), L token positions, T turns, G group size, V vocabulary, D model width.

Alignment, said once
    Entry t of every `[B, L]` field describes *token t*. Its log-prob is read from logits t−1; its
    value is read from the hidden state before token t is emitted; its reward and discount belong
    to having emitted it.

Padding
    A padding token has `valid_mask` False. A padding row has `valid_mask` False everywhere and
    `group_ids` equal to the number of groups, which is out of range: segment sums drop it.
"""

import dataclasses
from typing import Any

import jax

Array = jax.Array
PyTree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrajectoryBatch:
    """One trajectory per row: what estimators and losses read."""

    tokens: Array  # [B, L] int32, exactly the ids the sampler consumed and produced
    valid_mask: Array  # [B, L] bool, False on padding
    action_mask: Array  # [B, L] bool, True on sampled tokens, the end-of-turn token included
    turn_ids: Array  # [B, L] int32, turn a token belongs to, −1 on padding
    turn_ends: Array  # [B, L] bool, True on the last action token of each turn
    sampler_logprobs: Array  # [B, L] float32, as reported while decoding
    rewards: Array  # [B, L] float32, non-zero only where turn_ends
    discounts: Array  # [B, L] float32, γ per action token; 0 on the last of a terminated episode
    group_ids: Array  # [B] int32, same task and seed; the number of groups on padding rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What an update changes and a checkpoint holds."""

    step: Array  # [] int32, optimizer steps taken
    iteration: Array  # [] int32, loop iterations finished (one iteration takes several steps)
    params: PyTree  # the model's parameters
    opt_state: PyTree  # the optimizer's state
