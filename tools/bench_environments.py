"""What environments cost sampling: the same episodes with TextWorld attached, and detached.

    python tools/bench_environments.py --size 1M --waves 1 2
    python tools/bench_environments.py --size 0.5B --dtype bfloat16 --slots 256 --games 64 --group_size 8

Attached, `rollout.collect` plays real games in worker processes. Detached, it plays the same episodes
again, answered at once with what the environments said at the same turn of the same episode. (Where
bfloat16 sums make a sampled token another one, its turn is still answered as recorded.) Every number of
waves plays --repeats such pairs, each of episodes of its own, after one to warm up; the best of each
side counts, and the loss of each pair tells how steady the machine is. The games themselves are the
same in all pairs, so that they are started already, as most are in a run.

The model is random and its turns are those of `bench_rollout`: ended after eight tokens on average, at most
--budget. Longer ones leave environments more time.
"""

if __name__ == "__main__":
    from jaxagentrl import pages

    pages.use_huge_ones()  # before jax is imported: it starts this process again

import argparse
import os
import tempfile
import time

import jax

from counts import positive
import bench_rollout
from envs_host import textworld
from envs_host.pool import EnvPool
from jaxagentrl import compiles, engine, pages, precision, rollout


class Recorder:
    """A pool that remembers what the pool behind it answered, by episode."""

    def __init__(self, pool: EnvPool):
        self.pool = pool
        self.step, self.release, self.wake = pool.step, pool.release, pool.wake
        self.answers: dict = {}

    def reset(self, handle, task):
        self.answers[handle] = []
        self.pool.reset(handle, task)

    def poll(self, limit_s=None, **options):
        answers = self.pool.poll(limit_s, **options)
        for handle, answer in answers:
            self.answers[handle].append(answer)
        return answers


class Recorded:
    """A pool that answers at once with what was recorded; beyond that, with the last of it."""

    def __init__(self, answers: dict):
        self.recorded, self.turns, self.answers = answers, {}, []

    def reset(self, handle, task):
        del task
        self.turns[handle] = -1
        self.step(handle, "")

    def step(self, handle, text):
        del text
        self.turns[handle] += 1
        recorded = self.recorded[handle]
        self.answers.append((handle, recorded[min(self.turns[handle], len(recorded) - 1)]))

    def poll(self, limit_s=None, until=None):
        del limit_s, until
        answers, self.answers = self.answers, []
        return answers

    def wake(self):
        pass

    def release(self, handle):
        del self.turns[handle]


def measure(world: bench_rollout.World, args: argparse.Namespace, num_waves: int) -> None:
    sampler = engine.Engine(
        world.config,
        num_slots=args.slots,
        num_waves=num_waves,
        max_length=world.max_length,
        max_turn_tokens=args.budget,
        stop_ids=world.stop_ids,
        filled_buckets=[*range(args.filled_step, world.max_length, args.filled_step), world.max_length],
        width_buckets=args.widths,
        row_divisors=args.row_divisors,
        cache_dtype=world.dtype,
    )
    before, since = compiles.count(), time.perf_counter()
    sampler.warm_up(world.params)
    print(
        f"{num_waves} waves of {args.slots // num_waves} slots: {compiles.count() - before} programs in "
        f"{time.perf_counter() - since:.0f} s",
        flush=True,
    )

    def play(pool, seed: int) -> dict[str, float]:
        played = rollout.collect(
            rollout.episodes(world.tasks, group_size=args.group_size, stream=(seed,)),
            rules=bench_rollout.make_rules(args.turns),
            pool=pool,
            engine=sampler,
            params=world.params,
            chat_format=world.chat_format,
        )
        turns = sum(trajectory.num_turns for trajectory in played.trajectories)
        count = len(played.trajectories)
        rates = {"turns_per_s": turns, "episodes_per_s": count}
        return played.ledger | {name: value / played.ledger["seconds"] for name, value in rates.items()}

    def loss(pair: dict[str, dict[str, float]]) -> float:
        return 1 - pair["attached"]["turns_per_s"] / pair["detached"]["turns_per_s"]

    best: dict[str, dict[str, float]] = {}
    losses = []
    for seed in range(1 + args.repeats):
        recorder = Recorder(world.pool)
        pair = {"attached": play(recorder, seed), "detached": play(Recorded(recorder.answers), seed)}
        for name, result in pair.items():
            if seed and result["turns_per_s"] > best.get(name, {"turns_per_s": 0})["turns_per_s"]:
                best[name] = result
        losses.append(loss(pair))
    for name, result in best.items():
        shares = ", ".join(
            f"{key.removesuffix('_share')} {value:.1%}"
            for key, value in result.items()
            if key.endswith("_share")
        )
        print(
            f"    {name}: {result['turns_per_s']:8.1f} turns/s, {result['episodes_per_s']:7.2f} episodes/s, "
            f"{result['seconds']:.2f} s; {shares}"
        )
    each = ", ".join(f"{value:.1%}" for value in losses[1:])
    print(f"    environments cost {loss(best):.1%} (pair by pair: {each})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=bench_rollout.SIZES, default="1M")
    parser.add_argument("--dtype", choices=bench_rollout.DTYPES, default="float32")
    parser.add_argument("--turns", type=positive, default=5)
    parser.add_argument("--budget", type=positive, default=bench_rollout.BUDGET, help="tokens of a turn at most")
    parser.add_argument("--games", type=positive, default=16)
    parser.add_argument("--group_size", type=positive, default=4, help="episodes of each game")
    parser.add_argument("--slots", type=positive, default=32)
    parser.add_argument("--waves", type=positive, nargs="+", default=[1, 2])
    parser.add_argument("--workers", type=positive, default=os.cpu_count())
    parser.add_argument("--repeats", type=positive, default=3)
    # Few programs, since large models take long to compile.
    parser.add_argument("--filled_step", type=positive, default=256)
    parser.add_argument("--widths", type=positive, nargs="+", default=[64])
    parser.add_argument("--row_divisors", type=positive, nargs="+", default=[1])
    parser.add_argument("--cache_dir", default="~/.cache/jaxagentrl/textworld")
    args = parser.parse_args()
    pages.keep()
    precision.keep_float32(args.dtype)
    specs = [dict(bench_rollout.GAMES, seed=seed) for seed in range(1, args.games + 1)]
    tasks = textworld.generate(specs, cache_dir=args.cache_dir, num_workers=args.workers).tasks
    limits = dict(step_limit_s=60.0, reset_limit_s=60.0, worker_memory_mb=2000.0)
    with tempfile.TemporaryDirectory() as directory, EnvPool(
        "textworld", {}, num_workers=args.workers, **limits
    ) as pool:
        world = bench_rollout.make_world(args, directory, pool, tasks, budget=args.budget)
        world = bench_rollout.for_sampling(world, args.dtype)
        size = sum(x.size for x in jax.tree.leaves(world.params))
        print(
            f"{args.size}: {size / 1e6:.1f} M parameters, {args.dtype}, {len(tasks)} games, "
            f"{args.group_size} episodes of {args.turns} turns of each, at most {args.budget} tokens a turn, "
            f"{args.workers} workers, {jax.devices()[0].device_kind}"
        )
        for num_waves in args.waves:
            measure(world, args, num_waves)


if __name__ == "__main__":
    main()
