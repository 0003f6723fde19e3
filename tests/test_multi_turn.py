"""Real engine, real worker processes, ragged episodes: what is sampled depends on the seed alone."""

import dataclasses
import functools

import fakes
import jax
import numpy as np
import pytest

from envs_host.pool import EnvPool
from envs_host.types import StopReason, Task
from jaxagentrl import chat, demos, engine, logprobs, rollout, tokenizer
from jaxagentrl.models import decoder

LENGTH = 256
COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture(scope="module")
def chat_format(tmp_path_factory):
    texts = ["box key door room", "Say words.", "take the box"]
    made = tokenizer.train(texts * 9, vocab_size=300, directory=tmp_path_factory.mktemp("tokens"))
    return chat.make(made)


@functools.cache
def make_model(vocab_size: int):
    config = decoder.DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        intermediate_size=32,
    )
    params = decoder.init(config, jax.random.key(0))
    # Ends a turn after a few tokens, and is sure enough of the rest that rounding decides nothing.
    params["embed"]["embedding"] = params["embed"]["embedding"] * 10
    return config, params


def make_engine(chat_format, *, num_slots, num_waves, linger_share=0.0, **options):
    config, _ = make_model(len(chat_format.tokenizer))
    defaults = dict(max_length=LENGTH, filled_buckets=(LENGTH,), width_buckets=(32,), row_divisors=(1,))
    return engine.Engine(
        config,
        num_slots=num_slots,
        num_waves=num_waves,
        max_turn_tokens=8,
        stop_ids=[chat_format.end_of_turn_id],
        linger_share=linger_share,
        **defaults | options,
    )


def make_tasks(count: int) -> list[Task]:
    return [
        Task("fakes:RaggedEnv", f"game-{i}", {}, i, "", f"{i:08x}" * 8, "Say words.", 1.0, ())
        for i in range(count)
    ]


def make_pool(num_workers=1, **env_kwargs):
    return EnvPool(
        "fakes:RaggedEnv",
        env_kwargs,
        num_workers=num_workers,
        step_limit_s=60.0,
        reset_limit_s=60.0,
        worker_memory_mb=1000.0,
    )


def make_rules(**changes) -> rollout.Rules:
    fields = dict(max_turns=20, temperature=1.0, prompt_style="brief", show_admissible=False)
    return rollout.Rules(**fields | changes)


def play(chat_format, eng, pool, to_play, **rules):
    _, params = make_model(len(chat_format.tokenizer))
    options = dict(pool=pool, engine=eng, params=params, chat_format=chat_format)
    # An untrained model seldom ends a turn; a stop string makes the others reach the environment.
    rules = {"stop_strings": ("o", "e", "a")} | rules
    return rollout.collect(to_play, rules=make_rules(**rules), **options)


def assert_scored_alike(chat_format, trajectories) -> None:
    """Every context, scored at once without a cache, gives the log-probs that were reported."""
    config, params = make_model(len(chat_format.tokenizer))
    pieces = [(t, start, size) for t in trajectories for start, size in t.contexts]
    ids = np.zeros((len(pieces), LENGTH), np.int32)
    for row, (trajectory, start, size) in enumerate(pieces):
        ids[row, :size] = trajectory.tokens[start : start + size]
    x = decoder.hidden(config, params, ids)
    scores, _ = logprobs.token_logprobs(x, decoder.unembedding(params), ids)
    for row, (trajectory, start, size) in enumerate(pieces):
        fields = trajectory.token_fields()
        sampled = fields["action_mask"][start : start + size]
        expected = np.asarray(scores)[row, :size][sampled]
        reported = fields["sampler_logprobs"][start : start + size][sampled]
        np.testing.assert_allclose(reported, expected, atol=1e-4)


def assert_same(one: rollout.Rollout, other: rollout.Rollout) -> None:
    assert not one.failures and not other.failures
    for a, b in zip(one.trajectories, other.trajectories, strict=True):
        assert (a.task, a.member, a.stop_reason) == (b.task, b.member, b.stop_reason)
        np.testing.assert_array_equal(a.tokens, b.tokens)
        for mine, yours in zip(a.turns, b.turns, strict=True):
            np.testing.assert_allclose(mine.logprobs, yours.logprobs, atol=1e-5)


@pytest.fixture(scope="module")
def reference(chat_format):
    """Twelve games, three members each: four slots, one wave, one process."""
    to_play = rollout.episodes(make_tasks(12), group_size=3, stream=(1,))
    with make_pool() as pool:
        return play(chat_format, make_engine(chat_format, num_slots=4, num_waves=1), pool, to_play)


@pytest.mark.parametrize(
    "slots, waves, workers, linger, rules",
    [
        (64, 1, 1, 0.0, {}),
        (8, 4, 8, 0.0, {}),
        (12, 2, 3, 0.4, {"straggler_s": 0.002}),
    ],
)
def test_slots_waves_workers_and_latencies_change_nothing(
    chat_format, reference, slots, waves, workers, linger, rules
):
    to_play = rollout.episodes(make_tasks(12), group_size=3, stream=(1,))
    eng = make_engine(chat_format, num_slots=slots, num_waves=waves, linger_share=linger)
    with make_pool(workers, latency_s=0.02) as pool:
        other = play(chat_format, eng, pool, to_play, **rules)
    assert_same(reference, other)
    turns = {trajectory.num_turns for trajectory in other.trajectories}
    assert len(turns) > 4 and max(turns) > 8  # ragged, else this shows little
    # Another seed is another rollout; a part of the episodes is a part of the rollout.
    with make_pool() as pool:
        part = play(chat_format, eng, pool, to_play[5:8])
        again = play(
            chat_format, eng, pool, rollout.episodes(make_tasks(2), group_size=1, stream=(2,))
        )
    for a, b in zip(reference.trajectories[5:8], part.trajectories, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
    assert any(
        a.tokens.tolist() != b.tokens.tolist()
        for a, b in zip(reference.trajectories[::3], again.trajectories)
    )


def test_the_record_is_what_a_forward_pass_over_it_says(chat_format, reference):
    assert_scored_alike(chat_format, reference.trajectories)


@pytest.fixture(scope="module")
def small_engine(chat_format):
    """Slots too small for long episodes."""
    return make_engine(chat_format, num_slots=8, num_waves=2, max_length=96, filled_buckets=(96,))


def test_a_window_slides_over_turns(chat_format, small_engine):
    to_play = rollout.episodes(make_tasks(12), group_size=2, stream=(1,))
    with make_pool(2) as pool:
        ended = play(chat_format, small_engine, pool, to_play)
        slid = play(chat_format, small_engine, pool, to_play, context="window", context_keep=0.8)
    cut = [t.stop_reason is StopReason.TOKEN_LIMIT for t in ended.trajectories]
    assert any(cut) and not all(cut)
    assert not any(t.stop_reason is StopReason.TOKEN_LIMIT for t in slid.trajectories)
    for was_cut, a, b in zip(cut, ended.trajectories, slid.trajectories, strict=True):
        # Up to the slide nothing differs, and who had room enough never slid.
        assert (len(b.contexts) > 1) == was_cut
        np.testing.assert_array_equal(a.tokens, b.tokens[: a.num_tokens])
        assert all(size <= 96 for _, size in b.contexts)
        for index, turn in enumerate(b.turns):
            if turn.fresh:
                # The last turn before the slide is still there, word for word.
                last = b.turns[index - 1].action_ids.tolist()
                prompt = turn.prompt_ids.tolist()
                assert any(prompt[i : i + len(last)] == last for i in range(len(prompt)))
    assert_scored_alike(chat_format, slid.trajectories)


def test_a_context_that_reopens_keeps_what_it_begins_with(chat_format, small_engine, monkeypatch):
    to_play = rollout.episodes(make_tasks(6), group_size=1, stream=(2,))
    rules = dict(context="last_turns", history_turns=1)

    def play_it():
        with make_pool(2) as pool:
            return play(chat_format, small_engine, pool, to_play, **rules)

    kept = play_it()
    # Against giving the whole slot back.
    monkeypatch.setattr(small_engine, "rewind", lambda wave, slot, ids: small_engine.release(wave, slot) or 0)
    anew = play_it()
    assert_same(kept, anew)
    reopened = sum(turn.fresh for t in kept.trajectories for turn in t.turns)
    saved = anew.ledger["tokens_prefilled"] - kept.ledger["tokens_prefilled"]
    saved += anew.ledger["tokens_forked"] - kept.ledger["tokens_forked"]
    assert reopened > 10 and saved >= 5 * reopened  # "Say words." and what is around it


@pytest.mark.parametrize("history", [0, 2])
def test_the_last_turns_alone_are_shown(chat_format, small_engine, history):
    to_play = rollout.episodes(make_tasks(12), group_size=1, stream=(2,))
    with make_pool(2) as pool:
        played = play(
            chat_format, small_engine, pool, to_play, context="last_turns", history_turns=history
        )
    assert not any(t.stop_reason is StopReason.TOKEN_LIMIT for t in played.trajectories)
    longest = max(played.trajectories, key=lambda t: t.num_turns)
    assert longest.num_turns > 5
    for index, turn in enumerate(longest.turns):
        assert turn.fresh == (index > history)
        if turn.fresh:
            shown = longest.turns[index - history : index]
            expected = chat_format.first_prompt(
                chat.first_user_text(
                    "Say words.", (*shown, turn)[0].observation, None, style="brief"
                )
            ).tolist()
            for before, after in zip(shown, (*shown[1:], turn)):
                ended = int(before.action_ids[-1]) == chat_format.end_of_turn_id
                text = chat.later_user_text(after.observation, None, style="brief")
                expected += before.action_ids.tolist()
                expected += chat_format.next_prompt(text, ended=ended).tolist()
            assert turn.prompt_ids.tolist() == expected
    assert_scored_alike(chat_format, played.trajectories)


def test_two_hundred_ragged_episodes_compile_nothing_after_warm_up(chat_format):
    eng = make_engine(
        chat_format,
        num_slots=32,
        num_waves=2,
        filled_buckets=(96, LENGTH),
        width_buckets=(16, 64),
        row_divisors=(1, 4),
    )
    _, params = make_model(len(chat_format.tokenizer))
    eng.warm_up(params)
    compiled = []

    def listen(event: str, duration: float, **_) -> None:
        if event == COMPILED:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        to_play = rollout.episodes(make_tasks(50), group_size=4, stream=(3,))
        with make_pool(2) as pool:
            played = play(chat_format, eng, pool, to_play)
        assert not compiled and played.ledger["compiles"] == 0
        jax.jit(lambda x: x + 1)(np.zeros(3)).block_until_ready()
        assert compiled  # the listener hears
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(played.trajectories) == 200
    assert played.ledger["tokens_forked"] > 0
    used = sum(t.num_tokens for t in played.trajectories)
    sampled = sum(t.num_action_tokens for t in played.trajectories)
    # Every token of a prompt enters the cache once, or as the first input of a decode.
    appended = played.ledger["tokens_prefilled"] + played.ledger["tokens_forked"]
    assert appended <= used - sampled + sum(t.num_turns for t in played.trajectories)
    assert used < played.ledger["tokens_reprefill"]


def test_the_ledger_accounts_for_all_seconds(reference):
    shares = [value for key, value in reference.ledger.items() if key.endswith("_share")]
    shares.remove(reference.ledger["padding_share"])
    np.testing.assert_allclose(sum(shares), 1.0, atol=1e-6)
    assert 0 < reference.ledger["slot_occupancy"] <= 1
    assert 0 < reference.ledger["decode_occupancy"] <= 1


def test_two_waves_that_compile_at_the_same_time_count_it_once(chat_format):
    to_play = rollout.episodes(make_tasks(4), group_size=1, stream=(1,))
    eng = make_engine(chat_format, num_slots=4, num_waves=2)  # not warmed up
    with make_pool() as pool:
        ledger = play(chat_format, eng, pool, to_play).ledger
    assert ledger["compiles"] > 0 and ledger["compile_share"] > 0.3
    shares = [value for key, value in ledger.items() if key.endswith("_share") and key != "padding_share"]
    assert sum(shares) == pytest.approx(1.0, abs=0.02)


def test_a_turn_can_be_forked_and_goes_on_from_the_same_state(chat_format, reference):
    longest = max(reference.trajectories, key=lambda trajectory: trajectory.num_turns)
    turn = longest.num_turns // 2
    to_play = rollout.branch(longest, turn, group=7, num_members=5, stream=(9,))
    eng = make_engine(chat_format, num_slots=8, num_waves=1)
    with make_pool(2) as pool:
        played = play(chat_format, eng, pool, to_play)
    assert not played.failures and len(played.trajectories) == 5
    shared = sum(item.num_tokens for item in longest.turns[:turn])
    assert played.ledger["tokens_forked"] >= 4 * shared  # computed for one, copied for four
    for trajectory in played.trajectories:
        assert trajectory.group == 7 and trajectory.num_turns > turn
        np.testing.assert_array_equal(trajectory.tokens[:shared], longest.tokens[:shared])
        assert trajectory.turns[turn].observation == longest.turns[turn].observation
        np.testing.assert_array_equal(
            trajectory.turns[turn].prompt_ids, longest.turns[turn].prompt_ids
        )
    assert len({tuple(t.tokens.tolist()) for t in played.trajectories}) > 1
    assert_scored_alike(chat_format, played.trajectories)
    with pytest.raises(ValueError, match="cannot branch"):
        rollout.branch(longest, longest.num_turns, group=0, num_members=1, stream=())


def test_an_environment_that_cannot_be_replayed_is_a_counted_failure(chat_format, reference):
    longest = max(reference.trajectories, key=lambda trajectory: trajectory.num_turns)
    to_play = rollout.branch(longest, 2, group=0, num_members=2, stream=(9,))
    with make_pool(forgets=True) as pool:
        played = play(chat_format, make_engine(chat_format, num_slots=4, num_waves=1), pool, to_play)
    assert [failure.reason for _, failure in played.failures] == ["not deterministic"] * 2


@pytest.mark.parametrize("turn", [0, 2])
def test_the_state_that_a_branch_begins_at_is_compared_too(chat_format, reference, turn):
    longest = max(reference.trajectories, key=lambda trajectory: trajectory.num_turns)
    to_play = rollout.branch(longest, turn, group=0, num_members=2, stream=(9,))
    # All that the prefix's own turns were told is the same; what its last command leads to is not.
    with make_pool(forgets_after=turn - 1) as pool:
        played = play(chat_format, make_engine(chat_format, num_slots=4, num_waves=1), pool, to_play)
    assert not played.trajectories
    assert [failure.reason for _, failure in played.failures] == ["not deterministic"] * 2


def test_a_score_that_is_another_is_told_of(chat_format, reference):
    longest = max(reference.trajectories, key=lambda trajectory: trajectory.num_turns)
    changed = dataclasses.replace(longest.turns[1], score=0.25)
    other = dataclasses.replace(longest, turns=[longest.turns[0], changed, *longest.turns[2:]])
    to_play = rollout.branch(other, 3, group=0, num_members=1, stream=(9,))
    with make_pool() as pool:
        played = play(chat_format, make_engine(chat_format, num_slots=4, num_waves=1), pool, to_play)
    ((_, failure),) = played.failures
    assert "replayed to turn 2, the score is 0.0, but then it was 0.25" in failure.message


@pytest.fixture(scope="module")
def walked():
    """Games of 6 to 9 turns with their walkthroughs, and these as they went."""
    ends = {task.name: fakes.RaggedEnv.num_turns(task) for task in make_tasks(40)}
    tasks = [
        dataclasses.replace(task, walkthrough=("take the box", "say door") * 20)
        for task in make_tasks(40)
        if 6 <= ends[task.name] <= 9
    ]
    tasks = [dataclasses.replace(task, walkthrough=task.walkthrough[: ends[task.name]]) for task in tasks]
    with make_pool() as pool:
        return tasks, demos.replay(tasks, pool)


@pytest.mark.parametrize(
    "rules",
    [{}, {"context": "last_turns", "history_turns": 1}, {"context": "window", "context_keep": 0.3}],
    ids=["whole", "last turns", "window"],
)
def test_an_episode_begins_behind_its_walkthrough(chat_format, walked, rules):
    """With the very ids that a demonstration has there, and nothing of them among its turns."""
    tasks, replays = walked
    heads = [1 + index % 5 for index in range(len(tasks))]
    size = dict(max_length=112 if rules.get("context") == "window" else LENGTH)
    eng = make_engine(chat_format, num_slots=4, num_waves=2, filled_buckets=(size["max_length"],), **size)
    to_play = rollout.episodes(tasks, group_size=2, stream=(3,), head_starts=heads)
    with make_pool(2) as pool:
        played = play(chat_format, eng, pool, to_play, max_turns=5, cut_turns="send", **rules)
    shown = demos.encode(replays, chat_format, make_rules(**rules), max_turn_tokens=8, **size)
    assert not played.failures and len(played.trajectories) == 2 * len(tasks)
    slid = 0
    for trajectory in played.trajectories:
        demonstration, head = shown[trajectory.group], heads[trajectory.group]
        first, expected = trajectory.turns[0], demonstration.turns[head]
        held = demonstration.turns[:head]
        since = max((index for index, turn in enumerate(held) if turn.fresh), default=0)
        before = [ids for turn in held[since:] for ids in (turn.prompt_ids, turn.action_ids)]
        slid += expected.fresh or since > 0
        ids = expected.prompt_ids if expected.fresh else np.concatenate([*before, expected.prompt_ids])
        assert trajectory.head_start == head
        np.testing.assert_array_equal(first.prompt_ids, ids)
        assert first.fresh  # what is before it counts once, in its prompt
        assert first.observation == expected.observation and first.reward == 0.0
        assert trajectory.num_turns <= 5  # the walkthrough's are none of these
        left = len(trajectory.task.walkthrough) - head
        assert trajectory.stop_reason == (StopReason.DONE if left <= 5 else StopReason.TURN_LIMIT)
    assert (slid > 0) == bool(rules)
    assert_scored_alike(chat_format, played.trajectories)
    # A turn of such an episode can be forked, too.
    parent = max(played.trajectories, key=lambda trajectory: trajectory.num_turns)
    with make_pool() as pool:
        branches = rollout.branch(parent, 2, group=0, num_members=2, stream=(9,))
        forked = play(chat_format, eng, pool, branches, max_turns=5, cut_turns="send", **rules)
    assert not forked.failures
    for trajectory in forked.trajectories:
        assert trajectory.head_start == parent.head_start
        for one, other in zip(trajectory.turns[:2], parent.turns[:2], strict=True):
            np.testing.assert_array_equal(one.prompt_ids, other.prompt_ids)
            np.testing.assert_array_equal(one.action_ids, other.action_ids)
        np.testing.assert_array_equal(trajectory.turns[2].prompt_ids, parent.turns[2].prompt_ids)
    assert_scored_alike(chat_format, forked.trajectories)


def test_where_a_head_start_leaves_no_room_an_episode_is_played_from_the_start(chat_format, walked):
    tasks, _ = walked
    eng = make_engine(chat_format, num_slots=4, num_waves=1, max_length=128, filled_buckets=(128,))
    with make_pool() as pool:
        late, plain = (
            play(chat_format, eng, pool, rollout.episodes(tasks, group_size=1, stream=(3,), head_starts=heads))
            for heads in ([5] * len(tasks), None)
        )
    starts = [trajectory.head_start for trajectory in late.trajectories]
    assert set(starts) == {0, 5} and len(starts) == len(tasks) and not late.failures
    for one, other in zip(late.trajectories, plain.trajectories, strict=True):
        if not one.head_start:
            np.testing.assert_array_equal(one.tokens, other.tokens)
            assert (one.score, one.stop_reason) == (other.score, other.stop_reason)


def test_a_walkthrough_that_ends_before_the_episode_begins_is_a_failure(chat_format, walked):
    tasks, _ = walked
    number = len(tasks[0].walkthrough)
    task = dataclasses.replace(tasks[0], walkthrough=(*tasks[0].walkthrough, "say door", "say door"))
    (episode,) = rollout.episodes([task], group_size=1, stream=(3,), head_starts=[number + 1])
    with make_pool() as pool:
        played = play(chat_format, make_engine(chat_format, num_slots=4, num_waves=1), pool, [episode])
    ((_, failure),) = played.failures
    assert f"after command {number} of {number + 2} of its walkthrough the episode is over" in failure.message


def test_stop_strings_cut_after_the_token_that_completes_one(chat_format, reference):
    cut = 0
    for trajectory in reference.trajectories:
        for turn in trajectory.turns:
            found = [
                any(text in chat_format.decode(turn.action_ids[:count]) for text in "oea")
                for count in range(1, len(turn.action_ids) + 1)
            ]
            assert not any(found[:-1])
            cut += found[-1]
            # A cut turn reached the environment; one that neither stopped nor ended did not.
            assert found[-1] or turn.action_ids[-1] == chat_format.end_of_turn_id or not turn.command
    assert cut > 20


def test_an_episode_past_its_time_is_truncated_and_holds_nobody_up(chat_format):
    to_play = rollout.episodes(make_tasks(6), group_size=1, stream=(1,))
    eng = make_engine(chat_format, num_slots=4, num_waves=2)
    eng.warm_up(make_model(len(chat_format.tokenizer))[1])
    with make_pool() as pool:
        normal = play(chat_format, eng, pool, to_play)
    stuck = next(i for i, t in enumerate(normal.trajectories) if t.num_turns > 2)
    with make_pool(6, stuck_seed=stuck) as pool:
        played = play(chat_format, eng, pool, to_play, episode_limit_s=8.0, straggler_s=0.01)
    assert not played.failures
    for index, (a, b) in enumerate(zip(normal.trajectories, played.trajectories, strict=True)):
        if index == stuck:
            assert b.stop_reason is StopReason.TIME_LIMIT and b.truncated and b.num_turns == 2
            np.testing.assert_array_equal(b.tokens, a.tokens[: b.num_tokens])
        else:
            np.testing.assert_array_equal(a.tokens, b.tokens)


def test_rules_that_make_no_sense_are_refused():
    for key, value in (
        ("max_turns", 0),
        ("max_refusals", 0),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_k", -1),
        ("min_p", 1.0),
        ("cut_turns", "drop"),
        ("context", "summary"),
        ("context_keep", 1.0),
        ("history_turns", -1),
        ("stop_strings", ("",)),
        ("episode_limit_s", 0.0),
    ):
        with pytest.raises(ValueError, match=f"rollout.{key}"):
            make_rules(**{key: value})
