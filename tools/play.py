"""Plays a game of a run in the terminal: by hand, or by its model, a walkthrough or chance, which you watch.

    python tools/play.py runs/quickstart                       you play: a line is a command, ? lists some, an empty line is the end
    python tools/play.py runs/quickstart --agent model --game 7
    python tools/play.py runs/quickstart --agent model --temperature 0 --split test_rooms

The run's config says what is played and how many turns it may take; its model, `model/` of the run's end, plays by all of
the run's rules. Games are found in the run's cache, or made, and numbered from 0 as the run has them.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import envs_host
from envs_host.pool import EnvPool
from envs_host.types import EnvFailure, ResetResult, StepResult, Task
from jaxagentrl import engine, evaluate, prepare, progress, rollout, rules, tokenizer, workdir
from jaxagentrl.models import decoding_layout, pretrained
from jaxagentrl.trajectory import Trajectory

AGENTS = ("you", "model", "walkthrough", "random")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=pathlib.Path, help="the workdir of a run")
    parser.add_argument("--agent", choices=AGENTS, default="you")
    parser.add_argument("--split", default="test", help="of the run's splits")
    parser.add_argument("--game", type=int, default=0)
    parser.add_argument("--temperature", type=float, help="of the model; the run's eval.temperature by default")
    parser.add_argument("--seed", type=int, default=0, help="of what the model, or chance, draws")
    args = parser.parse_args(arguments)
    sys.path.append(os.getcwd())  # where `python -m jaxagentrl.main` finds an environment of one's own, too
    try:
        play(args)
    except ValueError as error:  # of what was asked for
        sys.exit(f"error: {error}")


def play(args: argparse.Namespace) -> None:
    config = workdir.content(args.run)["config"]
    task = find_task(config, args.split, args.game)
    show(f"{task.name}: {task.objective or 'no objective is told'}")
    options = {}
    if args.agent in ("you", "random") and envs_host.takes(config["env"]["name"], "admissible_commands"):
        options = {"admissible_commands": True}
    config["pool"]["num_workers"] = 1
    with prepare.make_pool(config, **options) as pool:
        if args.agent == "model":
            temperature = config["eval"]["temperature"] if args.temperature is None else args.temperature
            show_episode(sample(args.run, config, task, pool, temperature=temperature, seed=args.seed))
        elif args.agent == "you":
            step_through(task, pool, ask, max_turns=config["rollout"]["max_turns"])
        else:
            policy = evaluate.random_policy(args.seed) if args.agent == "random" else walkthrough(task)
            step_through(task, pool, policy, max_turns=config["rollout"]["max_turns"])


def find_task(config: Mapping[str, Any], split: str, game: int) -> Task:
    """A game of a split, from the run's cache.

    Raises:
        ValueError: there is no such split, or no such game.
    """
    if split not in config["splits"]:
        raise ValueError(f"--split {split}: the run's splits are {', '.join(config['splits'])}.")
    # A game is in one split only, the held-out ones first: without those before it a split would have more.
    only = prepare.held_out(config["splits"])
    made = prepare.games(config["env"], config["splits"], config["namings"], only=only if split in only else None)[split]
    if not 0 <= game < len(made):
        raise ValueError(f"--game {game}: splits.{split} has the games 0 to {len(made) - 1}.")
    return made[game]


def sample(
    run: pathlib.Path, config: Mapping[str, Any], task: Task, pool: EnvPool, *, temperature: float, seed: int
) -> Trajectory:
    """An episode of the run's model.

    Raises:
        ValueError: there is no model, or the environment failed.
    """
    folder = run / "model"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model: a run writes it at its end, and with lora.export 'separate' not there.")
    chat_format = prepare.make_chat(tokenizer.load(folder), config["prompt"])
    model, params = pretrained.load(folder)
    kept = ("max_length", "max_turn_tokens", "filled_buckets", "width_buckets", "cache_dtype")
    sizes = {key: config["sampling"][key] for key in kept}
    stop_ids = prepare.stop_ids(folder, chat_format)
    sampler = engine.Engine(
        model, num_slots=1, num_waves=1, stop_ids=stop_ids, row_divisors=(1,), notice=progress.notice, **sizes
    )
    played = rollout.collect(
        rollout.episodes([task], group_size=1, stream=(seed,)),
        rules=rules.of_config(config, temperature=temperature),
        pool=pool,
        engine=sampler,
        params=decoding_layout.for_decoding(params, config["learner"]["compute_dtype"]),
        chat_format=chat_format,
    )
    for _, failure in played.failures:
        raise ValueError(f"the environment failed: {failure.reason}: {failure.message}")
    return played.trajectories[0]


def show_episode(trajectory: Trajectory) -> None:
    for number, turn in enumerate(trajectory.turns, 1):
        show(turn.observation)
        said = turn.action if turn.action.strip() == turn.command else f"{turn.action}\n→ {turn.command}"
        show(f"{number}> {said}" + ("" if turn.valid_command else "   (refused)"))
    tell_end(trajectory.won, trajectory.score, trajectory.max_score, str(trajectory.stop_reason))


def step_through(task: Task, pool: EnvPool, policy: evaluate.Policy, *, max_turns: int) -> None:
    """Plays by commands of a policy, showing what the world says; "" ends the episode."""
    pool.reset("game", task)
    answer = answered(pool)
    show(answer.observation)
    why = f"the limit of {max_turns} turns"
    for turn in range(max_turns):
        command = policy(task, turn, answer.info.admissible_commands)
        if not command:
            why = "no further command"
            break
        if policy is not ask:
            show(f"{turn + 1}> {command}")
        pool.step("game", command)
        answer = answered(pool)
        show(answer.observation + ("" if answer.info.valid_command else "   (refused)"))
        if answer.terminated or answer.truncated:
            why = "the game ended"
            break
    tell_end(answer.info.won, answer.info.score, task.max_score, why)


def answered(pool: EnvPool) -> ResetResult | StepResult:
    ((_, answer),) = pool.poll()
    if isinstance(answer, EnvFailure):
        raise ValueError(f"the environment failed: {answer.reason}: {answer.message}")
    return answer


def ask(task: Task, turn: int, admissible: Sequence[str]) -> str:
    """A command of the person at the terminal; "" is the end."""
    while True:
        try:
            command = input(f"{turn + 1}> ").strip()
        except EOFError:
            show("")
            return ""
        if command != "?":
            return command
        show("\n".join(admissible) if admissible else "this environment lists no commands")


def walkthrough(task: Task) -> evaluate.Policy:
    """The walkthrough of a task.

    Raises:
        ValueError: it has none.
    """
    if not task.walkthrough:
        raise ValueError(f"the task {task.name} has no walkthrough.")
    return lambda task, turn, admissible: task.walkthrough[turn] if turn < len(task.walkthrough) else ""


def tell_end(won: bool, score: float, max_score: float, why: str) -> None:
    show(f"{'won' if won else 'not won'} ({why}), score {score:g} of {max_score:g}")


def show(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
