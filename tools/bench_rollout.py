"""Multi-turn sampling, side by side: ours against the ways in which others sample a conversation.

    python tools/bench_rollout.py --size 25M --turns 5
    python tools/bench_rollout.py --size 25M --turns 25 --episodes 16
    python tools/bench_rollout.py --size 25M --turns 5 --group-size 8       groups of one game, as RL samples them
    python tools/bench_rollout.py --size 25M --turns 25 --per-turn     what each turn costs, ours alone
    python tools/bench_rollout.py --size 25M --alike                   groups whose members act alike for a while
    python tools/bench_rollout.py --size 1M --spread                   short and long episodes mixed or apart
    python tools/bench_rollout.py --size 0.5B --spread --dtype bfloat16      the same on an accelerator
    python tools/bench_rollout.py --size 25M --record rollout.jsonl    for tools/plot_rollout.py

In one run, with the same random weights (written as a Hugging Face folder by us, read by them), the
same TextWorld games in the same worker processes, the same temperature and budgets:

    ours        `rollout.collect`: slots, only what is new is appended
    reprefill   transformers `generate`: the whole conversation again every turn
    kept        transformers `generate`, its cache handed from turn to turn, padded where rows differ
    tunix       Tunix's vanilla sampler, the whole conversation again every turn (needs
                `pip install google-tunix`; only with --against tunix)

An untrained model never ends a turn, so one id in twelve counts as an end of turn: turns are ragged,
eight tokens on average, sixteen at most, and what is cut there is sent all the same. Every contender
plays once to warm up and compile, and is timed on other episodes, all of them in turn. Printed are
the episodes per second of each one's best repeat and our ratio to each.
"""

if __name__ == "__main__":
    from jaxagentrl import pages

    # For all sides, as the main job has them; before jax is imported: it starts this process again.
    pages.use_huge_ones()

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np

from counts import positive
from envs_host import textworld
from envs_host.pool import EnvPool
from envs_host.types import Info, ResetResult, StepResult
from jaxagentrl import chat, demos, engine, pages, precision, prefixes, rollout, tokenizer
from jaxagentrl.models import decoder, decoding_layout, pretrained

SIZES = {
    # For trying this program.
    "tiny": dict(
        vocab_size=1024, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        intermediate_size=64,
    ),
    "1M": dict(
        vocab_size=1024, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
        intermediate_size=384,
    ),
    "25M": dict(
        vocab_size=8192, hidden_size=384, num_layers=13, num_heads=6, num_kv_heads=3, head_dim=64,
        intermediate_size=1024,
    ),
    # The shape of SmolLM2-135M.
    "135M": dict(
        vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, head_dim=64,
        intermediate_size=1536,
    ),
    # The shape of Qwen2.5-0.5B, without its biases.
    "0.5B": dict(
        vocab_size=151936, hidden_size=896, num_layers=24, num_heads=14, num_kv_heads=2, head_dim=64,
        intermediate_size=4864,
    ),
    # That of Qwen2.5-1.5B, without its biases.
    "1.5B": dict(
        vocab_size=151936, hidden_size=1536, num_layers=28, num_heads=12, num_kv_heads=2, head_dim=128,
        intermediate_size=8960,
    ),
}
DTYPES = ("float32", "bfloat16")
BUDGET = 16
GAMES = dict(family="custom", world_size=2, nb_objects=3, quest_length=4, theme="basic")


@dataclasses.dataclass(frozen=True)
class Wrapped(chat.ChatFormat):
    """A chat format whose model has more ids than its tokenizer: the surplus wraps around."""

    def decode_action(self, ids) -> str:
        return super().decode_action(np.asarray(ids) % len(self.tokenizer))


@dataclasses.dataclass(frozen=True)
class World:
    """What all contenders share."""

    config: decoder.DecoderConfig
    params: decoder.Params
    folder: str  # where `compare` writes the model for the others
    chat_format: chat.ChatFormat
    tasks: list
    pool: EnvPool
    stop_ids: list[int]
    turns: int
    max_length: int
    group_size: int = 1  # episodes of each task
    dtype: str = "float32"  # of parameters, computation and cache


def for_sampling(world: World, dtype: str) -> World:
    """The same world with its parameters as runs hold them for sampling."""
    params = decoding_layout.for_decoding(world.params, dtype)
    return dataclasses.replace(world, params=params, dtype=dtype)


def make_engine(world: World, num_slots: int, num_waves: int, stop_ids=None) -> engine.Engine:
    length = world.max_length
    step = 64 if length <= 512 else 128
    return engine.Engine(
        world.config,
        num_slots=num_slots,
        num_waves=num_waves,
        max_length=length,
        max_turn_tokens=BUDGET,
        stop_ids=world.stop_ids if stop_ids is None else stop_ids,
        filled_buckets=sorted({*range(step, length, step), length}),
        width_buckets=(33, 48, 64),
        row_divisors=(1, 2, 8),
        cache_dtype=world.dtype,
    )


def make_rules(turns: int) -> rollout.Rules:
    return rollout.Rules(
        max_turns=turns,
        temperature=1.0,
        prompt_style="brief",
        show_admissible=False,
        cut_turns="send",
    )


def ours(world: World, num_slots: int, num_waves: int):
    """Our sampler; returns a function that plays episodes and says how it went."""
    sampler = make_engine(world, num_slots, num_waves)
    rules = make_rules(world.turns)

    def play(seed: int) -> dict[str, float]:
        played = rollout.collect(
            rollout.episodes(world.tasks, group_size=world.group_size, stream=(seed,)),
            rules=rules,
            pool=world.pool,
            engine=sampler,
            params=world.params,
            chat_format=world.chat_format,
        )
        turns = sum(trajectory.num_turns for trajectory in played.trajectories)
        return {"episodes": len(played.trajectories), "turns": turns} | played.ledger

    sampler.warm_up(world.params)
    return play


def lockstep(world: World, sample_turn):
    """Plays all episodes turn by turn with `sample_turn(histories, new_ids, state)`, as peers do."""

    def play(seed: int) -> dict[str, float]:
        del seed
        tasks = [task for task in world.tasks for _ in range(world.group_size)]
        count = len(tasks)
        for index, task in enumerate(tasks):
            world.pool.reset(index, task)
        answers = _answers(world.pool, count)
        live = list(range(count))
        histories = {i: np.zeros(0, np.int32) for i in live}
        actions: dict[int, np.ndarray] = {}
        state, turns = None, 0
        for turn in range(world.turns):
            new = {}
            for index in live:
                answer, form = answers[index], world.chat_format
                if turn == 0:
                    text = chat.first_user_text(
                        answer.info.objective, answer.observation, None, style="brief"
                    )
                    new[index] = form.first_prompt(text)
                else:
                    ended = int(actions[index][-1]) == form.end_of_turn_id
                    text = chat.later_user_text(answer.observation, None, style="brief")
                    new[index] = form.next_prompt(text, ended=ended)
                histories[index] = np.concatenate([histories[index], new[index]])
            actions, state = sample_turn(histories, new, live, state)
            turns += len(live)
            for index in live:
                histories[index] = np.concatenate([histories[index], actions[index]])
                world.pool.step(index, world.chat_format.decode_action(actions[index]))
            answers = _answers(world.pool, len(live))
        for index in range(count):
            world.pool.release(index)
        return {"episodes": count, "turns": turns}

    return play


def _answers(pool: EnvPool, count: int) -> dict:
    answers: dict = {}
    while len(answers) < count:
        answers |= dict(pool.poll())
    return answers


def transformers_reprefill(world: World):
    import bench_transformers

    return bench_transformers.reprefill(world, lockstep, BUDGET)


def transformers_kept_cache(world: World):
    import bench_transformers

    return bench_transformers.kept_cache(world, lockstep, BUDGET)


def tunix_sampler(world: World):
    """Tunix's vanilla sampler (a Llama of the same shape and weights), text in and text out."""
    import bench_tunix

    return bench_tunix.contender(world, lockstep, BUDGET)


def make_world(args, directory: str, pool: EnvPool, tasks, *, budget: int = BUDGET) -> World:
    config = decoder.DecoderConfig(**SIZES[args.size])
    params = jax.jit(functools.partial(decoder.init, config))(jax.random.key(0))
    replays = demos.replay(tasks, pool)
    texts = demos.texts(replays, prompt_style="brief", show_admissible=False)
    trained = tokenizer.train(
        texts, vocab_size=768, directory=pathlib.Path(directory) / "tokenizer", names="parts",
        phrases=True, glue_tokens=True, lexicon=[],
    )
    made = chat.make(trained)
    fields = {field.name: getattr(made, field.name) for field in dataclasses.fields(made)}
    chat_format = Wrapped(**fields)
    stop_ids = sorted({*range(11, config.vocab_size, 12), made.end_of_turn_id})
    per_turn = budget + 40
    max_length = -(-(120 + per_turn * args.turns) // 64) * 64
    folder = str(pathlib.Path(directory) / "model")
    return World(config, params, folder, chat_format, tasks, pool, stop_ids, args.turns, max_length)


def compare(world: World, args) -> dict[str, float]:
    """Turns per second of every contender."""
    pretrained.save(world.folder, world.config, world.params, tokenizer=world.chat_format.tokenizer)
    slots = args.slots or -(-len(world.tasks) * world.group_size // args.waves) * args.waves
    contenders = {
        "ours": lambda world: ours(for_sampling(world, args.dtype), slots, args.waves),
        "kept": transformers_kept_cache,
        "reprefill": transformers_reprefill,
        "tunix": tunix_sampler,
    }
    plays = {name: contenders[name](world) for name in ("ours", *args.against)}
    for play in plays.values():
        play(0)
    best: dict = {}
    for repeat in range(args.repeats):  # in turn, so that a slow minute of the machine hits all of them
        for name, play in plays.items():
            since = time.perf_counter()
            result = play(1 + repeat)
            seconds = time.perf_counter() - since
            if name not in best or seconds / result["turns"] < best[name][0] / best[name][1]["turns"]:
                best[name] = seconds, result
    rates = {name: result["turns"] / seconds for name, (seconds, result) in best.items()}
    for name, rate in rates.items():
        print(
            f"{name:11} {rate / world.turns:8.3f} episodes/s  {1e3 / rate:8.2f} ms a turn  "
            f"ours is {rates['ours'] / rate:6.2f} x",
            flush=True,
        )
        if name == "ours":
            print("            " + ", ".join(
                f"{key} {value:.2f}" for key, value in best[name][1].items() if key.endswith("share")
            ))
    return rates


def per_turn(world: World) -> None:
    """Cost of a turn by its number: all episodes in lockstep, equal tokens every turn, no stops."""
    rows, new, told, repeats = len(world.tasks), 24, 8, 3
    sampler = make_engine(world, rows, 1, stop_ids=[-1])
    sampler.warm_up(world.params)
    ids = np.random.default_rng(0).integers(0, world.config.vocab_size, (world.turns, rows, new))
    seconds = np.full((repeats, world.turns), np.inf)
    for repeat in range(repeats):
        for slot in range(rows):
            sampler.release(0, slot)
        for turn in range(world.turns):
            since = time.perf_counter()
            for slot in range(rows):
                request = engine.TurnRequest(slot, ids[turn, slot], told, (repeat, slot, turn))
                sampler.submit(0, request)
            sampler.launch(world.params, 0)
            sampler.receive(0)
            seconds[repeat, turn] = time.perf_counter() - since
    best = 1e3 * seconds.min(0) / rows
    for turn, value in enumerate(best, 1):
        held = turn * (new + told)
        print(f"turn {turn:3}: {value:7.2f} ms a row, {held} tokens held")
    if world.turns > 5:
        print(f"turn {world.turns} costs {best[-1] / best[4]:.2f} x turn 5")


def alike(world: World, members: int = 8) -> None:
    """Turns after the first of groups whose members act alike for a while, copied and computed.

    Member m of M acts and hears what member 0 does in the first m / M of its turns: of what is appended
    over many turns, nearly half is another's. A group's common first prompt is not timed.
    """
    rows, new, told = len(world.tasks), 24, 8
    sampler = make_engine(world, rows, 1, stop_ids=[-1])
    sampler.warm_up(world.params)
    ids = np.random.default_rng(0).integers(0, world.config.vocab_size, (world.turns, rows, new))
    least, best = prefixes.LEAST, {}
    for repeat in range(2):
        for name, worth_it in (("copied", least), ("computed", world.max_length + 1)):
            prefixes.LEAST = worth_it
            seconds, before = 0.0, dataclasses.replace(sampler.counters)
            for slot in range(rows):
                sampler.release(0, slot)
            for turn in range(world.turns):
                since = time.perf_counter()
                for slot in range(rows):
                    group, member = divmod(slot, members)
                    leader = group * members if turn * members < member * world.turns else slot
                    request = engine.TurnRequest(slot, ids[turn, leader], told, (repeat, leader, turn))
                    sampler.submit(0, request)
                sampler.launch(world.params, 0)
                sampler.receive(0)
                seconds += (turn > 0) * (time.perf_counter() - since)
                if turn == 0:
                    before = dataclasses.replace(sampler.counters)
            used = sampler.counters.since(before)
            best[name] = min(best.get(name, np.inf), seconds)
            print(
                f"{name:8}: {(world.turns - 1) * rows / seconds:8.2f} turns/s, {used.tokens_forked} tokens "
                f"copied, {used.tokens_extended} computed, {used.seconds_extend:.2f} s of {seconds:.2f} in "
                "extends",
                flush=True,
            )
    prefixes.LEAST = least
    print(f"copying is {best['computed'] / best['copied']:.2f} x as fast")


class Countdown:
    """Environments that answer at once and end after as many turns as their task's seed."""

    def __init__(self):
        self.answers, self.tasks, self.left = [], {}, {}

    def reset(self, handle, task):
        self.tasks[handle], self.left[handle] = task, task.seed
        self.answers.append((handle, ResetResult("You see a box.", self.info(task))))

    def step(self, handle, text):
        self.left[handle] -= 1
        done, info = self.left[handle] == 0, self.info(self.tasks[handle])
        self.answers.append((handle, StepResult("Nothing happens.", 0.0, done, False, info)))

    def info(self, task):
        return Info(0.0, 1.0, False, False, True, "", 0.0, (), task.objective)

    def poll(self, limit_s=None, until=None):
        answers, self.answers = self.answers, []
        return answers

    def wake(self):
        pass

    def release(self, handle):
        del self.tasks[handle], self.left[handle]


def spread(world: World, num_slots: int, num_waves: int) -> None:
    """Turns per second of short and long episodes mixed, and of the same episodes length by length.

    The same turns with the same beginnings and histories: what differs is that slots fall free at
    different times, and that short and long rows share a call. Beginnings are the objectives of
    --episodes games: if all had one, those that begin together would copy it, which equal lengths do.
    """
    lengths = [n for n in (1, 2, 3, 5, 10, 20) if n <= world.turns]
    each = 3 * num_slots
    games = world.tasks
    tasks = {
        # Every episode its own digest, so its own random stream.
        n: [
            dataclasses.replace(games[j % len(games)], seed=n, digest=f"{each * i + j:064x}"[::-1])
            for j in range(each)
        ]
        for i, n in enumerate(lengths)
    }
    mixed = [task for n in lengths for task in tasks[n]]
    np.random.default_rng(0).shuffle(mixed)
    sampler = make_engine(world, num_slots, num_waves)
    sampler.warm_up(world.params)

    sets = tasks | {"mixed": mixed}
    best: dict = {}
    for _ in range(3):  # in turn, so that a slow minute of the machine does not hit one of them alone
        for name, some in sets.items():
            played = rollout.collect(
                rollout.episodes(some, group_size=1, stream=(0,)),
                rules=make_rules(world.turns),
                pool=Countdown(),
                engine=sampler,
                params=world.params,
                chat_format=world.chat_format,
            )
            best[name] = min(best.get(name, np.inf), played.ledger["seconds"])
    for n in lengths:
        rate = each * n / best[n]
        print(f"{each} episodes of {n:2} turns in {num_slots} slots: {rate:8.1f} turns/s")
    turns, apart = each * sum(lengths), sum(best[n] for n in lengths)
    print(
        f"these one after the other: {turns / apart:8.1f} turns/s\n"
        f"all of them mixed:         {turns / best['mixed']:8.1f} turns/s, "
        f"{apart / best['mixed']:.2f} x"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1M")
    parser.add_argument("--turns", type=positive, help="default: 5, or 20 with --spread")
    parser.add_argument("--episodes", type=positive, default=32)
    parser.add_argument("--group-size", type=positive, default=1, help="episodes of one game; of a comparison alone")
    parser.add_argument("--slots", type=positive, help="default: one for each episode, 32 with --spread")
    parser.add_argument("--waves", type=positive, default=2, help="on a CPU up to one per core run side by side")
    parser.add_argument("--workers", type=positive, default=2, help="processes of environments")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights and cache")
    parser.add_argument("--repeats", type=positive, default=2)
    parser.add_argument(
        "--against", nargs="+", choices=("kept", "reprefill", "tunix"), default=("kept", "reprefill")
    )
    parser.add_argument("--per-turn", action="store_true")
    parser.add_argument("--alike", action="store_true")
    parser.add_argument("--spread", action="store_true")
    parser.add_argument("--record", help="a file to which the comparison's numbers are appended")
    parser.add_argument("--cache-dir", default="~/.cache/jaxagentrl/textworld")
    args = parser.parse_args()
    if args.dtype != "float32" and not (args.per_turn or args.alike or args.spread):
        parser.error(
            f"--dtype {args.dtype} is for our sampler alone: it goes with --per-turn, --alike or --spread (and "
            "bench_environments.py), the others play in float32."
        )
    if args.alike and args.turns == 1:
        parser.error("--alike times the turns after the first: give --turns at least 2.")
    if args.episodes % args.group_size or (args.group_size > 1 and (args.per_turn or args.alike or args.spread)):
        parser.error(
            f"--group-size {args.group_size} must divide --episodes ({args.episodes}) and goes with the comparison alone."
        )
    if args.slots is None and args.spread:
        args.slots = 32
    if args.waves < 1 or (args.slots or 0) % args.waves:
        parser.error(f"--slots must be a multiple of --waves, got {args.slots} and {args.waves}.")
    pages.keep()
    precision.keep_float32(args.dtype)

    if args.turns is None:
        args.turns = 20 if args.spread else 5
    specs = [dict(GAMES, seed=seed) for seed in range(1, args.episodes // args.group_size + 1)]
    tasks = textworld.generate(specs, cache_dir=args.cache_dir, num_workers=args.workers).tasks
    limits = dict(step_limit_s=60.0, reset_limit_s=60.0, worker_memory_mb=2000.0)
    with tempfile.TemporaryDirectory() as directory, EnvPool(
        "textworld", {}, num_workers=args.workers, **limits
    ) as pool:
        world = dataclasses.replace(make_world(args, directory, pool, tasks), group_size=args.group_size)
        size = sum(x.size for x in jax.tree.leaves(world.params))
        print(
            f"{args.size}: {size / 1e6:.1f} M parameters, {args.dtype}, {len(tasks) * args.group_size} episodes of "
            f"{args.turns} turns in groups of {args.group_size}, at most {BUDGET} tokens a turn, {jax.devices()[0].platform}"
        )
        if args.per_turn:
            per_turn(for_sampling(world, args.dtype))
        elif args.alike:
            alike(for_sampling(world, args.dtype))
        elif args.spread:
            spread(for_sampling(world, args.dtype), args.slots, args.waves)
        else:
            rates = compare(world, args)
            if args.record:
                with open(args.record, "a") as file:
                    result = dict(
                        size=args.size, turns=args.turns, group_size=args.group_size, turns_per_second=rates
                    )
                    file.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
