"""ALFWorld's own engine and ours side by side: the same games and commands, every answer compared.

    python tools/bench_alfworld.py --steps=10000
    python tools/bench_alfworld.py --steps=10000 --data=$ALFWORLD_DATA/json_2.1.1/valid_unseen

Plays generated houses (or the games under a folder), each by its walkthrough, by random admissible
commands and by commands that are refused, in both engines in one process; compares the feedback
byte by byte, the admissible commands and whether the game is won; prints steps per second of each
and their ratio. The original is asked for nothing beyond what it computes anyway, and never for an
expert plan.
"""

import argparse
import glob
import os
import random
import sys
import tempfile
import time

from counts import positive
from envs_host import alfworld_engine, games
from envs_host.specs import TASK_TYPES

REFUSED_SHARE = 0.1
RANDOM_STEPS = 100
SIZES = (6, 15, None)  # Receptacles of the generated rooms; None is all.
# Things a model may write that no game takes.
NONSENSE = ("", "look around", "go to the kitchen", "take mug", "Look", "put mug 1 in desk 1", "help me")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", help="a folder with game.tw-pddl files; default: generated houses")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        files = _official(args.data) if args.data else _generated(args, cache)
        compared = compare(files, num_steps=args.steps, seed=args.seed)
    seconds, original = compared["seconds"], compared["original_seconds"]
    steps = compared["steps"]
    print(f"{steps} steps in {compared['games']} games, {compared['won']} won: all answers equal")
    print(f"loading and opening a game: {_ms(compared['original_open'], compared['games'])} ms by "
          f"the original, {_ms(compared['open'], compared['games'])} ms by ours")
    print(f"original: {steps / original:8.1f} steps/s ({_ms(original, steps)} ms a step)")
    print(f"ours:     {steps / seconds:8.1f} steps/s ({_ms(seconds, steps)} ms a step)")
    print(f"ratio:    {original / seconds:8.1f}")


def compare(files: list[str], *, num_steps: int, seed: int) -> dict[str, float]:
    """Plays games in both engines until `num_steps` commands were given.

    Raises:
        SystemExit: two answers differ, says which; or the original cannot be loaded.
    """
    try:
        original = alfworld_engine.Original()
    except ImportError as error:
        said = " ".join(str(error).split())
        sys.exit(f"ALFWorld's own engine cannot be loaded: pip install -e '.[alfworld]' compiles what it needs ({said})")
    rng = random.Random(seed)
    totals: dict[str, float] = dict.fromkeys(
        ("steps", "games", "won", "seconds", "original_seconds", "open", "original_open"), 0)
    for number in range(sys.maxsize):
        file = files[number % len(files)]
        began = time.perf_counter()
        theirs = original.reset(file)
        totals["original_open"] += time.perf_counter() - began
        began = time.perf_counter()
        engine = alfworld_engine.Engine(game := alfworld_engine.read(file), file)
        outcome = engine.opening
        commands = engine.commands(outcome.facts)
        totals["open"] += time.perf_counter() - began
        _check(file, [], theirs, outcome, commands)
        totals["games"] += 1
        walkthrough, given = list(game.walkthrough), []
        # A random walk first on every other visit of a game, so that walkthroughs start anywhere.
        walk = RANDOM_STEPS if number // len(files) % 2 or number % 2 else 0
        while not outcome.won and (walk or walkthrough):
            if walk:
                walk -= 1
                command = rng.choice(sorted(commands))
                if rng.random() < REFUSED_SHARE:
                    command = rng.choice(NONSENSE)
            else:
                command = walkthrough.pop(0)
            given.append(command)
            began = time.perf_counter()
            theirs = original.step(command)
            totals["original_seconds"] += time.perf_counter() - began
            began = time.perf_counter()
            outcome = engine.step(outcome.facts, command, commands)
            commands = engine.commands(outcome.facts)
            totals["seconds"] += time.perf_counter() - began
            _check(file, given, theirs, outcome, commands)
            totals["steps"] += 1
            if totals["steps"] == num_steps:
                break
        totals["won"] += outcome.won
        if totals["steps"] == num_steps:
            return totals
    raise AssertionError("not reached")


def _check(file: str, given: list[str], theirs, outcome, commands) -> None:
    ours = (outcome.feedback, tuple(sorted(commands)), outcome.won)
    for what, their, our in zip(("feedback", "admissible commands", "won"), theirs, ours):
        if their != our:
            sys.exit(f"{file}, after {given}: {what} differ:\noriginal: {their!r}\nours:     {our!r}")


def _generated(args: argparse.Namespace, cache: str) -> list[str]:
    specs = [
        {"family": "alfworld", "split": split, "task_type": task_type, "seed": args.seed + number,
         "num_receptacles": SIZES[number % len(SIZES)]}
        for number in range(6) for task_type in TASK_TYPES for split in ("train", "valid_unseen")
    ]
    return [task.file for task in games.generate(specs, cache_dir=cache).tasks]


def _official(folder: str) -> list[str]:
    found = sorted(glob.glob(os.path.join(glob.escape(folder), "**", "game.tw-pddl"), recursive=True))
    if not found:
        sys.exit(f"there is no game.tw-pddl under {folder}: name a split of the data, for instance "
                 "$ALFWORLD_DATA/json_2.1.1/valid_unseen")
    return [file for file in found if "movable" not in file and "Sliced" not in file]


def _ms(seconds: float, count: int) -> str:
    return f"{1000 * seconds / count:.2f}"


if __name__ == "__main__":
    main()
