"""Environments of Gymnasium's shape, for tests. Worker processes import this file: nothing of jax in here."""

import random

import gymnasium
import numpy as np
from gymnasium import spaces

ACTIONS = ("Left", "right")


class Walk(gymnasium.Env):
    """A line of places: to its right end, not off its left one."""

    action_space = spaces.Discrete(2, start=5)
    observation_space = spaces.Text(100)

    def __init__(self, length=3, named=True, masked=False, limit=None):
        self.length, self._named, self._masked, self._limit, self.closed = length, named, masked, limit, False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._place, self._steps = int(self.np_random.integers(self.length)), 0
        info = {"identity": f"{self._place} of {self.length}"} if self._named else {}
        return self._seen(), info | self._mask()

    def step(self, action):
        self._place += {5: -1, 6: 1}[action]
        self._steps += 1
        won, lost = self._place == self.length, self._place < 0
        is_late = self._steps == self._limit and not (won or lost)
        return self._seen(), 2.0 * won - 0.5 * lost, won or lost, is_late, self._mask()

    def close(self):
        self.closed = True

    def _seen(self):
        return f"You stand at {self._place} of {self.length}."

    def _mask(self):
        return {"action_mask": [self._place > 0, True]} if self._masked else {}


class Echo(gymnasium.Env):
    """Says what was said; "bye" ends it, with success as `info` has it."""

    action_space = spaces.Text(10)

    def __init__(self, opening="Hello?"):
        self._opening = opening

    def reset(self, *, seed=None, options=None):
        return self._opening, {"admissible_commands": ["hi", "bye"]}

    def step(self, action):
        is_over = action == "bye"
        info = {"is_success": is_over, "valid_command": action != "", "admissible_commands": ["bye"]}
        return f"You said {action!r}.", 0.0, is_over, False, info


class Moody(Echo):
    def reset(self, *, seed=None, options=None):
        return f"Hello {random.random()}", {}


class Grid(Echo):
    action_space = spaces.Box(0, 1)


class Odd(Echo):
    """Answers in a way that Gymnasium's do not."""

    def __init__(self, oddity):
        super().__init__()
        self._oddity = oddity
        if oddity == "not made":
            raise ValueError("no board")

    def reset(self, *, seed=None, options=None):
        answer = super().reset(seed=seed)
        return answer[0] if self._oddity == "old reset" else answer

    def step(self, action):
        observation, _, terminated, truncated, info = super().step(action)
        if self._oddity == "raises":
            return [].index(action)
        if self._oddity == "old step":
            return observation, 0.0, terminated, info
        rewards = {"nan": float("nan"), "array": np.zeros(1), "text": "1", "numpy": np.float32(1)}
        return observation, rewards.get(self._oddity, 0.0), terminated, truncated, None if self._oddity == "no info" else info


def bye(env):
    """The expert of `Echo`."""
    if env.unwrapped._opening == "sad":
        raise ValueError("too sad to go")
    return ["bye"]


def way(env):
    """The expert of `Walk`."""
    world = env.unwrapped
    return ["right"] * (world.length - world._place)


def wrong_way(env):
    return ["right", "LEFT", *way(env)[:-1]]


def way_off(env):
    return ["left"] * 20


def no_way(env):
    return []


def one_word(env):
    return "right"


for name in ("Walk", "Echo", "Moody", "Grid", "Odd"):
    gymnasium.register(f"{name}-v0", entry_point=f"gymnasium_worlds:{name}")
