"""The tasks of a split: games made by seed, or official ones, whatever the environment."""

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

from envs_host import alfworld_data, games, specs
from envs_host.types import Task

# Order of the official games, so that the first few of a split are of all types and rooms.
_ORDER_SEED = 0


@dataclasses.dataclass(frozen=True)
class Collection:
    """The tasks, and sentences for people about those that are none."""

    tasks: list[Task]
    notices: list[str]


def environment(params: Mapping[str, Any]) -> str:
    """Name of the environment that plays games of these parameters.

    Raises:
        ValueError: the family is missing or unknown.
    """
    family = params.get("family")
    if family == alfworld_data.FAMILY:
        return "alfworld"
    if family not in specs.FAMILIES:
        raise ValueError(
            f"the game family {family!r} is unknown: env.params.family must be one of "
            f"{sorted([*specs.FAMILIES, alfworld_data.FAMILY])}."
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
        params: of the games, with their "family"; of family "alfworld-data" with "split", and
            optionally "data_dir" and "task_types", as `alfworld_data.read` takes them.
        seeds: one game each. Official games have none: they are shuffled once, and `seeds` are
            positions, counted from `first`.
        first: see there.
        cache_dir, num_workers: see `games.generate`.

    Raises:
        ValueError: parameters are wrong, or there are fewer official games than asked for.
    """
    if params["family"] != alfworld_data.FAMILY:
        made = [dict(params, seed=seed) for seed in seeds]
        report = games.generate(made, cache_dir=cache_dir, num_workers=num_workers)
        notices = []
        if report.set_aside:
            reason = next(iter(report.reasons.values()))
            notices = [f"{report.set_aside} of {len(made)} games set aside, e.g.: {reason}"]
        return Collection(report.tasks, notices)
    options = {key: value for key, value in params.items() if key != "family"}
    unknown = sorted(set(options) - {"split", "data_dir", "task_types"})
    if unknown or "split" not in options:
        raise ValueError(
            f"{alfworld_data.FAMILY} takes the parameters split, data_dir and task_types, of which "
            f"the first is needed; got {sorted(options)}."
        )
    found = alfworld_data.read(options.pop("split"), cache_dir=cache_dir, **options)
    order = random.Random(_ORDER_SEED).sample(found.tasks, len(found.tasks))
    chosen = order[seeds.start - first : seeds.stop - first]
    if len(chosen) < len(seeds):
        raise ValueError(
            f"{params['split']} holds {len(order)} official games of these task types, but the "
            f"splits ask for {seeds.stop - first}: lower the number."
        )
    return Collection(
        chosen,
        [f"{count} games left out: {reason}" for reason, count in found.left_out.items()
         if reason == "damaged"],
    )
