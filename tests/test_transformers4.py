"""What we export, read by transformers 4, which vLLM and others are still built on.

Skipped unless TRANSFORMERS4_PYTHON names a Python that has it (torch only for the logits):

    python3 -m venv /tmp/tf4 && /tmp/tf4/bin/pip install 'transformers>=4.51,<5' jinja2
    TRANSFORMERS4_PYTHON=/tmp/tf4/bin/python pytest tests/test_transformers4.py
"""

import json
import os
import subprocess

import numpy as np
import pytest
from published_configs import PUBLISHED
from test_tokenizer_files import NAMES, TURNS, make, said

from jaxagentrl.models import pretrained, pretrained_config, tokenizer_files

pytest.importorskip("torch")

import their_models  # noqa: E402  (after the check that torch is there)

pytestmark = pytest.mark.skipif(
    "TRANSFORMERS4_PYTHON" not in os.environ, reason="names a Python that has transformers 4")


def in_transformers_4(code, given):
    """What a program prints as JSON; `given` and transformers are there for it."""
    opening = """
import json, sys, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
given = json.loads(sys.stdin.read())
"""
    done = subprocess.run(
        [os.environ["TRANSFORMERS4_PYTHON"], "-c", opening + code], input=json.dumps(given), text=True,
        capture_output=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", NAMES)
def test_tokenizers_say_the_same(name, tmp_path):
    words = make(name, tmp_path / "first")
    (tmp_path / "out").mkdir()
    tokenizer_files.write(tmp_path / "out", words)
    expected = said(words)
    for template in ("in both files", "in the config alone"):   # the latter before 4.52
        found = in_transformers_4("""
words = transformers.AutoTokenizer.from_pretrained(given["folder"])
print(json.dumps({
    "ids": [words.encode(x, add_special_tokens=False) for x in given["texts"]],
    "whole": [words.encode(x) for x in given["texts"]],
    "size": len(words),
    "rendered": words.apply_chat_template(
        given["turns"], tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"),
    "end": words.eos_token_id,
    "padding": words.pad_token_id,
    "keys": list(words("x")),
}))
""", expected | {"folder": str(tmp_path / "out"), "turns": TURNS})
        assert found.pop("keys") == ["input_ids", "attention_mask"]
        assert found == {key: value for key, value in expected.items() if key != "texts"}, template
        (tmp_path / "out" / "chat_template.jinja").unlink(missing_ok=True)


# What may differ between a publisher's config and ours: names, storage, and what is not read there.
_ASIDE = {
    "_name_or_path", "architectures", "bos_token_id", "cache_implementation", "dtype", "eos_token_id",
    "hidden_act", "initializer_range", "is_llama_config", "pad_token_id", "rope_interleaved",
    "rope_parameters", "torch_dtype", "transformers.js_config", "transformers_version",
    "_sliding_window_pattern", "sliding_window_pattern", "sliding_window_size", "pretraining_tp",
    "max_window_layers",   # of a window that is off
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_configs_say_the_same(name, tmp_path):
    """Ours, written after reading the published one, beside the published one itself."""
    settings, _ = PUBLISHED[name]
    for folder in ("theirs", "ours"):
        (tmp_path / folder).mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(settings))
    config = pretrained_config.read_config(tmp_path / "theirs")
    (tmp_path / "ours" / "config.json").write_text(
        json.dumps(pretrained_config.to_json(config, "bfloat16")))
    theirs, ours = in_transformers_4("""
def read(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    return text.to_dict() | {"head_dim": getattr(text, "head_dim", None)}
print(json.dumps([read(folder) for folder in given]))
""", [str(tmp_path / "theirs"), str(tmp_path / "ours")])
    theirs["head_dim"] = theirs["head_dim"] or theirs["hidden_size"] // theirs["num_attention_heads"]
    differing = {
        key: (theirs.get(key), ours.get(key))
        for key in sorted({*theirs, *ours} - _ASIDE) if theirs.get(key) != ours.get(key)
    }
    assert not differing


@pytest.mark.parametrize("case", their_models.CASES)
def test_models_say_the_same(case, tmp_path):
    """Only where that Python has torch too."""
    tokens = np.random.default_rng(0).integers(1, 97, (2, 24)).tolist()
    model = their_models.make(case)
    model.save_pretrained(tmp_path / "theirs")
    pretrained.save(tmp_path / "ours", *pretrained.load(tmp_path / "theirs"))
    found = in_transformers_4("""
import importlib.util
if importlib.util.find_spec("torch") is None:
    print("null")
else:
    import torch
    model = transformers.AutoModelForCausalLM.from_pretrained(
        given["folder"], attn_implementation="eager").eval()
    with torch.no_grad():
        print(json.dumps(model(torch.tensor(given["tokens"])).logits.tolist()))
""", {"folder": str(tmp_path / "ours"), "tokens": tokens})
    if found is None:
        pytest.skip("that Python has no torch")
    np.testing.assert_allclose(found, their_models.logits(model, np.array(tokens)), atol=1e-5, rtol=0)
