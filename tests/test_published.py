"""A published model, if one is at hand: what random weights cannot show.

Skipped unless PUBLISHED_MODEL names its Hugging Face folder (docs/models.md says how SmolLM2 was had
without a hub):

    PUBLISHED_MODEL=SmolLM2-135M-Instruct pytest tests/test_published.py
"""

import os

import jax
import numpy as np
import pytest

from jaxagentrl import chat, tokenizer
from jaxagentrl.models import decoder, pretrained

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.skipif(
    "PUBLISHED_MODEL" not in os.environ, reason="names the folder of a published model")

CONVERSATION = [
    "You are in a kitchen. There is an old key on the table and a closed door to the east. What do you do?",
    "You take the key. The door is still closed.",
    "The door opens. To the east is a garden. Describe it in two sentences.",
]
LENGTH = 384


@pytest.fixture(scope="module")
def folder():
    return os.environ["PUBLISHED_MODEL"]


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def ours(folder):
    config, params = pretrained.load(folder)
    return config, params, jax.jit(lambda tokens: decoder.logits(config, params, tokens))


@pytest.fixture(scope="module")
def spoken(folder, theirs):
    """Ids of a conversation whose answers the model gave, greedily; and where the last one begins."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    said, begins = [], 0
    for text in CONVERSATION:
        said.append({"role": "user", "content": text})
        ids = words.apply_chat_template(
            said, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        begins = ids.shape[1]
        whole = theirs.generate(ids, max_new_tokens=48, do_sample=False)[0].tolist()
        said.append(
            {"role": "assistant", "content": words.decode(whole[begins:], skip_special_tokens=True)})
    assert begins < len(whole) <= LENGTH
    return whole, begins


def padded(ids):
    tokens = np.zeros((1, LENGTH), np.int32)
    tokens[0, : len(ids)] = ids
    return tokens


def test_log_probs_of_what_it_said(theirs, ours, spoken):
    """Of every token of the vocabulary at every position, against float64; theirs in float32 is told, too."""
    ids, _ = spoken
    *_, score = ours
    mine = np.asarray(jax.nn.log_softmax(score(padded(ids))[0, : len(ids)]))
    with torch.no_grad():
        single = theirs(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
        double = theirs.double()(torch.tensor([ids])).logits[0].log_softmax(-1).numpy()
        theirs.float()
    likely = double > -12.0
    assert likely.any(axis=1).all()
    errors = [np.abs(x - double)[likely] for x in (mine, single)]
    assert errors[0].max() < 1e-4, (errors[0].max(), errors[1].max())


def test_it_says_the_same(ours, spoken):
    ids, begins = spoken
    *_, score = ours
    said = list(ids[:begins])
    while len(said) < len(ids):
        said.append(int(np.argmax(score(padded(said))[0, len(said) - 1])))
    assert said == ids


def test_prompts_and_turns(folder):
    words = tokenizer.load(folder)
    made = chat.make(words)
    expected = words.apply_chat_template(
        [{"role": "user", "content": CONVERSATION[0]}], add_generation_prompt=True, tokenize=True,
        return_dict=True)["input_ids"]
    assert list(made.first_prompt(CONVERSATION[0])) == expected


def test_weights_come_back_bit_for_bit(folder, theirs, ours, tmp_path):
    config, params, _ = ours
    pretrained.save(tmp_path / "out", config, params, tokenizer=tokenizer.load(folder))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    there = again.state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(there[name], value), name
    mine, published = (
        transformers.AutoTokenizer.from_pretrained(where) for where in (tmp_path / "out", folder))
    for text in CONVERSATION:
        assert mine(text).input_ids == published(text).input_ids
