"""The same game under other names: what imitation and RL see of a TextWorld game, as often as asked.

In TextWorld's `basic` theme everything is called by its kind and a number or a letter (`thing6`,
`Z-box` with its `Z-key`), and no name means more than another. A naming is a permutation of the
numbers and one of the letters, applied to all that a game says and inversely to all that it is told:
the game is real, compiled and played as it is, and its namings are games as good as new. A model that
has seen a few hundred games learns from them to copy names instead of remembering them, and a game
costs a third of a second to make.

TextWorld draws digits, so half of all names have one, a quarter the same one twice. Each kind of number
is permuted by itself: renamed games look like those that are held out, which is what makes them of use.
"""

import dataclasses
import functools
import random
import re
import string
from collections.abc import Mapping

from envs_host.types import Task

THEME = "basic"
_NUMBER = re.compile(r"(?<=[A-Za-z])[0-9]{1,2}\b")
_DIGITS = string.digits
_TWINS = [2 * digit for digit in _DIGITS]
_PAIRS = [a + b for a in _DIGITS for b in _DIGITS if a != b]
_LETTER = re.compile(r"\b[A-Za-z](?=-(?:box|key)\b)", re.IGNORECASE | re.ASCII)


@dataclasses.dataclass(frozen=True)
class Naming:
    """A way to call things; `show` turns the game's names into it, `read` turns them back."""

    shown: Mapping[str, str]
    read_as: Mapping[str, str]

    def show(self, text: str) -> str:
        return _replace(text, self.shown)

    def read(self, text: str) -> str:
        return _replace(text, self.read_as)


def renamed(task: Task, number: int) -> Task:
    """The task under its `number`-th naming; 0 is the game's own.

    Raises:
        ValueError: the task's names mean something.
    """
    if number == 0:
        return task
    if task.params.get("theme") != THEME:
        raise ValueError(
            f"task {task.name} cannot be renamed: only games of the theme {THEME!r} have names that "
            "mean nothing. Play it under its own."
        )
    naming = _make(task.seed, number)
    return dataclasses.replace(
        task,
        name=f"{task.name}-n{number}",
        params=task.params | {"naming": number},
        objective=naming.show(task.objective),
        walkthrough=tuple(naming.show(command) for command in task.walkthrough),
    )


def of(task: Task) -> Naming | None:
    """The naming that `renamed` gave the task; None for the game's own names."""
    number = task.params.get("naming", 0)
    return _make(task.seed, number) if number else None


@functools.lru_cache(maxsize=4096)
def _make(seed: int, number: int) -> Naming:
    """A random permutation of each alphabet; a function of the game's seed and the number."""
    rng = random.Random(f"naming {seed} {number}")
    shown: dict[str, str] = {}
    for names in (_DIGITS, _TWINS, _PAIRS, string.ascii_uppercase):
        shown |= zip(names, rng.sample(names, len(names)), strict=True)
    return Naming(shown, {new: old for old, new in shown.items()})


def _replace(text: str, names: Mapping[str, str]) -> str:
    text = _NUMBER.sub(lambda found: names[found[0]], text)

    def letter(found: re.Match[str]) -> str:
        new = names[found[0].upper()]
        return new if found[0].isupper() else new.lower()

    return _LETTER.sub(letter, text)
