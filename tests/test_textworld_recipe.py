"""The TextWorld config of the seed paper end to end: real games, random weights of a tiny shape."""

import pathlib
import runpy

import jax
import pytest

from jaxagentrl import metrics, tokenizer, train
from jaxagentrl.models import decoder, pretrained
from jaxagentrl.models.decoder import DecoderConfig

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "textworld_qwen2_5_1_5b.py"
WORDS = "current state: You are in the kitchen. You can see a box. open take go west your action:"


@pytest.mark.slow
def test_the_practitioners_recipe(tmp_path, smoke_games):
    """No imitation; PPO on packed rows, with a critic and an optimizer of its own, and KL to the model
    it began from."""
    words = tokenizer.train([WORDS] * 4, vocab_size=400, directory=tmp_path / "tokenizer")
    shape = DecoderConfig(
        vocab_size=len(words), hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1,
        head_dim=8, intermediate_size=32, attention_bias=True, rope_theta=1e6)
    model = decoder.init(shape, jax.random.key(0))
    pretrained.save(tmp_path / "model", shape, model, tokenizer=words)
    config = runpy.run_path(str(CONFIG))["get_config"]().to_dict()
    config["env"] |= dict(cache_dir=str(smoke_games), num_workers=1)
    config["pool"] |= dict(num_workers=1)
    config["splits"] = dict(demo=(40_001, 2), train=(50_001, 4), test=(1, 2))
    config["model"]["directory"] = config["tokenizer"]["directory"] = str(tmp_path / "model")
    config["sampling"] |= dict(num_slots=4, max_length=1536, max_turn_tokens=8, filled_buckets=(1536,),
                               width_buckets=(512,), row_divisors=(1,), cache_dtype="float32")
    config["rollout"] |= dict(max_turns=4, cut_turns="send")  # random weights end no turn
    config["learner"] |= dict(length_buckets=(1536,), tokens_per_part=6144, compute_dtype="float32")
    config["mesh"] = dict(data=1, fsdp=1, tensor=1)
    config["rl"] |= dict(num_iterations=2, tasks_per_iteration=4, eval_every=2, save_every=2)
    config["compilation_cache_dir"] = None
    train.run(config, str(tmp_path / "run"))
    lines = metrics.read(tmp_path / "run" / "metrics.jsonl")
    assert [line["phase"] for line in lines] == ["baseline", "rl", "rl"]
    assert lines[0]["walkthrough/successes"] == lines[-1]["eval/episodes"] == 2
    assert "loss/value" in lines[-1] and lines[-1]["policy/sampler_gap_max"] <= 1e-4
