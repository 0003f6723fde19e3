"""Told once, when success is less than half of what it was: by counts, not by chance."""

import pytest

from jaxagentrl import collapse


def lines(*rates, episodes=256, **more):
    """One line of phase "rl" for each success rate."""
    return [
        {
            "phase": "rl", "step": step, "rollout/successes": round(rate * episodes), "rollout/episodes": episodes,
            "rollout/stop_no_end_of_turn": round((1 - rate) * episodes / 2),
        }
        | {key: values[step - 1] for key, values in more.items()}
        for step, rate in enumerate(rates, 1)
    ]


def times_told(made):
    return [count for count in range(1, len(made) + 1) if collapse.told(made[:count])]


def test_a_fall_is_told_once_with_what_changed():
    rates = [0.4] * 4 + [0.6] * 8 + [0.1] * 12
    more = {"policy/entropy": [0.5] * 12 + [0.0625] * 12, "rollout/repeat_rate": [0.125] * 12 + [0.75] * 12}
    made = lines(*rates, **more)
    (at,) = times_told(made)
    # With two of 0.6 left eight lines are at 0.227, and their interval ends at 0.245; of the ten before, the best eight
    # are at 0.551, and theirs begins at 0.53. With three left it ended at 0.309.
    assert at == 18
    text = collapse.told(made[:at])
    assert "success has fallen from 55.1 % (iterations 3 to 10) to 22.7 % (11 to 18)" in text
    assert "commands given again in the same state 12.5 % → 59.4 %" in text and "entropy 0.5 → 0.172" in text
    assert "episodes cut in a turn without its end 22.5 % → 38.7 %" in text
    assert "gradient norm" not in text  # not measured here


def test_what_falls_again_is_told_again():
    assert len(times_told(lines(*[0.6] * 8, *[0.1] * 8, *[0.6] * 16, *[0.05] * 8))) == 2


@pytest.mark.parametrize(
    "rates, episodes",
    [
        ([0.6] * 8 + [0.35] * 20, 256),  # not a half
        ([0.0] * 30, 256),
        ([0.01] * 8 + [0.0] * 8, 32),  # three wins of 256 are no success to fall from
        ([0.6] * 7 + [0.0] * 7, 256),  # too short to tell
        ([0.75, 0.25] * 12, 4),  # ups and downs of few episodes
        ([0.1 + 0.02 * i for i in range(25)], 256),
    ],
)
def test_chance_and_slow_declines_are_not_told(rates, episodes):
    assert times_told(lines(*rates, episodes=episodes)) == []


def test_iterations_whose_environments_all_failed_are_no_fall():
    assert times_told(lines(*[0.6] * 10) + lines(*[0.0] * 10, episodes=0)) == []


@pytest.mark.parametrize("key", ["curriculum/level", "curriculum/commands_left"])
def test_a_harder_level_of_a_curriculum_is_no_fall(key):
    rates = [0.6] * 10 + [0.1] * 16 + [0.02] * 8
    level = {key: [1.0] * 10 + [2.0] * 24}
    assert times_told(lines(*rates[:26])) and not times_told(lines(*rates[:26], **level))
    assert times_told(lines(*rates, **level)) == [33]  # within one it is: 57 wins of 2,048 after 205
