"""What a run stands on: the chat format that the config asks for, a tokenizer that fits the model."""

import jax
import pytest

from jaxagentrl import prepare, progress, tokenizer
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
    loaded, _ = prepare._model({"directory": str(folder)}, made, key, None)
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
        prepare._model({"directory": str(tmp_path / "small")}, made, key, None)
