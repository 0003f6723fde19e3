"""Exported tokenizers: the same words for transformers 4 and 5, whatever wrote the original."""

import json
import shutil

import jax
import pytest
import their_tokenizers

from jaxagentrl import chat, tokenizer
from jaxagentrl.models import decoder, pretrained, tokenizer_files

TEXTS = ("take Z-key from box44 123", "It's  a room54.\nThere is  an exit\n\n\nto the 12345 north", " x",
         "Ünïcödé ☃ <|im_end|>")
TURNS = [{"role": "user", "content": "There is a closed Z-box here."},
         {"role": "assistant", "content": "open Z-box"}, {"role": "user", "content": "It is open."}]
# The classes that the publishers name.
CLASSES = {"qwen2.5": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "gemma2": "GemmaTokenizer",
           "gemma3": "GemmaTokenizer", "mistral_v1": "LlamaTokenizer", "mistral_v3": "LlamaTokenizer",
           "llama3": "PreTrainedTokenizerFast"}
NAMES = ("ours", *CLASSES)


def make(name, folder):
    """A tokenizer as one has it after loading what was published, or after training it here."""
    if name == "ours":
        return tokenizer.train(their_tokenizers.TEXTS, vocab_size=400, directory=folder)
    their_tokenizers.make(name, folder)
    path = folder / tokenizer_files.CONFIG
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"tokenizer_class": CLASSES[name]}))
    return tokenizer.load(folder)


def said(words):
    """What is to be the same everywhere."""
    return {
        "texts": TEXTS,
        "ids": [words.encode(text, add_special_tokens=False) for text in TEXTS],
        "whole": [words.encode(text) for text in TEXTS],
        "size": len(words),
        "rendered": words.apply_chat_template(
            TURNS, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024"),
        "end": words.eos_token_id,
        "padding": words.pad_token_id,
    }


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_one_release_is_left(name, tmp_path):
    words = make(name, tmp_path / "first")
    (tmp_path / "out").mkdir()
    tokenizer_files.write(tmp_path / "out", words)
    settings = json.loads((tmp_path / "out" / tokenizer_files.CONFIG).read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in settings and "local_files_only" not in settings
    assert settings["chat_template"] == words.chat_template
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == words.chat_template
    assert settings.get("additional_special_tokens", []) == list(words.extra_special_tokens)
    again = tokenizer.load(tmp_path / "out")
    assert said(again) == said(words)
    assert list(again("x")) == ["input_ids", "attention_mask"]
    assert chat.make(again).first_prompt("Hello.").tolist() == (
        chat.make(words).first_prompt("Hello.").tolist())


def test_several_templates_are_kept_and_replaced(tmp_path):
    words = make("ours", tmp_path / "first")
    words.chat_template = {"default": words.chat_template, "tool_use": "{{ messages }}"}
    config = decoder.DecoderConfig(
        vocab_size=len(words), hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
        intermediate_size=16)
    params = decoder.init(config, jax.random.key(0))
    for _ in range(2):
        pretrained.save(tmp_path / "model", config, params, tokenizer=words)
    assert tokenizer.load(tmp_path / "model").chat_template == words.chat_template
    (tmp_path / "model" / "chat_template.jinja").unlink()   # readers before 4.52 do not look for them
    shutil.rmtree(tmp_path / "model" / "additional_chat_templates")
    assert tokenizer.load(tmp_path / "model").chat_template == words.chat_template
