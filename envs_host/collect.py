"""The tasks of a split: games made by seed, official ones, or those of a file, whatever the environment."""

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

from envs_host import alfworld_data, games, own_tasks, specs, swe_data
from envs_host.types import Task

# Families whose tasks are read, not made -> the environment that plays them; None is any.
_READ = {alfworld_data.FAMILY: "alfworld", swe_data.FAMILY: "swe", own_tasks.FAMILY: None}
# Order of the official games, so that the first few of a split are of all types and rooms.
_ORDER_SEED = 0


@dataclasses.dataclass(frozen=True)
class Collection:
    """The tasks, and sentences for people about those that are none."""

    tasks: list[Task]
    notices: list[str]


def environment(params: Mapping[str, Any]) -> str | None:
    """Name of the environment that plays games of these parameters; None where that is for `env.name` to say.

    Raises:
        ValueError: the family is missing or unknown.
    """
    family = params.get("family")
    if family in _READ:
        return _READ[family]
    if family not in specs.FAMILIES:
        raise ValueError(
            f"the game family {family!r} is unknown: env.params.family must be one of "
            f"{sorted([*specs.FAMILIES, *_READ])}."
        )
    return specs.environment(family)


def tasks(
    params: Mapping[str, Any],
    seeds: range,
    *,
    first: int,
    cache_dir: str,
    num_workers: int | None,
) -> Collection:
    """Makes or finds the games of a split.

    Args:
        params: of the games, with their "family"; those of "alfworld-data", "swe-data" and "tasks" are the
            arguments of `alfworld_data.read`, `swe_data.read` and `own_tasks.read`.
        seeds: one game each. What is read has none: `seeds` are positions, counted from `first`, of tasks in
            the order of their file, of official games and instances after they were shuffled, once.
        first: see there.
        cache_dir, num_workers: see `games.generate`.

    Raises:
        ValueError: parameters are wrong, or there are fewer tasks to be read than asked for.
    """
    if params["family"] not in _READ:
        made = [dict(params, seed=seed) for seed in seeds]
        report = games.generate(made, cache_dir=cache_dir, num_workers=num_workers)
        notices = []
        if report.set_aside:
            reason = next(iter(report.reasons.values()))
            notices = [f"{report.set_aside} of {len(made)} games set aside, e.g.: {reason}"]
        return Collection(report.tasks, notices)
    options = {key: value for key, value in params.items() if key != "family"}
    if params["family"] == own_tasks.FAMILY:
        _check(own_tasks.FAMILY, options, ("path",), ())
        found = Collection(own_tasks.read(**options), [])
        order = found.tasks
    else:
        found = (
            _alfworld(options, cache_dir)
            if params["family"] == alfworld_data.FAMILY
            else _swe(options, cache_dir, num_workers)
        )
        order = random.Random(_ORDER_SEED).sample(found.tasks, len(found.tasks))
    chosen = order[seeds.start - first : seeds.stop - first]
    if len(chosen) < len(seeds):
        raise ValueError(
            f"of {params['family']} with these parameters there are {len(order)} tasks, counted from {first}, but a split asks "
            f"for {seeds.start} to {seeds.stop - 1}: lower its first seed or its number. {' '.join(found.notices)}".rstrip()
        )
    return Collection(chosen, found.notices)


def _alfworld(options: dict[str, Any], cache_dir: str) -> Collection:
    """All official games of a split."""
    _check(alfworld_data.FAMILY, options, ("split",), ("data_dir", "task_types"))
    found = alfworld_data.read(options.pop("split"), cache_dir=cache_dir, **options)
    damaged = [count for reason, count in found.left_out.items() if reason == "damaged"]
    return Collection(found.tasks, [f"{count} games left out: damaged" for count in damaged])


def _swe(options: dict[str, Any], cache_dir: str, num_workers: int | None) -> Collection:
    """All instances that can be played."""
    _check(swe_data.FAMILY, options, ("instances", "repositories"), ("python", "repos", "test_limit_s"))
    found = swe_data.read(cache_dir=cache_dir, num_workers=num_workers, **options)
    reasons = list(found.left_out.items())
    notices = [f"{len(reasons)} instances left out, e.g. {reasons[0][0]}: {reasons[0][1]}"] if reasons else []
    return Collection(found.tasks, notices)


def _check(family: str, options: dict[str, Any], needed: tuple[str, ...], others: tuple[str, ...]) -> None:
    if set(options) - {*needed, *others} or set(needed) - set(options):
        raise ValueError(
            f"{family} needs the parameters {', '.join(needed)}"
            f"{' and may have ' + ', '.join(others) if others else ''}; got {', '.join(sorted(options)) or 'none'}."
        )
