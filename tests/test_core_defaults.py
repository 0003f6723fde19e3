"""What the functional core does when it is not told: the papers' values, and promises to callers.

None stands for "left out" everywhere and is not listed.
"""

import inspect

import pytest

from jaxagentrl import (
    advantages,
    anchors,
    buffers,
    divergences,
    group_advantages,
    importance,
    losses,
    masking,
    preference,
    transforms,
    turn_credit,
)

STD = {"ddof": 1, "epsilon": 1e-6}
GIGPO = STD | {
    "turn_discount": 0.95,
    "step_weight": 1.0,
    "scale": "std",
    "episode_mean_over": "trajectories",
    "first_visit": False,
}
DEFAULTS = {
    "gae": {"bootstrap_values": 0.0},
    "turn_gae": {"bootstrap_values": 0.0},
    "bilevel_gae": {"bootstrap_values": 0.0},
    "group_normalized": STD | {"scale": "std"},
    "whiten": {"shift_mean": True, "ddof": 1, "epsilon": 1e-8},
    "rewards_to_go_group": STD | {"horizon": "episode", "baseline": "mean", "scale": "none"},
    "mt_grpo": STD | {"turn_weight": 1.0, "outcome_weight": 1.0},
    "istar": STD | {"step_weight": 1.0, "baseline": "mean"},
    "turn_returns": {"horizon": "episode"},
    "gigpo": GIGPO,
    "gigpo_steps": GIGPO,
    "adaptive_kl_coefficient": {"limit": 0.2},
    "importance_ratios": {"level": "token", "geometric": False},
    "truncated_importance_weights": {"cap": 2.0},
    "importance_mask": {"low": 0.5, "high": 2.0},
    "masked_mean_and_var": {"ddof": 0},
    "sample": {"replace": False},
    "uncertainty_filter": {"keep_flat": True, "ddof": 1},
    "overlong_penalty": {"penalty": 1.0},
}
MODULES = [
    advantages, anchors, buffers, divergences, group_advantages, importance, losses, masking,
    preference, transforms, turn_credit,
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
def test_defaults(module):
    for name, function in vars(module).items():
        if not callable(function) or getattr(function, "__module__", "") != module.__name__:
            continue
        if inspect.isclass(function):
            continue
        defaults = {
            key: parameter.default
            for key, parameter in inspect.signature(function).parameters.items()
            if parameter.default not in (inspect.Parameter.empty, None)
        }
        assert defaults == DEFAULTS.get(name, {}), name
