"""The environment doctor: what an environment costs, and whether it keeps its promises.

    python tools/env_doctor.py --env=textworld
    python tools/env_doctor.py --env=alfworld
    python tools/env_doctor.py --env=swe --params='{"family": "swe-bugs", "repository": "<folder>"}'
    python tools/env_doctor.py --env=package.module:Class --tasks=tasks.jsonl

Plays games by random admissible commands and by walkthrough, in this process and in worker
processes, and prints one table (Markdown): latency of resets and steps, memory growth per episode,
determinism, process safety, range of rewards, the longest observation, versions, and from these
the worker count and the limits that it suggests. Exit code 1 if a promise is broken.

An environment of your own needs tasks, in a file as `envs_host/own_tasks.py` says.
"""

import argparse
import dataclasses
import json
import math
import os
import random
import signal
import sys
import tempfile
import time
from typing import Any

import psutil

import envs_host
from envs_host import collect, own_tasks, swe_tests
from envs_host.pool import EnvPool
from envs_host.types import EnvFailure, GameFileError, Task

_SEED = 20_001
_PARAMS = {
    "textworld": {"family": "custom", "world_size": 2, "nb_objects": 3, "quest_length": 4,
                  "theme": "basic"},
    "alfworld": {"family": "alfworld", "split": "valid_unseen"},
}
_VERSIONS = {"textworld": ("textworld", "jericho"), "alfworld": ("alfworld",), "swe": ("pytest",), "gymnasium": ("gymnasium",)}


@dataclasses.dataclass
class Findings:
    """What was measured; seconds and megabytes."""

    resets: list[float] = dataclasses.field(default_factory=list)
    first_steps: list[float] = dataclasses.field(default_factory=list)
    again_steps: list[float] = dataclasses.field(default_factory=list)
    rewards: list[float] = dataclasses.field(default_factory=list)
    longest: str = ""
    memory_mb: float = 0.0
    growth_kb: float = 0.0
    deterministic: bool = True
    walkthroughs: int = 0
    walkthroughs_won: int = 0
    survives_kill: bool = True
    survives_nonsense: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True, help="a name of envs_host.ENVIRONMENTS, or module:Class")
    parser.add_argument("--params", type=_object, help="JSON: parameters of the games, by default the environment's own")
    parser.add_argument("--tasks", help="file of tasks, one JSON object a line, instead of made ones")
    parser.add_argument("--options", type=_object, default={}, help="JSON: keyword arguments of the environment")
    parser.add_argument("--num_tasks", type=_count, default=8)
    parser.add_argument("--num_episodes", type=_count, default=40)
    parser.add_argument("--max_turns", type=_count, default=20)
    parser.add_argument("--num_slots", type=_count, default=256, help="episodes at a time in a rollout")
    parser.add_argument("--turn_s", type=_seconds, default=0.5,
                        help="seconds in which the device decodes a turn of half of them")
    parser.add_argument("--tokenizer", help="folder of a tokenizer, to count an observation's tokens")
    parser.add_argument("--cache_dir", help="where games are kept; by default a temporary folder")
    args = parser.parse_args()
    sys.path.append(os.getcwd())  # where `python -m jaxagentrl.main` finds an environment of one's own, too
    try:
        _check_env(args.env, args.options)
        with tempfile.TemporaryDirectory() as scratch:
            tasks = _tasks(args, args.cache_dir or scratch)
            findings = examine(args.env, tasks, args.options, args.num_episodes, args.max_turns)
            rows, broken = table(args, findings, tasks)
    except (ImportError, OSError, ValueError, GameFileError) as error:
        sys.exit(f"error: {error}")
    print(f"| {args.env} | |\n|---|---|")
    for name, value in rows:
        print(f"| {name} | {value} |")
    if broken:
        sys.exit(f"broken: {', '.join(broken)}")


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return found


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"expected seconds, more than 0, got {text!r}")
    return found


def _check_env(env: str, options: dict[str, Any]) -> None:
    try:
        envs_host.check_options(env, options)
    except ValueError as error:
        raise ValueError(f"--env={env} with --options={json.dumps(options)}: {error}") from error


def _tasks(args: argparse.Namespace, cache_dir: str) -> list[Task]:
    if args.tasks:
        found, notices = own_tasks.read(args.tasks), []
    else:
        params = args.params or _PARAMS.get(args.env)
        if params is None:
            sys.exit(f"there are no games known for {args.env!r}: describe some by --params, or name some by --tasks=<file>")
        played_by = collect.environment(params)
        if args.env in envs_host.ENVIRONMENTS and args.env != played_by:
            raise ValueError(f"--params: games of {params.get('family')!r} are played by --env={played_by}, got --env={args.env}.")
        try:
            os.makedirs(os.path.expanduser(cache_dir), exist_ok=True)
        except OSError as error:
            raise ValueError(f"--cache_dir={cache_dir} cannot be made: {error.strerror}.") from error
        seeds = range(_SEED, _SEED + args.num_tasks)
        collected = collect.tasks(params, seeds, first=_SEED, cache_dir=cache_dir, num_workers=None)
        found, notices = collected.tasks, collected.notices
    for notice in notices:
        print(notice, file=sys.stderr)
    if not found:
        sys.exit("no task is usable")
    return found


def _longest_step(env: str, options: dict[str, Any]) -> float:
    """Seconds that a step may take by itself: a run of tests that does not end is the agent's failure, which the
    pool must not come before."""
    return options.get("test_limit_s", swe_tests.Limits().seconds) + 10.0 if env == "swe" else 0.0


def examine(
    env: str, tasks: list[Task], options: dict[str, Any], num_episodes: int, max_turns: int
) -> Findings:
    """Plays and measures."""
    findings = Findings()
    said = sorted({command for task in tasks for command in task.walkthrough})
    if envs_host.takes(env, "admissible_commands"):
        options = options | {"admissible_commands": True}
    elif not said:
        raise ValueError(f"--env={env} has no option admissible_commands, and no task a walkthrough: there is nothing to say.")
    scripts = [_record(env, task, options, number, max_turns, said, findings)
               for number, task in enumerate(tasks)]
    _remembered(env, tasks, scripts, options, findings)
    _walkthroughs(env, tasks, options, findings)
    _nonsense(env, tasks[0], options, findings)
    _memory(env, tasks, scripts, options, num_episodes, said, findings)
    _processes(env, tasks, scripts, options, findings)
    return findings


def _record(env, task, options, number, max_turns, said, findings):
    """A random episode from a fresh environment, without any memory of answers: its script. Where the environment
    lists no commands, of those that walkthroughs say."""
    live = envs_host.make(env, **options)
    rng = random.Random(number)
    began = time.perf_counter()
    result = live.reset(task)
    findings.resets.append(time.perf_counter() - began)
    script, answers = [], [result]
    for _ in range(max_turns):
        findings.longest = max(findings.longest, result.observation, key=len)
        if not (commands := result.info.admissible_commands or said):
            break
        command = rng.choice(commands)
        began = time.perf_counter()
        result = live.step(command)
        findings.first_steps.append(time.perf_counter() - began)
        findings.rewards.append(result.reward)
        script.append(command)
        answers.append(result)
        if result.terminated or result.truncated:
            break
    live.close()
    return script, answers


def _remembered(env, tasks, scripts, options, findings):
    """The same commands again: equal answers, and how fast when they were given before."""
    live = envs_host.make(env, **options)
    for task, (script, answers) in zip(tasks, scripts, strict=True):
        again = [live.reset(task)]
        for command in script:
            began = time.perf_counter()
            again.append(live.step(command))
            findings.again_steps.append(time.perf_counter() - began)
        findings.deterministic &= again == answers
    live.close()


def _walkthroughs(env, tasks, options, findings):
    live = envs_host.make(env, **options)
    for task in tasks:
        if task.walkthrough:
            findings.walkthroughs += 1
            live.reset(task)
            for command in task.walkthrough:
                result = live.step(command)
                findings.rewards.append(result.reward)
                if result.terminated or result.truncated:
                    break
            findings.walkthroughs_won += result.info.won
    live.close()


def _nonsense(env, task, options, findings):
    """What a half-trained model may write: nothing may be raised."""
    texts = ["", " ", "\x00\x07", "take " * 400, "<|im_end|>", "ééé", "look.look;look", '"', "\\n\\"]
    with EnvPool(env, options, num_workers=1, step_limit_s=max(60.0, _longest_step(env, options)),
                 reset_limit_s=120.0, worker_memory_mb=8000.0, max_replays=0) as pool:
        for number, text in enumerate(texts):
            pool.reset(number, task)
            pool.poll()
            pool.step(number, text)
            ((_, answer),) = pool.poll()
            if isinstance(answer, EnvFailure):
                findings.survives_nonsense = False
                print(f"{text!r}: {answer.message}", file=sys.stderr)


def _memory(env, tasks, scripts, options, num_episodes, said, findings):
    """Growth of this process over episodes of new commands, the first half left out as warm-up."""
    process = psutil.Process()
    live = envs_host.make(env, **options)
    halfway = process.memory_info().rss
    for number in range(num_episodes):
        if number == num_episodes // 2:
            halfway = process.memory_info().rss
        which = number % len(tasks)
        rng, result = random.Random(1000 + number), live.reset(tasks[which])
        for _ in scripts[which][0]:
            commands = result.info.admissible_commands or said
            if commands and not (result.info.won or result.info.lost):
                result = live.step(rng.choice(commands))
    live.close()
    findings.memory_mb = process.memory_info().rss / 2**20
    half = num_episodes - num_episodes // 2
    findings.growth_kb = (process.memory_info().rss - halfway) / 2**10 / half


def _processes(env, tasks, scripts, options, findings):
    """Two worker processes at once give the same answers, and a killed one is replayed."""
    with EnvPool(env, options, num_workers=2,
                 step_limit_s=max(60.0, _longest_step(env, options)), reset_limit_s=120.0, worker_memory_mb=8000.0) as pool:
        collected = {number: [] for number in range(len(tasks))}
        for number, task in enumerate(tasks):
            pool.reset(number, task)
        killed = False
        while collected_answers := pool.poll():
            for number, answer in collected_answers:
                if isinstance(answer, EnvFailure):
                    findings.survives_kill = False
                    print(f"{tasks[number].name}: {answer}", file=sys.stderr)
                    continue
                collected[number].append(answer)
                if len(collected[number]) <= len(scripts[number][0]):
                    pool.step(number, scripts[number][0][len(collected[number]) - 1])
            if not killed and sum(map(len, collected.values())) > 2 * len(tasks):
                killed = True
                os.kill(pool.worker_pids[0], signal.SIGKILL)
    for number, (_, answers) in enumerate(scripts):
        findings.survives_kill &= collected[number] == answers


def table(
    args: argparse.Namespace, findings: Findings, tasks: list[Task]
) -> tuple[list[tuple[str, str]], list[str]]:
    """Rows of the report, and the promises that are broken."""
    step = _quantile(findings.first_steps, 0.5)
    reset_99 = _quantile(findings.resets, 0.99)
    cores = len(os.sched_getaffinity(0))
    # Half of the slots step while the other half decodes.
    wanted = math.ceil(args.num_slots / 2 * step / args.turn_s)
    low, high = min(findings.rewards), max(findings.rewards)
    promises = {
        "deterministic": findings.deterministic,
        "walkthroughs win": findings.walkthroughs_won == findings.walkthroughs,
        "safe in processes": findings.survives_kill,
        "takes any text": findings.survives_nonsense,
    }
    rows = [
        ("games", f"{len(tasks)}, e.g. `{tasks[0].name}`"),
        ("reset p50 / p99", f"{_ms(_quantile(findings.resets, 0.5))} / {_ms(reset_99)} ms"),
        ("step p50 / p99", f"{_ms(step)} / {_ms(_quantile(findings.first_steps, 0.99))} ms"),
        ("step answered from memory p50", f"{_ms(_quantile(findings.again_steps, 0.5))} ms"),
        ("memory of the process", f"{findings.memory_mb:.0f} MB"),
        ("growth per episode, after warm-up", f"{findings.growth_kb:.1f} kB"),
        ("same commands, same answers", _yes(findings.deterministic)),
        ("two processes at once, one killed and replayed: same answers",
         _yes(findings.survives_kill)),
        ("nonsense is answered, not raised", _yes(findings.survives_nonsense)),
        ("walkthroughs that win", f"{findings.walkthroughs_won} of {findings.walkthroughs}"),
        ("reward of a step", f"{low:g} to {high:g}"),
        ("longest observation", _length(findings.longest, args.tokenizer)),
        ("versions", _versions(args.env)),
        ("suggested `pool.num_workers`", f"{min(max(1, wanted), cores)} ({cores} cores)"),
        ("suggested `pool.step_limit_s` / `reset_limit_s`",
         f"{max(_limit(max(findings.first_steps)), _longest_step(args.env, args.options))} / "
         f"{_limit(max(findings.resets))}"),
        ("suggested `pool.worker_memory_mb`",
         f"{math.ceil(2 * findings.memory_mb / 500) * 500}"),
    ]
    return rows, [name for name, kept in promises.items() if not kept]


def _length(text: str, tokenizer: str | None) -> str:
    if tokenizer is None:
        return f"{len(text)} characters, about {math.ceil(len(text) / 3.5)} tokens"
    from jaxagentrl import tokenizer as tokenizers

    ids = tokenizers.load(tokenizer).encode(text, add_special_tokens=False)
    return f"{len(text)} characters, {len(ids)} tokens"


def _versions(env: str) -> str:
    import importlib.metadata

    found = []
    for package in _VERSIONS.get(env, ()):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join([*found, f"Python {sys.version.split()[0]}"])


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values) or [0.0]
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]


def _limit(slowest: float) -> float:
    """Two hundred times the slowest, at least ten seconds, in round numbers."""
    return float(max(10, math.ceil(200 * slowest / 10) * 10))


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.2f}"


def _yes(value: bool) -> str:
    return "yes" if value else "**NO**"


if __name__ == "__main__":
    main()
