"""What a run stands on: the chat format that the config asks for, a tokenizer that fits the model."""

import jax
import pytest

from jaxagentrl import prepare, tokenizer
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


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path):
    config = decoder.DecoderConfig(
        vocab_size=64, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
        intermediate_size=8,
    )
    pretrained.save(tmp_path, config, decoder.init(config, jax.random.key(0)))
    options = {"directory": str(tmp_path)}
    assert prepare._model(options, 64, jax.random.key(0), None)[0].vocab_size == 64
    with pytest.raises(ValueError, match="the tokenizer has 65 ids, but the model .* knows 64"):
        prepare._model(options, 65, jax.random.key(0), None)
