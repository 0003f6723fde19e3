"""A tokenizer's files so that transformers 4 and 5 read them, and what is built on either (vLLM).

transformers 5 writes names that 4 does not know: its own class, the further special tokens under
another key, the template in a file that is read from 4.52 on.
"""

import json
import os
import pathlib
from typing import Any

CONFIG = "tokenizer_config.json"

# Reads tokenizer.json as it stands, in both. The class of a family would build parts of it anew.
CLASS = "PreTrainedTokenizerFast"

# What only says how this process read its own copy.
_OURS = ("is_local", "local_files_only", "backend")


def write(directory: str | os.PathLike, tokenizer: Any) -> None:
    """Saves a fast transformers tokenizer into a folder that exists."""
    tokenizer.save_pretrained(directory)
    path = pathlib.Path(directory) / CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if key not in _OURS}
    settings["tokenizer_class"] = CLASS
    # Else transformers 4 adds token types, which no decoder takes.
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    further = settings.get("extra_special_tokens")
    if isinstance(further, list):
        del settings["extra_special_tokens"]
        settings["additional_special_tokens"] = further
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template is not None:
        settings["chat_template"] = template
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
