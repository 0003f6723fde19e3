"""What a run stands on: the chat format that the config asks for, a tokenizer that fits the model."""

import jax
import jax.numpy as jnp
import pytest

from jaxagentrl import plan, prepare, progress, tokenizer
from jaxagentrl.models import decoder, pretrained


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    texts = ["open the box", "take the key"]
    return tokenizer.train(texts * 9, vocab_size=300, directory=tmp_path_factory.mktemp("tokens"))


def test_the_configs_system_message_and_template_variables_reach_the_prompt(trained):
    plain = prepare.make_chat(trained, {"system": None, "template_options": {}})
    told = prepare.make_chat(
        trained, {"system": "Be brief.", "template_options": {"enable_thinking": False}}
    )
    assert "Be brief." not in plain.decode(plain.first_prompt("Look."))
    opening = told.decode(told.first_prompt("Look."))
    assert opening.index("Be brief.") < opening.index("Look.")
    assert told.template_options["enable_thinking"] is False


def test_a_models_folder_gives_its_vocabulary_its_stop_ids_and_its_longest_text(
    trained, tmp_path, monkeypatch
):
    shape = dict(
        hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8, intermediate_size=8
    )
    made = prepare.make_chat(trained, {"system": None, "template_options": {}})
    key, size, other = jax.random.key(0), len(trained), 7
    config = decoder.DecoderConfig(vocab_size=size, max_position_embeddings=64, **shape)
    folder = tmp_path / "model"
    pretrained.save(folder, config, decoder.init(config, key), tokenizer=trained, stop_ids=(other,))
    loaded, _ = prepare._model({"directory": str(folder)}, made, key, None, dtype="float32")
    assert loaded.vocab_size == size
    assert prepare._stop_ids(str(folder), made) == (made.end_of_turn_id, other)
    assert prepare._stop_ids(None, made) == (made.end_of_turn_id,)
    told = []
    monkeypatch.setattr(progress, "notice", told.append)
    prepare._note_long_texts(64, loaded)
    assert told == []
    prepare._note_long_texts(65, loaded)
    assert "sampling.max_length is 65" in told[0]

    small = decoder.DecoderConfig(vocab_size=size - 1, **shape)
    pretrained.save(tmp_path / "small", small, decoder.init(small, key))
    with pytest.raises(ValueError, match=f"knows the ids below {size - 1}"):
        prepare._model({"directory": str(tmp_path / "small")}, made, key, None, dtype="float32")


@pytest.mark.parametrize("rank, dtype", [(2, "bfloat16"), (0, "bfloat16"), (2, "float32")])
def test_a_frozen_base_lies_in_the_dtype_of_the_computation(trained, tmp_path, rank, dtype):
    """What is trained, adapters or the model, is float32; and so the plan counts them."""
    made = prepare.make_chat(trained, {"system": None, "template_options": {}})
    shape = dict(num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8)
    config = decoder.DecoderConfig(
        vocab_size=len(trained), hidden_size=16, intermediate_size=24, **shape
    )
    key = jax.random.key(0)
    pretrained.save(tmp_path / "model", config, decoder.init(config, key), dtype="bfloat16")
    settings = {
        "seed": 0,
        "learner": {"compute_dtype": dtype},
        "lora": {"rank": rank, "alpha": 4.0, "targets": ("attention/(q|v)", "mlp/.*")},
    }
    in_memory = prepare._dtype_in_memory(settings)
    directory = {"directory": str(tmp_path / "model")}
    _, policy = prepare._model(directory, made, key, None, dtype=in_memory)
    trainable, frozen = prepare._with_lora(policy, settings)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    size = decoder.num_params(policy)
    held = plan.per_device(trainable) + plan.per_device(frozen)
    if rank == 0:
        assert frozen is None and held == 4 * size
        return
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen["policy"])} == {jnp.dtype(dtype)}
    adapters = 4 * sum(leaf.size for leaf in jax.tree.leaves(trainable["adapters"]))
    assert held == jnp.dtype(dtype).itemsize * size + adapters + 4  # the scale
