"""The config.json of a Hugging Face model folder: what of it our decoder can be.

Two architectures are: `LlamaForCausalLM` (no biases) and `Qwen2ForCausalLM` (biases on the query,
key and value projections). A setting that would change the numbers and that the decoder does not
implement is an error naming its key, never ignored.
"""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from jaxagentrl.models import decoder

FILE = "config.json"
_MAX_LISTED = 12

# What shapes the model: our name and theirs.
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
}
_READ = {*_SIZES.values(), "num_key_value_heads", "head_dim", "rope_theta", "rope_parameters",
         "rope_scaling", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
         "model_type", "layer_types", "attention_bias"}

# Settings with one value that our decoder computes. Absent means that value.
_REQUIRED = {
    "hidden_act": ("silu",),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, None),
    "logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "quantization_config": (None,),
    "num_local_experts": (None,),
}

# Settings that do not change the logits of a forward pass: about training, storage or generation.
# `sliding_window` and `max_window_layers` act only with use_sliding_window, which is checked;
# pretraining_tp splits the same products.
_NEUTRAL = {
    "architectures", "auto_map", "attention_dropout", "bos_token_id", "chunk_size_feed_forward",
    "dtype", "embd_pdrop", "eos_token_id", "id2label", "initializer_range", "is_decoder",
    "is_llama_config", "label2id", "max_window_layers", "output_attentions",
    "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop",
    "return_dict", "sliding_window", "task_specific_params", "tokenizer_class", "torch_dtype",
    "torchscript", "transformers.js_config", "transformers_version", "unsloth_fixed",
    "unsloth_version", "use_cache", "_name_or_path", "_attn_implementation_autoset",
    "_commit_hash",
}


class PretrainedError(ValueError):
    """A model folder cannot be read or written; the message names the file and the way out."""


def read_config(directory: str | os.PathLike) -> decoder.DecoderConfig:
    """The decoder that a folder's config.json describes.

    Raises:
        PretrainedError: see `load`.
    """
    path = pathlib.Path(directory) / FILE
    settings = read_object(path)
    problems = _unsupported_settings(settings)
    missing = [key for key in (*_SIZES.values(), "rms_norm_eps") if settings.get(key) is None]
    problems += [f"{key} is missing" for key in missing]
    if problems:
        raise PretrainedError(
            f"{path}: {listed(problems)}. jaxagentrl reads Llama and Qwen2 models with full "
            "attention and plain rotary positions; use a model of that kind."
        )
    heads = settings["num_attention_heads"]
    # transformers derives the head size when the key is absent or null (Qwen2 never writes it).
    head_dim = settings.get("head_dim") or settings["hidden_size"] // heads
    return decoder.DecoderConfig(
        **{ours: settings[theirs] for ours, theirs in _SIZES.items()},
        num_kv_heads=settings.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope_theta=float(_rope_theta(settings)),
        norm_eps=float(settings["rms_norm_eps"]),
        tie_embeddings=bool(settings.get("tie_word_embeddings", False)),
        attention_bias=settings["model_type"] == "qwen2",
        max_position_embeddings=settings.get("max_position_embeddings") or 2048,
    )


def to_json(config: decoder.DecoderConfig, dtype: str) -> dict[str, Any]:
    """The settings of a config.json, with both spellings of rope, for old and new transformers."""
    settings = {
        "architectures": ["Qwen2ForCausalLM" if config.attention_bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if config.attention_bias else "llama",
        **{theirs: getattr(config, ours) for ours, theirs in _SIZES.items()},
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
    }
    if config.attention_bias:
        settings["use_sliding_window"] = False
    else:
        settings |= {"attention_bias": False, "mlp_bias": False}
    return settings


def _unsupported_settings(settings: Mapping[str, Any]) -> list[str]:
    problems = []
    if settings.get("model_type") not in ("llama", "qwen2"):
        kind = settings.get("model_type")
        problems.append(f"model_type is {kind!r}, expected 'llama' or 'qwen2'")
    elif settings["model_type"] == "llama" and settings.get("attention_bias"):
        problems.append("attention_bias is true, which in a Llama puts biases on the output too")
    for key, allowed in _REQUIRED.items():
        if key in settings and settings[key] not in allowed:
            problems.append(f"{key} is {settings[key]!r}, expected {allowed[0]!r}")
    layer_types = settings.get("layer_types") or []
    if any(kind != "full_attention" for kind in layer_types):
        problems.append(f"layer_types are {sorted(set(layer_types))}, expected ['full_attention']")
    for key in ("rope_scaling", "rope_parameters"):
        problems += _unsupported_rope(key, settings.get(key) or {})
    unknown = sorted(set(settings) - _READ - set(_REQUIRED) - _NEUTRAL)
    # A switch that is off changes nothing, whatever it is called.
    problems += [
        f"{key} is {settings[key]!r}, a setting not known here"
        for key in unknown if settings[key] not in (None, False)
    ]
    return problems


def _unsupported_rope(key: str, rope: Mapping[str, Any]) -> list[str]:
    """Anything but the default rotation; `type` is the older spelling of `rope_type`."""
    problems = []
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        problems.append(f"{key}.rope_type is {kind!r}, expected 'default'")
    for name, value in rope.items():
        if name == "partial_rotary_factor" and value in (1, None):
            continue
        if name not in ("rope_type", "type", "rope_theta"):
            problems.append(f"{key}.{name} is {value!r}, a setting not known here")
    return problems


def _rope_theta(settings: Mapping[str, Any]) -> float:
    """transformers 5 writes rope_parameters.rope_theta, older ones rope_theta."""
    rope = settings.get("rope_parameters") or {}
    return rope.get("rope_theta") or settings.get("rope_theta") or 10_000.0


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder, or PretrainedError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PretrainedError(
            f"{path} does not exist. Give the folder of a Hugging Face model, with {FILE} and "
            "safetensors files in it."
        ) from error
    except (OSError, ValueError) as error:
        raise PretrainedError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(content, dict):
        raise PretrainedError(f"{path} holds {type(content).__name__}, expected an object.")
    return content


def write_object(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def listed(problems: list[str]) -> str:
    rest = len(problems) - _MAX_LISTED
    return "; ".join(problems[:_MAX_LISTED]) + (f"; and {rest} more" if rest > 0 else "")
