"""tools/fork_run.py: what may be changed. That a forked run goes on is in test_train.py."""

import importlib
import pathlib

import pytest
from test_settings import changed

from jaxagentrl import workdir

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def fork_run():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "tools")
        yield importlib.import_module("fork_run")


def test_what_a_checkpoint_fits_may_be_changed_and_nothing_else(fork_run):
    keys = fork_run.may_differ(changed("textworld_quickstart.py"))

    def may(key):
        return any(workdir.is_under(key, prefix) for prefix in keys)

    for key in ("rl.optimizer.learning_rate", "rl.num_iterations", "rl.kl.coefficient", "rl.group_size",
                "reward.intermediate_scale", "rollout.temperature", "eval.attempts", "sampling.num_slots", "mesh.data"):
        assert may(key), key
    for key in ("seed", "rl.critic", "rl.curriculum.order", "rl.kl.placement", "rl.optimizer.moment_dtype",
                "splits", "env.name", "model.hidden_size", "sft.num_steps", "prompt.style", "tokenizer.vocab_size", "namings"):
        assert not may(key), key


def test_how_far_a_run_has_come(fork_run, monkeypatch):
    steps = {"runs/a/checkpoints/sft": 40, "runs/b/checkpoints/sft": 40, "runs/b/checkpoints/rl": 8}
    monkeypatch.setattr(fork_run.checkpoints, "latest_step", lambda folder: steps.get(str(folder)))
    assert [fork_run.stands(f"runs/{name}") for name in "abc"] == ["imitation step 40", "RL iteration 8", "the start"]
