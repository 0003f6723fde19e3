"""Episodes of several contexts: each is learned from as it was sampled, and nothing sees another."""

import pathlib
import runpy

import jax
import numpy as np
import pytest

from envs_host.types import StopReason, Task
from jaxagentrl import batching, imitate, learner, plan, reinforce, settings
from jaxagentrl.models import decoder
from jaxagentrl.models.decoder import DecoderConfig
from jaxagentrl.packing import Rows
from jaxagentrl.trajectory import Trajectory, Turn

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = DecoderConfig(
    vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8,
    intermediate_size=32)
SHAPES = dict(
    length_buckets=(24, 64), tokens_per_part=48, row_multiple=1, packing=False, most_rows=3)


def episode(rng, sizes, fresh):
    """Turns of (prompt, action) sizes with random ids."""
    turns = []
    for (prompt, action), opens in zip(sizes, fresh, strict=True):
        ids = [rng.integers(1, 40, size).astype(np.int32) for size in (prompt, action)]
        zeros = np.zeros(action, np.float32)
        turns.append(Turn(*ids, zeros, zeros, observation="o", action="a", command="a", reward=0.0,
                          intermediate_reward=0.0, valid_command=True, score=0.0, fresh=opens))
    task = Task("alfworld", "t", {}, 0, "f", "0" * 64, "", 1.0, ())
    return Trajectory(task=task, group=0, member=0, turns=turns, stop_reason=StopReason.TURN_LIMIT,
                      won=False, score=0.0, max_score=1.0)


@pytest.fixture(scope="module")
def played():
    rng = np.random.default_rng(0)
    return [
        episode(rng, [(6, 3), (9, 2), (7, 4)], [False, True, True]),  # each turn by itself
        episode(rng, [(5, 2), (4, 3), (8, 2)], [False, False, True]),  # one slide
        episode(rng, [(5, 2)], [False]),
    ]


def alone(params, piece):
    """Log-probs of one text, entry t of token t."""
    logits = decoder.logits(MODEL, params, piece[None])[0]
    every = jax.nn.log_softmax(logits, axis=-1)
    return np.array([every[t - 1, piece[t]] for t in range(1, len(piece))])


def test_scores_are_those_of_each_text_alone(played):
    params = {"policy": decoder.init(MODEL, jax.random.key(0))}
    batch = batching.to_batch(
        played, None, discount=1.0, length_buckets=(64,), row_multiple=1)
    lengths = np.array([trajectory.num_tokens for trajectory in played])
    contexts = imitate.contexts_of(played)
    assert [len(pieces) for pieces in contexts] == [3, 2, 1]
    work = imitate.split(
        np.arange(3, dtype=np.int32), lengths, shape=batch.tokens.shape, contexts=contexts, **SHAPES)
    # Packed as widely as the longest text needs, not as the longest episode.
    assert [stack.shape[-1] for stack in work] == [24]
    scores = learner.make_score(MODEL, temperature=1.0)(params, batch.tokens, batch.valid_mask, work)
    for row, trajectory in enumerate(played):
        for start, size in trajectory.contexts:
            piece = trajectory.tokens[start:start + size]
            np.testing.assert_allclose(
                scores.logprobs[row, start + 1:start + size], alone(params["policy"], piece),
                atol=1e-5)
            assert scores.logprobs[row, start] == 0.0  # Nothing predicts a text's first token.


def test_every_place_is_taken_once(played):
    lengths = np.array([trajectory.num_tokens for trajectory in played])
    (packed,) = imitate.split(
        np.array([0, 2], np.int32), lengths, shape=(3, 64), contexts=imitate.contexts_of(played),
        **SHAPES)
    taken = np.sort(packed.places[packed.segment_ids >= 0])
    expected = [row * 64 + column for row in (0, 2) for column in range(lengths[row])]
    np.testing.assert_array_equal(taken, expected)


def test_one_text_each_needs_no_packing(played):
    assert imitate.contexts_of(played[2:]) is None
    work = imitate.split(np.zeros(1, np.int32), np.array([7]), shape=(1, 64), **SHAPES)
    assert all(isinstance(stack, Rows) for stack in work)


def test_what_a_step_takes_was_planned_also_where_no_context_opened_anew(played):
    shapes = {key: SHAPES[key] for key in ("length_buckets", "tokens_per_part", "row_multiple", "packing")}
    config = {"rollout": {"context": "window"}, "learner": shapes | {"tree_length": 0}}
    planned = {stack.shape for work in plan.largest_works(3, longest_context=24, **shapes) for stack in work}
    for episodes in (played, played[2:] * 3):
        work = reinforce._splitter(np.zeros((3, 64), np.int32), episodes, config, None)(np.arange(3))
        assert {stack.shape for stack in work} == planned == {(2, 24)}


def test_a_config_whose_rows_are_too_short_is_refused():
    load = runpy.run_path(str(ROOT / "configs" / "textworld_quickstart.py"))["get_config"]
    config = load().to_dict()
    config["rollout"] |= {"context": "last_turns", "max_turns": 10}
    config["sampling"] |= {"max_length": 100, "filled_buckets": (100,)}
    config["learner"]["length_buckets"] = (100, 999)
    with pytest.raises(ValueError, match="= 1000 tokens: add a bucket"):
        settings.check(config)
    config["learner"]["length_buckets"] = (100, 1000)
    settings.check(config)
